"""A chunk's rows for a vector decay, as Triton kernels: o from v and the state before the chunk, or dv from do and the state
gradient after it.

What is surprising: there are two versions. The gentle one is for heads whose K is walked along in pieces, which no walk can
make rows of; decays count from the chunk's middle, where its states were kept. The exact one is for flagged chunks, or for all:
halves are merged pairwise from single tokens up, the later half's rows carrying the decay since the middle and the earlier
half's rows the decay up to the middle, so every factor is at most 1 and no row reads a later one.
Source: triton_vector.py launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_gate import shared_key
from kernels.triton_vector_tiles import (
    after,
    around_middle,
    chunk_of,
    decay_halves,
    decay_sums,
    flagged,
    from_on,
    load_row,
    load_state,
    load_tile,
    log2_of,
    merging,
    store_tile,
    up_to,
)


@triton.jit
def _pair_weights(
    q, k, high, low, REVERSE: tl.constexpr, ONE_HALF: tl.constexpr, C: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """A_ij = Σ_d q_i k_j λ_{j+1}…λ_i for i >= j, or its transpose, level by level. q and k in fp32."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    causal = i <= j if REVERSE else i >= j
    a = tl.where(i == j, tl.sum(q.to(LP).to(tl.float32) * k.to(LP).to(tl.float32), 1)[:, None], 0.0)
    for level in tl.static_range(0, LOGC):
        late, weights, pairs = merging(level, C)
        x = (tl.where(late, q, k) * tl.exp2(decay_sums(weights, high, low, ONE_HALF, LP))).to(LP)
        a += tl.where(causal & pairs, tl.dot(x, tl.trans(x), input_precision=IP), 0.0)
    return a


@triton.jit
def _rows_of_chunk(
    q, k, y, x, gain, offset, out, states, flags, flags_piece, scale, slope, left, first_value, q_t, k_t, y_t, x_t, out_t,
    EXACT: tl.constexpr, REVERSE: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, PIECES: tl.constexpr,
    PIECE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One chunk's o from v and the state before it, or its dv from do and the state gradient after it."""
    a = tl.zeros([C, C], tl.float32)
    rows = tl.zeros([C, BV], tl.float32)
    for first_key in tl.static_range(0, K, BK):
        tile_x = load_tile(x, x_t, first_key, left, C, K, BK)
        tile_gain = load_row(gain, first_key, 1.0, K, BK)
        tile_offset = load_row(offset, first_key, 0.0, K, BK)
        log2 = log2_of(tile_x, tile_gain, tile_offset, slope, first_key, left, KIND, C, K, BK)
        high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
        tile_q = load_tile(q, q_t, first_key, left, C, K, BK).to(tl.float32) * scale
        if k is not None:
            tile_k = load_tile(k, k_t, first_key, left, C, K, BK).to(tl.float32)
        else:
            tile_k = shared_key(log2)
        if EXACT:
            a += _pair_weights(tile_q, tile_k, high, low, REVERSE, ONE_HALF, C, LOGC, LP, IP)
            if REVERSE:
                decayed = tile_k * tl.exp2(decay_sums(after(C), high, low, ONE_HALF, LP))
            else:
                decayed = tile_q * tl.exp2(decay_sums(up_to(C), high, low, ONE_HALF, LP))
            decayed = decayed.to(LP)
        else:
            d = decay_sums(around_middle(C), high, low, ONE_HALF, LP)
            queries = (tile_q * tl.exp2(d)).to(LP)
            keys = (tile_k * tl.exp2(-d)).to(LP)
            if REVERSE:
                a = tl.dot(keys, tl.trans(queries), a, input_precision=IP)
                decayed = keys
            else:
                a = tl.dot(queries, tl.trans(keys), a, input_precision=IP)
                decayed = queries
        state = load_state(states, flags, flags_piece, log2, first_value, first_key, EXACT, PIECES, PIECE, K, V, BK, BV)
        rows = tl.dot(decayed, tl.trans(state.to(LP)), rows, input_precision=IP)
    if not EXACT:
        a = tl.where(from_on(C) if REVERSE else up_to(C), a, 0.0)
    tile_y = load_tile(y, y_t, first_value, left, C, V, BV).to(LP)
    rows = tl.dot(a.to(LP), tile_y, rows, input_precision=IP)
    store_tile(out, out_t, first_value, left, rows, C, V, BV)


@triton.jit
def _rows_at(
    q, k, y, x, gain, offset, out, states, flags, scale, slope, T, H, chunks, chunk, b, h, start, left,
    q_b, q_t, q_h, k_b, k_t, k_h, y_b, y_t, y_h, x_b, x_t, x_h,
    EXACT: tl.constexpr, REVERSE: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr, PIECES: tl.constexpr,
    PIECE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    if k is not None:
        k += b * k_b + h * k_h + start * k_t
    if gain is not None:
        gain += h * K
    if offset is not None:
        offset += h * K
    if flags is not None:
        flags += chunk * H + h
    _rows_of_chunk(
        q + b * q_b + h * q_h + start * q_t, k, y + b * y_b + h * y_h + start * y_t, x + b * x_b + h * x_h + start * x_t,
        gain, offset, out + ((b * T + start) * H + h) * V, states + (chunk * H + h) * (K * V), flags, chunks * H,
        scale, slope, left, tl.program_id(1) * BV, q_t, k_t, y_t, x_t, H * V,
        EXACT, REVERSE, KIND, ONE_HALF, PIECES, PIECE, K, V, BK, BV, C, LOGC, LP, IP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def rows_kernel(
    q, k, y, x, gain, offset, out, states, flags, table, scale, slope, T, H, chunks,
    q_b, q_t, q_h, k_b, k_t, k_h, y_b, y_t, y_h, x_b, x_t, x_h,
    AGAIN: tl.constexpr, EXACT: tl.constexpr, REVERSE: tl.constexpr, KIND: tl.constexpr, ONE_HALF: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """_rows_of_chunk for every chunk, or, if AGAIN, for a group's flagged ones. The walks had pieces of PIECE keys."""
    h = (tl.program_id(0) % H).to(tl.int64)
    first = (tl.program_id(0) // H).to(tl.int64) * GROUP
    if AGAIN:
        for n in range(0, tl.minimum(GROUP, chunks - first)):
            chunk = first + n
            b, start, left = chunk_of(table, chunk, T, C)
            if left > 0:
                if flagged(flags, chunk, h, H, chunks, PIECES):
                    _rows_at(
                        q, k, y, x, gain, offset, out, states, flags, scale, slope, T, H, chunks, chunk, b, h, start, left,
                        q_b, q_t, q_h, k_b, k_t, k_h, y_b, y_t, y_h, x_b, x_t, x_h,
                        EXACT, REVERSE, KIND, ONE_HALF, PIECES, PIECE, K, V, BK, BV, C, LOGC, LP, IP,
                    )  # fmt: skip
    else:
        b, start, left = chunk_of(table, first, T, C)
        if left <= 0:
            return
        _rows_at(
            q, k, y, x, gain, offset, out, states, flags, scale, slope, T, H, chunks, first, b, h, start, left,
            q_b, q_t, q_h, k_b, k_t, k_h, y_b, y_t, y_h, x_b, x_t, x_h,
            EXACT, REVERSE, KIND, ONE_HALF, PIECES, PIECE, K, V, BK, BV, C, LOGC, LP, IP,
        )  # fmt: skip
