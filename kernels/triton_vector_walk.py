"""A walk along time for a vector decay, as a Triton kernel: forward for o and the states, in reverse for dv and dS.

    forward   o  = scale · S q,   S = diag(λ) S + v kᵀ        in reverse   dv = dS k,   dS = diag(λ) dS + scale · do qᵀ

What is surprising:
- Both directions are the same computation, with a reading side r (q, in reverse k), a writing side w (k, in reverse q) and rows
  y (v, in reverse do). Only the triangle of pairs and the direction of the decays differ.
- Decays inside a chunk count from the middle of the chunk's total decay, and the state is brought there: S̃ = 2^half S. Then
  out = r̃ S̃ + (r̃ w̃ᵀ) y and the next state is 2^half (S̃ + yᵀ w̃), with r̃ and w̃ decayed once. What is kept for the kernels that
  take all chunks at once is S̃, which spares them every scale per channel.
- What a token adds to the state goes in as two bf16 numbers, high digits and what they miss, at the price of one more product:
  the state is read by every result, and its rounding was the largest share of all errors.
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
    halves,
    load_row,
    load_tile,
    log2_of,
    span_of,
    state_offsets,
    store_tile,
    up_to,
)


@triton.jit
def _step(
    r, w, x, out, tile_y, state, rows, pairs, states, flags, gain, offset, scale, slope, left, first_value, first_key,
    r_t, w_t, x_t, out_t,
    FIRST: tl.constexpr, LAST: tl.constexpr, REVERSE: tl.constexpr, MIDDLE: tl.constexpr, KIND: tl.constexpr,
    ONE_HALF: tl.constexpr, RANGE: tl.constexpr, FINE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One chunk for BK keys: (the state after it, rows and pairs with these keys' share, log2 of half the decay).

    The FIRST tile of keys finds no rows and pairs; the LAST one puts pairs and y to the rows and stores them.
    """
    tile_x = load_tile(x, x_t, first_key, left, C, K, BK)
    log2 = log2_of(tile_x, gain, offset, slope, first_key, left, KIND, C, K, BK)
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
    tile_w, missed = halves(tile_w * tl.exp2(d), LP)
    if states is not None:
        tl.store(flags, steep.to(tl.int8))
        if MIDDLE:
            state *= tl.exp2(tl.where(steep, 0.0, before))[None, :]
        values, keys, inside = state_offsets(first_value, first_key, V, K, BV, BK)
        tl.store(states + values * K + keys, state.to(states.dtype.element_ty), mask=inside)
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
        if FIRST:
            pairs = tl.dot(tile_r, tl.trans(tile_w), input_precision=IP)
            rows = tl.dot(tile_r, tl.trans(state.to(LP)), input_precision=IP)
        else:
            pairs = tl.dot(tile_r, tl.trans(tile_w), pairs, input_precision=IP)
            rows = tl.dot(tile_r, tl.trans(state.to(LP)), rows, input_precision=IP)
        if LAST:
            causal = tl.where(from_on(C) if REVERSE else up_to(C), pairs, 0.0).to(LP)
            rows = tl.dot(causal, tile_y, rows, input_precision=IP)
            store_tile(out, out_t, first_value, left, rows, C, V, BV)
    if states is not None:
        if MIDDLE:
            if steep:
                state *= tl.exp2(before)[None, :]
        else:
            state *= tl.exp2(before)[None, :]
    if LP == tl.bfloat16:
        state = tl.dot(tl.trans(tile_y), missed, state)
    state = tl.dot(tl.trans(tile_y), tile_w, state, input_precision=IP) * tl.exp2(beyond)[None, :]
    return state, rows, pairs, half


@triton.jit
def _first(first_state, span, first_value, first_key, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    if first_state is None:
        return tl.zeros([BV, BK], tl.float32)
    else:
        values, keys, inside = state_offsets(first_value, first_key, V, K, BV, BK)
        return tl.load(first_state + span * (K * V) + keys * V + values, mask=inside, other=0.0)


@triton.jit
def _last(
    last_state, span, state, first_value, first_key, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr
):
    values, keys, inside = state_offsets(first_value, first_key, V, K, BV, BK)
    tl.store(last_state + span * (K * V) + keys * V + values, state, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "segments", "length", "chunks"])
def walk_kernel(
    r, w, y, x, gain, offset, out, first_state, last_state, totals, states, flags, spans, scale, slope, T, H, segments, length,
    chunks, r_b, r_t, r_h, w_b, w_t, w_h, y_b, y_t, y_h, x_b, x_t, x_h,
    REVERSE: tl.constexpr, MIDDLE: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, RANGE: tl.constexpr,
    FINE: tl.constexpr, TILES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, STAGES: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One program walks along one head's span with one or two (BV, BK) tiles of the state in registers; `out` only where they
    hold all of K.

    states: kept before each chunk (in reverse: after), S̃ with MIDDLE and S without; None keeps none. flags: one row per tile
    of K. totals: the decay over the whole span, in walks of one tile. FINE: digits of fp32 inputs are kept.
    """
    b, h, span, start, count, chunk = span_of(spans, T, H, segments, length, C)
    first_value = tl.program_id(1) * BV
    first_key = tl.program_id(2) * (TILES * BK)
    next_key = first_key + BK
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
        flags += (tl.program_id(2) * TILES * chunks + chunk) * H + h
    heads_gain = gain if gain is None else gain + h * K
    heads_offset = offset if offset is None else offset + h * K
    tile_gain = load_row(heads_gain, first_key, 1.0, K, BK)
    tile_offset = load_row(heads_offset, first_key, 0.0, K, BK)
    state = _first(first_state, span, first_value, first_key, V, K, BV, BK)
    if TILES == 2:
        next_gain = load_row(heads_gain, next_key, 1.0, K, BK)
        next_offset = load_row(heads_offset, next_key, 0.0, K, BK)
        next_state = _first(first_state, span, first_value, next_key, V, K, BV, BK)
    if totals is not None:
        log2_total = tl.zeros([BK], tl.float32)
    for n in tl.range(0, steps, num_stages=STAGES):
        left = count - (first + step * n) * C
        tile_y = load_tile(y, y_t, first_value, left, C, V, BV).to(LP)
        state, rows, pairs, half = _step(
            r, w, x, out, tile_y, state, 0.0, 0.0, states, flags, tile_gain, tile_offset, scale, slope, left, first_value,
            first_key, r_t, w_t, x_t, H * V, True, TILES == 1, REVERSE, MIDDLE, KIND, ONE_HALF, RANGE, FINE, K, V, BK, BV, C,
            LP, IP,
        )  # fmt: skip
        if TILES == 2:
            next_flags = flags if flags is None else flags + chunks * H
            next_state, rows, pairs, half = _step(
                r, w, x, out, tile_y, next_state, rows, pairs, states, next_flags, next_gain, next_offset, scale, slope, left,
                first_value, next_key, r_t, w_t, x_t, H * V, False, True, REVERSE, MIDDLE, KIND, ONE_HALF, RANGE, FINE, K, V,
                BK, BV, C, LP, IP,
            )  # fmt: skip
        if r is not None:
            r += step * C * r_t
        if w is not None:
            w += step * C * w_t
        y += step * C * y_t
        x += step * C * x_t
        if out is not None:
            out += step * C * H * V
        if states is not None:
            flags += step * H
            states += step * H * (K * V)
        if totals is not None:
            log2_total += 2 * half
    if last_state is not None:
        _last(last_state, span, state, first_value, first_key, V, K, BV, BK)
        if TILES == 2:
            _last(last_state, span, next_state, first_value, next_key, V, K, BV, BK)
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
