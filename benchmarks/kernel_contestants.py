"""Who is compared: our decay scan as the model calls it, flash-linear-attention's, softmax attention, and Mamba-2's.

A contestant makes a problem from the same inputs for all: its own leaves, one call, and the same mathematics in fp64, against
which output and gradients are held.

What is surprising:
- FLA and SDPA scale by 1/√K, ours does not: each is compared with a definition that has its own scale.
- FLA 0.6.0 refuses the backward pass of chunk_simple_gla on Hopper with Triton 3.4 to 3.7.0, which miscompiles it. The guard is
  lifted for the sake of its time, a remark says so, and its errors stand beside.
Source: signatures as in fla-core 0.6.0, mamba-ssm 2.2 and torch 2.11.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_shapes import SOFTMAX, Shape

FLA_VERSION = "0.6.0"


class NotHere(Exception):
    """A contestant that cannot take part: why, and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """f: what a model's projection gives for the decay; log_decay: what the formula makes of it, as tensors are handed over."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    f: Tensor
    gain: Tensor
    offset: Tensor
    slope: float
    log_decay: Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """leaves: what has gradients, by name. reference: the output from the leaves in fp64."""

    leaves: dict[str, Tensor]
    call: Callable[[], Tensor]
    do: Tensor
    reference: Callable[[dict[str, Tensor]], Tensor]

    def gradients(self) -> tuple[Tensor, ...]:
        """Forward and backward: (o, gradients of the leaves)."""
        o = self.call()
        return (o, *torch.autograd.grad(o, list(self.leaves.values()), self.do))


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """tuned: it times configurations of its kernels at its first call. optional: takes part only when asked for.

    prepare: imports what it needs and returns a remark; raises NotHere.
    """

    name: str
    classes: tuple[str, ...]
    problem: Callable[[Inputs], Problem]
    ours: bool = False
    tuned: bool = False
    optional: bool = False
    prepare: Callable[[], str | None] = lambda: None


def inputs(shape: Shape, vector: bool, dtype: torch.dtype, device: str, decay: str = "mild", seed: int = 0) -> Inputs:
    """Random tensors as a model has them. decay: one of DECAYS."""
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
    return Inputs(q=q, k=k, v=v, do=do, f=f, gain=gain, offset=offset, slope=slope, log_decay=log_decay)


def _mild(f: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mamba-2 at its start: gains from 1 to 16, steps softplus(offset) from 0.001 to 0.1, both log-uniform."""
    step = torch.exp(math.log(1e-3) + uniform[1] * math.log(100.0))
    return 0.5 * f, torch.exp(uniform[0] * math.log(16.0)), torch.log(torch.expm1(step)), 1.0


def _steep(f: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """λ = σ(f) with a median of 0.2, as trained HGRN2 and GLA layers have it."""
    return 1.5 * f - math.log(4.0), torch.ones_like(uniform[0]), torch.zeros_like(uniform[0]), -1.0


DECAYS = {"mild": _mild, "steep": _steep}


def _leaves(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def _seam() -> Any:
    return importlib.import_module("decay_core.kernel_seam")


def _naive(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    _seam()  # which puts kernels/ on the path
    o: Tensor = importlib.import_module("kernels.decay_scan_naive").decay_scan_naive(q, k, v, log_decay)[0]
    return o


def _source(x: dict[str, Tensor], given: Inputs) -> Any:
    _seam()
    made = importlib.import_module("kernels.decay_source").DecaySource
    return made(x=x["f"], kind="softplus", slope=given.slope, gain=x["gain"], offset=x["offset"])


def _ours(given: Inputs) -> Problem:
    x, scan = _leaves(q=given.q, k=given.k, v=given.v, g=given.log_decay), _seam().decay_scan
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], x["g"])[0],
        do=given.do,
        reference=lambda y: _naive(y["q"], y["k"], y["v"], y["g"]),
    )


def _ours_fused(given: Inputs) -> Problem:
    x = _leaves(q=given.q, k=given.k, v=given.v, f=given.f, gain=given.gain, offset=given.offset)
    scan = _seam().decay_scan
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


def _fla() -> str | None:
    """Imports it; returns what there is to say."""
    try:
        version = importlib.metadata.version("fla-core")
        if "fla.ops" not in sys.modules:  # its __init__ imports forty operators, which takes seconds in every process
            package = sys.modules["fla.ops"] = ModuleType("fla.ops")
            package.__path__ = [f"{folder}/ops" for folder in importlib.import_module("fla").__path__]
        importlib.import_module("fla.ops.common.chunk_o")
    except ImportError as error:
        raise NotHere(f"pip install fla-core=={FLA_VERSION} einops ({error})") from error
    return None if version == FLA_VERSION else f"fla-core is {version}, not {FLA_VERSION}"


def _fla_unguarded() -> str | None:
    """The same, with its refusal of a backward pass that Triton miscompiles lifted."""
    said = _fla()
    module: Any = importlib.import_module("fla.ops.common.chunk_o")
    if not module.IS_NVIDIA_HOPPER or not module.TRITON_ABOVE_3_4_0 or module.TRITON_ABOVE_3_7_1:
        return said
    module.TRITON_ABOVE_3_7_1 = True
    lifted = "FLA refuses this backward pass on Hopper with this Triton; lifted for timing, its gradients may be wrong"
    return "; ".join(filter(None, (said, lifted)))


def _fla_simple(name: str) -> Callable[[Inputs], Problem]:
    def problem(given: Inputs) -> Problem:
        scan = getattr(importlib.import_module("fla.ops.simple_gla"), name)
        x, scale = _leaves(q=given.q, k=given.k, v=given.v, g=given.log_decay), given.q.shape[-1] ** -0.5
        return Problem(
            leaves=x,
            call=lambda: scan(q=x["q"], k=x["k"], v=x["v"], g=x["g"])[0],
            do=given.do,
            reference=lambda y: _naive(y["q"] * scale, y["k"], y["v"], y["g"]),
        )

    return problem


def _fla_lightning(given: Inputs) -> Problem:
    scan = importlib.import_module("fla.ops.lightning_attn").chunk_lightning_attn
    x, heads, scale = _leaves(q=given.q, k=given.k, v=given.v), given.q.shape[2], given.q.shape[-1] ** -0.5
    constant = -(8 / heads * 0.5) * torch.arange(heads, dtype=torch.float64, device=given.q.device)
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], layer_idx=6, num_layers=12)[0],
        do=given.do,
        reference=lambda y: _naive(y["q"] * scale, y["k"], y["v"], constant.expand(y["q"].shape[:3])),
    )


def _fla_vector(given: Inputs) -> Problem:
    scan = importlib.import_module("fla.ops.gla").chunk_gla
    x, scale = _leaves(q=given.q, k=given.k, v=given.v, g=given.log_decay), given.q.shape[-1] ** -0.5
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
    x = _leaves(**{name: getattr(given, name).transpose(1, 2).contiguous() for name in "qkv"})

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
    x = _leaves(q=given.q, k=given.k, v=given.v, g=-given.log_decay)
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
    Contestant(name="ours", classes=_SCALAR + _VECTOR, problem=_ours, ours=True),
    Contestant(name="chunk_simple_gla", classes=_SCALAR, problem=_SIMPLE, tuned=True, prepare=_fla_unguarded),
    Contestant(name="fused_chunk_simple_gla", classes=_SCALAR, problem=_FUSED, tuned=True, prepare=_fla),
    Contestant(name="chunk_gla", classes=_VECTOR, problem=_fla_vector, tuned=True, prepare=_fla),
    Contestant(name="mamba2_ssd", classes=_SCALAR, problem=_mamba_ssd, tuned=True, prepare=_mamba),
    Contestant(name="ours_fused", classes=_SCALAR + _VECTOR, problem=_ours_fused, ours=True, prepare=_takes_sources),
    Contestant(name="sdpa_flash", classes=(SOFTMAX,), problem=_sdpa),
    Contestant(name="chunk_lightning_attn", classes=_SCALAR, problem=_fla_lightning, tuned=True, optional=True, prepare=_fla),
)
CONTESTANTS = {contestant.name: contestant for contestant in _ALL}
