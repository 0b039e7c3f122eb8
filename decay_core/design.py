"""A design point is one choice on every axis of the study, and it says itself whether it makes sense.

What is unusual: an invalid point is never repaired. It is refused with the reason and with the valid point that keeps
most of what was asked for, found by looking at every point of the same decay.
Source: the axes are those of the paper (arXiv 2509.05282); `form` tells the paper's text from the authors'
public code where they differ.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from decay_core import decays, positions

Form = Literal["as_published", "as_run"]
FORMS: tuple[Form, ...] = ("as_published", "as_run")
GRANULARITIES = ("vector", "scalar")
SUGGESTED_P = 0.99  # a start with long memory that the paper runs for simple decay (Table 8)

# What it costs to give up what was asked for, when looking for the nearest valid point: the position encoding last.
_COST = {"p": 0.5, "granularity": 1.0, "form": 1.5, "share": 2.0, "position": 3.0}


class Refusal(ValueError):
    """A design point that makes no sense: `reason` says why, `nearest` names a valid point close to it, if any."""

    def __init__(self, reason: str, nearest: str | None = None) -> None:
        super().__init__(reason, nearest)
        self.reason = reason
        self.nearest = nearest

    def __str__(self) -> str:
        return f"{self.reason}; nearest valid point: {self.nearest}" if self.nearest else self.reason


class Misspelt(Refusal):
    """A word that no axis knows, or a `p` that is missing, superfluous or out of range: an error, not a finding."""


@dataclass(frozen=True, kw_only=True, order=True)
class DesignPoint:
    """One choice of decay, its starting value `p` where it takes one, granularity, key sharing, position and form."""

    decay: str
    p: float | None = None
    granularity: str = "vector"
    share: bool = False
    position: str = "none"
    form: Form = "as_published"

    def check(self) -> None:
        """Raises Refusal, with the reason and the nearest valid point, unless the point can be built.

        The Refusal is a Misspelt where the point is not well written, whatever the other axes say.
        """
        for word, known, what in (
            (self.decay, decays.names(), "decay"),
            (self.position, positions.names(), "position"),
            (self.granularity, GRANULARITIES, "granularity"),
            (self.form, FORMS, "form"),
        ):
            _check_known(word, tuple(known), what)
        wrong_p = self._wrong_p()
        reason = wrong_p or self._reason()
        if reason is not None:
            nearest = self._nearest()
            raise (Misspelt if wrong_p else Refusal)(reason, nearest.name if nearest else None)

    @property
    def name(self) -> str:
        """A file-system safe name; the default choices (as_published, no position, not shared) are not spelled."""
        words = [self.decay if self.p is None else f"{self.decay}_p{self.p!r}", self.granularity]
        words += ["share"] if self.share else []
        words += [self.position] if self.position != DesignPoint.position else []
        words += [self.form] if self.form != DesignPoint.form else []
        return "-".join(words)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DesignPoint:
        """Reads what `to_dict` wrote; raises ValueError on an unknown key or a missing decay."""
        known = {field.name for field in fields(cls)}
        if extra := sorted(set(values) - known):
            raise ValueError(f"design point: unknown key {extra[0]!r}; known keys: {', '.join(sorted(known))}")
        if "decay" not in values:
            raise ValueError("design point: the key 'decay' is missing")
        return cls(**values)

    def _wrong_p(self) -> str | None:
        """What is wrong with `p`, whatever the other axes; None when it is right."""
        decay = decays.get(self.decay)
        if decay.takes_p and self.p is None:
            return f"{self.decay} needs its starting value p"
        if not decay.takes_p and self.p is not None:
            return f"{self.decay} takes no p (given {self.p:g})"
        if self.p is not None and not 0 < self.p < 1:
            return f"p must lie strictly between 0 and 1, given {self.p:g}"
        return None

    def _reason(self) -> str | None:
        """Why a well-written point is refused; None when it is valid."""
        decay = decays.get(self.decay)
        if self.granularity not in decay.granularities:
            return f"{self.decay} has no {self.granularity} form, only {' and '.join(decay.granularities)}"
        if self.share and self.granularity != "vector":
            return "a shared key k = 1 - decay has one entry per channel, so sharing needs vector decay"
        if self.share and (why := decay.sharing_refusal(self.form)) is not None:
            return f"{self.decay} cannot share its parameters with the key in form {self.form}: {why}"
        return positions.get(self.position).refusal(self)

    def _nearest(self) -> DesignPoint | None:
        valid = [point for point in self._relatives() if point._reason() is None]
        return min(valid, key=self._distance, default=None)

    def _relatives(self) -> Iterator[DesignPoint]:
        takes_p = decays.get(self.decay).takes_p
        usable = self.p is not None and 0 < self.p < 1
        p = (self.p if usable else SUGGESTED_P) if takes_p else None
        axes = itertools.product(GRANULARITIES, (False, True), positions.names(), FORMS)
        for granularity, share, position, form in axes:
            yield replace(self, p=p, granularity=granularity, share=share, position=position, form=form)

    def _distance(self, other: DesignPoint) -> float:
        return sum(cost for axis, cost in _COST.items() if getattr(self, axis) != getattr(other, axis))


def _check_known(word: str, known: tuple[str, ...], what: str) -> None:
    if word in known:
        return
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise Misspelt(f"unknown {what} {word!r}{guess}; known: {', '.join(known)}")
