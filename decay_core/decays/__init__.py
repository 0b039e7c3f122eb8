"""The decay mechanisms, one file each; a file placed here is a decay that every study can use.

The file's name is the decay's name. What a file defines is in decay_core/decay.py.
"""

from __future__ import annotations

import sys
from functools import cache

from decay_core.decay import Decay
from decay_core.variants import discover


@cache
def _registry() -> dict[str, type[Decay]]:
    return discover(sys.modules[__name__], Decay)


def names() -> tuple[str, ...]:
    """The known decays, sorted."""
    return tuple(_registry())


def get(name: str) -> type[Decay]:
    """The class of the decay called `name`; KeyError when there is none."""
    return _registry()[name]
