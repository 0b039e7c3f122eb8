"""Finds the variants of an axis: every file of a folder that defines one class of a given kind.

What is unusual: there is no list of variants anywhere. The file's name is the variant's name, so adding one is adding a
file, and a folder that holds a file without exactly one such class is an error at import.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import TypeVar

Kind = TypeVar("Kind")


def discover(package: ModuleType, kind: type[Kind]) -> dict[str, type[Kind]]:
    """Returns {file stem: class} over the modules of `package`, sorted by name.

    Raises TypeError when a module does not define exactly one subclass of `kind`.
    """
    found = {}
    for stem in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        module = importlib.import_module(f"{package.__name__}.{stem}")
        own = [c for c in vars(module).values() if _defined_here(c, kind, module)]
        if len(own) != 1:
            raise TypeError(f"{module.__name__} must define exactly one {kind.__name__}, it defines {len(own)}")
        found[stem] = own[0]
    return found


def _defined_here(candidate: object, kind: type, module: ModuleType) -> bool:
    return inspect.isclass(candidate) and issubclass(candidate, kind) and candidate.__module__ == module.__name__
