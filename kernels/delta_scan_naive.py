"""Linear attention with the delta rule and decay (DPLR), one token after another: the definition that every faster
version is compared with.

    S_t = (I − β_t k_t k_tᵀ) diag(λ_t) S_{t-1} + w_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t        w_t = β_t or 1

What is unusual: the decay acts first and the erasure along k second, which for one λ per channel differs from the other
order. k is taken as it is, unless normalize_key asks for k / √(Σ k² + ε) per head, with ε inside the root, so that a key of
zeros stays one. The scale is 1 unless asked otherwise, and the arithmetic is at least fp32. Token t's output does not read
later tokens, so it is causal bit for bit whether `exact` asks for it or not.
Source: the DPLR transition of the paper (arXiv 2509.05282, section 5.6). Its runs write with w = β where λ is absent or
one per head, and with w = 1 where λ is one per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from kernels.decay_source import DecaySource
from kernels.scan_arguments import check_delta_scan

KEY_EPS = 1e-5  # inside the root, as in the paper's runs
Scan = Callable[..., tuple[Tensor, Tensor]]


def delta_scan_naive(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    beta_bth: Tensor,
    decay: Tensor | DecaySource | None = None,
    beta_on_write: bool = True,
    initial_state_bhkv: Tensor | None = None,
    output_final_state: bool = False,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
    normalize_key: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns (o (B, T, H, V), final state (B, H, K, V) or None), both fp32, or float64 when q, β or the decay is.

    beta_bth: from 0 to 2. decay: natural log of λ, (B, T, H) for one λ per head or (B, T, H, K) for one per key channel; -inf
    is λ = 0, None is λ = 1. Or the DecaySource that makes it. cu_seqlens: (N + 1,), where N sequences packed into one of B = 1
    begin and end; states are then (N, H, K, V). Any B >= 0 and T >= 0, K != V allowed. ValueError for what does not fit.
    """
    check_delta_scan(q_bthk, k_bthk, v_bthv, beta_bth, decay, initial_state_bhkv, scale, cu_seqlens)
    tensors, state = widened(q_bthk, k_bthk, v_bthv, beta_bth, decay, initial_state_bhkv, scale, cu_seqlens, normalize_key)
    o_bthv, state = by_sequence(_scan, tensors, state, cu_seqlens, beta_on_write)
    return o_bthv, state if output_final_state else None


def widened(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | DecaySource | None,
    state: Tensor | None,
    scale: float,
    cu: Tensor | None,
    normalize_key: bool,
) -> tuple[list[Tensor], Tensor]:
    """([q times scale, k, v, β (B, T, H, 1), log λ], initial state), all there and in the dtype of the arithmetic."""
    log_decay = decay.log_decay() if isinstance(decay, DecaySource) else decay
    if log_decay is None:
        log_decay = beta.new_zeros(1, q.shape[1], 1)
    dtype = torch.promote_types(torch.promote_types(q.dtype, beta.dtype), log_decay.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    q, k, v, beta, log_decay = (x.to(dtype) for x in (q, k, v, beta[..., None], log_decay))
    if state is None:
        sequences = q.shape[0] if cu is None else cu.shape[0] - 1
        state = q.new_zeros(sequences, q.shape[2], q.shape[3], v.shape[3])
    q, k = q if scale == 1 else scale * q, normalized(k) if normalize_key else k
    return [q, k, v, beta, log_decay], state.to(dtype)


def normalized(k_bthk: Tensor) -> Tensor:
    """Keys of norm 1, less for tiny ones."""
    return k_bthk / (k_bthk.square().sum(dim=-1, keepdim=True) + KEY_EPS).sqrt()


def by_sequence(
    scan: Scan, tensors: list[Tensor], state: Tensor, cu_seqlens: Tensor | None, beta_on_write: bool
) -> tuple[Tensor, Tensor]:
    """One scan, or one for each packed sequence; then cu_seqlens is read on the host."""
    if cu_seqlens is None:
        return scan(*tensors, state, beta_on_write)
    lengths = [end - start for start, end in pairwise(cu_seqlens.tolist())]
    if not lengths:
        return no_outputs(*tensors), state
    parts = (x.split(lengths, dim=1) for x in tensors)
    found = [scan(*part, beta_on_write) for part in zip(*parts, state.split(1), strict=True)]
    outputs, states = zip(*found, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(states)


def no_outputs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """(B, 0, H, V): no number, but a result of every input, so that a gradient is asked of it as of any other."""
    decay = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    return (q * k * beta * decay).sum(dim=-1, keepdim=True) * v


def _scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, beta_on_write: bool
) -> tuple[Tensor, Tensor]:
    decay = log_decay.exp() if log_decay.dim() == 4 else log_decay.exp()[..., None]
    write = beta * v if beta_on_write else v
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state
        recalled = (k[:, t, :, :, None] * state).sum(dim=-2)
        state = state + k[:, t, :, :, None] * (write[:, t] - beta[:, t] * recalled)[:, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(dim=-2))
    return torch.stack(outputs, dim=1) if outputs else no_outputs(q, k, v, beta, log_decay), state
