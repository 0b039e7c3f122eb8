"""Kernels of a first call are compiled side by side, one thread for each, instead of one after the other as they are launched.

What is surprising: the launchers themselves say which kernels there are. They are called once with tensors on the meta device,
which hold nothing, while their launches are listed (launching.py). Where a guess is wrong, such as how a gradient that is yet
to come lies in memory, its kernel is compiled at its launch as ever; what fails to compile fails there again and says why.
Threads also load what they have compiled: Triton 3.6 has a C compiler make a launcher for every signature when it does that.
Source: triton.AsyncCompileMode.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.launching import INTERPRETED, Planned, collecting

THREADS = 8


def compile_ahead(call: Callable[[], Any]) -> None:
    """Compiles what a call on meta tensors would launch, for the current device."""
    if INTERPRETED:
        return
    with collecting() as planned, suppress(NotImplementedError):  # of an operation that has no meta version
        call()
    if len(planned) > 1:
        _compile(planned)


def _compile(planned: list[Planned]) -> None:
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def load(kernel: Any) -> None:
        compiled = kernel.result(ignore_errors=True) if isinstance(kernel, triton.FutureKernel) else kernel
        if compiled is not None:
            with nullcontext() if device is None else torch.cuda.device(device):
                _ = compiled.run

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1, len(planned))) as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            kernels = []
            for kernel, grid, arguments, options in planned:
                given = (arguments[name] for name in kernel.arg_names)
                kernels.append(kernel.warmup(*(x.dtype if isinstance(x, Tensor) else x for x in given), grid=grid, **options))
        for loading in [pool.submit(load, kernel) for kernel in kernels]:
            loading.exception()
