"""What the kernel benchmark is measured on, and its clock.

What is surprising: a time is the median over many calls, the GPU's cache cleared before each, for every contestant alike. There
are two: as one caller sees it, whose GPU waits wherever the host is slower, and on the GPU alone, which is given other work
until the host has queued the whole call, as in a training step, where the host runs ahead.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

ZEROING_MS = 0.05  # 2**28 bytes at 5 TB/s, which no GPU of today has


def milliseconds(call: Callable[[], Any], cuda: bool, reps_ms: float) -> float:
    """The median of calls for about `reps_ms`; on a CPU of three."""
    if cuda:
        testing = importlib.import_module("triton.testing")
        return float(testing.do_bench(call, warmup=0.2 * reps_ms, rep=reps_ms, return_mode="median"))
    call()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return sorted(times)[1]


def gpu_milliseconds(call: Callable[[], Any], reps: int = 15) -> float:
    """The median of calls that the host has queued before the GPU comes to them."""
    waiting = torch.empty(2**28, dtype=torch.int8, device="cuda")  # more than any cache of a GPU holds

    def timed(rounds: int) -> tuple[float, float]:
        """Milliseconds on the GPU and on the host."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(rounds):
            waiting.zero_()
        started = time.perf_counter()
        start.record()
        call()
        end.record()
        queued = 1e3 * (time.perf_counter() - started)
        torch.cuda.synchronize()
        return start.elapsed_time(end), queued

    call()
    host = sorted(timed(1)[1] for _ in range(3))[1]
    rounds = min(10 + int(host / ZEROING_MS * 1.5), 400)
    return sorted(timed(rounds)[0] for _ in range(reps))[reps // 2]


def facts(cuda: bool) -> dict[str, Any]:
    """Host, versions, and what a copy and a product of matrices reach; `gpu` is None where one was asked for and none is."""
    if cuda and not torch.cuda.is_available():
        return {"gpu": None}
    found: dict[str, Any] = {"cpus": os.cpu_count(), "platform": platform.platform(), "versions": _versions()}
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    found["gpu"] = torch.cuda.get_device_name() if cuda else "no GPU, times mean nothing"
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu_memory_gib": round(properties.total_memory / 2**30), "multiprocessors": properties.multi_processor_count}
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["ptxas"] = ptxas()
    device, size, width = ("cuda", 2**29, 8192) if cuda else ("cpu", 2**20, 128)
    one = torch.ones(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    found["copy_tb_s"] = round(2 * size / milliseconds(lambda: other.copy_(one), cuda, 60) / 1e9, 3)
    a = torch.randn(width, width, device=device).to(torch.bfloat16)
    found["matmul_tflop_s"] = round(2 * width**3 / milliseconds(lambda: a @ a, cuda, 60) / 1e9, 1)
    return found


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "fla-core", "einops", "mamba-ssm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["commit"] = _output("git", "describe", "--always", "--dirty", "--exclude=*")
    return found


def _output(*command: str) -> str | None:
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip().splitlines()[0] if said.returncode == 0 and said.stdout.strip() else None


def ptxas() -> str:
    """Which assembler is used: the one that ours chooses, for rivals too."""
    importlib.import_module("decay_core.kernel_seam")
    return str(importlib.import_module("kernels.triton_toolchain").choose_ptxas())
