"""Linear attention with the delta rule and decay (DPLR) in chunks of plain torch: fast enough to train small models on
a CPU, and exact for every decay in [0, 1].

The idea: with the pseudo-value u_t = w_t v_t − β_t (diag(λ_t) S_{t-1})ᵀ k_t the recurrence is a plain decay scan,
S_t = diag(λ_t) S_{t-1} + k_t u_tᵀ. Inside a chunk that starts from the state S,

    u_t = w_t v_t − Sᵀ (Γ_t ⊙ y_t) − Σ_{s<t} A_ts u_s        A_ts = y_tᵀ (Γ_t/Γ_s ⊙ k_s)        y_t = β_t k_t

with Γ_t the product of the chunk's λ up to t. So (I + A) u = w v − (Γ y) S, a triangular system that is solved for the
values and for the decayed erasers Γ y at once, all chunks side by side. Only u = u₀ − Y S waits for the state before.

What is unusual: as in decay_scan_chunked.py every decay is a product of λs and nothing is divided or subtracted, so
λ = 0 (log = -inf) and λ = 1 are exact. Token t's output does not read later tokens: it is causal bit for bit.
Source: delta_scan_naive.py is the definition; the triangular system is the WY representation of a product of
Householder-like factors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decay_scan_chunked import decay_between, halves, joined, scores, to_chunks
from kernels.decay_source import DecaySource
from kernels.delta_scan_naive import by_sequence, no_outputs, widened
from kernels.scan_arguments import check_delta_scan

# Forward and backward on one busy CPU core, chunks of 16/32/64/128. (B, T, H, D) = (16, 128, 1, 128): scalar 36/31/34/35,
# vector 56/54/56/61 ms; (16, 128, 4, 32): scalar 30/31/37/54, vector 51/52/58/70 ms. On a GPU the sequence of chunks is
# what takes the time: at (4, 2048, 6, 128) an H100 is 1.7 times as fast with 64 as with 32.
CHUNK = 64


def delta_scan_chunked(
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

    The arguments are those of delta_scan_naive; `exact` asks for what holds here anyway. Packed sequences are done one after
    another, and cu_seqlens is read on the host. Differentiable in every tensor.
    """
    check_delta_scan(q_bthk, k_bthk, v_bthv, beta_bth, decay, initial_state_bhkv, scale, cu_seqlens)
    tensors, state = widened(q_bthk, k_bthk, v_bthv, beta_bth, decay, initial_state_bhkv, scale, cu_seqlens, normalize_key)
    o_bthv, state = by_sequence(_scan, tensors, state, cu_seqlens, beta_on_write)
    return o_bthv, state if output_final_state else None


def _scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, beta_on_write: bool
) -> tuple[Tensor, Tensor]:
    length, key_dim = q.shape[1], q.shape[3]
    if length == 0:
        return no_outputs(q, k, v, beta, log_decay), state
    size = min(CHUNK, 1 << (length - 1).bit_length())  # one token is not padded to a whole chunk
    write = beta * v if beta_on_write else v
    # Padding tokens have k = 0 and λ = 1: they change neither outputs nor state.
    q, k, erase, write, log_decay = (to_chunks(x, size) for x in (q, k, beta * k, write, log_decay))
    inside = _vector_pairs if log_decay.dim() == 5 else _scalar_pairs
    read_scores, erase_scores, q, erase, k, total = inside(q, erase, k, log_decay)
    solved = torch.linalg.solve_triangular(erase_scores, torch.cat([write, erase], dim=-1), upper=False, unitriangular=True)
    u, erase = solved.split([v.shape[-1], key_dim], dim=-1)
    u, states, state = _carry(u, erase, k, total, state)
    return (q @ states + read_scores @ u).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length], state


def _scalar_pairs(q: Tensor, erase: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    """All chunks by themselves for one decay per head: (scores of q against k, scores of erase against k, q and erase
    decayed since the start, k decayed up to the end, total decays).

    q, erase, k: (..., C, K); log_decay: (..., C). The scores are (..., C, C), row t for the reader, and 0 for later
    keys; the total decay is (..., 1).
    """
    weight = decay_between(log_decay)
    since_start = log_decay.cumsum(dim=-1).exp()[..., None]
    pairs = ((x @ k.transpose(-1, -2)) * weight for x in (q, erase))
    return *pairs, q * since_start, erase * since_start, k * weight[..., -1, :, None], since_start[..., -1, :]


def _vector_pairs(q: Tensor, erase: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    """As _scalar_pairs for one decay per channel: log_decay (..., C, K), C a power of two, the total decay (..., K)."""
    total = log_decay.exp()
    readers, k_decayed, half = torch.stack([q, erase]), k, 1
    pairs = (readers * k).sum(dim=-1)[..., None, None]  # (2, ..., C / half, half, half)
    readers = readers * total
    while half < q.shape[-2]:
        (early, late), (k_early, k_late) = halves(readers, half), halves(k_decayed, half)
        total_early, total_late = halves(total, 1)
        pairs = _block_triangular(pairs, scores(late, k_early))
        readers = joined(early, late * total_early)
        k_decayed = joined(k_early * total_late, k_late)
        total = (total_early * total_late).flatten(-3, -2)
        half *= 2
    return *pairs.squeeze(-3), *readers, k_decayed, total.squeeze(-2)


def _block_triangular(diagonal: Tensor, across: Tensor) -> Tensor:
    """(..., 2n, h, h) diagonal blocks and the (..., n, h, h) below them -> (..., n, 2h, 2h), 0 above."""
    early, late = diagonal.unflatten(-3, (diagonal.shape[-3] // 2, 2)).unbind(dim=-3)
    return torch.cat([F.pad(early, [0, early.shape[-1]]), torch.cat([across, late], dim=-1)], dim=-2)


def _carry(u: Tensor, erase: Tensor, k: Tensor, total: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks in sequence: (pseudo-values, the states before each chunk, the state after the last).

    u: (B, H, chunks, C, V), what the pseudo-values are for a state of zeros; erase: (B, H, chunks, C, K), what takes
    the state's part off them; k: decayed up to the chunk's end.
    """
    states, values = [], []
    for u_c, erase_c, k_c, total_c in zip(*(x.unbind(dim=2) for x in (u, erase, k, total)), strict=True):
        states.append(state)
        values.append(u_c - erase_c @ state)
        state = total_c[..., None] * state + k_c.transpose(-1, -2) @ values[-1]
    return torch.stack(values, dim=2), torch.stack(states, dim=2), state
