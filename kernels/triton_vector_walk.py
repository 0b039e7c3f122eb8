"""A walk along time for a vector decay, as a Triton kernel: forward for o and the states, in reverse for dv and dS.

    forward   o  = scale · S q,   S = diag(λ) S + v kᵀ        in reverse   dv = dS k,   dS = diag(λ) dS + scale · do qᵀ

What is surprising:
- Both directions are the same computation, with a reading side r (q, in reverse k), a writing side w (k, in reverse q) and rows
  y (v, in reverse do). Only the triangle of pairs and the direction of the decays differ.
- Decays inside a chunk count from the middle of the chunk's total decay, and the state is brought there: S̃ = 2^half S. Then
  out = r̃ S̃ + (r̃ w̃ᵀ) y and the next state is 2^half (S̃ + yᵀ w̃), with r̃ and w̃ decayed once. What is kept for the kernels that
  take all chunks at once is S̃, which spares them every scale per channel.
- Where some channel loses more than 2^-200 in a chunk, that channel's middle is moved so that no factor of the state overflows,
  the chunk is flagged, S is kept as it is, and `out` is nonsense that a second launch replaces.
Source: triton_vector.py launches it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_gate import LOG2_E, shared_key
from kernels.triton_vector_tiles import (
    after,
    around_middle,
    decay_halves,
    decay_sums,
    from_on,
    load_row,
    load_tile,
    log2_of,
    span_of,
    state_offsets,
    store_tile,
    up_to,
)


@triton.jit(do_not_specialize=["T", "H", "segments", "length", "chunks"])
def walk_kernel(
    r, w, y, x, gain, offset, out, first_state, last_state, totals, states, flags, spans, scale, slope, T, H, segments, length,
    chunks, r_b, r_t, r_h, w_b, w_t, w_h, y_b, y_t, y_h, x_b, x_t, x_h,
    REVERSE: tl.constexpr, MIDDLE: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, RANGE: tl.constexpr,
    FINE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    STAGES: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One program walks along one head's span with a (BV, BK) tile of the state in registers; `out` only where BK is all of K.

    states: kept before each chunk (in reverse: after), S̃ with MIDDLE and S without; None keeps none. flags: one row per piece
    of K. totals: the decay over the whole span. FINE: digits of fp32 inputs are kept.
    """
    b, h, span, start, count, chunk = span_of(spans, T, H, segments, length, C)
    first_value = tl.program_id(1) * BV
    first_key = tl.program_id(2) * BK
    steps = tl.cdiv(count, C)
    first = 0
    step = 1
    if REVERSE:
        first = steps - 1
        step = -1
        start += first * C
        chunk += first
    if r is not None:
        r += b * r_b + h * r_h + start * r_t
    if w is not None:
        w += b * w_b + h * w_h + start * w_t
    y += b * y_b + h * y_h + start * y_t
    x += b * x_b + h * x_h + start * x_t
    if out is not None:
        out += ((b * T + start) * H + h) * V
    if states is not None:
        states += (chunk * H + h) * (K * V)
    if flags is not None:
        flags += (tl.program_id(2) * chunks + chunk) * H + h
    tile_gain = load_row(gain if gain is None else gain + h * K, first_key, 1.0, K, BK)
    tile_offset = load_row(offset if offset is None else offset + h * K, first_key, 0.0, K, BK)
    values, keys, inside = state_offsets(first_value, first_key, V, K, BV, BK)
    if first_state is not None:
        state = tl.load(first_state + span * (K * V) + keys * V + values, mask=inside, other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    if totals is not None:
        log2_total = tl.zeros([BK], tl.float32)
    for n in tl.range(0, steps, num_stages=STAGES):
        left = count - (first + step * n) * C
        tile_x = load_tile(x, x_t, first_key, left, C, K, BK)
        log2 = log2_of(tile_x, tile_gain, tile_offset, slope, first_key, left, KIND, C, K, BK)
        high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
        d = decay_sums(around_middle(C), high, low, ONE_HALF, LP)
        if ONE_HALF:
            half = tl.sum(high.to(tl.float32), 0) * (0.5 * LOG2_E)
        else:
            half = tl.sum(log2, 0) * 0.5
        # The exponents of the state's decay to the middle and from there on: equal but for a steep channel.
        steep = tl.min(half, 0) < -RANGE
        beyond = tl.maximum(half, -RANGE)
        before = 2 * half - beyond
        if REVERSE:
            d += (half - beyond)[None, :]
        else:
            d = (half - beyond)[None, :] - d
        if FINE:
            # Of a steep channel d is the small difference of large sums, which fp32 inputs would show.
            if steep:
                d = decay_sums(up_to(C) if REVERSE else after(C), high, low, ONE_HALF, LP)
                before = 2 * half
                beyond = tl.zeros_like(half)
        if w is not None:
            tile_w = load_tile(w, w_t, first_key, left, C, K, BK).to(tl.float32)
        else:
            tile_w = shared_key(log2)
        if REVERSE:
            tile_w *= scale
        tile_w = (tile_w * tl.exp2(d)).to(LP)
        tile_y = load_tile(y, y_t, first_value, left, C, V, BV).to(LP)
        if states is not None:
            tl.store(flags, steep.to(tl.int8))
            flags += step * H
            if MIDDLE:
                state *= tl.exp2(tl.where(steep, 0.0, before))[None, :]
            tl.store(states + values * K + keys, state.to(states.dtype.element_ty), mask=inside)
            states += step * H * (K * V)
        else:
            state *= tl.exp2(before)[None, :]
        if out is not None:
            if r is not None:
                tile_r = load_tile(r, r_t, first_key, left, C, K, BK).to(tl.float32)
            else:
                tile_r = shared_key(log2)
            if not REVERSE:
                tile_r *= scale
            tile_r = (tile_r * tl.exp2(-d)).to(LP)
            pairs = tl.dot(tile_r, tl.trans(tile_w), input_precision=IP)
            pairs = tl.where(from_on(C) if REVERSE else up_to(C), pairs, 0.0).to(LP)
            rows = tl.dot(tile_r, tl.trans(state.to(LP)), input_precision=IP)
            rows = tl.dot(pairs, tile_y, rows, input_precision=IP)
            store_tile(out, H * V, first_value, left, rows, C, V, BV)
            out += step * C * H * V
        if states is not None:
            if MIDDLE:
                if steep:
                    state *= tl.exp2(before)[None, :]
            else:
                state *= tl.exp2(before)[None, :]
        state = tl.dot(tl.trans(tile_y), tile_w, state, input_precision=IP) * tl.exp2(beyond)[None, :]
        if r is not None:
            r += step * C * r_t
        if w is not None:
            w += step * C * w_t
        y += step * C * y_t
        x += step * C * x_t
        if totals is not None:
            log2_total += 2 * half
    if last_state is not None:
        tl.store(last_state + span * (K * V) + keys * V + values, state, mask=inside)
    if totals is not None:
        if tl.program_id(1) == 0:
            columns = first_key + tl.arange(0, BK)
            tl.store(totals + span * K + columns, tl.exp2(log2_total), mask=columns < K)


@triton.jit(do_not_specialize=["H", "segments"])
def carry_kernel(
    added, totals, outside, last, bounds, H, segments, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Puts the state from which each segment starts in the place of what it adds; in reverse, the gradient at its end."""
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < K * V
    sequence = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    here = tl.program_id(0).to(tl.int64) * (K * V) + entry
    if bounds is not None:
        first = tl.load(bounds + sequence)
        count = tl.load(bounds + sequence + 1) - first
    else:
        first = sequence * segments
        count = segments
    state = tl.zeros([BLOCK], tl.float32) if outside is None else tl.load(outside + here, mask=inside, other=0.0)
    for n in tl.range(0, count, num_stages=4):
        span = first + (count - 1 - n if REVERSE else n)
        span = tl.cast(span, tl.int64) * H + h
        own = tl.load(added + span * (K * V) + entry, mask=inside, other=0.0)
        total = tl.load(totals + span * K + entry // V, mask=inside, other=0.0)
        tl.store(added + span * (K * V) + entry, state, mask=inside)
        state = state * total + own
    if last is not None:
        tl.store(last + here, state, mask=inside)
