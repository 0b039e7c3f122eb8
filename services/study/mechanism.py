"""Which code a design point computes with, as digests: what tells two results apart that the same design gave.

What is unusual: the files follow from the classes that the point is built of, parents included, so a new decay is covered
without being named here. Kernels are taken all together, because which of them runs is decided by device and shape.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
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
    found = {f"{module.__name__.replace('.', '/')}.py": inspect.getfile(module) for module in COMMON}
    for module_name, file in _modules(chosen):
        found[f"{module_name.replace('.', '/')}.py"] = file
    found |= {f"kernels/{path.name}": str(path) for path in KERNELS.glob("*.py")}
    return {name: _digest(found[name]) for name in sorted(found)}


def _modules(classes: Iterable[type]) -> Iterable[tuple[str, str]]:
    """The modules of decay_core that the classes and their parents stand in, with their files."""
    for parent in {parent for one in classes for parent in inspect.getmro(one)}:
        if parent.__module__.startswith("decay_core."):
            yield parent.__module__, inspect.getfile(parent)


@cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
