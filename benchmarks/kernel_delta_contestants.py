"""Who is compared in the delta rule: ours as the model calls it, and flash-linear-attention's four.

    delta_none: no decay        delta_scalar: one λ per head, both with w = β        delta_vector: one per channel, w = 1
    delta_general: one λ per channel, and a bᵀ instead of −β k (λ k)ᵀ, with any a and b

What is surprising:
- FLA's chunk_kda writes with β, ours with 1 as in the paper; both are given β, and each is compared with its own definition.
- chunk_dplr_delta_rule has the state's transition as diag(λ) + b aᵀ, where ours is diag(λ) + a bᵀ; both have its leaves by our
  names. In delta_vector it is given the delta rule, a = −β k and b = λ k.
- In delta_general a = −η ⊙ κ and b = κ, with κ of norm 1 and η from 0 to 1 per channel, as RWKV-7 has it: nothing grows, and no
  delta rule is that.
Source: signatures as in fla-core 0.6.0.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from benchmarks.kernel_problem import Contestant, Inputs, Problem, fla, fla_unguarded, leaves_of, seam

_NONE, _SCALAR, _VECTOR, _GENERAL = "delta_none", "delta_scalar", "delta_vector", "delta_general"


def _naive(x: dict[str, Tensor], beta_on_write: bool, scale: float = 1.0) -> Tensor:
    seam()  # which puts kernels/ on the path
    scan = importlib.import_module("kernels.delta_scan_naive").delta_scan_naive
    o: Tensor = scan(x["q"], x["k"], x["v"], x["beta"], x.get("g"), beta_on_write, scale=scale)[0]
    return o


def _common(given: Inputs) -> dict[str, Tensor]:
    decay = {} if given.kind == _NONE else {"g": given.log_decay}
    return leaves_of(q=given.q, k=given.k, v=given.v, beta=given.beta, **decay)


def delta_problem(given: Inputs) -> Problem:
    """Ours: on a GPU the Triton kernels, which nobody has to ask for here."""
    if given.kind == _GENERAL:
        return _general_problem(given)
    x, scan, write = _common(given), seam().delta_scan, given.kind != _VECTOR
    if given.q.is_cuda:
        scan = importlib.import_module("kernels.delta_scan_triton").delta_scan_triton
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], x["beta"], x.get("g"), write)[0],
        do=given.do,
        reference=lambda y: _naive(y, write),
    )


def _chunk_delta_rule(given: Inputs) -> Problem:
    scan = importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
    x, scale = _common(given), given.q.shape[-1] ** -0.5
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], x["beta"].to(x["q"].dtype))[0],
        do=given.do,
        reference=lambda y: _naive(y, True, scale),
    )


def _chunk_gated_delta_rule(given: Inputs) -> Problem:
    scan = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    x, scale = _common(given), given.q.shape[-1] ** -0.5
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], x["g"], x["beta"])[0],
        do=given.do,
        reference=lambda y: _naive(y, True, scale),
    )


def _chunk_kda(given: Inputs) -> Problem:
    scan = importlib.import_module("fla.ops.kda").chunk_kda
    x, scale = _common(given), given.q.shape[-1] ** -0.5
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], x["g"], x["beta"])[0],
        do=given.do,
        reference=lambda y: _naive(y, True, scale),
    )


def _general_problem(given: Inputs) -> Problem:
    x, scan = _general(given), seam().dplr_scan
    if given.q.is_cuda:
        scan = importlib.import_module("kernels.dplr_scan_triton").dplr_scan_triton
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], x["a"], x["b"], x["g"])[0],
        do=given.do,
        reference=lambda y: _dplr(y, 1.0),
    )


def _general(given: Inputs) -> dict[str, Tensor]:
    """The leaves of a scan with a and b: in delta_vector those that make the delta rule."""
    if given.kind == _VECTOR:
        a, b = -given.beta[..., None] * given.k.float(), given.log_decay.float().exp() * given.k.float()
    else:
        generator = torch.Generator(given.q.device).manual_seed(1)
        noise = (torch.randn(given.k.shape, generator=generator, device=given.q.device) for _ in range(2))
        b, share = torch.nn.functional.normalize(next(noise), dim=-1), next(noise).sigmoid()
        a = -share * b
    made = {"a": a.to(given.k.dtype), "b": b.to(given.k.dtype)}
    return leaves_of(q=given.q, k=given.k, v=given.v, **made, g=given.log_decay)


def _chunk_dplr_delta_rule(given: Inputs) -> Problem:
    scan = importlib.import_module("fla.ops.generalized_delta_rule").chunk_dplr_delta_rule
    x, scale = _general(given), given.q.shape[-1] ** -0.5
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], x["b"], x["a"], x["g"])[0],
        do=given.do,
        reference=lambda y: _dplr(y, scale),
    )


def _dplr(x: dict[str, Tensor], scale: float) -> Tensor:
    seam()
    scan = importlib.import_module("kernels.dplr_scan_naive").dplr_scan_naive
    o: Tensor = scan(x["q"], x["k"], x["v"], x["a"], x["b"], x["g"], scale=scale)[0]
    return o


DELTA = (
    Contestant(name="chunk_delta_rule", classes=(_NONE,), problem=_chunk_delta_rule, tuned=True, prepare=fla_unguarded),
    Contestant(
        name="chunk_gated_delta_rule",
        classes=(_SCALAR,),
        problem=_chunk_gated_delta_rule,
        tuned=True,
        prepare=fla_unguarded,
    ),
    Contestant(name="chunk_kda", classes=(_VECTOR,), problem=_chunk_kda, tuned=True, prepare=fla),
    Contestant(
        name="chunk_dplr_delta_rule", classes=(_VECTOR, _GENERAL), problem=_chunk_dplr_delta_rule, tuned=True, prepare=fla
    ),
)
