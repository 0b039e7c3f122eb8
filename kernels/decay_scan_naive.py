"""Linear attention with decay, one token after another: the definition that every faster version is compared with.

    S_t = diag(λ_t) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

What is unusual: the scale is 1 unless asked otherwise and there is no normaliser; the arithmetic is at least fp32 whatever the
inputs' dtype. Token t's output does not read later tokens, so it is causal bit for bit whether `exact` asks for it or not.
Source: the recurrence of the paper (arXiv 2509.05282), diagonal transition.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from kernels.decay_source import DecaySource
from kernels.scan_arguments import check_decay_scan

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def decay_scan_naive(
    q_bthk: Tensor,
    k_bthk: Tensor | None,
    v_bthv: Tensor,
    decay: Tensor | DecaySource,
    initial_state_bhkv: Tensor | None = None,
    output_final_state: bool = False,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns (o (B, T, H, V), final state (B, H, K, V) or None), both fp32, or float64 when q or the decay is float64.

    decay: natural log of λ, (B, T, H) for one λ per head or (B, T, H, K) for one per key channel; -inf is λ = 0. Or what makes
    it. Without k the key is 1 - λ. cu_seqlens: (N + 1,), where N sequences packed into one of B = 1 begin and end; states are
    then (N, H, K, V). Any B >= 0 and T >= 0, K != V allowed. ValueError for arguments that do not fit.
    """
    check_decay_scan(q_bthk, k_bthk, v_bthv, decay, initial_state_bhkv, scale, cu_seqlens)
    tensors = widened(q_bthk, k_bthk, v_bthv, decay, initial_state_bhkv, scale, cu_seqlens)
    o_bthv, state = _scan(*tensors) if cu_seqlens is None else by_sequence(_scan, *tensors, cu_seqlens)
    return o_bthv, state if output_final_state else None


def widened(
    q: Tensor, k: Tensor | None, v: Tensor, decay: Tensor | DecaySource, state: Tensor | None, scale: float, cu: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q times scale, k, v, log λ, initial state), all there and in the dtype of the arithmetic."""
    log_decay = decay.log_decay() if isinstance(decay, DecaySource) else decay
    dtype = torch.promote_types(torch.promote_types(q.dtype, log_decay.dtype), torch.float32)
    q, v, log_decay = (x.to(dtype) for x in (q, v, log_decay))
    k = -torch.expm1(log_decay) if k is None else k.to(dtype)
    if state is None:
        sequences = q.shape[0] if cu is None else cu.shape[0] - 1
        state = q.new_zeros(sequences, q.shape[2], q.shape[3], v.shape[3])
    return q if scale == 1 else scale * q, k, v, log_decay, state.to(dtype)


def by_sequence(
    scan: Scan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """One scan for each packed sequence. Reads cu_seqlens on the host."""
    lengths = [end - start for start, end in pairwise(cu_seqlens.tolist())]
    if not lengths:
        return no_outputs(q, k, v, log_decay if log_decay.dim() == 4 else log_decay[..., None]), state
    parts = (x.split(lengths, dim=1) for x in (q, k, v, log_decay))
    found = [scan(*part) for part in zip(*parts, state.split(1), strict=True)]
    outputs, states = zip(*found, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    decay = log_decay.exp() if log_decay.dim() == 4 else log_decay.exp()[..., None]
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(dim=-2))
    return torch.stack(outputs, dim=1) if outputs else no_outputs(q, k, v, decay), state


def no_outputs(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """(B, 0, H, V): no number, but a result of every input, so that a gradient is asked of it as of any other."""
    return (q * k * decay).sum(dim=-1, keepdim=True) * v
