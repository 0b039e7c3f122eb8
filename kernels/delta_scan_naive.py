"""Linear attention with the delta rule and decay (DPLR), one token after another: the definition that every faster
version is compared with.

    S_t = (I − β_t k_t k_tᵀ) diag(λ_t) S_{t-1} + w_t k_t v_tᵀ        o_t = S_tᵀ q_t        w_t = β_t or 1

What is unusual: the decay acts first and the erasure along k second, which for one λ per channel differs from the other
order. k is taken as it is: its norm is the caller's. There is no scale, and the arithmetic is at least fp32.
Source: the DPLR transition of the paper (arXiv 2509.05282, section 5.6). Its runs write with w = β where λ is absent or
one per head, and with w = 1 where λ is one per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_scan_naive(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    beta_bth: Tensor,
    log_decay: Tensor | None = None,
    beta_on_write: bool = True,
    initial_state_bhkv: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns (o (B, T, H, V), final state (B, H, K, V) or None), both fp32, or float64 when q, β or the decay is.

    beta_bth: from 0 to 2. log_decay: natural log of λ, (B, T, H) for one λ per head or (B, T, H, K) for one per key
    channel; -inf is λ = 0, None is λ = 1. Any B >= 0 and T >= 0, K != V allowed.
    """
    batch, length, heads, key_dim = q_bthk.shape
    if log_decay is None:
        log_decay = beta_bth.new_zeros(1, length, 1)
    dtype = torch.promote_types(torch.promote_types(q_bthk.dtype, beta_bth.dtype), log_decay.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    q, k, v, beta, log_decay = (x.to(dtype) for x in (q_bthk, k_bthk, v_bthv, beta_bth[..., None], log_decay))
    decay = log_decay.exp() if log_decay.dim() == 4 else log_decay.exp()[..., None]
    write = beta * v if beta_on_write else v
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1])
    if initial_state_bhkv is not None:
        state = initial_state_bhkv.to(dtype)
    outputs = []
    for t in range(length):
        state = decay[:, t, :, :, None] * state
        recalled = (k[:, t, :, :, None] * state).sum(dim=-2)
        state = state + k[:, t, :, :, None] * (write[:, t] - beta[:, t] * recalled)[:, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(dim=-2))
    o_bthv = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)
    return o_bthv, state if output_final_state else None
