"""Launching a Triton kernel without asking at every launch what it is to be compiled for.

What is surprising:
- Triton's own launch looks at each of some fifty arguments and at the kernel's globals, and takes longer than many of our
  kernels run. What it finds depends on nothing but the arguments that are no tensors, the tensors' dtypes and whether they are
  aligned to 16 bytes, so the compiled kernel is remembered under those and launched as it is, with tensors' addresses.
  Triton's interpreter compiles nothing and remembers nothing.
- Inside of `collecting` nothing is launched: what would be is listed, and compile_ahead.py compiles all of it side by side.
Source: a compiled kernel is called with all arguments in the order of its signature, as in Triton's tutorial on fused softmax.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST = 4096  # launches of one kernel remembered: a new length of the text is a new one
ALIGNMENT = 16  # bytes
NARROWEST = 64  # columns of a tile: ptxas 12.8 and 13.0 miscompile many products of 32-wide tiles (triton#10486)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Planned(NamedTuple):
    """A launch that was not made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class _Place:
    """The launches of a kernel from where it is given its arguments in one order."""

    kernel: Any  # kept, so that its id is nobody else's
    pointers: tuple[str, ...]
    numbers: Callable[[dict[str, Any]], tuple[Any, ...]]
    slots: tuple[int, ...]  # of the pointers in the signature
    compiled: dict[tuple[Any, ...], tuple[Callable[..., Any], list[Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, kernel: Any, arguments: dict[str, Any]) -> _Place:
        """A tensor may stand where None is, and nowhere else."""
        names = list(kernel.arg_names)
        pointers = tuple(name for name, value in arguments.items() if value is None or isinstance(value, Tensor))
        others = [name for name in arguments if name not in pointers]
        numbers = itemgetter(*others) if len(others) > 1 else lambda given: tuple(given[name] for name in others)
        return cls(kernel, pointers, numbers, tuple(names.index(name) for name in pointers))


_places: dict[tuple[Any, ...], _Place] = {}
_planned: ContextVar[list[Planned] | None] = ContextVar("planned launches", default=None)


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any) -> Callable[..., Any] | None:
    """Launches kernel[grid](**arguments, **options) on the current device. arguments: all that the kernel takes, by name.

    Returns what launches the same with other tensors, given as addresses in the order of the signature, if that is remembered.
    """
    planned = _planned.get()
    if planned is not None:
        planned.append(Planned(kernel, grid, arguments, options))
        return None
    where = id(kernel), *arguments, *options
    place = _places.get(where)
    if place is None:
        place = _places.setdefault(where, _Place.of(kernel, arguments))
    tensors = [arguments[name] for name in place.pointers]
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    dtypes = [None if x is None else x.dtype for x in tensors]
    key = (device, grid, *place.numbers(arguments), *options.values(), *dtypes)
    known = place.compiled.get(key)
    bits = 0
    for address in addresses:
        bits |= address or 0
    if bits % ALIGNMENT:
        kernel[grid](**arguments, **options)
        return None
    if known is not None:
        run, given = known
        given = given.copy()
        for slot, address in zip(place.slots, addresses, strict=True):
            given[slot] = address
        run(*given)
        return run
    compiled = finished(kernel[grid](**arguments, **options))
    if compiled is None:
        return None
    if len(place.compiled) >= MOST:
        place.compiled.clear()
    run = compiled[(*grid, 1, 1)[:3]]
    place.compiled[key] = run, [None if name in place.pointers else arguments[name] for name in kernel.arg_names]
    return run


def finished(compiled: Any) -> Any:
    """A compiled kernel, waited for where another thread compiles it; None where that has failed, or there is none."""
    return compiled.result(ignore_errors=True) if hasattr(compiled, "result") else compiled


@contextmanager
def collecting() -> Iterator[list[Planned]]:
    """Launches inside are listed and not made."""
    planned: list[Planned] = []
    token = _planned.set(planned)
    try:
        yield planned
    finally:
        _planned.reset(token)


def cdiv(count: int, size: int) -> int:
    """How many pieces of `size` hold `count`; triton.cdiv is the same, for a kernel's arguments, and many times slower."""
    return -(-count // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is no smaller, as triton.next_power_of_2 has it."""
    return 1 << max(number - 1, 0).bit_length()


def padded(dim: int) -> int:
    """Columns of the tiles that hold `dim` columns."""
    return max(NARROWEST, next_power_of_2(dim))


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Of batch, time and head, as name_b, name_t and name_h; an axis of one has none, so that no kernel is compiled for it."""
    names = axes(name)
    if x is None:
        return dict.fromkeys(names, 0)
    return {axis: 0 if size == 1 else step for axis, size, step in zip(names, x.shape, x.stride(), strict=False)}


@cache
def axes(name: str) -> tuple[str, str, str]:
    """What a kernel calls a tensor's strides."""
    return f"{name}_b", f"{name}_t", f"{name}_h"


def at_most(registers: int | None) -> dict[str, int]:
    """The option that limits a kernel's registers per thread; none for None."""
    return {} if registers is None else {"maxnreg": registers}


def widened(x: Tensor | None) -> Tensor | None:
    """A state or a parameter as kernels read it: fp32, contiguous."""
    return None if x is None else x.float().contiguous()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's device the current one, where it is not."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
