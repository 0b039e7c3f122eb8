"""The gradients of a vector decay, as Triton kernels: all chunks at once, from the states before and the gradients after each.

What is surprising: there are two versions of one chunk. The gentle one counts decays from the chunk's middle, where its states
were kept, and is ordered so that few tiles live at a time; the exact one merges halves level by level from single tokens up.
Source: triton_vector.py says how, and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_gate import input_gradient, lambda_of, shared_key
from kernels.triton_vector_tiles import (
    after,
    around_middle,
    chunk_of,
    crossing,
    decay_halves,
    decay_sums,
    flagged,
    from_on,
    halves,
    load_row,
    load_state,
    load_tile,
    log2_of,
    mask_of,
    merging,
    operand,
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
def _gentle_gradients(
    q, k, v, x, gain, offset, do, dq, dk, dx, dgain, doffset, states, dstates, scale, slope, left, first_key,
    q_t, k_t, v_t, x_t, do_t, dk_t,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One chunk's dq, dk and decay's gradients for BK channels from states at the chunk's middle; few tiles live at a time."""
    tile_x = load_tile(x, x_t, first_key, left, C, K, BK)
    tile_gain = load_row(gain, first_key, 1.0, K, BK)
    tile_offset = load_row(offset, first_key, 0.0, K, BK)
    log2 = log2_of(tile_x, tile_gain, tile_offset, slope, first_key, left, KIND, C, K, BK)
    high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
    d = decay_sums(around_middle(C), high, low, ONE_HALF, LP)
    if k is not None:
        keys = load_tile(k, k_t, first_key, left, C, K, BK).to(tl.float32)
    else:
        keys = shared_key(log2)
    keys = operand(keys * tl.exp2(-d), LP, IP)
    queries = load_tile(q, q_t, first_key, left, C, K, BK).to(tl.float32)
    queries = operand(queries * (tl.exp2(d) * scale), LP, IP)

    tile_dq = tl.zeros([C, BK], tl.float32)
    pairs = tl.zeros([C, C], tl.float32)
    for first_value in tl.static_range(0, V, BV):
        tile_v = load_tile(v, v_t, first_value, left, C, V, BV).to(LP)
        tile_do = load_tile(do, do_t, first_value, left, C, V, BV).to(LP)
        row, col, inside = state_offsets(first_value, first_key, V, K, BV, BK)
        state = tl.load(states + row * K + col, mask=inside, other=0.0)
        pairs = tl.dot(tile_do, tl.trans(tile_v), pairs, input_precision=IP)
        tile_dq = tl.dot(tile_do, state.to(LP), tile_dq, input_precision=IP)
    pairs = tl.where(up_to(C), pairs, 0.0).to(LP)
    tile_dq = tl.dot(pairs, keys, tile_dq, input_precision=IP)
    store_tile(dq, dk_t, first_key, left, tile_dq * (tl.exp2(d) * scale), C, K, BK)
    gained = queries.to(tl.float32) * tile_dq

    tile_dk = tl.zeros([C, BK], tl.float32)
    pairs_t = tl.zeros([C, C], tl.float32)
    around = tl.zeros([BV, BK], tl.float32)
    for first_value in tl.static_range(0, V, BV):
        row, col, inside = state_offsets(first_value, first_key, V, K, BV, BK)
        if V > BV:
            tile_v = load_tile(v, v_t, first_value, left, C, V, BV).to(LP)
            tile_do = load_tile(do, do_t, first_value, left, C, V, BV).to(LP)
            state = tl.load(states + row * K + col, mask=inside, other=0.0)
        dstate = tl.load(dstates + row * K + col, mask=inside, other=0.0)
        tile_dk = tl.dot(tile_v, dstate.to(LP), tile_dk, input_precision=IP)
        around += state.to(tl.float32) * dstate.to(tl.float32)
        pairs_t = tl.dot(tile_v, tl.trans(tile_do), pairs_t, input_precision=IP)
    # Pairs with one end in the chunk are summed as they are; q·dq - k·dk below is for the pairs inside, so theirs is undone.
    past = keys.to(tl.float32) * tile_dk
    gained += past
    past = past.to(LP)
    if C == BV:
        around = around.to(LP)  # a product with ones sums over a square tile's rows and hands the sum to every row
    else:
        total = tl.sum(around, 0)
    pairs_t = tl.where(from_on(C), pairs_t, 0.0).to(LP)
    tile_dk = tl.dot(pairs_t, queries, tile_dk, input_precision=IP)
    gained -= keys.to(tl.float32) * tile_dk
    tile_dk *= tl.exp2(-d)
    if k is not None:
        store_tile(dk, dk_t, first_key, left, tile_dk, C, K, BK)

    high, low = halves(gained, LP)
    d_log = sums(from_on(C), high, low, LP)
    d_log = tl.dot((tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]).to(LP), past, d_log, input_precision=IP)
    if C == BV:
        d_log = tl.dot(tl.full([C, C], 1.0, LP), around, d_log, input_precision=IP)
    else:
        d_log += total[None, :]
    _store_decay_gradient(
        d_log, tile_dk, x, gain, offset, dx, dgain, doffset, slope, left, first_key, x_t, dk_t, k is None, KIND, C, K, BK
    )


@triton.jit
def _exact_gradients(
    q, k, v, x, gain, offset, do, dq, dk, dx, dgain, doffset, states, dstates, flags, flags_piece, scale, slope, left,
    first_key, q_t, k_t, v_t, x_t, do_t, dk_t,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """What _gentle_gradients does, for any decay and from states at the chunk's edges.

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
    for first_value in tl.static_range(0, V, BV):
        tile_v = load_tile(v, v_t, first_value, left, C, V, BV).to(LP)
        tile_do = load_tile(do, do_t, first_value, left, C, V, BV).to(LP)
        state = load_state(states, flags, flags_piece, log2, first_value, first_key, True, PIECES, PIECE, K, V, BK, BV)
        dstate = load_state(dstates, flags, flags_piece, log2, first_value, first_key, True, PIECES, PIECE, K, V, BK, BV)
        across += tl.sum(state * dstate, 0)
        pairs = tl.dot(tile_do, tl.trans(tile_v), pairs, input_precision=IP)
        pairs_t = tl.dot(tile_v, tl.trans(tile_do), pairs_t, input_precision=IP)
        dq_state = tl.dot(tile_do, state.to(LP), dq_state, input_precision=IP)
        dk_state = tl.dot(tile_v, dstate.to(LP), dk_state, input_precision=IP)
    tile_q = load_tile(q, q_t, first_key, left, C, K, BK).to(tl.float32) * scale
    if k is not None:
        tile_k = load_tile(k, k_t, first_key, left, C, K, BK).to(tl.float32)
    else:
        tile_k = shared_key(log2)
    # through the state before the chunk and the state after it
    decay = tl.exp2(decay_sums(up_to(C), high, low, ONE_HALF, LP))
    tile_dq = decay * dq_state
    d_log = tl.dot(from_on(C).to(LP), (tile_q * tile_dq).to(LP), input_precision=IP)
    decay = tl.exp2(decay_sums(after(C), high, low, ONE_HALF, LP))
    tile_dk = decay * dk_state
    d_log = tl.dot((i > j).to(LP), (tile_k * tile_dk).to(LP), d_log, input_precision=IP)
    d_log += (tl.exp2(tl.sum(log2, 0)) * across)[None, :]
    # a token with itself, between which and itself no λ lies
    own = tl.sum(tl.where(i == j, pairs, 0.0), 1)[:, None]
    tile_dq += own * tile_k
    tile_dk += own * tile_q
    # pairs, level by level
    for level in range(0, LOGC):
        late, weights, apart = merging(level, C)
        decay = tl.exp2(decay_sums(weights, high, low, ONE_HALF, LP))
        both = operand(tl.where(late, tile_q, tile_k) * decay, LP, IP)
        d_both = tl.where(apart, tl.where(i > j, pairs, pairs_t), 0.0).to(LP)
        d_both = tl.dot(d_both, both, input_precision=IP)
        tile_dq += tl.where(late, decay * d_both, 0.0)
        tile_dk += tl.where(late, 0.0, decay * d_both)
        d_both *= both.to(tl.float32)
        d_log = tl.dot(crossing(level, C).to(LP), d_both.to(LP), d_log, input_precision=IP)
    store_tile(dq, dk_t, first_key, left, tile_dq * scale, C, K, BK)
    if k is not None:
        store_tile(dk, dk_t, first_key, left, tile_dk, C, K, BK)
    _store_decay_gradient(
        d_log, tile_dk, x, gain, offset, dx, dgain, doffset, slope, left, first_key, x_t, dk_t, k is None, KIND, C, K, BK
    )


@triton.jit
def _gradients_at(
    q, k, v, x, gain, offset, do, dq, dk, dx, dgain, doffset, states, dstates, flags, scale, slope, T, H, chunks,
    chunk, b, h, start, left,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, do_b, do_t, do_h,
    EXACT: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOGC: tl.constexpr,
    LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    first_key = tl.program_id(1) * BK
    row = (b * T + start) * H + h
    tile = chunk * H + h
    q += b * q_b + h * q_h + start * q_t
    v += b * v_b + h * v_h + start * v_t
    x += b * x_b + h * x_h + start * x_t
    do += b * do_b + h * do_h + start * do_t
    dq += row * K
    dx += row * K
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
    if EXACT:
        if flags is not None:
            flags += tile
        _exact_gradients(
            q, k, v, x, gain, offset, do, dq, dk, dx, dgain, doffset, states, dstates, flags, chunks * H, scale, slope, left,
            first_key, q_t, k_t, v_t, x_t, do_t, H * K, KIND, ONE_HALF, PIECES, PIECE, K, V, BK, BV, C, LOGC, LP, IP,
        )  # fmt: skip
    else:
        _gentle_gradients(
            q, k, v, x, gain, offset, do, dq, dk, dx, dgain, doffset, states, dstates, scale, slope, left, first_key,
            q_t, k_t, v_t, x_t, do_t, H * K, KIND, ONE_HALF, K, V, BK, BV, C, LP, IP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def gradients_kernel(
    q, k, v, x, gain, offset, do, dq, dk, dx, dgain, doffset, states, dstates, flags, table, scale, slope, T, H, chunks,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, do_b, do_t, do_h,
    AGAIN: tl.constexpr, EXACT: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, PIECES: tl.constexpr,
    PIECE: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The gradients of every chunk, or, if AGAIN, of those of a group that are flagged. The walks had pieces of PIECE keys."""
    h = (tl.program_id(0) % H).to(tl.int64)
    first = (tl.program_id(0) // H).to(tl.int64) * GROUP
    if AGAIN:
        for n in range(0, tl.minimum(GROUP, chunks - first)):
            chunk = first + n
            b, start, left = chunk_of(table, chunk, T, C)
            if left > 0:
                if flagged(flags, chunk, h, H, chunks, PIECES):
                    _gradients_at(
                        q, k, v, x, gain, offset, do, dq, dk, dx, dgain, doffset, states, dstates, flags, scale, slope, T, H,
                        chunks, chunk, b, h, start, left,
                        q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, do_b, do_t, do_h,
                        EXACT, KIND, ONE_HALF, PIECES, PIECE, K, V, BK, BV, C, LOGC, LP, IP,
                    )  # fmt: skip
    else:
        b, start, left = chunk_of(table, first, T, C)
        if left <= 0:
            return
        _gradients_at(
            q, k, v, x, gain, offset, do, dq, dk, dx, dgain, doffset, states, dstates, flags, scale, slope, T, H,
            chunks, first, b, h, start, left,
            q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, do_b, do_t, do_h,
            EXACT, KIND, ONE_HALF, PIECES, PIECE, K, V, BK, BV, C, LOGC, LP, IP,
        )  # fmt: skip
