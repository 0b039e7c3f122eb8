"""Who is compared in the delta rule: ours as the model calls it, and flash-linear-attention's four.

    delta_none: no decay        delta_scalar: one λ per head, both with w = β        delta_vector: one per channel, w = 1

What is surprising:
- FLA's chunk_kda writes with β, ours with 1 as in the paper; both are given β, and each is compared with its own definition.
- chunk_dplr_delta_rule has the state's transition as diag(λ) + b aᵀ: with b = k and a = −β λ k it is the same recurrence, and
  its leaves are a and b. Ours has no kernel for any other a and b.
Source: signatures as in fla-core 0.6.0.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from benchmarks.kernel_problem import Contestant, Inputs, Problem, fla, fla_unguarded, leaves_of, seam

_NONE, _SCALAR, _VECTOR = "delta_none", "delta_scalar", "delta_vector"


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


def _chunk_dplr_delta_rule(given: Inputs) -> Problem:
    scan = importlib.import_module("fla.ops.generalized_delta_rule").chunk_dplr_delta_rule
    erase = -given.beta[..., None] * given.log_decay.float().exp() * given.k.float()
    x = leaves_of(q=given.q, k=given.k, v=given.v, a=erase.to(given.k.dtype), b=given.k, g=given.log_decay)
    scale = given.q.shape[-1] ** -0.5
    return Problem(
        leaves=x,
        call=lambda: scan(x["q"], x["k"], x["v"], x["a"], x["b"], x["g"])[0],
        do=given.do,
        reference=lambda y: _dplr(y, scale),
    )


def _dplr(x: dict[str, Tensor], scale: float) -> Tensor:
    """S_t = diag(λ_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ, token after token."""
    state = x["q"].new_zeros(*x["q"].shape[0::2], x["q"].shape[3], x["v"].shape[3])
    outputs = []
    for q, k, v, a, b, g in zip(*(x[name].unbind(dim=1) for name in "qkvabg"), strict=True):
        recalled = (a[..., None] * state).sum(dim=-2, keepdim=True)
        state = g.exp()[..., None] * state + b[..., None] * recalled + k[..., None] * v[..., None, :]
        outputs.append(scale * (q[..., None] * state).sum(dim=-2))
    return torch.stack(outputs, dim=1)


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
    Contestant(name="chunk_dplr_delta_rule", classes=(_VECTOR,), problem=_chunk_dplr_delta_rule, tuned=True, prepare=fla),
)
