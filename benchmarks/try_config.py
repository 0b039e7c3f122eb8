"""What one configuration of the Triton scans is worth: whether it is right, then how long it takes.

What is unusual: a configuration can crash, and an illegal memory access ends a process's use of its GPU. So this is a process
that is asked job by job and may die of one; who asks (tune_kernels.py) starts another.
Source: the limits are those of tests/kernels/test_triton_gpu.py, test_triton_gpu_delta.py and test_triton_gpu_dplr.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from kernel_host import gpu_milliseconds
from torch import Tensor

from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable

LIMITS = {"dx": 1e-2, "dgain": 1e-2, "doffset": 1e-2, "dbeta": 1e-2}  # relative norms for bf16 inputs; all others:
LIMIT = 6e-3
CHECKED = (2, 333, 16)  # B, T, H: several chunks and a last one that is cut; kernels are compiled as for the timed shape
FORMULAS = ("mild", "wild", "softplus")
WARM, REPEATS = 3, 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """A configuration as JSON, to be checked or timed over (B, T, H)."""

    granularity: str
    key_dim: int
    value_dim: int
    config: dict[str, Any]
    timed: bool = False
    shape: tuple[int, int, int] = CHECKED


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came out: `problem` says why the configuration cannot be taken, `fatal` that the process has to be another now."""

    problem: str | None = None
    fatal: bool = False
    error: float = 0.0  # the largest, as a share of its limit
    seconds: float = 0.0  # of compiling and checking
    milliseconds: float = 0.0  # forward and backward
    forward_ms: float = 0.0
    peak_mib: float = 0.0


def serve(connection: Any) -> None:
    """Answers jobs with findings until the other end is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(tried(job))


def tried(job: Job) -> Finding:
    """Checks or times one configuration."""
    from kernels.decay_scan_triton import architecture_of
    from kernels.tuned import Row, on_trial

    place = {"architecture": architecture_of(_device()), "granularity": job.granularity}
    unknown = {"milliseconds": 0.0, "shape": [], "gpu": "", "versions": "", "date": ""}
    on_trial(Row(**place, key_dim=job.key_dim, value_dim=job.value_dim, config=job.config, **unknown))  # type: ignore[arg-type]
    try:
        return timed(job) if job.timed else checked(job)
    except Exception as error:  # whatever a kernel, its compiler or the driver does is a finding
        text = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        return Finding(problem=text, fatal="OutOfResources" not in text)


def checked(job: Job) -> Finding:
    """Outputs and gradients against the definition in float64, and equal bits of two runs."""
    started, worst = time.perf_counter(), 0.0
    for formula in FORMULAS:
        tensors, do = inputs(job, formula)
        with torch.no_grad():
            # Another kernel, which saves nothing: compiled here, not while others wait for the GPU.
            _scan(tensors, formula, job.granularity)
        found, again = (outcome(tensors, do, formula, job.granularity) for _ in range(2))
        if not all(torch.equal(a, b) for a, b in zip(found.values(), again.values(), strict=True)):
            return Finding(problem=f"{formula}: two runs differ")
        x = tensors[_names(job.granularity).index("dx")]
        for name, wanted in expected(job.granularity, job.key_dim, job.value_dim, formula).items():
            share = _error(found[name], wanted, x, formula, name) / LIMITS.get(name, LIMIT)
            worst = max(worst, share)
            if not share <= 1:
                return Finding(problem=f"{formula}: {name} is off by {share:.3g} times its limit", error=share)
    return Finding(error=worst, seconds=time.perf_counter() - started)


def timed(job: Job) -> Finding:
    """Median milliseconds of the forward pass and of both, with a cold L2 cache, and the peak memory."""
    tensors, do = inputs(job, "mild")
    first, again = (outcome(tensors, do, "mild", job.granularity) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first.values(), again.values(), strict=True)):
        return Finding(problem="two runs of the timed shape differ")
    del first, again
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outcome(tensors, do, "mild", job.granularity)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    both = _median(lambda: outcome(tensors, do, "mild", job.granularity))
    with torch.no_grad():
        forward = _median(lambda: _scan(tensors, "mild", job.granularity))
    return Finding(milliseconds=both, forward_ms=forward, peak_mib=peak)


def inputs(job: Job, formula: str) -> tuple[list[Tensor], Tensor]:
    """([q, k, v, x, gain, offset], do), in the delta rule with β after v, in general with a and b there: the same for every
    configuration."""
    tensors, do = _decay_inputs(job, formula)
    if _delta(job.granularity):
        generator = torch.Generator(_device()).manual_seed(1)
        tensors[1] = torch.nn.functional.normalize(tensors[1].float(), dim=-1).bfloat16()
        if _general(job.granularity):  # a = −η ⊙ b with η from 0 to 1 per channel: nothing grows
            noise = (torch.randn(tensors[1].shape, generator=generator, device=_device()) for _ in range(2))
            b, share = torch.nn.functional.normalize(next(noise), dim=-1), next(noise).sigmoid()
            tensors[3:3] = [(-share * b).bfloat16(), b.bfloat16()]
        else:
            tensors.insert(3, 2 * torch.randn(job.shape, generator=generator, device=_device()).sigmoid())
    return tensors, do


def _decay_inputs(job: Job, formula: str) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator(_device()).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=_device())

    q, k, v, do = (normal(*job.shape, n).bfloat16() for n in (job.key_dim, job.key_dim, job.value_dim, job.value_dim))
    vector = job.granularity.endswith("vector") or _general(job.granularity)
    width = (job.key_dim,) if vector else ()
    x = normal(*job.shape, *width)
    if formula == "softplus":  # rates up to 16, as Mamba2 starts
        gain, offset = normal(job.shape[2], *width).abs() * 6, normal(job.shape[2], *width) - 3
        return [q, k, v, x.bfloat16(), gain, offset], do
    x = torch.nn.functional.logsigmoid(x + 3)
    if formula == "wild":
        x = torch.where(normal(*x.shape) < -1.3, -torch.inf, 60 * x)
    # As activations are; one number per head is little and stays wide.
    return [q, k, v, x.bfloat16() if vector else x], do


def outcome(
    tensors: list[Tensor], do: Tensor, formula: str, granularity: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """o and every gradient by the Triton scan, or, in float64, by plain torch."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    o = _scan(leaves, formula, granularity)
    return {"o": o.detach(), **dict(zip(_names(granularity), torch.autograd.grad(o, leaves, do.to(o.dtype)), strict=False))}


def _delta(granularity: str) -> bool:
    return granularity.startswith("delta")


def _general(granularity: str) -> bool:
    return granularity == "delta_general"


def _names(granularity: str) -> tuple[str, ...]:
    own = ("da", "db") if _general(granularity) else ("dbeta",) if _delta(granularity) else ()
    return ("dq", "dk", "dv", *own, "dx", "dgain", "doffset")


def _scan(tensors: list[Tensor], formula: str, granularity: str) -> Tensor:
    from kernels.decay_scan_chunked import decay_scan_chunked
    from kernels.decay_scan_triton import decay_scan_triton
    from kernels.decay_source import DecaySource
    from kernels.delta_scan_chunked import delta_scan_chunked
    from kernels.delta_scan_triton import delta_scan_triton
    from kernels.dplr_scan_chunked import dplr_scan_chunked
    from kernels.dplr_scan_triton import dplr_scan_triton

    q, k, v, *others = tensors
    own = [others.pop(0) for _ in range(2 if _general(granularity) else 1 if _delta(granularity) else 0)]
    x, *parameters = others
    source = DecaySource(x=x)
    if formula == "softplus":
        source = DecaySource(x=x, kind="softplus", gain=parameters[0], offset=parameters[1])
    plain = q.dtype == torch.float64
    if _general(granularity):
        return (dplr_scan_chunked if plain else dplr_scan_triton)(q, k, v, *own, source)[0]
    if _delta(granularity):  # written as the paper's runs do
        return (delta_scan_chunked if plain else delta_scan_triton)(q, k, v, *own, source, granularity == "delta_scalar")[0]
    return (decay_scan_chunked if plain else decay_scan_triton)(q, k, v, source)[0]


@cache
def expected(granularity: str, key_dim: int, value_dim: int, formula: str) -> dict[str, Tensor]:
    """The definition's outcome in float64: once for all configurations of a class and its dims."""
    job = Job(granularity=granularity, key_dim=key_dim, value_dim=value_dim, config={})
    return outcome(*inputs(job, formula), formula, granularity, torch.float64)


def _error(found: Tensor, wanted: Tensor, x: Tensor, formula: str, name: str) -> float:
    """Relative norm of the difference; NaN where anything is. The gradient at λ = 0 is not looked at."""
    found, wanted = found.double(), wanted.nan_to_num()
    if name == "dx" and formula != "softplus":
        found, wanted = found[x > -100], wanted[x > -100]
    return float((found - wanted).norm() / wanted.norm())


def _median(step: Any) -> float:
    """Milliseconds on the GPU, with a cold L2 cache; how fast the host is has no part in it."""
    for _ in range(WARM):
        step()
    return gpu_milliseconds(step, REPEATS)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
