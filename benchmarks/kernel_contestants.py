"""Who is compared: our decay scan as the model calls it, flash-linear-attention's, softmax attention, and Mamba-2's.

A contestant makes a problem from the same inputs for all: its own leaves, one call, and the same mathematics in fp64, against
which output and gradients are held.

What is surprising:
- FLA and SDPA scale by 1/√K, ours does not: each is compared with a definition that has its own scale.
- The delta rule's are in kernel_delta_contestants.py.
Source: signatures as in fla-core 0.6.0, mamba-ssm 2.2 and torch 2.11.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_delta_contestants import DELTA, delta_problem
from benchmarks.kernel_problem import Contestant, Inputs, NotHere, Problem, fla, fla_unguarded, leaves_of, seam
from benchmarks.kernel_shapes import DELTA_CLASSES, SOFTMAX, Shape


def inputs(
    shape: Shape, vector: bool, dtype: torch.dtype, device: str, decay: str = "mild", seed: int = 0, kind: str = ""
) -> Inputs:
    """Random tensors as a model has them. decay: one of DECAYS. kind: one of CLASSES, by default as `vector` says."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    rows, token = (shape.batch, shape.tokens, shape.heads), (shape.heads, *((shape.key_dim,) if vector else ()))
    q, k = (normal(*rows, shape.key_dim).to(dtype) for _ in range(2))
    v, do = (normal(*rows, shape.value_dim).to(dtype) for _ in range(2))
    f, gain, offset, slope = DECAYS[decay](normal(*rows[:2], *token), uniform(2, *token))
    f = f.to(dtype) if vector else f
    log_decay = -gain * F.softplus(slope * f.float() + offset)
    log_decay = log_decay.to(dtype) if vector else log_decay
    beta = 2 * torch.sigmoid(normal(*rows))
    kind = kind or ("vector" if vector else "scalar")
    if kind in DELTA_CLASSES:
        k = F.normalize(k.float(), dim=-1).to(dtype)
    made = {"f": f, "gain": gain, "offset": offset, "slope": slope, "log_decay": log_decay}
    return Inputs(q=q, k=k, v=v, do=do, **made, beta=beta, kind=kind)


def _mild(f: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mamba-2 at its start: gains from 1 to 16, steps softplus(offset) from 0.001 to 0.1, both log-uniform."""
    step = torch.exp(math.log(1e-3) + uniform[1] * math.log(100.0))
    return 0.5 * f, torch.exp(uniform[0] * math.log(16.0)), torch.log(torch.expm1(step)), 1.0


def _steep(f: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """λ = σ(f) with a median of 0.2, as trained HGRN2 and GLA layers have it."""
    return 1.5 * f - math.log(4.0), torch.ones_like(uniform[0]), torch.zeros_like(uniform[0]), -1.0


DECAYS = {"mild": _mild, "steep": _steep}


def _naive(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    seam()  # which puts kernels/ on the path
    o: Tensor = importlib.import_module("kernels.decay_scan_naive").decay_scan_naive(q, k, v, log_decay)[0]
    return o


def _source(x: dict[str, Tensor], given: Inputs) -> Any:
    seam()
    made = importlib.import_module("kernels.decay_source").DecaySource
    return made(x=x["f"], kind="softplus", slope=given.slope, gain=x["gain"], offset=x["offset"])


def _ours(given: Inputs) -> Problem:
    if given.kind in DELTA_CLASSES:
        return delta_problem(given)
    x, scan = leaves_of(q=given.q, k=given.k, v=given.v, g=given.log_decay), seam().decay_scan
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], x["g"])[0],
        do=given.do,
        reference=lambda y: _naive(y["q"], y["k"], y["v"], y["g"]),
    )


def _ours_fused(given: Inputs) -> Problem:
    x = leaves_of(q=given.q, k=given.k, v=given.v, f=given.f, gain=given.gain, offset=given.offset)
    scan = seam().decay_scan
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], _source(x, given))[0],
        do=given.do,
        reference=lambda y: _naive(y["q"], y["k"], y["v"], _source(y, given).log_decay()),
    )


def _takes_sources() -> None:
    """Asks the scan itself, with a few numbers on the CPU."""
    small = inputs(Shape.of((1, 2, 1, 8)), False, torch.float32, "cpu")
    try:
        _ours_fused(small).call()
    except (TypeError, AttributeError, ValueError) as error:
        raise NotHere(f"decay_scan takes no DecaySource ({error})") from error


def _fla_simple(name: str) -> Callable[[Inputs], Problem]:
    def problem(given: Inputs) -> Problem:
        scan = getattr(importlib.import_module("fla.ops.simple_gla"), name)
        x, scale = leaves_of(q=given.q, k=given.k, v=given.v, g=given.log_decay), given.q.shape[-1] ** -0.5
        return Problem(
            leaves=x,
            call=lambda: scan(q=x["q"], k=x["k"], v=x["v"], g=x["g"])[0],
            do=given.do,
            reference=lambda y: _naive(y["q"] * scale, y["k"], y["v"], y["g"]),
        )

    return problem


def _fla_lightning(given: Inputs) -> Problem:
    scan = importlib.import_module("fla.ops.lightning_attn").chunk_lightning_attn
    x, heads, scale = leaves_of(q=given.q, k=given.k, v=given.v), given.q.shape[2], given.q.shape[-1] ** -0.5
    constant = -(8 / heads * 0.5) * torch.arange(heads, dtype=torch.float64, device=given.q.device)
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], layer_idx=6, num_layers=12)[0],
        do=given.do,
        reference=lambda y: _naive(y["q"] * scale, y["k"], y["v"], constant.expand(y["q"].shape[:3])),
    )


def _fla_vector(given: Inputs) -> Problem:
    scan = importlib.import_module("fla.ops.gla").chunk_gla
    x, scale = leaves_of(q=given.q, k=given.k, v=given.v, g=given.log_decay), given.q.shape[-1] ** -0.5
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], x["g"])[0],
        do=given.do,
        reference=lambda y: _naive(y["q"] * scale, y["k"], y["v"], y["g"]),
    )


def _sdpa(given: Inputs) -> Problem:
    if given.q.shape[-1] != given.v.shape[-1]:
        raise NotHere("flash attention needs K = V")
    attention = importlib.import_module("torch.nn.attention")
    kernel = attention.SDPBackend.FLASH_ATTENTION if given.q.is_cuda else attention.SDPBackend.MATH
    x = leaves_of(**{name: getattr(given, name).transpose(1, 2).contiguous() for name in "qkv"})

    def call() -> Tensor:
        with attention.sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)

    def reference(y: dict[str, Tensor]) -> Tensor:
        scores = y["q"] @ y["k"].transpose(-1, -2) * y["q"].shape[-1] ** -0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ y["v"]

    return Problem(leaves=x, call=call, do=given.do.transpose(1, 2).contiguous(), reference=reference)


def _mamba() -> None:
    try:
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except Exception as error:  # its package compiles and imports much else, which may fail in many ways
        raise NotHere(f"mamba_ssm cannot be imported ({type(error).__name__}: {error})") from error


def _mamba_ssd(given: Inputs) -> Problem:
    """Mamba-2's recurrence with A = -1 and one group per head: λ = e^-dt, and dt also scales v."""
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    x = leaves_of(q=given.q, k=given.k, v=given.v, g=-given.log_decay)
    rate = -torch.ones(given.q.shape[2], device=given.q.device)
    return Problem(
        leaves=x,
        call=lambda: scan(x["v"], x["g"], rate, x["k"], x["q"], chunk_size=256),
        do=given.do,
        reference=lambda y: _naive(y["q"], y["k"], y["v"] * y["g"][..., None], -y["g"]),
    )


_SCALAR, _VECTOR = ("scalar",), ("vector",)
_SIMPLE, _FUSED = (_fla_simple(name) for name in ("chunk_simple_gla", "fused_chunk_simple_gla"))
_ALL = (
    Contestant(name="ours", classes=_SCALAR + _VECTOR + DELTA_CLASSES, problem=_ours, ours=True),
    Contestant(name="chunk_simple_gla", classes=_SCALAR, problem=_SIMPLE, tuned=True, prepare=fla_unguarded),
    Contestant(name="fused_chunk_simple_gla", classes=_SCALAR, problem=_FUSED, tuned=True, prepare=fla),
    Contestant(name="chunk_gla", classes=_VECTOR, problem=_fla_vector, tuned=True, prepare=fla),
    Contestant(name="mamba2_ssd", classes=_SCALAR, problem=_mamba_ssd, tuned=True, prepare=_mamba),
    Contestant(name="ours_fused", classes=_SCALAR + _VECTOR, problem=_ours_fused, ours=True, prepare=_takes_sources),
    Contestant(name="sdpa_flash", classes=(SOFTMAX,), problem=_sdpa),
    Contestant(name="chunk_lightning_attn", classes=_SCALAR, problem=_fla_lightning, tuned=True, optional=True, prepare=fla),
    *DELTA,
)
CONTESTANTS = {contestant.name: contestant for contestant in _ALL}
