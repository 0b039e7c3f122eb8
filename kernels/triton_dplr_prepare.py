"""A chunk of general DPLR as one linear map, for all chunks at once: what its tokens do to each other, solved.

With Γ_t a channel's decay up to token t, and `a` and `b` as in dplr_scan_naive.py, there are first

    queries = scale Γ_t q_t    readers = Γ_{t-1} b_t    writers_a = a_t / Γ_t    writers_k = k_t / Γ_t
    P = queries · writersᵀ for s <= t     L = readers · writers_aᵀ, N = readers · writers_kᵀ for s < t     M = (I − L)^-1 − I

and then what is read of a state S and of the chunk's values, and the outputs,

    r = W S + R v,  W = (I + M) readers,  R = (I + M) N        o = Q S + O v,  Q = queries + P_a W,  O = P_k + P_a R

What is surprising:
- W and R are made with M in two halves: where tokens are alike M's entries are large and cancel, and W and R are small.
- Γ is counted from the middle of the chunk's total decay where no channel loses more than 2^(-2 RANGE) in the chunk. Other
  chunks are flagged and done again, with EXACT: pairs are merged from single tokens up, as triton_vector.py says, and tiles are
  counted from the chunk's edges, writers up to its end. `totals` says to the walks which it was.
- Blocks of the triangular system are inverted in pairs, so that no power of L appears. For 16-bit inputs this is done with fp16
  operands, and again in tf32 where something does not fit fp16, since nothing is known of the size of a and b.
Source: triton_vector_tiles.py has the sums of log λ; the launches are in triton_dplr.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_delta_solve import merged
from kernels.triton_delta_vector_walk import get_block
from kernels.triton_scalar_tiles import locate_slot
from kernels.triton_vector_tiles import (
    after,
    decay_halves,
    decay_sums,
    halves,
    load_row,
    load_tile,
    log2_of,
    merging,
    operand,
    store_tile,
    up_to,
)

LARGEST = tl.constexpr(4096.0)  # of M in fp16, so that what is left out of a block does not overflow either


@triton.jit
def inverted(lower, rows, LEVELS: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """M of a strictly lower triangular L."""
    pairs = tl.where((rows[:, None] ^ rows[None, :]) == 1, lower, 0.0)
    inverse = pairs
    wide = tl.full([], 1, tl.int32)
    if HALF:
        wide = tl.max(tl.max(tl.where(tl.abs(lower) < LARGEST, 0, 1), 1), 0)
        if wide == 0:
            small = lower.to(tl.float16)
            for level in tl.static_range(1, LEVELS):
                inverse = merged(inverse, small, rows, level, PRECISION)
            wide = tl.max(tl.max(tl.where(tl.abs(inverse) < LARGEST, 0, 1), 1), 0)  # NaN is not below it
    if wide != 0:
        inverse = pairs
        for level in tl.range(1, LEVELS):
            inverse = merged(inverse, lower, rows, level, PRECISION)
    return inverse


@triton.jit
def _pairs(
    left, right, rows, K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left · rightᵀ for two tiles of K columns that lie in memory."""
    found = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first_key in tl.range(0, K, BLOCK_K):
        ck = first_key + tl.arange(0, BLOCK_K)
        late = get_block(left, rows, ck, K, BLOCK_K, LP)
        early = get_block(right, rows, ck, K, BLOCK_K, LP)
        found = tl.dot(late, tl.trans(early), found, input_precision=PRECISION)
    return found


@triton.jit
def _applied(high, low, x, LP: tl.constexpr, PRECISION: tl.constexpr):
    """(I + M) x for M in two halves."""
    found = tl.dot(high, x, x.to(tl.float32), input_precision=PRECISION)
    if LP != tl.float32:
        found = tl.dot(low, x, found, input_precision=PRECISION)
    return found


# fmt: off
@triton.jit
def _loaded(
    q, k, a, b, x, gain, offset, slope, head, left, first_key, q_t, k_t, a_t, b_t, x_t,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, LP: tl.constexpr,
):
    """A chunk's q, k, a and b as they are, log2 λ, and its halves."""
    tile_x = load_tile(x, x_t, first_key, left, CHUNK, K, BLOCK_K)
    tile_q = load_tile(q, q_t, first_key, left, CHUNK, K, BLOCK_K)
    tile_b = load_tile(b, b_t, first_key, left, CHUNK, K, BLOCK_K)
    tile_a = load_tile(a, a_t, first_key, left, CHUNK, K, BLOCK_K)
    tile_k = load_tile(k, k_t, first_key, left, CHUNK, K, BLOCK_K)
    row_gain = load_row(gain + head * K if gain is not None else None, first_key, 1.0, K, BLOCK_K)
    row_offset = load_row(offset + head * K if offset is not None else None, first_key, 0.0, K, BLOCK_K)
    log2 = log2_of(tile_x, row_gain, row_offset, slope, first_key, left, KIND, CHUNK, K, BLOCK_K)
    high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
    return tile_q, tile_k, tile_a, tile_b, log2, high, low


@triton.jit
def _store_tiles(
    queries, readers, writers_a, writers_k, totals, query, reader, writer_a, writer_k, half, rest, first_key,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):
    store_tile(queries, K, first_key, CHUNK, query, CHUNK, K, BLOCK_K)
    store_tile(readers, K, first_key, CHUNK, reader, CHUNK, K, BLOCK_K)
    store_tile(writers_a, K, first_key, CHUNK, writer_a, CHUNK, K, BLOCK_K)
    store_tile(writers_k, K, first_key, CHUNK, writer_k, CHUNK, K, BLOCK_K)
    columns = first_key + tl.arange(0, BLOCK_K)
    tl.store(totals + columns, half, mask=columns < K)
    tl.store(totals + K + columns, rest, mask=columns < K)


@triton.jit
def _gentle_tiles(
    q, k, a, b, x, gain, offset, queries, readers, writers_a, writers_k, totals, slope, scale, head, left, first_key,
    q_t, k_t, a_t, b_t, x_t,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, LP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """query, reader, writer_a, writer_k, counted from the chunk's middle and stored, and the least log2 of a total decay."""
    tile_q, tile_k, tile_a, tile_b, log2, high, low = _loaded(
        q, k, a, b, x, gain, offset, slope, head, left, first_key, q_t, k_t, a_t, b_t, x_t,
        K, BLOCK_K, CHUNK, KIND, ONE_HALF, LP,
    )
    total = tl.sum(log2, 0)
    half = total * 0.5
    since_middle = decay_sums(up_to(CHUNK), high, low, ONE_HALF, LP) - half[None, :]
    query = operand(tile_q.to(tl.float32) * (tl.exp2(since_middle) * scale), LP, PRECISION)
    reader = operand(tile_b.to(tl.float32) * tl.exp2(since_middle - log2), LP, PRECISION)
    fade = tl.exp2(-since_middle)
    writer_a = operand(tile_a.to(tl.float32) * fade, LP, PRECISION)
    writer_k = operand(tile_k.to(tl.float32) * fade, LP, PRECISION)
    _store_tiles(
        queries, readers, writers_a, writers_k, totals, query, reader, writer_a, writer_k, half, tl.zeros_like(half), first_key,
        K, BLOCK_K, CHUNK,
    )
    return query, reader, writer_a, writer_k, tl.min(total, 0)


@triton.jit
def _prepare_at(
    q, k, a, b, x, gain, offset, queries, readers, writers_a, writers_k, state_reads, state_outputs, value_reads, value_outputs,
    scores, inverse, totals, flags, slope, scale, heads, head, slot, batch, start, left,
    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h, x_b, x_t, x_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr,
    ONE_HALF: tl.constexpr, HALF: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    RANGE: tl.constexpr,
):
    HELD: tl.constexpr = (not EXACT) and K <= BLOCK_K  # the tiles stay where they are made
    rows = tl.arange(0, CHUNK)
    earlier = rows[:, None] > rows[None, :]
    same = rows[:, None] == rows[None, :]
    place = slot.to(tl.int64) * heads + head
    q += batch * q_b + start * q_t + head * q_h
    k += batch * k_b + start * k_t + head * k_h
    a += batch * a_b + start * a_t + head * a_h
    b += batch * b_b + start * b_t + head * b_h
    x += batch * x_b + start * x_t + head * x_h
    tile, square = place * (CHUNK * K), place * (CHUNK * CHUNK)
    queries, readers, writers_a, writers_k = queries + tile, readers + tile, writers_a + tile, writers_k + tile
    totals += place * (2 * K)
    if HELD:
        query, reader, writer_a, writer_k, lowest = _gentle_tiles(
            q, k, a, b, x, gain, offset, queries, readers, writers_a, writers_k, totals, slope, scale, head, left, 0,
            q_t, k_t, a_t, b_t, x_t, K, BLOCK_K, CHUNK, KIND, ONE_HALF, LP, PRECISION,
        )
        solve_a = tl.dot(reader, tl.trans(writer_a), input_precision=PRECISION)
    elif not EXACT:
        lowest = tl.full([], 0.0, tl.float32)
        for first_key in tl.range(0, K, BLOCK_K):
            _q, _r, _a, _k, least = _gentle_tiles(
                q, k, a, b, x, gain, offset, queries, readers, writers_a, writers_k, totals, slope, scale, head, left,
                first_key, q_t, k_t, a_t, b_t, x_t, K, BLOCK_K, CHUNK, KIND, ONE_HALF, LP, PRECISION,
            )
            lowest = tl.minimum(lowest, least)
        tl.debug_barrier()
        # Pairs are made one matrix after another, from tiles that are read back: few live at a time.
        solve_a = _pairs(readers, writers_a, rows, K, BLOCK_K, CHUNK, LP, PRECISION)
    else:
        read_a = tl.zeros([CHUNK, CHUNK], tl.float32)
        read_k = tl.zeros([CHUNK, CHUNK], tl.float32)
        solve_a = tl.zeros([CHUNK, CHUNK], tl.float32)
        solve_k = tl.zeros([CHUNK, CHUNK], tl.float32)
        for first_key in tl.range(0, K, BLOCK_K):
            tile_q, tile_k, tile_a, tile_b, log2, high, low = _loaded(
                q, k, a, b, x, gain, offset, slope, head, left, first_key, q_t, k_t, a_t, b_t, x_t,
                K, BLOCK_K, CHUNK, KIND, ONE_HALF, LP,
            )
            tile_q = tile_q.to(tl.float32) * scale
            tile_k = tile_k.to(tl.float32)
            tile_a = tile_a.to(tl.float32)
            tile_b = tile_b.to(tl.float32)
            read_a += tl.where(same, tl.sum(tile_q * tile_a, 1)[:, None], 0.0)
            read_k += tl.where(same, tl.sum(tile_q * tile_k, 1)[:, None], 0.0)
            for level in range(0, LEVELS):
                _, weights, apart = merging(level, CHUNK)
                apart = apart & earlier
                decay = tl.exp2(decay_sums(weights, high, low, ONE_HALF, LP))
                query = operand(tile_q * decay, LP, PRECISION)
                writer_a = operand(tile_a * decay, LP, PRECISION)
                writer_k = operand(tile_k * decay, LP, PRECISION)
                decay = tl.exp2(decay_sums(weights & (same == 0), high, low, ONE_HALF, LP))
                reader = operand(tile_b * decay, LP, PRECISION)
                read_a += tl.where(apart, tl.dot(query, tl.trans(writer_a), input_precision=PRECISION), 0.0)
                read_k += tl.where(apart, tl.dot(query, tl.trans(writer_k), input_precision=PRECISION), 0.0)
                solve_a += tl.where(apart, tl.dot(reader, tl.trans(writer_a), input_precision=PRECISION), 0.0)
                solve_k += tl.where(apart, tl.dot(reader, tl.trans(writer_k), input_precision=PRECISION), 0.0)
            query = operand(tile_q * tl.exp2(decay_sums(up_to(CHUNK), high, low, ONE_HALF, LP)), LP, PRECISION)
            reader = operand(tile_b * tl.exp2(decay_sums(earlier, high, low, ONE_HALF, LP)), LP, PRECISION)
            decay = tl.exp2(decay_sums(after(CHUNK), high, low, ONE_HALF, LP))
            writer_a = operand(tile_a * decay, LP, PRECISION)
            writer_k = operand(tile_k * decay, LP, PRECISION)
            total = tl.sum(log2, 0)
            _store_tiles(
                queries, readers, writers_a, writers_k, totals, query, reader, writer_a, writer_k, tl.zeros_like(total), total,
                first_key, K, BLOCK_K, CHUNK,
            )
        tl.debug_barrier()
    if flags is not None:
        tl.store(flags + place, (lowest < -2.0 * RANGE).to(tl.int8))
    found = inverted(tl.where(earlier, solve_a, 0.0), rows, LEVELS, HALF, PRECISION)
    store_tile(inverse + square, CHUNK, 0, CHUNK, found, CHUNK, CHUNK, CHUNK)
    high, low = halves(found, LP)
    if HELD:
        solve_k = tl.dot(reader, tl.trans(writer_k), input_precision=PRECISION)
    elif not EXACT:
        solve_k = _pairs(readers, writers_k, rows, K, BLOCK_K, CHUNK, LP, PRECISION)
    values, rest = halves(tl.where(earlier, solve_k, 0.0), LP)
    reads = _applied(high, low, values, LP, PRECISION)
    if LP != tl.float32:
        reads = tl.dot(high, rest, reads + rest.to(tl.float32), input_precision=PRECISION)
    values = reads.to(LP)
    store_tile(value_reads + square, CHUNK, 0, CHUNK, values, CHUNK, CHUNK, CHUNK)
    if HELD:
        read_a = tl.dot(query, tl.trans(writer_a), input_precision=PRECISION)
        read_k = tl.dot(query, tl.trans(writer_k), input_precision=PRECISION)
    elif not EXACT:
        read_a = _pairs(queries, writers_a, rows, K, BLOCK_K, CHUNK, LP, PRECISION)
        read_k = _pairs(queries, writers_k, rows, K, BLOCK_K, CHUNK, LP, PRECISION)
    score = tl.where(up_to(CHUNK), read_a, 0.0).to(LP)
    store_tile(scores + square, CHUNK, 0, CHUNK, score, CHUNK, CHUNK, CHUNK)
    outputs = tl.dot(score, values, tl.where(up_to(CHUNK), read_k, 0.0), input_precision=PRECISION)
    store_tile(value_outputs + square, CHUNK, 0, CHUNK, outputs, CHUNK, CHUNK, CHUNK)
    if HELD:
        _store_maps(
            state_reads + tile, state_outputs + tile, query, reader, high, low, score, 0, K, BLOCK_K, CHUNK, LP, PRECISION
        )
    else:
        for first_key in tl.range(0, K, BLOCK_K):
            ck = first_key + tl.arange(0, BLOCK_K)
            query = get_block(queries, rows, ck, K, BLOCK_K, LP)
            reader = get_block(readers, rows, ck, K, BLOCK_K, LP)
            _store_maps(
                state_reads + tile, state_outputs + tile, query, reader, high, low, score, first_key,
                K, BLOCK_K, CHUNK, LP, PRECISION,
            )


@triton.jit
def _store_maps(
    state_reads, state_outputs, query, reader, high, low, score, first_key,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr,
):
    """W and Q."""
    of_state = _applied(high, low, reader, LP, PRECISION).to(LP)
    store_tile(state_reads, K, first_key, CHUNK, of_state, CHUNK, K, BLOCK_K)
    outputs = tl.dot(score, of_state, query.to(tl.float32), input_precision=PRECISION)
    store_tile(state_outputs, K, first_key, CHUNK, outputs, CHUNK, K, BLOCK_K)


@triton.jit(do_not_specialize=["slope", "scale", "tokens", "heads", "sequences", "search_steps", "slots"])
def prepare_kernel(
    q, k, a, b, x, gain, offset, cu, queries, readers, writers_a, writers_k, state_reads, state_outputs, value_reads,
    value_outputs, scores, inverse, totals, flags, slope, scale, tokens, heads, sequences, search_steps, slots,
    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h, x_b, x_t, x_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr,
    ONE_HALF: tl.constexpr, HALF: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    RANGE: tl.constexpr, AGAIN: tl.constexpr, GROUP: tl.constexpr,
):
    """Tiles of (slots, H, CHUNK, K): queries, readers, writers_a, writers_k, state_reads W, state_outputs Q; of (slots, H,
    CHUNK, CHUNK): value_reads R, value_outputs O, scores P_a, inverse M; totals: (slots, H, 2, K), log2 of the decay from an
    edge to where tiles are counted from, and of what else there is; flags, (slots, H): which chunks were too steep. AGAIN: of
    a group of GROUP slots those alone."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    first = tl.program_id(0) // heads * GROUP
    if AGAIN:
        for n in range(0, tl.minimum(GROUP, slots - first)):
            if tl.load(flags + (first + n).to(tl.int64) * heads + head) != 0:
                batch, start, left = locate_slot(cu, first + n, sequences, search_steps, tokens, CHUNK)
                _prepare_at(
                    q, k, a, b, x, gain, offset, queries, readers, writers_a, writers_k, state_reads, state_outputs,
                    value_reads, value_outputs, scores, inverse, totals, None, slope, scale, heads, head, first + n,
                    batch, start, left, q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h, x_b, x_t, x_h,
                    K, BLOCK_K, CHUNK, LEVELS, KIND, ONE_HALF, HALF, LP, PRECISION, EXACT, RANGE,
                )
    else:
        batch, start, left = locate_slot(cu, first, sequences, search_steps, tokens, CHUNK)
        if left <= 0:
            return
        _prepare_at(
            q, k, a, b, x, gain, offset, queries, readers, writers_a, writers_k, state_reads, state_outputs, value_reads,
            value_outputs, scores, inverse, totals, flags, slope, scale, heads, head, first, batch, start, left,
            q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h, x_b, x_t, x_h,
            K, BLOCK_K, CHUNK, LEVELS, KIND, ONE_HALF, HALF, LP, PRECISION, EXACT, RANGE,
        )
# fmt: on
