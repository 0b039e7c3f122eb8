"""The scan of dplr_scan_naive.py in chunks of plain torch: fast enough to train small models on a CPU, and exact for every
decay in [0, 1].

The idea: with r_t = S_{t-1}ᵀ b_t every token makes two writes, (k_t, v_t) and (a_t, r_t), and the recurrence is a plain decay
scan of both. Inside a chunk that starts from the state S, with Γ_t the product of the chunk's λ up to t,

    r_t = Sᵀ (Γ_{t-1} ⊙ b_t) + Σ_{s<t} L_ts r_s + N_ts v_s        L_ts = b_tᵀ (Γ_{t-1}/Γ_s ⊙ a_s), N_ts with k_s for a_s

so (I − L) r = (Γ b) S + N v, a triangular system that is solved for the values and for the readers Γ b at once, all chunks
side by side. Only r = r₀ + W S waits for the state before.

What is unusual: b reads before its own token's decay, which is a reader of the token before. Every decay is a product of λs
and nothing is divided or subtracted, so λ = 0 (log = -inf) and λ = 1 are exact. It is causal bit for bit.
Source: dplr_scan_naive.py is the definition; the pairs inside a chunk are merged as in decay_scan_chunked.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decay_scan_chunked import to_chunks
from kernels.decay_source import DecaySource
from kernels.delta_scan_chunked import CHUNK, _vector_pairs
from kernels.dplr_scan_naive import by_sequence, no_outputs, widened
from kernels.scan_arguments import check_dplr_scan


def dplr_scan_chunked(
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

    The arguments are those of dplr_scan_naive; `exact` asks for what holds here anyway. Packed sequences are done one after
    another, and cu_seqlens is read on the host. Differentiable in every tensor.
    """
    check_dplr_scan(q_bthk, k_bthk, v_bthv, a_bthk, b_bthk, decay, initial_state_bhkv, scale, cu_seqlens)
    tensors, state = widened(q_bthk, k_bthk, v_bthv, a_bthk, b_bthk, decay, initial_state_bhkv, scale, cu_seqlens)
    o_bthv, state = by_sequence(_scan, tensors, state, cu_seqlens)
    return o_bthv, state if output_final_state else None


def _scan(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    if length == 0:
        return no_outputs(q, k, v, a, b, log_decay), state
    size = min(CHUNK, 1 << (length - 1).bit_length())  # one token is not padded to a whole chunk
    # Padding tokens have k = a = b = 0 and λ = 1: they change neither outputs nor state.
    q, k, v, a, b, log_decay = (to_chunks(x, size) for x in (q, k, v, a, b, log_decay.expand(q.shape)))
    # Both writers along a new first axis; b reads after the token before, the chunk's first b from the state itself.
    before = F.pad(b[..., 1:, :], [0, 0, 0, 1])
    read, solve, q, readers, writers, total = _vector_pairs(q[None], before[None], torch.stack([a, k]), log_decay)
    readers = torch.cat([b[..., :1, :], readers[0][..., :-1, :]], dim=-2)
    lower, values = F.pad(solve[..., :-1, :], [0, 0, 1, 0])
    found = torch.linalg.solve_triangular(-lower, torch.cat([values @ v, readers], dim=-1), upper=False, unitriangular=True)
    r, readers = found.split([v.shape[-1], readers.shape[-1]], dim=-1)
    r, states, state = _carry(r, readers, v, *writers, total, state)
    o = q[0] @ states + read[0] @ r + read[1] @ v
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length], state


def _carry(
    r: Tensor, readers: Tensor, v: Tensor, a: Tensor, k: Tensor, total: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks in sequence: (what is read, the states before each chunk, the state after the last).

    r: (B, H, chunks, C, V), what is read for a state of zeros; readers: (B, H, chunks, C, K), what is read of the state beside
    it; a, k: decayed up to the chunk's end.
    """
    states, found = [], []
    for r_c, readers_c, v_c, a_c, k_c, total_c in zip(*(x.unbind(dim=2) for x in (r, readers, v, a, k, total)), strict=True):
        states.append(state)
        found.append(r_c + readers_c @ state)
        state = total_c[..., None] * state + a_c.transpose(-1, -2) @ found[-1] + k_c.transpose(-1, -2) @ v_c
    return torch.stack(found, dim=2), torch.stack(states, dim=2), state
