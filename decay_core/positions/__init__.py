"""The position encodings, one file each; a file placed here can be chosen by every study.

The file's name is the encoding's name. What a file defines is in decay_core/position.py.
"""

from __future__ import annotations

import sys
from functools import cache

from decay_core.position import Position
from decay_core.variants import discover


@cache
def _registry() -> dict[str, type[Position]]:
    return discover(sys.modules[__name__], Position)


def names() -> tuple[str, ...]:
    """The known position encodings, sorted."""
    return tuple(_registry())


def get(name: str) -> type[Position]:
    """The class of the position encoding called `name`; KeyError when there is none."""
    return _registry()[name]
