"""The gradients of general DPLR, for all chunks at once, from what the walks have kept.

With S before and dS after a chunk, r and y as in triton_dplr_walk.py, dr = P_aᵀ do + y and dx = (I + M)ᵀ dr, there are four
matrices of pairs, dP_a = do rᵀ and dP_k = do vᵀ with their diagonals, dL = dx rᵀ and dN = dx vᵀ without, and

    dq: do Sᵀ + dP_a a + dP_k k      db: dx Sᵀ + dL a + dN k
    da: r dSᵀ + dP_aᵀ q + dLᵀ b      dk: v dSᵀ + dP_kᵀ q + dNᵀ b

each between factors of the decay. log λ_t has the sum of what passes over t: of q·dq from t on, of b·db after t, of a·da and
k·dk up to t.

What is surprising:
- A kernel of its own makes dx and the pairs, since slices of K go by themselves and all want them, transposed too.
- There are two versions of a chunk. The gentle one takes the tiles that were prepared, they and the states counted from the
  chunk's middle. The exact one, for chunks that were flagged, merges halves level by level: the rows of the later half are
  readers, those of the earlier one writers, and one symmetric product gives the gradients of both.
Source: triton_dplr_prepare.py and triton_dplr_walk.py have what these are derivatives of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_delta_vector_gradients import _state_at
from kernels.triton_delta_vector_walk import get_block
from kernels.triton_gate import input_gradient
from kernels.triton_scalar_tiles import locate_slot
from kernels.triton_vector_tiles import (
    after,
    crossing,
    decay_halves,
    decay_sums,
    from_on,
    halves,
    load_row,
    load_tile,
    log2_of,
    mask_of,
    merging,
    operand,
    store_tile,
    sums,
    up_to,
)


# fmt: off
@triton.jit
def _store_decay_gradient(
    d_log, x, gain, offset, dx, d_gain, d_offset, slope, head, place, row, heads, left, first_key, x_t,
    KIND: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """From the gradient of log λ to those of x and, summed over the chunk, of gain and offset. Loads x once more."""
    tile_x = load_tile(x, x_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32)
    tile_gain = load_row(gain + head * K if gain is not None else None, first_key, 1.0, K, BLOCK_K)
    tile_offset = load_row(offset + head * K if offset is not None else None, first_key, 0.0, K, BLOCK_K)
    log2 = log2_of(tile_x, tile_gain, tile_offset, slope, first_key, left, KIND, CHUNK, K, BLOCK_K)
    d_x, of_gain, of_offset = input_gradient(d_log, tile_x, tile_gain, tile_offset, slope, log2, KIND)
    store_tile(dx + row * K, heads * K, first_key, left, d_x, CHUNK, K, BLOCK_K)
    columns = first_key + tl.arange(0, BLOCK_K)
    here = mask_of(first_key, left, CHUNK, K, BLOCK_K)
    if d_gain is not None:
        tl.store(d_gain + place * K + columns, tl.sum(tl.where(here, of_gain, 0.0), 0), mask=columns < K)
    if d_offset is not None:
        tl.store(d_offset + place * K + columns, tl.sum(tl.where(here, of_offset, 0.0), 0), mask=columns < K)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences", "search_steps"])
def pairs_kernel(
    v, d, reads, d_reads, scores, inverse, cu, read_a, read_k, solve_a, solve_k, tokens, heads, sequences, search_steps,
    v_b, v_t, v_h, d_b, d_t, d_h,
    V: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr,
):
    """read_a, read_k, solve_a, solve_k, (slots, H, CHUNK, CHUNK): dP_a, dP_k, dL, dN. d_reads: y, in whose place dx is left."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    slot = tl.program_id(0) // heads
    batch, start, left = locate_slot(cu, slot, sequences, search_steps, tokens, CHUNK)
    if left <= 0:
        return
    rows = tl.arange(0, CHUNK)
    row = ((batch * tokens + start) * heads + head) * V
    square = (slot.to(tl.int64) * heads + head) * (CHUNK * CHUNK)
    v += batch * v_b + start * v_t + head * v_h
    d += batch * d_b + start * d_t + head * d_h
    score = get_block(scores + square, rows, rows, CHUNK, CHUNK, LP)
    m = get_block(inverse + square, rows, rows, CHUNK, CHUNK, LP)
    found_ra = tl.zeros([CHUNK, CHUNK], tl.float32)
    found_rk = tl.zeros([CHUNK, CHUNK], tl.float32)
    found_sa = tl.zeros([CHUNK, CHUNK], tl.float32)
    found_sk = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first_value in tl.static_range(0, V, BLOCK_V):
        dc = load_tile(d, d_t, first_value, left, CHUNK, V, BLOCK_V).to(LP)
        dr = load_tile(d_reads + row, heads * V, first_value, left, CHUNK, V, BLOCK_V).to(tl.float32)
        read = load_tile(reads + row, heads * V, first_value, left, CHUNK, V, BLOCK_V).to(LP)
        value = load_tile(v, v_t, first_value, left, CHUNK, V, BLOCK_V).to(LP)
        dr = tl.dot(tl.trans(score), dc, dr, input_precision=PRECISION)
        dr = tl.dot(tl.trans(m), dr.to(LP), dr, input_precision=PRECISION)
        store_tile(d_reads + row, heads * V, first_value, left, dr, CHUNK, V, BLOCK_V)
        dx = dr.to(LP)
        found_ra = tl.dot(dc, tl.trans(read), found_ra, input_precision=PRECISION)
        found_rk = tl.dot(dc, tl.trans(value), found_rk, input_precision=PRECISION)
        found_sa = tl.dot(dx, tl.trans(read), found_sa, input_precision=PRECISION)
        found_sk = tl.dot(dx, tl.trans(value), found_sk, input_precision=PRECISION)
    earlier = rows[:, None] > rows[None, :]
    store_tile(read_a + square, CHUNK, 0, CHUNK, tl.where(up_to(CHUNK), found_ra, 0.0), CHUNK, CHUNK, CHUNK)
    store_tile(read_k + square, CHUNK, 0, CHUNK, tl.where(up_to(CHUNK), found_rk, 0.0), CHUNK, CHUNK, CHUNK)
    store_tile(solve_a + square, CHUNK, 0, CHUNK, tl.where(earlier, found_sa, 0.0), CHUNK, CHUNK, CHUNK)
    store_tile(solve_k + square, CHUNK, 0, CHUNK, tl.where(earlier, found_sk, 0.0), CHUNK, CHUNK, CHUNK)


@triton.jit
def _gentle_at(
    v, x, gain, offset, d, queries, readers, writers_a, writers_k, read_a, read_k, solve_a, solve_k, reads, d_reads, starts,
    ends, dq, dk, da, db, dx, d_gain, d_offset, slope, scale, tokens, heads, head, place, batch, start, left, slice_k,
    v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr,
    ONE_HALF: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr,
):
    rows = tl.arange(0, CHUNK)
    earlier = rows[:, None] > rows[None, :]
    row = (batch * tokens + start) * heads + head
    first_key = slice_k * BLOCK_K
    ck = first_key + tl.arange(0, BLOCK_K)
    tile, square = place * (CHUNK * K), place * (CHUNK * CHUNK)
    writer_a = get_block(writers_a + tile, rows, ck, K, BLOCK_K, LP)
    writer_k = get_block(writers_k + tile, rows, ck, K, BLOCK_K, LP)
    ra = get_block(read_a + square, rows, rows, CHUNK, CHUNK, LP)
    rk = get_block(read_k + square, rows, rows, CHUNK, CHUNK, LP)
    sa = get_block(solve_a + square, rows, rows, CHUNK, CHUNK, LP)
    sk = get_block(solve_k + square, rows, rows, CHUNK, CHUNK, LP)
    state = _state_at(starts + place * (K * V), first_key, K, V, BLOCK_K, BLOCK_V, LP)
    d_read = load_tile(d_reads + row * V, heads * V, 0, left, CHUNK, V, BLOCK_V).to(LP)
    dc = load_tile(d + batch * d_b + start * d_t + head * d_h, d_t, 0, left, CHUNK, V, BLOCK_V).to(LP)

    found = tl.dot(d_read, tl.trans(state), input_precision=PRECISION)
    found = tl.dot(sa, writer_a, found, input_precision=PRECISION)
    found = tl.dot(sk, writer_k, found, input_precision=PRECISION)
    x += batch * x_b + start * x_t + head * x_h
    row_gain = load_row(gain + head * K if gain is not None else None, first_key, 1.0, K, BLOCK_K)
    row_offset = load_row(offset + head * K if offset is not None else None, first_key, 0.0, K, BLOCK_K)
    tile_x = load_tile(x, x_t, first_key, left, CHUNK, K, BLOCK_K)
    log2 = log2_of(tile_x, row_gain, row_offset, slope, first_key, left, KIND, CHUNK, K, BLOCK_K)
    high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
    since_middle = decay_sums(up_to(CHUNK), high, low, ONE_HALF, LP) - 0.5 * tl.sum(log2, 0)[None, :]
    store_tile(db + row * K, heads * K, first_key, left, found * tl.exp2(since_middle - log2), CHUNK, K, BLOCK_K)
    # A token's own λ does not lie before its b: what is summed from the token on is taken off again.
    gained = get_block(readers + tile, rows, ck, K, BLOCK_K, LP).to(tl.float32) * found
    d_log = -gained

    found = tl.dot(dc, tl.trans(state), input_precision=PRECISION)
    found = tl.dot(ra, writer_a, found, input_precision=PRECISION)
    found = tl.dot(rk, writer_k, found, input_precision=PRECISION)
    store_tile(dq + row * K, heads * K, first_key, left, found * (tl.exp2(since_middle) * scale), CHUNK, K, BLOCK_K)
    gained += get_block(queries + tile, rows, ck, K, BLOCK_K, LP).to(tl.float32) * found

    # What is multiplied number by number is read again rather than held.
    query = get_block(queries + tile, rows, ck, K, BLOCK_K, LP)
    reader = get_block(readers + tile, rows, ck, K, BLOCK_K, LP)
    d_state = _state_at(ends + place * (K * V), first_key, K, V, BLOCK_K, BLOCK_V, LP)
    read = load_tile(reads + row * V, heads * V, 0, left, CHUNK, V, BLOCK_V).to(LP)
    value = load_tile(v + batch * v_b + start * v_t + head * v_h, v_t, 0, left, CHUNK, V, BLOCK_V).to(LP)
    around = _state_at(starts + place * (K * V), first_key, K, V, BLOCK_K, BLOCK_V, LP).to(tl.float32)
    around *= _state_at(ends + place * (K * V), first_key, K, V, BLOCK_K, BLOCK_V, LP).to(tl.float32)
    d_log += tl.sum(around, 1)[None, :]
    fade = tl.exp2(-since_middle)
    # Pairs that pass over the chunk's end are summed as they are; gained is for those inside and over its start.
    writer = get_block(writers_a + tile, rows, ck, K, BLOCK_K, LP).to(tl.float32)
    past = writer * tl.dot(read, tl.trans(d_state), input_precision=PRECISION)
    d_log = tl.dot(earlier.to(LP), past.to(LP), d_log, input_precision=PRECISION)
    found = tl.dot(tl.trans(ra), query, input_precision=PRECISION)
    found = tl.dot(tl.trans(sa), reader, found, input_precision=PRECISION)
    gained -= writer * found
    found = tl.dot(read, tl.trans(d_state), found, input_precision=PRECISION)
    store_tile(da + row * K, heads * K, first_key, left, found * fade, CHUNK, K, BLOCK_K)

    writer = get_block(writers_k + tile, rows, ck, K, BLOCK_K, LP).to(tl.float32)
    past = writer * tl.dot(value, tl.trans(d_state), input_precision=PRECISION)
    d_log = tl.dot(earlier.to(LP), past.to(LP), d_log, input_precision=PRECISION)
    found = tl.dot(tl.trans(rk), query, input_precision=PRECISION)
    found = tl.dot(tl.trans(sk), reader, found, input_precision=PRECISION)
    gained -= writer * found
    found = tl.dot(value, tl.trans(d_state), found, input_precision=PRECISION)
    store_tile(dk + row * K, heads * K, first_key, left, found * fade, CHUNK, K, BLOCK_K)
    if dx is not None:
        high, low = halves(gained, LP)
        d_log += sums(from_on(CHUNK), high, low, LP)
        _store_decay_gradient(
            d_log, x, gain, offset, dx, d_gain, d_offset, slope, head, place, row, heads, left, first_key, x_t,
            KIND, CHUNK, K, BLOCK_K,
        )


@triton.jit
def _symmetric(pairs, rows, CHUNK: tl.constexpr, LP: tl.constexpr):
    """A lower triangular matrix with its transpose above the diagonal, and its diagonal as a column."""
    lower = get_block(pairs, rows, rows, CHUNK, CHUNK, LP)
    upper = tl.load(pairs + rows[None, :] * CHUNK + rows[:, None]).to(LP)
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], lower.to(tl.float32), 0.0), 1)
    return tl.where(rows[:, None] > rows[None, :], lower, upper), own[:, None]


@triton.jit
def _exact_at(
    q, k, a, b, v, x, gain, offset, d, read_a, read_k, solve_a, solve_k, reads, d_reads, starts, ends,
    dq, dk, da, db, dx, d_gain, d_offset, slope, scale, tokens, heads, head, place, batch, start, left,
    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr,
):
    """What _gentle_at does for all slices of K, for any decay and from states at the chunk's edges. The gradient of log λ_t is
    summed over the pairs that t lies between, and over no other that would have to cancel."""
    rows = tl.arange(0, CHUNK)
    earlier = rows[:, None] > rows[None, :]
    same = rows[:, None] == rows[None, :]
    row = (batch * tokens + start) * heads + head
    square = place * (CHUNK * CHUNK)
    dc = load_tile(d + batch * d_b + start * d_t + head * d_h, d_t, 0, left, CHUNK, V, BLOCK_V).to(LP)
    d_read = load_tile(d_reads + row * V, heads * V, 0, left, CHUNK, V, BLOCK_V).to(LP)
    read = load_tile(reads + row * V, heads * V, 0, left, CHUNK, V, BLOCK_V).to(LP)
    value = load_tile(v + batch * v_b + start * v_t + head * v_h, v_t, 0, left, CHUNK, V, BLOCK_V).to(LP)
    ra, own_a = _symmetric(read_a + square, rows, CHUNK, LP)
    rk, own_k = _symmetric(read_k + square, rows, CHUNK, LP)
    sa, _ = _symmetric(solve_a + square, rows, CHUNK, LP)
    sk, _ = _symmetric(solve_k + square, rows, CHUNK, LP)
    q += batch * q_b + start * q_t + head * q_h
    k += batch * k_b + start * k_t + head * k_h
    a += batch * a_b + start * a_t + head * a_h
    b += batch * b_b + start * b_t + head * b_h
    x += batch * x_b + start * x_t + head * x_h
    for first_key in tl.range(0, K, BLOCK_K):
        row_gain = load_row(gain + head * K if gain is not None else None, first_key, 1.0, K, BLOCK_K)
        row_offset = load_row(offset + head * K if offset is not None else None, first_key, 0.0, K, BLOCK_K)
        tile_x = load_tile(x, x_t, first_key, left, CHUNK, K, BLOCK_K)
        log2 = log2_of(tile_x, row_gain, row_offset, slope, first_key, left, KIND, CHUNK, K, BLOCK_K)
        high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
        state = _state_at(starts + place * (K * V), first_key, K, V, BLOCK_K, BLOCK_V, LP)
        d_state = _state_at(ends + place * (K * V), first_key, K, V, BLOCK_K, BLOCK_V, LP)
        d_log = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        d_log += (tl.exp2(tl.sum(log2, 0)) * tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1))[None, :]
        tile_q = load_tile(q, q_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32) * scale
        tile_k = load_tile(k, k_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32)
        tile_a = load_tile(a, a_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32)
        tile_b = load_tile(b, b_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32)
        # through the state before the chunk and the state after it
        dq_c = tl.dot(dc, tl.trans(state), input_precision=PRECISION)
        dq_c *= tl.exp2(decay_sums(up_to(CHUNK), high, low, ONE_HALF, LP))
        d_log = tl.dot(from_on(CHUNK).to(LP), (tile_q * dq_c).to(LP), d_log, input_precision=PRECISION)
        db_c = tl.dot(d_read, tl.trans(state), input_precision=PRECISION)
        db_c *= tl.exp2(decay_sums(earlier, high, low, ONE_HALF, LP))
        d_log = tl.dot(after(CHUNK).to(LP), (tile_b * db_c).to(LP), d_log, input_precision=PRECISION)
        late = tl.exp2(decay_sums(after(CHUNK), high, low, ONE_HALF, LP))
        da_c = tl.dot(read, tl.trans(d_state), input_precision=PRECISION) * late
        dk_c = tl.dot(value, tl.trans(d_state), input_precision=PRECISION) * late
        past = (tile_a * da_c + tile_k * dk_c).to(LP)
        d_log = tl.dot(earlier.to(LP), past, d_log, input_precision=PRECISION)
        # a token with itself, between which and itself no λ lies
        dq_c += own_a * tile_a + own_k * tile_k
        da_c += own_a * tile_q
        dk_c += own_k * tile_q
        for level in range(0, LEVELS):
            is_late, weights, apart = merging(level, CHUNK)
            between = crossing(level, CHUNK)
            fade = tl.exp2(decay_sums(weights, high, low, ONE_HALF, LP))
            fade_b = tl.exp2(decay_sums(weights & (same == 0), high, low, ONE_HALF, LP))
            both = operand(tl.where(is_late, tile_q, tile_a) * fade, LP, PRECISION)
            found = tl.dot(tl.where(apart, ra, tl.zeros_like(ra)), both, input_precision=PRECISION)
            gained = both.to(tl.float32) * found
            found *= fade
            dq_c += tl.where(is_late, found, 0.0)
            da_c += tl.where(is_late, 0.0, found)
            both = operand(tl.where(is_late, tile_q, tile_k) * fade, LP, PRECISION)
            found = tl.dot(tl.where(apart, rk, tl.zeros_like(rk)), both, input_precision=PRECISION)
            gained += both.to(tl.float32) * found
            found *= fade
            dq_c += tl.where(is_late, found, 0.0)
            dk_c += tl.where(is_late, 0.0, found)
            d_log = tl.dot(between.to(LP), gained.to(LP), d_log, input_precision=PRECISION)
            both = operand(tl.where(is_late, tile_b, tile_a) * fade_b, LP, PRECISION)
            found = tl.dot(tl.where(apart, sa, tl.zeros_like(sa)), both, input_precision=PRECISION)
            gained = both.to(tl.float32) * found
            found *= fade_b
            db_c += tl.where(is_late, found, 0.0)
            da_c += tl.where(is_late, 0.0, found)
            both = operand(tl.where(is_late, tile_b, tile_k) * fade_b, LP, PRECISION)
            found = tl.dot(tl.where(apart, sk, tl.zeros_like(sk)), both, input_precision=PRECISION)
            gained += both.to(tl.float32) * found
            found *= fade_b
            db_c += tl.where(is_late, found, 0.0)
            dk_c += tl.where(is_late, 0.0, found)
            between = between & (same == 0)
            d_log = tl.dot(between.to(LP), gained.to(LP), d_log, input_precision=PRECISION)
        store_tile(dq + row * K, heads * K, first_key, left, dq_c * scale, CHUNK, K, BLOCK_K)
        store_tile(dk + row * K, heads * K, first_key, left, dk_c, CHUNK, K, BLOCK_K)
        store_tile(da + row * K, heads * K, first_key, left, da_c, CHUNK, K, BLOCK_K)
        store_tile(db + row * K, heads * K, first_key, left, db_c, CHUNK, K, BLOCK_K)
        if dx is not None:
            _store_decay_gradient(
                d_log, x, gain, offset, dx, d_gain, d_offset, slope, head, place, row, heads, left, first_key, x_t,
                KIND, CHUNK, K, BLOCK_K,
            )


@triton.jit(do_not_specialize=["slope", "scale", "tokens", "heads", "sequences", "search_steps", "slots"])
def gradients_kernel(
    q, k, a, b, v, x, gain, offset, d, queries, readers, writers_a, writers_k, read_a, read_k, solve_a, solve_k, reads,
    d_reads, starts, ends, cu, flags, dq, dk, da, db, dx, d_gain, d_offset, slope, scale, tokens, heads, sequences,
    search_steps, slots,
    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    AGAIN: tl.constexpr, GROUP: tl.constexpr,
):
    """BLOCK_V holds all of V. EXACT: every chunk, or with AGAIN those of a group of GROUP slots that are flagged; else those
    that are not flagged, a program for each slice of K. dx, d_gain, d_offset may be None."""
    SLICES: tl.constexpr = 1 if EXACT else (K + BLOCK_K - 1) // BLOCK_K
    slice_k = tl.program_id(0) % SLICES
    program = tl.program_id(0) // SLICES
    head = (program % heads).to(tl.int64)
    first = program // heads * GROUP
    if EXACT:
        for n in range(0, tl.minimum(GROUP, slots - first) if AGAIN else 1):
            place = (first + n).to(tl.int64) * heads + head
            batch, start, left = locate_slot(cu, first + n, sequences, search_steps, tokens, CHUNK)
            wanted = left > 0
            if AGAIN:
                wanted = tl.load(flags + place) != 0
            if wanted:
                _exact_at(
                    q, k, a, b, v, x, gain, offset, d, read_a, read_k, solve_a, solve_k, reads, d_reads, starts, ends,
                    dq, dk, da, db, dx, d_gain, d_offset, slope, scale, tokens, heads, head, place, batch, start, left,
                    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
                    K, V, BLOCK_K, BLOCK_V, CHUNK, LEVELS, KIND, ONE_HALF, LP, PRECISION,
                )
    else:
        place = first.to(tl.int64) * heads + head
        batch, start, left = locate_slot(cu, first, sequences, search_steps, tokens, CHUNK)
        if left <= 0:
            return
        if tl.load(flags + place) != 0:
            return
        _gentle_at(
            v, x, gain, offset, d, queries, readers, writers_a, writers_k, read_a, read_k, solve_a, solve_k, reads, d_reads,
            starts, ends, dq, dk, da, db, dx, d_gain, d_offset, slope, scale, tokens, heads, head, place, batch, start, left,
            slice_k, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
            K, V, BLOCK_K, BLOCK_V, CHUNK, KIND, ONE_HALF, LP, PRECISION,
        )
# fmt: on
