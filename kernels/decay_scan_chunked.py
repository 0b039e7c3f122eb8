"""Linear attention with decay in chunks of plain torch: fast enough to train small models on a CPU, and exact for every
decay in [0, 1].

What is unusual: the usual factorisation e^{G_t} · e^{-G_s} is never formed, because e^{-G_s} overflows as soon as a
channel forgets quickly. Inside a chunk of a vector decay, halves are merged pairwise (1+1, 2+2, ... tokens): the later
half's queries carry the decay since the middle, the earlier half's keys the decay up to the middle. Every factor is a
product of λs, so λ = 0 (log = -inf) and λ = 1 are exact and nothing is subtracted. A scalar decay needs one number per
pair of tokens, which is a masked running sum. Across chunks the state is carried in sequence. Token t's output does not
read later tokens, so it is causal bit for bit.
Source: decay_scan_naive.py is the definition; the pairwise merge is the textbook parallel scan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decay_scan_naive import by_sequence, no_outputs, widened
from kernels.decay_source import DecaySource
from kernels.scan_arguments import check_decay_scan

# Forward and backward on one CPU core, (B, T, H, D) = (8, 256, 4, 64), chunks of 16/32/64: vector 74/63/60 ms, scalar
# 41/32/35 ms.
CHUNK = 32


def decay_scan_chunked(
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

    The arguments are those of decay_scan_naive; `exact` asks for what holds here anyway. Packed sequences are done one after
    another, and cu_seqlens is read on the host. Differentiable in every tensor.
    """
    check_decay_scan(q_bthk, k_bthk, v_bthv, decay, initial_state_bhkv, scale, cu_seqlens)
    tensors = widened(q_bthk, k_bthk, v_bthv, decay, initial_state_bhkv, scale, cu_seqlens)
    o_bthv, state = _scan(*tensors) if cu_seqlens is None else by_sequence(_scan, *tensors, cu_seqlens)
    return o_bthv, state if output_final_state else None


def _scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    if length == 0:
        return no_outputs(q, k, v, log_decay if log_decay.dim() == 4 else log_decay[..., None]), state
    inside = _vector_chunks if log_decay.dim() == 4 else _scalar_chunks
    # Padding tokens have k = 0 and λ = 1: they change neither outputs nor state.
    o, q_decayed, update, total = inside(*(to_chunks(x, CHUNK) for x in (q, k, v, log_decay)))
    states = []
    # Taken apart once: the gradient of an index into the whole is as large as the whole, chunk by chunk.
    for faded, added in zip(total.unbind(dim=2), update.unbind(dim=2), strict=True):
        states.append(state)
        state = faded[..., None] * state + added
    o = o + q_decayed @ torch.stack(states, dim=2)
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length], state


def to_chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, ...) -> contiguous (B, H, chunks, size, ...), zero-padded in time."""
    missing = -x.shape[1] % size
    padded = F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing])
    return padded.unflatten(1, (padded.shape[1] // size, size)).movedim(3, 1).contiguous()


def decay_between(log_decay: Tensor) -> Tensor:
    """(..., C) -> (..., C, C): row t, column s holds the product of λ over the tokens after s up to t, and 0 for s > t."""
    size = log_decay.shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril(-1)
    # A running sum of the tokens after s: a difference of two prefix sums would be inf - inf at λ = 0.
    between = log_decay[..., None].expand(*log_decay.shape, size).masked_fill(~earlier, 0.0).cumsum(dim=-2)
    return between.masked_fill(~earlier.logical_or(earlier.new_ones(size).diag()), -torch.inf).exp()


def _scalar_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All chunks by themselves for one decay per head: (outputs, decayed queries, state updates, total decays).

    q, k: (..., C, K); v: (..., C, V); log_decay: (..., C). The update is (..., K, V), the total decay (..., 1).
    """
    weight = decay_between(log_decay)
    o = ((q @ k.transpose(-1, -2)) * weight) @ v
    since_start = log_decay.cumsum(dim=-1).exp()[..., None]
    update = (k * weight[..., -1, :, None]).transpose(-1, -2) @ v
    return o, q * since_start, update, since_start[..., -1, :]


def _vector_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All chunks by themselves for one decay per channel: (outputs, decayed queries, state updates, total decays).

    q, k, log_decay: (..., C, K), C a power of two; v: (..., C, V). The update is (..., K, V), the total decay (..., K).
    """
    total = log_decay.exp()
    o = (q * k).sum(dim=-1, keepdim=True) * v
    q_decayed, k_decayed, half = q * total, k, 1
    while half < q.shape[-2]:
        (o_early, o_late), (v_early, _) = halves(o, half), halves(v, half)
        (q_early, q_late), (k_early, k_late) = halves(q_decayed, half), halves(k_decayed, half)
        total_early, total_late = halves(total, 1)
        o = joined(o_early, o_late + scores(q_late, k_early) @ v_early)
        q_decayed = joined(q_early, q_late * total_early)
        k_decayed = joined(k_early * total_late, k_late)
        total = (total_early * total_late).flatten(-3, -2)
        half *= 2
    return o, q_decayed, k_decayed.transpose(-1, -2) @ v, total.squeeze(-2)


def scores(q: Tensor, k: Tensor) -> Tensor:
    # Products of single rows are many times slower as a batched matrix product than as a sum.
    return (q * k).sum(dim=-1, keepdim=True) if q.shape[-2] == 1 else q @ k.transpose(-1, -2)


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(..., C, D) -> the earlier and the later halves of its blocks of 2·half tokens, each (..., blocks, half, D)."""
    early, late = x.unflatten(-2, (x.shape[-2] // (2 * half), 2, half)).unbind(dim=-3)
    return early, late


def joined(early: Tensor, late: Tensor) -> Tensor:
    return torch.stack([early, late], dim=-3).flatten(-4, -2)
