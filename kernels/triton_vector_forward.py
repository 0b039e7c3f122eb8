"""The forward pass of a vector decay, as Triton kernels: walks along the chunks, and all chunks at once where states are known.

What is surprising: the kernel that walks with states makes those of the forward pass from (k, v) and, in reverse, their
gradients from (q, do). A flagged chunk's outputs are made again with blocks of one token.
Source: triton_vector.py says how, and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_gate import shared_key
from kernels.triton_vector_tiles import (
    HALF_RANGE,
    after,
    around_middle,
    chunk_of,
    decay_halves,
    decay_sums,
    flagged,
    last_row,
    load_row,
    load_tile,
    log2_of,
    merging,
    same_block,
    span_of,
    state_offsets,
    store_tile,
    up_to,
)


@triton.jit
def _pair_weights(
    q, k, d, high, low, ONE_HALF: tl.constexpr, C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """A_ij = Σ_d q_i k_j λ_{j+1}…λ_i for i >= j. q and k in fp32; d from around_middle."""
    queries = (q * tl.exp2(d)).to(LP)
    keys = (k * tl.exp2(-d)).to(LP)
    a = tl.dot(queries, tl.trans(keys), input_precision=IP)
    a = tl.where(up_to(C) & same_block(C, BASE), a, 0.0)
    for level in range(BASE, LOGC):
        late, weights, pairs = merging(level, C)
        x = (tl.where(late, q, k) * tl.exp2(decay_sums(weights, high, low, ONE_HALF, LP))).to(LP)
        a += tl.where(up_to(C) & pairs, tl.dot(x, tl.trans(x), input_precision=IP), 0.0)
    return a


@triton.jit(do_not_specialize=["T", "H", "segments", "length"])
def forward_kernel(
    q, k, v, x, gain, offset, o, initial, final, states, flags, spans, scale, slope, T, H, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, EVERY: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr, STAGES: tl.constexpr, LP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """One program walks along one head's span with BV columns of the state in registers, and keeps every EVERYth state."""
    b, h, span, start, count, kept = span_of(spans, T, H, segments, length, C * EVERY)
    first_value = tl.program_id(1) * BV
    q += b * q_b + h * q_h + start * q_t
    if k is not None:
        k += b * k_b + h * k_h + start * k_t
    v += b * v_b + h * v_h + start * v_t
    x += b * x_b + h * x_h + start * x_t
    o += ((b * T + start) * H + h) * V
    if states is not None:
        states += (kept * H + h) * (K * V)
    flags += kept * EVERY * H + h
    tile_gain = load_row(gain if gain is None else gain + h * K, 0, 1.0, K, BK)
    tile_offset = load_row(offset if offset is None else offset + h * K, 0, 0.0, K, BK)
    row, col, inside = state_offsets(first_value, 0, V, K, BV, BK)
    if initial is not None:
        state = tl.load(initial + span * (K * V) + col * V + row, mask=inside, other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    for c in tl.range(0, tl.cdiv(count, C), num_stages=STAGES):
        left = count - c * C
        tile_q = load_tile(q, q_t, 0, left, C, K, BK)
        if k is not None:
            tile_k = load_tile(k, k_t, 0, left, C, K, BK).to(tl.float32)
        tile_v = load_tile(v, v_t, first_value, left, C, V, BV).to(LP)
        tile_x = load_tile(x, x_t, 0, left, C, K, BK)
        log2 = log2_of(tile_x, tile_gain, tile_offset, slope, 0, left, KIND, C, K, BK)
        if states is not None:
            tl.store(states + row * K + col, state.to(states.dtype.element_ty), mask=inside & (c % EVERY == 0))
        high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
        tile_q = tile_q.to(tl.float32) * scale
        if k is None:
            tile_k = shared_key(log2)
        since = decay_sums(up_to(C), high, low, ONE_HALF, LP)
        total = last_row(since, C)
        if BASE == LOGC:
            # Where a channel is too steep, the chunk's pairs come out as nonsense and are left to the exact launch.
            middle = tl.maximum(0.5 * total, -HALF_RANGE)[None, :]
            queries = tile_q * tl.exp2(since - middle)
            keys = tile_k * tl.exp2(middle - since)
            steep = tl.min(total, 0) < -2 * HALF_RANGE
            a = tl.dot(queries.to(LP), tl.trans(keys.to(LP)), input_precision=IP)
            a = tl.where(up_to(C), a, 0.0)
            queries *= tl.exp2(middle)
            keys = tile_k * tl.exp2(total[None, :] - since)
        else:
            d = decay_sums(around_middle(C, BASE), high, low, ONE_HALF, LP)
            steep = tl.max(tl.max(tl.abs(d), 1), 0) > HALF_RANGE
            a = _pair_weights(tile_q, tile_k, d, high, low, ONE_HALF, C, BASE, LOGC, LP, IP)
            queries = tile_q * tl.exp2(since)
            keys = tile_k * tl.exp2(total[None, :] - since)
        if LP == tl.float32:  # noqa: SIM300
            # total - since loses the last digits where a chunk forgets much
            keys = tile_k * tl.exp2(decay_sums(after(C), high, low, ONE_HALF, LP))
        tl.store(flags + c * H, steep.to(tl.int8))
        a = tl.where(steep, 0.0, a)
        out = tl.dot(queries.to(LP), tl.trans(state.to(LP)), input_precision=IP)
        out = tl.dot(a.to(LP), tile_v, out, input_precision=IP)
        store_tile(o, H * V, first_value, left, out, C, V, BV)
        state = tl.dot(tl.trans(tile_v), keys.to(LP), state * tl.exp2(total)[None, :], input_precision=IP)
        q += C * q_t
        if k is not None:
            k += C * k_t
        v += C * v_t
        x += C * x_t
        o += C * H * V
        if states is not None:
            states += tl.where(c % EVERY == EVERY - 1, H * K * V, 0)
    if final is not None:
        tl.store(final + span * (K * V) + col * V + row, state, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "segments", "length", "chunks"])
def states_kernel(
    a, y, x, gain, offset, first_state, last_state, totals, states, flags, spans, scale, slope, T, H, segments, length, chunks,
    a_b, a_t, a_h, y_b, y_t, y_h, x_b, x_t, x_h,
    REVERSE: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr, STAGES: tl.constexpr, LP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """States before each chunk from (k, v), or, in reverse, state gradients after each chunk from (q, do); a is scaled.

    With `totals` no state is kept but the last, and the decay over the whole span is.
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
    if a is not None:
        a += b * a_b + h * a_h + start * a_t
    y += b * y_b + h * y_h + start * y_t
    x += b * x_b + h * x_h + start * x_t
    if totals is None:
        states += (chunk * H + h) * (K * V)
    if flags is not None:
        # one row of flags per piece of K: a program writes what it has seen
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
        if a is not None:
            tile_a = load_tile(a, a_t, first_key, left, C, K, BK).to(tl.float32)
        tile_y = load_tile(y, y_t, first_value, left, C, V, BV).to(LP)
        tile_x = load_tile(x, x_t, first_key, left, C, K, BK)
        log2 = log2_of(tile_x, tile_gain, tile_offset, slope, first_key, left, KIND, C, K, BK)
        if totals is None:
            tl.store(states + values * K + keys, state.to(states.dtype.element_ty), mask=inside)
        high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
        if flags is not None:
            if BASE == LOGC:
                steep = tl.min(tl.sum(log2, 0), 0) < -2 * HALF_RANGE
            else:
                d = decay_sums(around_middle(C, BASE), high, low, ONE_HALF, LP)
                steep = tl.max(tl.max(tl.abs(d), 1), 0) > HALF_RANGE
            tl.store(flags + step * n * H, steep.to(tl.int8))
        weights = up_to(C) if REVERSE else after(C)
        decay = tl.exp2(decay_sums(weights, high, low, ONE_HALF, LP)) * scale
        if a is None:
            tile_a = shared_key(log2)
        update = (tile_a * decay).to(LP)
        total = tl.sum(log2, 0)
        state = tl.dot(tl.trans(tile_y), update, state * tl.exp2(total)[None, :], input_precision=IP)
        if a is not None:
            a += step * C * a_t
        y += step * C * y_t
        x += step * C * x_t
        if totals is None:
            states += step * H * (K * V)
        else:
            log2_total += total
    if last_state is not None:
        tl.store(last_state + span * (K * V) + keys * V + values, state, mask=inside)
    if totals is not None:  # noqa: SIM102
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


@triton.jit
def _outputs_of_chunk(
    q, k, v, x, gain, offset, o, states, scale, slope, left, first_value, q_t, k_t, v_t, x_t, o_t,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One chunk's o from the state before it. Without states, what `o` holds stands for the state's part."""
    a = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BV], tl.float32)
    if states is None:
        out += load_tile(o, o_t, first_value, left, C, V, BV).to(tl.float32)
    for first_key in range(0, K, BK):
        tile_x = load_tile(x, x_t, first_key, left, C, K, BK)
        tile_gain = load_row(gain, first_key, 1.0, K, BK)
        tile_offset = load_row(offset, first_key, 0.0, K, BK)
        log2 = log2_of(tile_x, tile_gain, tile_offset, slope, first_key, left, KIND, C, K, BK)
        high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
        tile_q = load_tile(q, q_t, first_key, left, C, K, BK).to(tl.float32) * scale
        tile_k = shared_key(log2) if k is None else load_tile(k, k_t, first_key, left, C, K, BK).to(tl.float32)
        since = decay_sums(up_to(C), high, low, ONE_HALF, LP)
        if BASE == LOGC:
            half = 0.5 * last_row(since, C)[None, :]
            tile_q *= tl.exp2(since - half)
            tile_k *= tl.exp2(half - since)
            a = tl.dot(tile_q.to(LP), tl.trans(tile_k.to(LP)), a, input_precision=IP)
            queries = tile_q * tl.exp2(half)
        else:
            d = decay_sums(around_middle(C, BASE), high, low, ONE_HALF, LP)
            a += _pair_weights(tile_q, tile_k, d, high, low, ONE_HALF, C, BASE, LOGC, LP, IP)
            queries = tile_q * tl.exp2(since)
        if states is not None:
            row, col, inside = state_offsets(first_value, first_key, V, K, BV, BK)
            state = tl.load(states + row * K + col, mask=inside, other=0.0).to(LP)
            out = tl.dot(queries.to(LP), tl.trans(state), out, input_precision=IP)
    if BASE == LOGC:
        a = tl.where(up_to(C), a, 0.0)
    tile_v = load_tile(v, v_t, first_value, left, C, V, BV).to(LP)
    out = tl.dot(a.to(LP), tile_v, out, input_precision=IP)
    store_tile(o, o_t, first_value, left, out, C, V, BV)


@triton.jit
def _outputs_at(
    q, k, v, x, gain, offset, o, states, scale, slope, T, H, chunk, b, h, start, left,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    if k is not None:
        k += b * k_b + h * k_h + start * k_t
    if gain is not None:
        gain += h * K
    if offset is not None:
        offset += h * K
    if states is not None:
        states += (chunk * H + h) * (K * V)
    _outputs_of_chunk(
        q + b * q_b + h * q_h + start * q_t, k, v + b * v_b + h * v_h + start * v_t, x + b * x_b + h * x_h + start * x_t,
        gain, offset, o + ((b * T + start) * H + h) * V, states, scale, slope, left, tl.program_id(1) * BV,
        q_t, k_t, v_t, x_t, H * V, KIND, ONE_HALF, K, V, BK, BV, C, BASE, LOGC, LP, IP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def outputs_kernel(
    q, k, v, x, gain, offset, o, states, flags, table, scale, slope, T, H, chunks,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h,
    AGAIN: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    EVERY: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    BASE: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The outputs of every chunk that is not flagged, or, if AGAIN, of those of a group that are."""
    h = (tl.program_id(0) % H).to(tl.int64)
    first = (tl.program_id(0) // H).to(tl.int64) * GROUP
    if AGAIN:
        for n in range(0, tl.minimum(GROUP, chunks - first)):
            chunk = first + n
            b, start, left = chunk_of(table, chunk, T, C, EVERY)
            if left > 0:  # noqa: SIM102
                if flagged(flags, chunk, h, H, chunks, PIECES):
                    _outputs_at(
                        q, k, v, x, gain, offset, o, states, scale, slope, T, H, chunk, b, h, start, left,
                        q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h,
                        KIND, ONE_HALF, K, V, BK, BV, C, BASE, LOGC, LP, IP,
                    )  # fmt: skip
    else:
        b, start, left = chunk_of(table, first, T, C, EVERY)
        if left <= 0:
            return
        if flags is not None:  # noqa: SIM102
            if flagged(flags, first, h, H, chunks, PIECES):
                return
        _outputs_at(
            q, k, v, x, gain, offset, o, states, scale, slope, T, H, first, b, h, start, left,
            q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h,
            KIND, ONE_HALF, K, V, BK, BV, C, BASE, LOGC, LP, IP,
        )  # fmt: skip
