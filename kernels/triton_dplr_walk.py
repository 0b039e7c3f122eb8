"""The walks along time of general DPLR: a chunk is a linear map, and these multiply its tiles with the state and the values.

    forwards     r = W S + R v       o = Q S + O v               S ← Γ S + Aᵀ r + Kᵀ v
    in reverse   y = A dS            dv = K dS + Oᵀ do + Rᵀ y    dS ← Γ dS + Qᵀ do + Wᵀ y

with A and K the writers, W, R, Q and O as triton_dplr_prepare.py has them: the second line is the adjoint of the first.

What is surprising: the tiles of a chunk lie one after another and hold 0 past a sequence's end, so that no row is masked. They
are counted from the chunk's middle or its edges, and states are kept decayed to there.
Source: the launches are in triton_dplr.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_delta_vector_walk import get_block
from kernels.triton_scalar_tiles import first_slot, get_state, get_tile, locate, put_state, put_tile


@triton.jit
def _edges(totals, ck, K: tl.constexpr):
    """The decay from an edge to where tiles are counted from, and the rest of the chunk's total, as columns."""
    edge = tl.exp2(tl.load(totals + ck, mask=ck < K, other=0.0))
    rest = tl.exp2(tl.load(totals + K + ck, mask=ck < K, other=0.0))
    return edge[:, None], rest[:, None]


# fmt: off
@triton.jit(do_not_specialize=["tokens", "heads", "segments"])
def forward_kernel(
    state_reads, value_reads, state_outputs, value_outputs, writers_a, writers_k, totals, v, cu, initial, o, final, states,
    reads, tokens, heads, segments, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    LP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """segments: 1, or how many sequences are packed. o, final, states and reads (r) may be None."""
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    _, slice_v, batch, segment, head, start, count = locate(cu, heads, segments, tokens, tokens, 1, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    place = first_slot(cu, batch, segment, start, tokens, CHUNK) * heads + head
    v_base = v + batch * v_b + start * v_t + head * v_h
    v_offsets = rows[:, None] * v_t + cv[None, :]
    out_base = ((batch * tokens + start) * heads + head) * V
    out_offsets = rows[:, None] * (heads * V) + cv[None, :]
    span = (batch * segments + segment) * heads + head
    if initial is not None:
        state = get_state(initial + span * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for c in tl.range(0, tl.cdiv(count, CHUNK), num_stages=STAGES):
        left = count - c * CHUNK
        value = get_tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        of_state = get_block(state_reads + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        of_values = get_block(value_reads + place * (CHUNK * CHUNK), rows, rows, CHUNK, CHUNK, LP)
        writer_a = get_block(writers_a + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        writer_k = get_block(writers_k + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        edge, rest = _edges(totals + place * (2 * K), ck, K)
        state *= edge
        rounded = state.to(LP)
        if states is not None:
            put_state(states + place * (K * V), ck, cv, rounded, K, V, BLOCK_K, BLOCK_V)
        read = tl.dot(of_state, rounded, input_precision=PRECISION)
        read = tl.dot(of_values, value, read, input_precision=PRECISION)
        if reads is not None:
            put_tile(reads + out_base, out_offsets, rows, cv, left, read, V, BLOCK_V)
        if o is not None:
            of_state = get_block(state_outputs + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
            of_values = get_block(value_outputs + place * (CHUNK * CHUNK), rows, rows, CHUNK, CHUNK, LP)
            out = tl.dot(of_state, rounded, input_precision=PRECISION)
            out = tl.dot(of_values, value, out, input_precision=PRECISION)
            put_tile(o + out_base, out_offsets, rows, cv, left, out, V, BLOCK_V)
        state = tl.dot(tl.trans(writer_k), value, state * rest, input_precision=PRECISION)
        state = tl.dot(tl.trans(writer_a), read.to(LP), state, input_precision=PRECISION) * edge
        place += heads
        v_base += CHUNK * v_t
        out_base += CHUNK * heads * V
    if final is not None:
        put_state(final + span * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["tokens", "heads", "segments"])
def reverse_kernel(
    state_reads, value_reads, state_outputs, value_outputs, writers_a, writers_k, totals, d, cu, d_final, dv, d_reads,
    d_initial, d_states, tokens, heads, segments, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    LP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """d: the gradient of o; d_reads: y, and d_states: dS after each chunk, for the gradients. d_initial may be None."""
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    _, slice_v, batch, segment, head, start, count = locate(cu, heads, segments, tokens, tokens, 1, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    chunks = tl.cdiv(count, CHUNK)
    first = start + (chunks - 1) * CHUNK
    place = (first_slot(cu, batch, segment, start, tokens, CHUNK) + chunks - 1) * heads + head
    d_base = d + batch * d_b + first * d_t + head * d_h
    d_offsets = rows[:, None] * d_t + cv[None, :]
    out_base = ((batch * tokens + first) * heads + head) * V
    out_offsets = rows[:, None] * (heads * V) + cv[None, :]
    span = (batch * segments + segment) * heads + head
    if d_final is not None:
        state = get_state(d_final + span * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for c in tl.range(0, chunks, num_stages=STAGES):
        left = count - (chunks - 1 - c) * CHUNK
        dc = get_tile(d_base, d_offsets, rows, cv, left, V, BLOCK_V, LP)
        writer_a = get_block(writers_a + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        writer_k = get_block(writers_k + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        value_output = get_block(value_outputs + place * (CHUNK * CHUNK), rows, rows, CHUNK, CHUNK, LP)
        value_read = get_block(value_reads + place * (CHUNK * CHUNK), rows, rows, CHUNK, CHUNK, LP)
        state_output = get_block(state_outputs + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        state_read = get_block(state_reads + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        edge, rest = _edges(totals + place * (2 * K), ck, K)
        state *= edge
        rounded = state.to(LP)
        put_state(d_states + place * (K * V), ck, cv, rounded, K, V, BLOCK_K, BLOCK_V)
        d_read = tl.dot(writer_a, rounded, input_precision=PRECISION)
        put_tile(d_reads + out_base, out_offsets, rows, cv, left, d_read, V, BLOCK_V)
        d_read = d_read.to(LP)
        d_value = tl.dot(writer_k, rounded, input_precision=PRECISION)
        d_value = tl.dot(tl.trans(value_output), dc, d_value, input_precision=PRECISION)
        d_value = tl.dot(tl.trans(value_read), d_read, d_value, input_precision=PRECISION)
        put_tile(dv + out_base, out_offsets, rows, cv, left, d_value, V, BLOCK_V)
        state = tl.dot(tl.trans(state_output), dc, state * rest, input_precision=PRECISION)
        state = tl.dot(tl.trans(state_read), d_read, state, input_precision=PRECISION) * edge
        place -= heads
        d_base -= CHUNK * d_t
        out_base -= CHUNK * heads * V
    if d_initial is not None:
        put_state(d_initial + span * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)
# fmt: on
