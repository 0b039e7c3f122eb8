"""Which of the paper's takeaways hold: each a predicate written as data, evaluated on the printed rows or on a study's results.

A claim compares points that differ in named axes only, at one size and in one form at a time. What is unusual: three answers.
A claim holds, fails, or is not testable because rows are missing, and those are named; a missing row decides nothing that the
others have decided already. Nothing here knows statistics: `closest` says by how little an answer was reached, and the printed
losses carry 0.01 to 0.02 nats of noise each.
Source: tune_spaces/paper/claims.yaml.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import yaml

from decay_core.design import DesignPoint
from decay_core.sizes import SIZES
from services.report.seed_spread import Configuration, over_layers, rank_by_size
from services.study.published import FOLDER, runs
from services.study.result import TrialResult

HOLDS, FAILS, NOT_TESTABLE = "holds", "fails", "not testable"
PRINTED = "as printed"
DIGITS = 9  # printed figures have three: their differences are rounded back to what a reader would compute
_BOUNDS: dict[str, Callable[[float, float], float]] = {  # how far inside the bound a value lies; negative is outside
    "above": lambda value, bound: value - bound,
    "below": lambda value, bound: bound - value,
    "within": lambda value, bound: bound - abs(value),
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One takeaway: `pairs` of points (the second None where the measure itself is bounded) and what is expected of each."""

    id: str
    section: str
    statement: str
    measure: str
    pairs: tuple[tuple[DesignPoint, DesignPoint | None], ...]
    expect: Mapping[str, float]
    quantifier: str
    beware: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a claim is asked: one size, in one form, with one variant of what a study varies beside the point."""

    size: str
    form: str
    variant: str = ""


Measured = Mapping[Place, Mapping[DesignPoint, Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pair: `value` is the measure or its difference, `room` how far inside the bounds; None where rows are missing."""

    name: str
    value: float | None = None
    room: float | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer of one claim at one place."""

    claim: Claim
    place: Place
    answer: str
    cases: tuple[Case, ...]

    @property
    def closest(self) -> float | None:
        """The least distance of any case's value from its bound: how easily noise turns the answer."""
        return min((abs(case.room) for case in self.cases if case.room is not None), default=None)

    @property
    def missing(self) -> tuple[str, ...]:
        """The points without this measure, each once."""
        return tuple(dict.fromkeys(name for case in self.cases for name in case.missing))


@functools.cache
def read_claims() -> tuple[Claim, ...]:
    """Every claim, in file order."""
    raw = yaml.safe_load((FOLDER / "claims.yaml").read_text(encoding="utf-8"))
    return tuple(_claim(**entry) for entry in raw)


def evaluate(measured: Measured, claims: Sequence[Claim] | None = None) -> list[Verdict]:
    """The verdict of every claim at every place, claims in file order."""
    asked = read_claims() if claims is None else claims
    return [_verdict(claim, place, found) for claim in asked for place, found in measured.items()]


def measured_in_paper() -> Measured:
    """The printed losses, by size. The paper prints no λ beside its figures."""
    found: dict[Place, dict[DesignPoint, Mapping[str, float]]] = {}
    for row in sorted(runs(), key=lambda row: list(SIZES).index(row.size)):
        values = {"loss": row.loss} if row.loss is not None else {}
        found.setdefault(Place(size=row.size, form=PRINTED), {})[row.point] = values
    return found


def measured_in(results: Sequence[TrialResult]) -> Measured:
    """Held-out loss and λ of a study's finished trials: means over the seeds."""
    found: dict[Place, dict[DesignPoint, Mapping[str, float]]] = {}
    for ranking in rank_by_size(results):
        for row in ranking.rows:
            point = DesignPoint.from_dict(dict(row.trials[0].point))
            place = Place(size=row.size, form=point.form, variant=_variant(row.trials[0]))
            found.setdefault(place, {})[replace(point, form="as_published")] = _measures(row)
    return found


def _variant(trial: TrialResult) -> str:
    return ", ".join(f"{key} {value}" for key, value in trial.varied.items())


def _measures(row: Configuration) -> dict[str, float]:
    trained, initial = over_layers(row.trained()), over_layers(row.initial())
    decay = {"median_lambda": trained} if trained is not None else {}
    drift = {"lambda_drift": trained - initial} if trained is not None and initial is not None else {}
    return {"loss": fmean(trial.held_out_loss for trial in row.trials), **decay, **drift}


def _claim(*, of: Any, against: Any = None, beware: Sequence[str], **rest: Any) -> Claim:
    left = list(_products(of))
    pairs: list[tuple[DesignPoint, DesignPoint | None]] = [
        (DesignPoint(**axes), None if change is None else DesignPoint(**{**axes, **change}))
        for axes in left
        for change in ([None] if against is None else _products(against))
    ]
    return Claim(pairs=tuple(pairs), beware=tuple(beware), **rest)


def _products(selection: Any) -> Iterator[dict[str, Any]]:
    """A selection, or each of a list of them, as one dict of axes per point."""
    for axes in selection if isinstance(selection, list) else [selection]:
        values = [value if isinstance(value, list) else [value] for value in axes.values()]
        for choice in itertools.product(*values):
            yield dict(zip(axes, choice, strict=True))


def _verdict(claim: Claim, place: Place, found: Mapping[DesignPoint, Mapping[str, float]]) -> Verdict:
    cases = tuple(_case(claim, pair, found) for pair in claim.pairs)
    return Verdict(claim=claim, place=place, answer=_answer(claim.quantifier, cases), cases=cases)


def _case(claim: Claim, pair: tuple[DesignPoint, DesignPoint | None], found: Mapping[DesignPoint, Mapping[str, float]]) -> Case:
    points = [point for point in pair if point is not None]
    name = " - ".join(point.name for point in points)
    values = [found.get(point, {}).get(claim.measure) for point in points]
    known = [value for value in values if value is not None]
    if len(known) < len(points):
        missing = (point.name for point, value in zip(points, values, strict=True) if value is None)
        return Case(name=name, missing=tuple(missing))
    value = round(known[0] - sum(known[1:]), DIGITS)
    room = min(round(_BOUNDS[how](value, bound), DIGITS) for how, bound in claim.expect.items())
    return Case(name=name, value=value, room=room)


def _answer(quantifier: str, cases: Sequence[Case]) -> str:
    """What the known cases decide, whatever the unknown ones would say."""
    true = sum(_inside(case) for case in cases)
    unknown = sum(case.room is None for case in cases)
    needed = {"all": len(cases), "any": 1, "majority": len(cases) // 2 + 1}[quantifier]
    if true >= needed:
        return HOLDS
    return FAILS if true + unknown < needed else NOT_TESTABLE


def _inside(case: Case) -> bool:
    return case.room is not None and case.room > 0
