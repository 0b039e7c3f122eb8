"""The delta rule with one decay per key channel inside a chunk, for all chunks at once: what the walks then only multiply.

    queries = scale Γ_i q_i    erasers = Γ_i k_i    writers = k_i / Γ_i
    A_ij = scale Σ_d q_i k_j Γ_i/Γ_j for j <= i     K̃_ij = Σ_d k_i k_j Γ_i/Γ_j for j < i

with Γ_i the channel's decay; from K̃ comes M, as triton_delta_solve.py has it.

What is surprising:
- Γ is counted from the middle of the chunk's total decay, and A and K̃ are products of those tiles, where no channel loses more
  than 2^(-2 RANGE) in the chunk. Other chunks are flagged and done again, with EXACT: A and K̃ are merged pairwise from single
  tokens up, as triton_vector.py says, and tiles are counted from the chunk's edges, writers up to its end.
- `totals` says it to the walks: log2 of the decay from an edge to where tiles are counted from, and of what else there is.
Source: triton_vector_tiles.py has the sums of log λ; the launches are in triton_delta_vector.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_delta_solve import KEY_EPS, inverted_either
from kernels.triton_scalar_tiles import locate_slot
from kernels.triton_vector_tiles import (
    after,
    decay_halves,
    decay_sums,
    load_row,
    load_tile,
    log2_of,
    merging,
    operand,
    store_tile,
    up_to,
)

PLANES = tl.constexpr(3)  # of the gates: β, 1 / |k| or 1, and what M has been divided by


@triton.jit
def inverse_norms(k, stride, left, CHUNK: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    squares = tl.zeros([CHUNK], tl.float32)
    for first_key in tl.static_range(0, K, BLOCK_K):
        keys = load_tile(k, stride, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32)
        squares += tl.sum(keys * keys, 1)
    return tl.rsqrt(squares + KEY_EPS)


# fmt: off
@triton.jit
def _prepare_at(
    q, k, x, beta, gain, offset, inverse, scores, queries, erasers, writers, totals, gates, flags,
    slope, scale, heads, head, slot, batch, start, left,
    q_b, q_t, q_h, k_b, k_t, k_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr,
    ONE_HALF: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr, EXACT: tl.constexpr,
    RANGE: tl.constexpr,
):
    rows = tl.arange(0, CHUNK)
    place = slot.to(tl.int64) * heads + head
    q += batch * q_b + start * q_t + head * q_h
    k += batch * k_b + start * k_t + head * k_h
    x += batch * x_b + start * x_t + head * x_h
    tile = place * (CHUNK * K)
    betas = tl.load(beta + batch * beta_b + start * beta_t + head * beta_h + rows * beta_t, mask=rows < left, other=0.0)
    betas = betas.to(tl.float32)
    inverse_norm = tl.full([CHUNK], 1.0, tl.float32)
    if NORM:
        inverse_norm = inverse_norms(k, k_t, left, CHUNK, K, BLOCK_K)
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    lower = tl.zeros([CHUNK, CHUNK], tl.float32)
    squares = tl.zeros([CHUNK], tl.float32)
    steep = tl.full([], 0, tl.int1)
    for first_key in tl.range(0, K, BLOCK_K):
        row_gain = load_row(gain + head * K if gain is not None else None, first_key, 1.0, K, BLOCK_K)
        row_offset = load_row(offset + head * K if offset is not None else None, first_key, 0.0, K, BLOCK_K)
        tile_x = load_tile(x, x_t, first_key, left, CHUNK, K, BLOCK_K)
        log2 = log2_of(tile_x, row_gain, row_offset, slope, first_key, left, KIND, CHUNK, K, BLOCK_K)
        high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
        total = tl.sum(log2, 0)
        tile_q = load_tile(q, q_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32) * scale
        tile_k = load_tile(k, k_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32)
        if NORM:
            tile_k *= inverse_norm[:, None]
        squares += tl.sum(tile_k * tile_k, 1)
        since_start = decay_sums(up_to(CHUNK), high, low, ONE_HALF, LP)
        if not EXACT:
            steep = steep | (tl.min(total, 0) < -2.0 * RANGE)
            half = total * 0.5
            late = tl.exp2(since_start - half[None, :])
            query = operand(tile_q * late, LP, PRECISION)
            eraser = operand(tile_k * late, LP, PRECISION)
            writer = operand(tile_k * tl.exp2(half[None, :] - since_start), LP, PRECISION)
            pairs = tl.dot(query, tl.trans(writer), pairs, input_precision=PRECISION)
            lower = tl.dot(eraser, tl.trans(writer), lower, input_precision=PRECISION)
            total = tl.zeros_like(half)
        else:
            own = tl.sum(tile_q * tile_k, 1)[:, None]
            pairs += tl.where(rows[:, None] == rows[None, :], own, 0.0)
            for level in range(0, LEVELS):
                _, weights, apart = merging(level, CHUNK)
                apart = apart & (rows[:, None] > rows[None, :])
                decay = tl.exp2(decay_sums(weights, high, low, ONE_HALF, LP))
                both = operand(tile_k * decay, LP, PRECISION)
                found = tl.dot(both, tl.trans(both), input_precision=PRECISION)
                lower += tl.where(apart, found, 0.0)
                found = tl.dot(operand(tile_q * decay, LP, PRECISION), tl.trans(both), input_precision=PRECISION)
                pairs += tl.where(apart, found, 0.0)
            late = tl.exp2(since_start)
            query = tile_q * late
            eraser = tile_k * late
            writer = tile_k * tl.exp2(decay_sums(after(CHUNK), high, low, ONE_HALF, LP))
            half = tl.zeros_like(total)
        store_tile(queries + tile, K, first_key, CHUNK, query, CHUNK, K, BLOCK_K)
        store_tile(erasers + tile, K, first_key, CHUNK, eraser, CHUNK, K, BLOCK_K)
        store_tile(writers + tile, K, first_key, CHUNK, writer, CHUNK, K, BLOCK_K)
        columns = first_key + tl.arange(0, BLOCK_K)
        tl.store(totals + place * (2 * K) + columns, half, mask=columns < K)
        tl.store(totals + place * (2 * K) + K + columns, total, mask=columns < K)
    square = place * (CHUNK * CHUNK)
    store_tile(scores + square, CHUNK, 0, CHUNK, tl.where(up_to(CHUNK), pairs, 0.0), CHUNK, CHUNK, CHUNK)
    lower = tl.where(rows[:, None] > rows[None, :], lower, 0.0)
    found = inverted_either(lower, betas, squares, rows, LEVELS, LP, PRECISION)
    factor = 1.0
    if inverse.dtype.element_ty == tl.float16:
        factor = tl.maximum(tl.max(tl.max(tl.abs(found), 1), 0) * 2.0**-15, 1.0)
        found /= factor
    store_tile(inverse + square, CHUNK, 0, CHUNK, found, CHUNK, CHUNK, CHUNK)
    if flags is not None:
        tl.store(flags + place, steep.to(tl.int8))
    gates += place * (PLANES * CHUNK)
    tl.store(gates + rows, betas)
    tl.store(gates + CHUNK + rows, inverse_norm)
    tl.store(gates + 2 * CHUNK + rows, tl.full([CHUNK], 1.0, tl.float32) * factor)


@triton.jit(do_not_specialize=["slope", "scale", "tokens", "heads", "sequences", "search_steps", "slots"])
def prepare_kernel(
    q, k, x, beta, gain, offset, cu, inverse, scores, queries, erasers, writers, totals, gates, flags,
    slope, scale, tokens, heads, sequences, search_steps, slots,
    q_b, q_t, q_h, k_b, k_t, k_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr,
    ONE_HALF: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr, EXACT: tl.constexpr,
    RANGE: tl.constexpr, AGAIN: tl.constexpr, GROUP: tl.constexpr,
):
    """inverse, scores: (slots, H, CHUNK, CHUNK); queries, erasers, writers: (slots, H, CHUNK, K); totals: (slots, H, 2, K);
    flags, (slots, H): which chunks were too steep. AGAIN: of a group of GROUP slots those alone."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    slot = tl.program_id(0) // heads * GROUP
    if AGAIN:
        for n in range(0, tl.minimum(GROUP, slots - slot)):
            if tl.load(flags + (slot + n).to(tl.int64) * heads + head) != 0:
                batch, start, left = locate_slot(cu, slot + n, sequences, search_steps, tokens, CHUNK)
                _prepare_at(
                    q, k, x, beta, gain, offset, inverse, scores, queries, erasers, writers, totals, gates, None,
                    slope, scale, heads, head, slot + n, batch, start, left,
                    q_b, q_t, q_h, k_b, k_t, k_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
                    K, BLOCK_K, CHUNK, LEVELS, KIND, ONE_HALF, LP, PRECISION, NORM, EXACT, RANGE,
                )
    else:
        batch, start, left = locate_slot(cu, slot, sequences, search_steps, tokens, CHUNK)
        if left <= 0:
            return
        _prepare_at(
            q, k, x, beta, gain, offset, inverse, scores, queries, erasers, writers, totals, gates, flags,
            slope, scale, heads, head, slot, batch, start, left,
            q_b, q_t, q_h, k_b, k_t, k_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
            K, BLOCK_K, CHUNK, LEVELS, KIND, ONE_HALF, LP, PRECISION, NORM, EXACT, RANGE,
        )
# fmt: on
