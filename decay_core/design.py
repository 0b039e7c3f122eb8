"""A design point is one choice on every axis of the study, and it says itself whether it makes sense.

What is unusual: an invalid point is never repaired. It is refused with the reason and with the valid point that keeps
most of what was asked for, found by looking at every point of the same decay.
Source: the axes are those of the paper (arXiv 2509.05282); `form` tells the paper's text from the authors'
public code where they differ.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from decay_core import decays, positions, transitions
from decay_core.objection import Kind, Objection

Form = Literal["as_published", "as_run"]
FORMS: tuple[Form, ...] = ("as_published", "as_run")
GRANULARITIES = ("vector", "paired", "scalar")
SUGGESTED_P = 0.99  # a start with long memory that the paper runs for simple decay (Table 8)

# What it costs to give up what was asked for, when looking for the nearest valid point: the position encoding last.
_COST = {
    "p": 0.5,
    "write": 0.5,
    "head_dim": 0.5,
    "granularity": 1.0,
    "form": 1.5,
    "share": 2.0,
    "position": 3.0,
    "transition": 4.0,
}


class Refusal(ValueError):
    """A design point that makes no sense: `reason` says why, `nearest` names a valid point close to it, if any."""

    def __init__(self, reason: str, nearest: str | None = None, kind: Kind = "mathematical") -> None:
        super().__init__(reason, nearest, kind)
        self.reason = reason
        self.nearest = nearest
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.reason}; nearest valid point: {self.nearest}" if self.nearest else self.reason


class Misspelt(Refusal):
    """A word that no axis knows, or a `p` that is missing, superfluous or out of range: an error, not a finding."""


@dataclass(frozen=True, kw_only=True, order=True)
class DesignPoint:
    """One choice of decay, its starting value `p` where it takes one, granularity, key sharing, position, transition and
    form.

    `write` is what the delta rule writes with and `head_dim` the width of a head; None takes the transition's own.
    """

    decay: str
    p: float | None = None
    granularity: str = "vector"
    share: bool = False
    position: str = "none"
    transition: str = "diagonal"
    write: str | None = None
    head_dim: int | None = None
    form: Form = "as_published"

    def check(self) -> None:
        """Raises Refusal, with the reason and the nearest valid point, unless the point can be built.

        The Refusal is a Misspelt where the point is not well written, whatever the other axes say.
        """
        for word, known, what in (
            (self.decay, decays.names(), "decay"),
            (self.position, positions.names(), "position"),
            (self.granularity, GRANULARITIES, "granularity"),
            (self.transition, transitions.names(), "transition"),
            (self.form, FORMS, "form"),
        ):
            _check_known(word, tuple(known), what)
        wrong = self._wrong_p() or self._wrong_head_dim()
        objection = Objection("mathematical", wrong) if wrong else self.objection()
        if objection is not None:
            nearest = nearest_valid(self)
            refusal = Misspelt if wrong else Refusal
            raise refusal(objection.text, nearest.name if nearest else None, objection.kind)

    @property
    def name(self) -> str:
        """A file-system safe name; the default choices (as_published, no position, not shared) are not spelled."""
        words = [self.decay if self.p is None else f"{self.decay}_p{self.p!r}", self.granularity]
        transition = [self.transition] if self.transition != DesignPoint.transition else []
        if not transitions.get(self.transition).reads_decay:
            words, transition = transition, []
        words += ["share"] if self.share else []
        words += [self.position] if self.position != DesignPoint.position else []
        words += transition
        words += [f"dh{self.head_dim}"] if self.head_dim is not None else []
        words += [self.write] if self.write is not None else []
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

    def _wrong_head_dim(self) -> str | None:
        if self.head_dim is not None and (isinstance(self.head_dim, bool) or self.head_dim < 1):
            return f"head_dim must be at least 1, given {self.head_dim}"
        return None

    def objection(self) -> Objection | None:
        """Why a well-written point is refused; None when it is valid for some size."""
        decay, transition = decays.get(self.decay), transitions.get(self.transition)
        if self.granularity not in decay.granularities:
            text = f"{self.decay} has no {self.granularity} form, only {' and '.join(decay.granularities)}"
            return Objection("mathematical", text)
        if self.share and self.granularity != "vector":
            return Objection(
                "mathematical", "a shared key k = 1 - decay has one entry per channel, so sharing needs vector decay"
            )
        if self.share and (why := decay.sharing_refusal(self.form)) is not None:
            text = f"{self.decay} cannot share its parameters with the key in form {self.form}: {why.text}"
            return Objection(why.kind, text)
        if self.write is not None and self.write not in transition.writes:
            return Objection("mathematical", self._wrong_write(transition.writes))
        return transition.refusal(self) or positions.get(self.position).refusal(self)

    def _wrong_write(self, known: tuple[str, ...]) -> str:
        if not known:
            return f"transition {self.transition} has no choice of write (given {self.write})"
        return f"transition {self.transition} knows no write {self.write!r}, only {' and '.join(known)}"

    def relatives(self) -> Iterator[DesignPoint]:
        """Every point of the same decay."""
        takes_p = decays.get(self.decay).takes_p
        usable = self.p is not None and 0 < self.p < 1
        p = (self.p if usable else SUGGESTED_P) if takes_p else None
        axes = itertools.product(
            dict.fromkeys((self.transition, DesignPoint.transition, *transitions.names())),
            GRANULARITIES,
            (False, True),
            positions.names(),
            FORMS,
            dict.fromkeys((self.write, None)),
            dict.fromkeys((self.head_dim, None)),
        )
        for transition, granularity, share, position, form, write, head_dim in axes:
            yield DesignPoint(
                decay=self.decay,
                p=p,
                granularity=granularity,
                share=share,
                position=position,
                transition=transition,
                write=write,
                head_dim=head_dim,
                form=form,
            )

    def distance(self, other: DesignPoint) -> float:
        """What it costs to have `other` in place of this point."""
        return sum(cost for axis, cost in _COST.items() if getattr(self, axis) != getattr(other, axis))


def nearest_valid(point: DesignPoint, fits: Callable[[DesignPoint], bool] = lambda _: True) -> DesignPoint | None:
    """The valid point of the same decay that keeps most of what was asked for and that `fits`; None when there is none."""
    for relative in sorted(point.relatives(), key=point.distance):
        if relative.head_dim is not None and relative.head_dim < 1:
            continue
        if relative.objection() is None and fits(relative):
            return relative
    return None


def _check_known(word: str, known: tuple[str, ...], what: str) -> None:
    if word in known:
        return
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise Misspelt(f"unknown {what} {word!r}{guess}; known: {', '.join(known)}")
