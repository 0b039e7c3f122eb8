"""The gradients of a vector decay, as Triton kernels: all chunks at once, from the states before and the gradients after each.

What is surprising: there are two versions of one chunk. The gentle one splits decays around the chunk's middle and is ordered
so that few tiles live at a time; the other works with smaller blocks, down to one token, and merges them level by level.
Source: triton_vector.py says how, and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_gate import input_gradient, lambda_of, shared_key
from kernels.triton_vector_tiles import (
    HALF_RANGE,
    after,
    around_middle,
    chunk_of,
    crossing,
    decay_halves,
    decay_sums,
    flagged,
    from_on,
    halves,
    last_row,
    load_row,
    load_tile,
    log2_of,
    mask_of,
    merging,
    rounded,
    same_block,
    state_offsets,
    store_tile,
    sums,
    up_to,
)


@triton.jit
def _store_decay_gradient(
    d_log, tile_dk, x, gain, offset, dx, dgain, doffset, slope, left, first_key, x_t, dx_t, SHARED: tl.constexpr,
    KIND: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """From the gradient of log λ to those of x and, summed over the chunk, of gain and offset. Loads x once more."""
    tile_x = load_tile(x, x_t, first_key, left, C, K, BK).to(tl.float32)
    tile_gain = load_row(gain, first_key, 1.0, K, BK)
    tile_offset = load_row(offset, first_key, 0.0, K, BK)
    log2 = log2_of(tile_x, tile_gain, tile_offset, slope, first_key, left, KIND, C, K, BK)
    if SHARED:
        d_log -= lambda_of(tile_x, tile_offset, slope, log2, KIND) * tile_dk  # k = 1 - λ
    d_x, d_gain, d_offset = input_gradient(d_log, tile_x, tile_gain, tile_offset, slope, log2, KIND)
    store_tile(dx, dx_t, first_key, left, d_x, C, K, BK)
    columns = first_key + tl.arange(0, BK)
    here = mask_of(first_key, left, C, K, BK)
    if dgain is not None:
        tl.store(dgain + columns, tl.sum(tl.where(here, d_gain, 0.0), 0), mask=columns < K)
    if doffset is not None:
        tl.store(doffset + columns, tl.sum(tl.where(here, d_offset, 0.0), 0), mask=columns < K)


@triton.jit
def _add_to_dv(
    dv, dv_t, first_key, first_value, left, tile_dv, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """The first piece of K finds nothing there; the others add their shares, one launch after another."""
    if K > BK:  # noqa: SIM102
        if first_key > 0:
            tile_dv += load_tile(dv, dv_t, first_value, left, C, V, BV).to(tl.float32)
    store_tile(dv, dv_t, first_value, left, tile_dv, C, V, BV)


@triton.jit
def _gentle_gradients(
    q, k, v, x, gain, offset, do, dq, dk, dv, dx, dgain, doffset, states, dstates, scale, slope, left, first_key,
    q_t, k_t, v_t, x_t, do_t, dk_t, dv_t,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """What _gradients_of_chunk does, where the chunk is one block; ordered so that few tiles live at a time."""
    # All loads first: one wait for memory.
    row, col, inside = state_offsets(0, first_key, V, K, BV, BK)
    tile_v = load_tile(v, v_t, 0, left, C, V, BV).to(LP)
    tile_do = load_tile(do, do_t, 0, left, C, V, BV).to(LP)
    state = tl.load(states + row * K + col, mask=inside, other=0.0)
    dstate = tl.load(dstates + row * K + col, mask=inside, other=0.0)
    tile_x = load_tile(x, x_t, first_key, left, C, K, BK)
    queries = load_tile(q, q_t, first_key, left, C, K, BK)
    if k is not None:
        keys = load_tile(k, k_t, first_key, left, C, K, BK).to(tl.float32)
    tile_gain = load_row(gain, first_key, 1.0, K, BK)
    tile_offset = load_row(offset, first_key, 0.0, K, BK)
    log2 = log2_of(tile_x, tile_gain, tile_offset, slope, first_key, left, KIND, C, K, BK)
    if k is None:
        keys = shared_key(log2)

    across = tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
    high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
    d = decay_sums(up_to(C), high, low, ONE_HALF, LP)
    half = 0.5 * last_row(d, C)
    total_decay = tl.exp2(2 * half)
    half = tl.maximum(half, -HALF_RANGE)  # changed by a steep channel only: see forward_kernel
    edge = tl.exp2(half)
    d -= half[None, :]
    queries = rounded(queries.to(tl.float32) * (tl.exp2(d) * scale), LP)
    keys = rounded(keys * tl.exp2(-d), LP)

    tile_dq = tl.dot(tile_do, state.to(LP), input_precision=IP)
    pairs = tl.dot(tile_do, tl.trans(tile_v), input_precision=IP)
    for first_value in tl.static_range(BV, V, BV):
        tile_v = load_tile(v, v_t, first_value, left, C, V, BV).to(LP)
        tile_do = load_tile(do, do_t, first_value, left, C, V, BV).to(LP)
        row, col, inside = state_offsets(first_value, first_key, V, K, BV, BK)
        state = tl.load(states + row * K + col, mask=inside, other=0.0)
        dstate = tl.load(dstates + row * K + col, mask=inside, other=0.0)
        across += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
        tile_dq = tl.dot(tile_do, state.to(LP), tile_dq, input_precision=IP)
        pairs = tl.dot(tile_do, tl.trans(tile_v), pairs, input_precision=IP)
    pairs = tl.where(up_to(C), pairs, 0.0).to(LP)
    tile_dq = tl.dot(pairs, keys, tile_dq * edge[None, :], input_precision=IP)
    store_tile(dq, dk_t, first_key, left, tile_dq * (tl.exp2(d) * scale), C, K, BK)
    gained = queries.to(tl.float32) * tile_dq

    pairs = tl.zeros([C, C], tl.float32)
    tile_dk = tl.zeros([C, BK], tl.float32)
    for first_value in tl.static_range(0, V, BV):
        if V > BV:
            tile_v = load_tile(v, v_t, first_value, left, C, V, BV).to(LP)
            tile_do = load_tile(do, do_t, first_value, left, C, V, BV).to(LP)
            row, col, inside = state_offsets(first_value, first_key, V, K, BV, BK)
            dstate = tl.load(dstates + row * K + col, mask=inside, other=0.0)
        tile_dk = tl.dot(tile_v, dstate.to(LP), tile_dk, input_precision=IP)
        pairs = tl.dot(tile_v, tl.trans(tile_do), pairs, input_precision=IP)
    pairs = tl.where(from_on(C), pairs, 0.0).to(LP)
    tile_dk *= edge[None, :]
    total = total_decay * across + tl.sum(keys.to(tl.float32) * tile_dk, 0)
    tile_dk = tl.dot(pairs, queries, tile_dk, input_precision=IP)
    gained -= keys.to(tl.float32) * tile_dk
    tile_dk *= tl.exp2(-d)
    if k is not None:
        store_tile(dk, dk_t, first_key, left, tile_dk, C, K, BK)

    high, low = halves(gained, LP)
    d_log = sums(from_on(C), high, low, LP) + total[None, :]
    _store_decay_gradient(
        d_log, tile_dk, x, gain, offset, dx, dgain, doffset, slope, left, first_key, x_t, dk_t, k is None, KIND, C, K, BK
    )

    a = tl.dot(keys, tl.trans(queries), input_precision=IP)
    a = tl.where(from_on(C), a, 0.0).to(LP)
    decayed = (keys.to(tl.float32) * edge[None, :]).to(LP)
    for first_value in tl.static_range(0, V, BV):
        if V > BV:
            tile_do = load_tile(do, do_t, first_value, left, C, V, BV).to(LP)
            row, col, inside = state_offsets(first_value, first_key, V, K, BV, BK)
            dstate = tl.load(dstates + row * K + col, mask=inside, other=0.0)
        tile_dv = tl.dot(decayed, tl.trans(dstate.to(LP)), input_precision=IP)
        tile_dv = tl.dot(a, tile_do, tile_dv, input_precision=IP)
        _add_to_dv(dv, dv_t, first_key, first_value, left, tile_dv, C, K, V, BK, BV)


@triton.jit
def _gradients_of_chunk(
    q, k, v, x, gain, offset, do, dq, dk, dv, dx, dgain, doffset, states, dstates, scale, slope, left, first_key,
    q_t, k_t, v_t, x_t, do_t, dk_t, dv_t,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One chunk's dq, dk and decay's gradients for BK channels, and their share of its dv.

    The gradient of log λ_t is summed over the pairs that t lies between, and over no other that would have to cancel.
    """
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    tile_x = load_tile(x, x_t, first_key, left, C, K, BK)
    tile_gain = load_row(gain, first_key, 1.0, K, BK)
    tile_offset = load_row(offset, first_key, 0.0, K, BK)
    log2 = log2_of(tile_x, tile_gain, tile_offset, slope, first_key, left, KIND, C, K, BK)
    high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
    # dA = do vᵀ and its transpose, and what comes through the states
    pairs = tl.zeros([C, C], tl.float32)
    pairs_t = tl.zeros([C, C], tl.float32)
    dq_state = tl.zeros([C, BK], tl.float32)
    dk_state = tl.zeros([C, BK], tl.float32)
    across = tl.zeros([BK], tl.float32)
    for first_value in range(0, V, BV):
        tile_v = load_tile(v, v_t, first_value, left, C, V, BV).to(LP)
        tile_do = load_tile(do, do_t, first_value, left, C, V, BV).to(LP)
        values, keys, inside = state_offsets(first_value, first_key, V, K, BV, BK)
        state = tl.load(states + values * K + keys, mask=inside, other=0.0)
        dstate = tl.load(dstates + values * K + keys, mask=inside, other=0.0)
        across += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
        pairs = tl.dot(tile_do, tl.trans(tile_v), pairs, input_precision=IP)
        pairs_t = tl.dot(tile_v, tl.trans(tile_do), pairs_t, input_precision=IP)
        dq_state = tl.dot(tile_do, state.to(LP), dq_state, input_precision=IP)
        dk_state = tl.dot(tile_v, dstate.to(LP), dk_state, input_precision=IP)
    tile_q = load_tile(q, q_t, first_key, left, C, K, BK).to(tl.float32) * scale
    tile_k = shared_key(log2) if k is None else load_tile(k, k_t, first_key, left, C, K, BK).to(tl.float32)
    # through the state before the chunk and the state after it
    decay = tl.exp2(decay_sums(up_to(C), high, low, ONE_HALF, LP))
    tile_dq = decay * dq_state
    d_log = tl.dot(from_on(C).to(LP), (tile_q * tile_dq).to(LP), input_precision=IP)
    decay = tl.exp2(decay_sums(after(C), high, low, ONE_HALF, LP))
    tile_dk = decay * dk_state
    d_log = tl.dot((i > j).to(LP), (tile_k * tile_dk).to(LP), d_log, input_precision=IP)
    d_log += (tl.exp2(tl.sum(log2, 0)) * across)[None, :]
    decayed = (tile_k * decay).to(LP)
    # pairs within a block: in blocks of one token i = j, which gives d_log nothing
    d = decay_sums(around_middle(C, BASE), high, low, ONE_HALF, LP)
    decay = tl.exp2(d)
    growth = tl.exp2(-d)
    queries = rounded(tile_q * decay, LP)
    keys_ = rounded(tile_k * growth, LP)
    block = same_block(C, BASE)
    dq_block = tl.dot(tl.where((i >= j) & block, pairs, 0.0).to(LP), keys_, input_precision=IP)
    dk_block = tl.dot(tl.where((i <= j) & block, pairs_t, 0.0).to(LP), queries, input_precision=IP)
    tile_dq += decay * dq_block
    tile_dk += growth * dk_block
    if BASE > 0:
        gained = queries.to(tl.float32) * dq_block - keys_.to(tl.float32) * dk_block
        gained_high, gained_low = halves(gained, LP)
        d_log += sums(from_on(C) & block, gained_high, gained_low, LP)
    a = tl.where((i <= j) & block, tl.dot(keys_, tl.trans(queries), input_precision=IP), 0.0)
    # pairs across blocks, level by level
    for level in range(BASE, LOGC):
        late, weights, across_blocks = merging(level, C)
        decay = tl.exp2(decay_sums(weights, high, low, ONE_HALF, LP))
        both = rounded(tl.where(late, tile_q, tile_k) * decay, LP)
        d_both = tl.where(across_blocks, tl.where(i > j, pairs, pairs_t), 0.0).to(LP)
        d_both = tl.dot(d_both, both, input_precision=IP)
        tile_dq += tl.where(late, decay * d_both, 0.0)
        tile_dk += tl.where(late, 0.0, decay * d_both)
        d_both *= both.to(tl.float32)
        d_log = tl.dot(crossing(level, C).to(LP), d_both.to(LP), d_log, input_precision=IP)
        a += tl.where(across_blocks & (i < j), tl.dot(both, tl.trans(both), input_precision=IP), 0.0)
    store_tile(dq, dk_t, first_key, left, tile_dq * scale, C, K, BK)
    if k is not None:
        store_tile(dk, dk_t, first_key, left, tile_dk, C, K, BK)
    _store_decay_gradient(
        d_log, tile_dk, x, gain, offset, dx, dgain, doffset, slope, left, first_key, x_t, dk_t, k is None, KIND, C, K, BK
    )
    a = a.to(LP)
    for first_value in range(0, V, BV):
        tile_do = load_tile(do, do_t, first_value, left, C, V, BV).to(LP)
        values, keys, inside = state_offsets(first_value, first_key, V, K, BV, BK)
        dstate = tl.load(dstates + values * K + keys, mask=inside, other=0.0)
        tile_dv = tl.dot(decayed, tl.trans(dstate.to(LP)), input_precision=IP)
        tile_dv = tl.dot(a, tile_do, tile_dv, input_precision=IP)
        _add_to_dv(dv, dv_t, first_key, first_value, left, tile_dv, C, K, V, BK, BV)


@triton.jit
def _gradients_at(
    q, k, v, x, gain, offset, do, dq, dk, dv, dx, dgain, doffset, states, dstates, scale, slope, T, H, chunk, b, h, start, left,
    first_key, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, do_b, do_t, do_h,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    row = (b * T + start) * H + h
    tile = chunk * H + h
    q += b * q_b + h * q_h + start * q_t
    v += b * v_b + h * v_h + start * v_t
    x += b * x_b + h * x_h + start * x_t
    do += b * do_b + h * do_h + start * do_t
    dq += row * K
    dx += row * K
    dv += row * V
    if k is not None:
        k += b * k_b + h * k_h + start * k_t
        dk += row * K
    if gain is not None:
        gain += h * K
    if offset is not None:
        offset += h * K
    if dgain is not None:
        dgain += tile * K
    if doffset is not None:
        doffset += tile * K
    states += tile * (K * V)
    dstates += tile * (K * V)
    if BASE == LOGC:
        _gentle_gradients(
            q, k, v, x, gain, offset, do, dq, dk, dv, dx, dgain, doffset, states, dstates, scale, slope, left, first_key,
            q_t, k_t, v_t, x_t, do_t, H * K, H * V, KIND, ONE_HALF, K, V, BK, BV, C, LP, IP,
        )  # fmt: skip
    else:
        _gradients_of_chunk(
            q, k, v, x, gain, offset, do, dq, dk, dv, dx, dgain, doffset, states, dstates, scale, slope, left, first_key,
            q_t, k_t, v_t, x_t, do_t, H * K, H * V, KIND, ONE_HALF, K, V, BK, BV, C, BASE, LOGC, LP, IP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def gradients_kernel(
    q, k, v, x, gain, offset, do, dq, dk, dv, dx, dgain, doffset, states, dstates, flags, table, scale, slope, T, H, chunks,
    first_key, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, do_b, do_t, do_h,
    AGAIN: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, BASE: tl.constexpr,
    LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The gradients of every chunk that is not flagged, or, if AGAIN, of those of a group that are; of one piece of K."""
    h = (tl.program_id(0) % H).to(tl.int64)
    first = (tl.program_id(0) // H).to(tl.int64) * GROUP
    if AGAIN:
        for n in range(0, tl.minimum(GROUP, chunks - first)):
            chunk = first + n
            b, start, left = chunk_of(table, chunk, T, C, 1)
            if left > 0:  # noqa: SIM102
                if flagged(flags, chunk, h, H, chunks, PIECES):
                    _gradients_at(
                        q, k, v, x, gain, offset, do, dq, dk, dv, dx, dgain, doffset, states, dstates, scale, slope, T, H,
                        chunk, b, h, start, left, first_key,
                        q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, do_b, do_t, do_h,
                        KIND, ONE_HALF, K, V, BK, BV, C, BASE, LOGC, LP, IP,
                    )  # fmt: skip
    else:
        b, start, left = chunk_of(table, first, T, C, 1)
        if left <= 0:
            return
        if flags is not None:  # noqa: SIM102
            if flagged(flags, first, h, H, chunks, PIECES):
                return
        _gradients_at(
            q, k, v, x, gain, offset, do, dq, dk, dv, dx, dgain, doffset, states, dstates, scale, slope, T, H,
            first, b, h, start, left, first_key,
            q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, do_b, do_t, do_h,
            KIND, ONE_HALF, K, V, BK, BV, C, BASE, LOGC, LP, IP,
        )  # fmt: skip
