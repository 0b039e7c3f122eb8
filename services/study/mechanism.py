"""Which code a design point computes with, as digests: what tells two results apart that the same design gave.

What is unusual: the files follow from the classes that the point is built of: where they, their parents and whatever their
modules took from others stand. A new decay is covered without being named here. Kernels are taken all together, because
which of them runs is decided by device and shape.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from functools import cache
from pathlib import Path

from decay_core import decay, decays, kernel_seam, layers, mixer, model, position, positions, transition, transitions
from decay_core.design import DesignPoint

COMMON = (model, mixer, decay, position, transition, layers, kernel_seam)
KERNELS = Path(kernel_seam.__file__).resolve().parents[1] / "kernels"


def mechanism_code(point: DesignPoint) -> dict[str, str]:
    """{path below the repository: SHA-256} of every file that this point's forward pass is made of."""
    chosen: list[type] = [decays.get(point.decay), positions.get(point.position), transitions.get(point.transition)]
    chosen += [own for own in [transitions.get(point.transition).mixer] if own is not None]
    names = {module.__name__ for module in COMMON}
    for one in chosen:
        names |= _reached(one.__module__)
    files = {f"{name.replace('.', '/')}.py": str(sys.modules[name].__file__) for name in names}
    files |= {f"kernels/{path.name}": str(path) for path in KERNELS.glob("*.py")}
    return {name: _digest(files[name]) for name in sorted(files)}


@cache
def _reached(start: str) -> frozenset[str]:
    """The modules of decay_core that the module `start` and those it took classes or functions from stand on."""
    found, waiting = {start}, [start]
    while waiting:
        values = vars(sys.modules[waiting.pop()]).values()
        taken = (value.__module__ for value in values if inspect.isclass(value) or inspect.isfunction(value))
        new = {name for name in taken if name.startswith("decay_core.")} - found
        found |= new
        waiting += new
    return frozenset(found)


@cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
