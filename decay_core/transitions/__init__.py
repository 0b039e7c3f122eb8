"""The transitions, one file each; a file placed here can be chosen by every study.

The file's name is the transition's name. What a file defines is in decay_core/transition.py.
"""

from __future__ import annotations

import sys
from functools import cache

from decay_core.transition import Transition
from decay_core.variants import discover


@cache
def _registry() -> dict[str, type[Transition]]:
    return discover(sys.modules[__name__], Transition)


def names() -> tuple[str, ...]:
    """The known transitions, sorted."""
    return tuple(_registry())


def get(name: str) -> type[Transition]:
    """The class of the transition called `name`; KeyError when there is none."""
    return _registry()[name]
