"""Launching a Triton kernel without asking at every launch what it is to be compiled for.

What is surprising: Triton's own launch looks at each of some fifty arguments and at the kernel's globals, and takes longer than
many of our kernels run. What it finds depends on nothing but the arguments that are no tensors, the tensors' dtypes and
whether they are aligned to 16 bytes, so the compiled kernel is remembered under those and launched as it is. Triton's
interpreter compiles nothing and remembers nothing.
Source: a compiled kernel is called with all arguments in the order of its signature, as in Triton's tutorial on fused softmax.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MOST = 4096  # launches remembered: a new length of the text is a new one
ALIGNMENT = 16  # bytes
NARROWEST = 64  # columns of a tile: ptxas 12.8 and 13.0 miscompile many products of 32-wide tiles (triton#10486)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_compiled: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any) -> None:
    """Launches kernel[grid](**arguments, **options) on the current device. arguments: all that the kernel takes, by name."""
    key = [id(kernel), *grid, *options.values(), *arguments]
    pointers = 0
    for value in arguments.values():
        if isinstance(value, Tensor):
            pointers |= value.data_ptr()
            value = value.dtype
        key.append(value)
    if pointers % ALIGNMENT:
        kernel[grid](**arguments, **options)
        return
    place = (torch.cuda.current_device() if torch.cuda.is_initialized() else None, *key)
    known = _compiled.get(place)
    if known is not None:
        compiled, names = known
        compiled[(*grid, 1, 1)[:3]](*[arguments[name] for name in names])
        return
    compiled = kernel[grid](**arguments, **options)
    if compiled is not None:
        if len(_compiled) >= MOST:
            _compiled.clear()
        _compiled[place] = compiled, list(kernel.arg_names)


def cdiv(count: int, size: int) -> int:
    """How many pieces of `size` hold `count`; triton.cdiv is the same, for a kernel's arguments, and many times slower."""
    return -(-count // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is no smaller, as triton.next_power_of_2 has it."""
    return 1 << max(number - 1, 0).bit_length()


def padded(dim: int) -> int:
    """Columns of the tiles that hold `dim` columns."""
    return max(NARROWEST, next_power_of_2(dim))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's device the current one, where it is not."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
