"""`decay diff A B`: what differs between two studies or two trials, from the design to the bits of the weights.

Only differences are printed. Trials of two studies are paired by name, so that a point trained by another recipe is one row.
What is unusual: code is compared too, by the digests that a result carries of every file its forward pass was made of. Speed
is printed and is no difference, since no two runs are equally fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.study.compare import CODE, WIDTH, Side, read_side
from services.study.file import StudyError
from services.study.result import TrialResult

HEADINGS = ("study", "design", "recipe", "model", "data", "resources", CODE)
ABSENT = "(not there)"
DIGEST_CHARACTERS = 12
RESULT_COLUMNS = ("trial", "loss A", "loss B", "B less A", "parameters A", "parameters B", "tokens/s A", "tokens/s B", "order",
                  "weights", "code")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that is not the same on both sides: its heading and name, and both values as text."""

    heading: str
    name: str
    a: str
    b: str


def diff(a: str, b: str, console: Console) -> bool:
    """Prints what differs between the studies or trials that `a` and `b` name; returns whether anything does.

    Raises StudyError when one names nothing, or when one is a study and the other a trial.
    """
    left, right = read_side(a), read_side(b)
    if left.kind != right.kind:
        raise StudyError(f"{a} is a {left.kind} and {b} a {right.kind}; compare two studies or two trials")
    found, results = list(differences(left, right)), list(result_rows(left, right))
    for heading in dict.fromkeys(one.heading for one in found):
        console.print(_table(heading, [one for one in found if one.heading == heading]))
    if results:
        console.print(_result_table(results))
    for line in _notes(left, right) if found or results else ["no difference"]:
        console.print(escape(line), soft_wrap=True)
    return bool(found or results)


def differences(left: Side, right: Side) -> Iterator[Difference]:
    """Every difference but those of results, heading by heading."""
    for heading in HEADINGS:
        one, other = left.parts.get(heading, {}), right.parts.get(heading, {})
        if heading == CODE and not (one and other):
            continue
        for name in dict.fromkeys([*one, *other]):
            a, b = one.get(name, ABSENT), other.get(name, ABSENT)
            # a study file has not read its text, and today's code may not plan an old trial
            if a != b and not (name in ("digest", WIDTH) and ABSENT in (a, b)):
                yield Difference(heading=heading, name=name, a=_text(heading, name, a), b=_text(heading, name, b))


def result_rows(left: Side, right: Side) -> Iterator[tuple[str, ...]]:
    """One row of RESULT_COLUMNS for every trial whose results differ in more than speed, or that only one side has."""
    for name in dict.fromkeys([*left.results, *right.results]):
        one, other = left.results.get(name), right.results.get(name)
        same = [_same(one, other, what) for what in ("order_hash", "weights_sha256", "mechanism")]
        losses = [None if result is None else result.held_out_loss for result in (one, other)]
        counts = [None if result is None else result.parameters for result in (one, other)]
        if losses[0] != losses[1] or counts[0] != counts[1] or "differ" in same:
            speeds = [_number(None if result is None else result.tokens_per_second, ",.0f") for result in (one, other)]
            less = None if None in losses else losses[1] - losses[0]  # type: ignore[operator]
            yield (name or "both", *(_number(loss, ".4f") for loss in losses), _number(less, "+.4f"),
                   *(_number(count, ",") for count in counts), *speeds, *same)  # fmt: skip


def _same(one: TrialResult | None, other: TrialResult | None, what: str) -> str:
    a, b = getattr(one, what, None), getattr(other, what, None)
    if not (a and b):
        return "unknown"
    return "same" if a == b else "differ"


def _notes(left: Side, right: Side) -> Iterator[str]:
    shared = len(set(left.trials.values()) & set(right.trials.values()))
    if left.kind == "study":
        yield f"A has {len(left.trials)} trials, B {len(right.trials)}; {shared} are the same trial by their id."
    for side, name in ((left, "A"), (right, "B")):
        results = list(side.results.values())
        if results and not all(result.mechanism for result in results):
            yield f"{name} does not say with which code it was trained: an earlier release wrote its results."


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _text(heading: str, name: str, value: Any) -> str:
    if isinstance(value, str) and value != ABSENT and (name == "digest" or heading == CODE):
        return value[:DIGEST_CHARACTERS]
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and name != "seed" else str(value)


def _table(heading: str, found: list[Difference]) -> Table:
    table = Table(title=escape(heading), title_justify="left")
    for column in ("", "A", "B"):
        table.add_column(column, overflow="fold")
    for one in found:
        table.add_row(escape(one.name), escape(one.a), escape(one.b))
    return table


def _result_table(rows: list[tuple[str, ...]]) -> Table:
    table = Table(title="results", title_justify="left")
    for column in RESULT_COLUMNS:
        table.add_column(column, justify="left" if column in ("trial", "order", "weights", "code") else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
