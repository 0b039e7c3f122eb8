"""Linear attention with decay, one token after another: the definition that every faster version is compared with.

    S_t = diag(λ_t) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t

What is unusual: there is no 1/√d scale and no normaliser, and the arithmetic is at least fp32 whatever the inputs'
dtype.
Source: the recurrence of the paper (arXiv 2509.05282), diagonal transition.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decay_scan_naive(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    log_decay: Tensor,
    initial_state_bhkv: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns (o (B, T, H, V), final state (B, H, K, V) or None), both fp32, or float64 when any input is float64.

    log_decay: natural log of λ, (B, T, H) for one λ per head or (B, T, H, K) for one per key channel; -inf is λ = 0.
    Any B >= 0 and T >= 0, K != V allowed.
    """
    dtype = torch.promote_types(torch.promote_types(q_bthk.dtype, log_decay.dtype), torch.float32)
    q, k, v, log_decay = (x.to(dtype) for x in (q_bthk, k_bthk, v_bthv, log_decay))
    decay = log_decay.exp() if log_decay.dim() == 4 else log_decay.exp()[..., None]
    batch, length, heads, key_dim = q.shape
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1])
    if initial_state_bhkv is not None:
        state = initial_state_bhkv.to(dtype)
    outputs = []
    for t in range(length):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(dim=-2))
    o_bthv = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)
    return o_bthv, state if output_final_state else None
