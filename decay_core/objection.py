"""Why a design point cannot be built, in words and of one of four kinds, so that refusals can be counted.

`mathematical`: it would not mean what its words say. `scope`: neither the paper nor its public code has it. `kernel`: the
arithmetic we have cannot carry it. `size`: it does not go with this size of model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["mathematical", "scope", "kernel", "size"]
KINDS: tuple[Kind, ...] = ("mathematical", "scope", "kernel", "size")


@dataclass(frozen=True)
class Objection:
    """One reason; `text` is a line that ends without a stop."""

    kind: Kind
    text: str
