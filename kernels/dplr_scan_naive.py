"""Linear attention whose state is transformed by a diagonal and a matrix of rank one (general DPLR), one token after another:
the definition that every faster version is compared with.

    S_t = (diag(λ_t) + a_t b_tᵀ) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

What is unusual: b reads the state before it has decayed, a writes into it afterwards. Nothing is assumed of a and b but that
they are finite: it is the caller who keeps the product of the transitions bounded. The delta rule of delta_scan_naive.py is
the case a = −β k, b = λ ⊙ k with a write of k or β k. The scale is 1 unless asked otherwise, and the arithmetic is at least
fp32. Token t's output does not read later tokens, so it is causal bit for bit whether `exact` asks for it or not.
Source: DPLR as in the paper (arXiv 2509.05282, section 5.6). In flash-linear-attention's chunk_dplr_delta_rule what is `a`
here is called b, and what is `b` here is called a.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from kernels.decay_source import DecaySource
from kernels.scan_arguments import check_dplr_scan

Scan = Callable[..., tuple[Tensor, Tensor]]


def dplr_scan_naive(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    a_bthk: Tensor,
    b_bthk: Tensor,
    decay: Tensor | DecaySource | None = None,
    initial_state_bhkv: Tensor | None = None,
    output_final_state: bool = False,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns (o (B, T, H, V), final state (B, H, K, V) or None), both fp32, or float64 when q or the decay is.

    decay: natural log of λ, (B, T, H, K), one per key channel; -inf is λ = 0, None is λ = 1. Or the DecaySource that makes it.
    cu_seqlens: (N + 1,), where N sequences packed into one of B = 1 begin and end; states are then (N, H, K, V). Any B >= 0 and
    T >= 0, K != V allowed. ValueError for what does not fit.
    """
    check_dplr_scan(q_bthk, k_bthk, v_bthv, a_bthk, b_bthk, decay, initial_state_bhkv, scale, cu_seqlens)
    tensors, state = widened(q_bthk, k_bthk, v_bthv, a_bthk, b_bthk, decay, initial_state_bhkv, scale, cu_seqlens)
    o_bthv, state = by_sequence(_scan, tensors, state, cu_seqlens)
    return o_bthv, state if output_final_state else None


def widened(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | DecaySource | None,
    state: Tensor | None,
    scale: float,
    cu: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """([q times scale, k, v, a, b, log λ], initial state), all there and in the dtype of the arithmetic."""
    log_decay = decay.log_decay() if isinstance(decay, DecaySource) else decay
    if log_decay is None:
        log_decay = q.new_zeros(1, q.shape[1], 1, 1)
    dtype = torch.promote_types(torch.promote_types(q.dtype, log_decay.dtype), torch.float32)
    q, k, v, a, b, log_decay = (x.to(dtype) for x in (q, k, v, a, b, log_decay))
    if state is None:
        sequences = q.shape[0] if cu is None else cu.shape[0] - 1
        state = q.new_zeros(sequences, q.shape[2], q.shape[3], v.shape[3])
    return [q if scale == 1 else scale * q, k, v, a, b, log_decay], state.to(dtype)


def by_sequence(scan: Scan, tensors: list[Tensor], state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """One scan, or one for each packed sequence; then cu_seqlens is read on the host."""
    if cu_seqlens is None:
        return scan(*tensors, state)
    lengths = [end - start for start, end in pairwise(cu_seqlens.tolist())]
    if not lengths:
        return no_outputs(*tensors), state
    parts = (x.split(lengths, dim=1) for x in tensors)
    outputs, states = zip(*(scan(*part) for part in zip(*parts, state.split(1), strict=True)), strict=True)
    return torch.cat(outputs, dim=1), torch.cat(states)


def no_outputs(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor) -> Tensor:
    """(B, 0, H, V): no number, but a result of every input, so that a gradient is asked of it as of any other."""
    return (q * k * a * b * log_decay).sum(dim=-1, keepdim=True) * v


def _scan(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    decay = log_decay.exp()
    outputs = []
    for t in range(q.shape[1]):
        read = (b[:, t, :, :, None] * state).sum(dim=-2, keepdim=True)
        state = decay[:, t, :, :, None] * state + a[:, t, :, :, None] * read + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(dim=-2))
    return torch.stack(outputs, dim=1) if outputs else no_outputs(q, k, v, a, b, log_decay), state
