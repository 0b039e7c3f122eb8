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
from contextvars import copy_context
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.launching import INTERPRETED, Planned, collecting, finished

THREADS = 8
_one_at_a_time = Lock()


def compile_ahead(call: Callable[[], Any]) -> None:
    """Compiles what a call on meta tensors would launch, for the current device; as much of it as can be."""
    if INTERPRETED:
        return
    with collecting() as planned, suppress(NotImplementedError, RuntimeError):  # of an operation that meta does not have
        call()
    if len(planned) > 1:
        # Triton leaves its mode set where it is interrupted: in a context of its own that does not outlive this call.
        with _one_at_a_time, suppress(Exception):
            copy_context().run(_compile, planned)


def _compile(planned: list[Planned]) -> None:
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def load(kernel: Any) -> None:
        compiled = finished(kernel)
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
