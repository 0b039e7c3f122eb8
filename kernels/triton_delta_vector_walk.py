"""The walks along time of the delta rule with one decay per key channel: products of tiles that lie ready, and the state.

The equations are those of triton_delta_walk.py, in which Γ Q, Γ K and Γ_C/Γ K are now tiles of their own and A is loaded.

What is surprising: the tiles of a chunk lie one after another and hold 0 past a sequence's end, so that no row is masked. They
are counted from the chunk's middle or its edges, and states are kept decayed to there.
Source: triton_delta_vector_prepare.py makes the tiles; the launches are in triton_delta_vector.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_delta_solve import times_inverse
from kernels.triton_delta_vector_prepare import PLANES
from kernels.triton_scalar_tiles import first_slot, get_state, get_tile, locate, put_state, put_tile


@triton.jit
def get_block(base, rows, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LP: tl.constexpr):
    """A (chunk, BLOCK) tile whose rows lie one after another."""
    pointers = base + rows[:, None] * WIDTH + columns[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(pointers).to(LP)
    else:
        return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0).to(LP)


# fmt: off
@triton.jit(do_not_specialize=["tokens", "batches", "heads", "segments", "length"])
def vector_forward_kernel(
    queries, erasers, writers, scores, inverse, totals, gates, v, cu, initial, o, final, states, errors,
    tokens, batches, heads, segments, length, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    LP: tl.constexpr, PRECISION: tl.constexpr, WRITE: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr,
):
    """As triton_delta_walk.py's forward_kernel."""
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    _, slice_v, batch, segment, head, start, count = locate(cu, heads, segments, length, tokens, 1, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    chunks = tl.cdiv(count, CHUNK)
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
    for c in tl.range(0, chunks, num_stages=STAGES):
        left = count - c * CHUNK
        eraser = get_block(erasers + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        writer = get_block(writers + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        mc = tl.load(inverse + place * (CHUNK * CHUNK) + rows[:, None] * CHUNK + rows[None, :])
        value = get_tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP).to(tl.float32)
        beta = tl.load(gates + place * (PLANES * CHUNK) + rows)
        factor = tl.load(gates + place * (PLANES * CHUNK) + 2 * CHUNK)
        edge = tl.exp2(tl.load(totals + place * (2 * K) + ck, mask=ck < K, other=0.0))[:, None]
        rest_of_total = tl.exp2(tl.load(totals + place * (2 * K) + K + ck, mask=ck < K, other=0.0))[:, None]
        state *= edge
        rounded = state.to(LP)
        if states is not None:
            put_state(states + place * (K * V), ck, cv, rounded, K, V, BLOCK_K, BLOCK_V)
        recalled = tl.dot(eraser, rounded, input_precision=PRECISION)
        if WRITE:
            rest = (beta * factor)[:, None] * (value - recalled)
        else:
            rest = factor * value - (beta * factor)[:, None] * recalled
        recalled = times_inverse(mc, rest, recalled, LP, PRECISION)
        if WRITE:
            error = value - recalled
            u = (beta[:, None] * error).to(LP)
        else:
            error = -recalled
            u = (value + beta[:, None] * error).to(LP)
        if errors is not None:
            put_tile(errors + out_base, out_offsets, rows, cv, left, error, V, BLOCK_V)
        if o is not None:
            qc = get_block(queries + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
            score = get_block(scores + place * (CHUNK * CHUNK), rows, rows, CHUNK, CHUNK, LP)
            out = tl.dot(qc, rounded, input_precision=PRECISION)
            out = tl.dot(score, u, out, input_precision=PRECISION)
            put_tile(o + out_base, out_offsets, rows, cv, left, out, V, BLOCK_V)
        state = tl.dot(tl.trans(writer), u, state * rest_of_total, input_precision=PRECISION) * edge
        place += heads
        v_base += CHUNK * v_t
        out_base += CHUNK * heads * V
    if final is not None:
        if EACH:
            put_state(final + span * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)
        elif segment == segments - 1:
            put_state(final + (batch * heads + head) * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["tokens", "batches", "heads", "segments", "length"])
def vector_reverse_kernel(
    queries, erasers, writers, scores, inverse, totals, gates, d, cu, d_final, dr, d_initial, d_states,
    tokens, batches, heads, segments, length, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    LP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr,
):
    """As triton_delta_walk.py's reverse_kernel."""
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    _, slice_v, batch, segment, head, start, count = locate(cu, heads, segments, length, tokens, 1, SLICES_V)
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
        score = get_block(scores + place * (CHUNK * CHUNK), rows, rows, CHUNK, CHUNK, LP)
        writer = get_block(writers + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        mc = tl.load(inverse + place * (CHUNK * CHUNK) + rows[:, None] * CHUNK + rows[None, :])
        qc = get_block(queries + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        eraser = get_block(erasers + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        beta = tl.load(gates + place * (PLANES * CHUNK) + rows)
        factor = tl.load(gates + place * (PLANES * CHUNK) + 2 * CHUNK)
        edge = tl.exp2(tl.load(totals + place * (2 * K) + ck, mask=ck < K, other=0.0))[:, None]
        rest_of_total = tl.exp2(tl.load(totals + place * (2 * K) + K + ck, mask=ck < K, other=0.0))[:, None]
        state *= edge
        rounded = state.to(LP)
        put_state(d_states + place * (K * V), ck, cv, rounded, K, V, BLOCK_K, BLOCK_V)
        du = tl.dot(writer, rounded, input_precision=PRECISION)
        du = tl.dot(tl.trans(score), dc, du, input_precision=PRECISION)
        du = times_inverse(tl.trans(mc), (beta * -factor)[:, None] * du, du, LP, PRECISION)
        put_tile(dr + out_base, out_offsets, rows, cv, left, du, V, BLOCK_V)
        state = tl.dot(tl.trans(qc), dc, state * rest_of_total, input_precision=PRECISION)
        state = tl.dot(tl.trans(eraser), (du * -beta[:, None]).to(LP), state, input_precision=PRECISION) * edge
        place -= heads
        d_base -= CHUNK * d_t
        out_base -= CHUNK * heads * V
    if d_initial is not None:
        if EACH:
            put_state(d_initial + span * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)
        elif segment == 0:
            put_state(d_initial + (batch * heads + head) * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)
# fmt: on
