"""The gradients of the delta rule with one decay per key channel, for all chunks at once, from what the walks have kept.

With U, dR, D = β dR, S before and dS after a chunk, P = dO Uᵀ with its diagonal and N = −D Uᵀ without, a slice of K has

    from the state:  dq: dO Sᵀ    dk as an eraser: −D Sᵀ    dk as a writer: U dSᵀ
    inside:          dq: P k      dk as an eraser: N k      dk as a writer: Pᵀ q + Nᵀ k

each between factors of the decay, and log λ_t the sum of what passes over t of q·dq and of both k·dk.

What is surprising:
- There are two versions of a chunk. The gentle one takes the tiles that were prepared, they and the states counted from the
  chunk's middle, and makes dk as a writer transposed, so that a loaded tile stands on the left. The exact one, for chunks that
  were flagged, merges halves level by level, where an eraser's and a writer's dk are one symmetric product.
- Slices of K go by themselves, except where keys are normalized and each waits for the sum k·dk over all of K.
Source: triton_delta_vector_prepare.py and triton_delta_vector_walk.py have what these are derivatives of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_delta_vector_prepare import PLANES
from kernels.triton_delta_vector_walk import get_block
from kernels.triton_scalar_tiles import locate_slot
from kernels.triton_vector_gradients import _store_decay_gradient
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
    merging,
    operand,
    store_tile,
    sums,
    up_to,
)


# fmt: off
@triton.jit
def _inside(
    v, d, gates, errors, dr, dv, d_beta, heads, head, place, row, batch, start, left, slice_k, v_b, v_t, v_h, d_b, d_t, d_h,
    V: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, WRITE: tl.constexpr,
):
    """U, −D, dO, P and N of a chunk, the latter two in fp32; dv and dβ leave with the first slice of K."""
    rows = tl.arange(0, CHUNK)
    beta = tl.load(gates + place * (PLANES * CHUNK) + rows)
    error = load_tile(errors + row * V, heads * V, 0, left, CHUNK, V, BLOCK_V).to(tl.float32)
    drc = load_tile(dr + row * V, heads * V, 0, left, CHUNK, V, BLOCK_V).to(tl.float32)
    u = beta[:, None] * error
    if not WRITE:
        u += load_tile(v + batch * v_b + start * v_t + head * v_h, v_t, 0, left, CHUNK, V, BLOCK_V).to(tl.float32)
    if slice_k == 0:
        tl.store(d_beta + row + rows * heads, tl.sum(drc * error, 1), mask=rows < left)
        store_tile(dv + row * V, heads * V, 0, left, drc * beta[:, None] if WRITE else drc, CHUNK, V, BLOCK_V)
    u = u.to(LP)
    minus_d = (drc * -beta[:, None]).to(LP)
    dc = load_tile(d + batch * d_b + start * d_t + head * d_h, d_t, 0, left, CHUNK, V, BLOCK_V).to(LP)
    read = tl.where(up_to(CHUNK), tl.dot(dc, tl.trans(u), input_precision=PRECISION), 0.0)
    erased = tl.dot(minus_d, tl.trans(u), input_precision=PRECISION)
    return u, minus_d, dc, read, tl.where(rows[:, None] > rows[None, :], erased, 0.0)


@triton.jit
def _state_at(
    states, first_key, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LP: tl.constexpr,
):
    ck = first_key + tl.arange(0, BLOCK_K)
    cv = tl.arange(0, BLOCK_V)
    pointers = states + ck[:, None] * V + cv[None, :]
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        return tl.load(pointers).to(LP)
    else:
        return tl.load(pointers, mask=(ck < K)[:, None] & (cv < V)[None, :], other=0.0).to(LP)


@triton.jit
def _of_normalized(
    k, dk, along, inverse_norm, left, k_t, dk_t, K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):
    """Takes the gradients of keys as they were given from 1 / |k| times those of normalized keys; along: the sum of k·dk."""
    tl.debug_barrier()
    for first_key in tl.range(0, K, BLOCK_K):
        keys = load_tile(k, k_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32)
        dk_c = load_tile(dk, dk_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32)
        dk_c -= keys * (along * inverse_norm * inverse_norm)[:, None]
        store_tile(dk, dk_t, first_key, left, dk_c, CHUNK, K, BLOCK_K)


@triton.jit
def _gentle_at(
    k, v, x, gain, offset, d, queries, erasers, writers, gates, errors, dr, starts, ends,
    dq, dk, dv, d_beta, dx, d_gain, d_offset, slope, scale, tokens, heads, head, place, batch, start, left, slice_k,
    k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr,
    ONE_HALF: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr, WRITE: tl.constexpr,
    SLICES: tl.constexpr,
):
    rows = tl.arange(0, CHUNK)
    row = (batch * tokens + start) * heads + head
    u, minus_d, dc, read, erased = _inside(
        v, d, gates, errors, dr, dv, d_beta, heads, head, place, row, batch, start, left, slice_k,
        v_b, v_t, v_h, d_b, d_t, d_h, V, BLOCK_V, CHUNK, LP, PRECISION, WRITE,
    )
    read, erased = read.to(LP), erased.to(LP)
    x += batch * x_b + start * x_t + head * x_h
    along = tl.zeros([CHUNK], tl.float32)
    if NORM:
        inverse_norm = tl.load(gates + place * (PLANES * CHUNK) + CHUNK + rows)
    for piece in tl.range(0, SLICES, disable_licm=True):
        first_key = (slice_k + piece) * BLOCK_K
        ck = first_key + tl.arange(0, BLOCK_K)
        state = _state_at(starts + place * (K * V), first_key, K, V, BLOCK_K, BLOCK_V, LP)
        writer = get_block(writers + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        query = get_block(queries + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        dq_c = tl.dot(dc, tl.trans(state), input_precision=PRECISION)
        dq_c = tl.dot(read, writer, dq_c, input_precision=PRECISION)
        gained = query.to(tl.float32) * dq_c
        row_gain = load_row(gain + head * K if gain is not None else None, first_key, 1.0, K, BLOCK_K)
        row_offset = load_row(offset + head * K if offset is not None else None, first_key, 0.0, K, BLOCK_K)
        tile_x = load_tile(x, x_t, first_key, left, CHUNK, K, BLOCK_K)
        log2 = log2_of(tile_x, row_gain, row_offset, slope, first_key, left, KIND, CHUNK, K, BLOCK_K)
        high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
        since_middle = decay_sums(up_to(CHUNK), high, low, ONE_HALF, LP) - 0.5 * tl.sum(log2, 0)[None, :]
        fade = tl.exp2(since_middle)
        store_tile(dq + row * K, heads * K, first_key, left, dq_c * (fade * scale), CHUNK, K, BLOCK_K)

        early = tl.dot(minus_d, tl.trans(state), input_precision=PRECISION)
        early = tl.dot(erased, writer, early, input_precision=PRECISION)
        eraser = get_block(erasers + place * (CHUNK * K), rows, ck, K, BLOCK_K, LP)
        gained += eraser.to(tl.float32) * early
        early *= fade
        d_state = _state_at(ends + place * (K * V), first_key, K, V, BLOCK_K, BLOCK_V, LP)
        around = tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        # Pairs that pass over the chunk's end are summed as they are; gained is for those inside and over its start.
        late_t = tl.dot(d_state, tl.trans(u), input_precision=PRECISION)
        past = writer.to(tl.float32) * tl.trans(late_t)
        late_t = tl.dot(tl.trans(query), read, tl.zeros_like(late_t), input_precision=PRECISION)
        late_t = tl.dot(tl.trans(eraser), erased, late_t, input_precision=PRECISION)
        gained -= writer.to(tl.float32) * tl.trans(late_t)
        late_t = tl.dot(d_state, tl.trans(u), late_t, input_precision=PRECISION)
        dk_c = early + tl.trans(late_t) * tl.exp2(-since_middle)
        if NORM:
            tile_k = writer.to(tl.float32) * fade
            along += tl.sum(dk_c * tile_k, 1)
            if SLICES == 1:
                dk_c -= tile_k * along[:, None]
            dk_c *= inverse_norm[:, None]
        store_tile(dk + row * K, heads * K, first_key, left, dk_c, CHUNK, K, BLOCK_K)
        high, low = halves(gained, LP)
        d_log = sums(from_on(CHUNK), high, low, LP)
        d_log = tl.dot((rows[:, None] > rows[None, :]).to(LP), past.to(LP), d_log, input_precision=PRECISION)
        _store_decay_gradient(
            d_log + around[None, :], dk_c, x, gain + head * K if gain is not None else None,
            offset + head * K if offset is not None else None, dx + row * K,
            d_gain + place * K if d_gain is not None else None, d_offset + place * K if d_offset is not None else None,
            slope, left, first_key, x_t, heads * K, False, KIND, CHUNK, K, BLOCK_K,
        )
    if NORM and SLICES > 1:
        k += batch * k_b + start * k_t + head * k_h
        _of_normalized(k, dk + row * K, along, inverse_norm, left, k_t, heads * K, K, BLOCK_K, CHUNK)


@triton.jit
def _exact_at(
    q, k, v, x, gain, offset, d, gates, errors, dr, starts, ends,
    dq, dk, dv, d_beta, dx, d_gain, d_offset, slope, scale, tokens, heads, head, place, batch, start, left,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr,
    WRITE: tl.constexpr,
):
    """What _gentle_at does for all slices of K, for any decay and from states at the chunk's edges. The gradient of log λ_t is
    summed over the pairs that t lies between, and over no other that would have to cancel."""
    rows = tl.arange(0, CHUNK)
    row = (batch * tokens + start) * heads + head
    u, minus_d, dc, read, erased = _inside(
        v, d, gates, errors, dr, dv, d_beta, heads, head, place, row, batch, start, left, 0,
        v_b, v_t, v_h, d_b, d_t, d_h, V, BLOCK_V, CHUNK, LP, PRECISION, WRITE,
    )
    earlier = rows[:, None] > rows[None, :]
    read_t = tl.where(from_on(CHUNK), tl.dot(u, tl.trans(dc), input_precision=PRECISION), 0.0).to(LP)
    erased_t = tl.where(after(CHUNK), tl.dot(u, tl.trans(minus_d), input_precision=PRECISION), 0.0).to(LP)
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], read, 0.0), 1)[:, None]
    read, erased = read.to(LP), erased.to(LP)
    q += batch * q_b + start * q_t + head * q_h
    k += batch * k_b + start * k_t + head * k_h
    x += batch * x_b + start * x_t + head * x_h
    along = tl.zeros([CHUNK], tl.float32)
    if NORM:
        inverse_norm = tl.load(gates + place * (PLANES * CHUNK) + CHUNK + rows)
    for first_key in tl.range(0, K, BLOCK_K):
        row_gain = load_row(gain + head * K if gain is not None else None, first_key, 1.0, K, BLOCK_K)
        row_offset = load_row(offset + head * K if offset is not None else None, first_key, 0.0, K, BLOCK_K)
        tile_x = load_tile(x, x_t, first_key, left, CHUNK, K, BLOCK_K)
        log2 = log2_of(tile_x, row_gain, row_offset, slope, first_key, left, KIND, CHUNK, K, BLOCK_K)
        high, low = decay_halves(tile_x, log2, ONE_HALF, LP)
        state = _state_at(starts + place * (K * V), first_key, K, V, BLOCK_K, BLOCK_V, LP)
        d_state = _state_at(ends + place * (K * V), first_key, K, V, BLOCK_K, BLOCK_V, LP)
        around = tl.exp2(tl.sum(log2, 0)) * tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        tile_q = load_tile(q, q_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32) * scale
        tile_k = load_tile(k, k_t, first_key, left, CHUNK, K, BLOCK_K).to(tl.float32)
        if NORM:
            tile_k *= inverse_norm[:, None]
        # through the state before the chunk and the state after it
        fade = tl.exp2(decay_sums(up_to(CHUNK), high, low, ONE_HALF, LP))
        dq_c = tl.dot(dc, tl.trans(state), input_precision=PRECISION) * fade
        dk_c = tl.dot(minus_d, tl.trans(state), input_precision=PRECISION) * fade
        gained = tile_q * dq_c + tile_k * dk_c
        d_log = tl.dot(from_on(CHUNK).to(LP), gained.to(LP), input_precision=PRECISION)
        late = tl.dot(u, tl.trans(d_state), input_precision=PRECISION)
        late *= tl.exp2(decay_sums(after(CHUNK), high, low, ONE_HALF, LP))
        dk_c += late
        d_log = tl.dot(earlier.to(LP), (tile_k * late).to(LP), d_log, input_precision=PRECISION) + around[None, :]
        # a token with itself, between which and itself no λ lies
        dq_c += own * tile_k
        dk_c += own * tile_q
        for level in range(0, LEVELS):
            is_late, weights, apart = merging(level, CHUNK)
            fade = tl.exp2(decay_sums(weights, high, low, ONE_HALF, LP))
            key = operand(tile_k * fade, LP, PRECISION)
            query = operand(tl.where(is_late, tile_q * fade, 0.0), LP, PRECISION)
            pairs = tl.where(apart & earlier, read, tl.zeros_like(read))
            d_query = tl.dot(pairs, key, input_precision=PRECISION)
            pairs = tl.where(apart, tl.where(earlier, erased, erased_t), tl.zeros_like(erased))
            d_key = tl.dot(pairs, key, input_precision=PRECISION)
            pairs = tl.where(apart & (earlier == 0), read_t, tl.zeros_like(read))
            d_key = tl.dot(pairs, query, d_key, input_precision=PRECISION)
            gained = query.to(tl.float32) * d_query + key.to(tl.float32) * d_key
            d_log = tl.dot(crossing(level, CHUNK).to(LP), gained.to(LP), d_log, input_precision=PRECISION)
            dq_c += tl.where(is_late, fade * d_query, 0.0)
            dk_c += fade * d_key
        store_tile(dq + row * K, heads * K, first_key, left, dq_c * scale, CHUNK, K, BLOCK_K)
        if NORM:
            along += tl.sum(dk_c * tile_k, 1)
            if K <= BLOCK_K:
                dk_c -= tile_k * along[:, None]
            dk_c *= inverse_norm[:, None]
        store_tile(dk + row * K, heads * K, first_key, left, dk_c, CHUNK, K, BLOCK_K)
        _store_decay_gradient(
            d_log, dk_c, x, gain + head * K if gain is not None else None,
            offset + head * K if offset is not None else None, dx + row * K,
            d_gain + place * K if d_gain is not None else None, d_offset + place * K if d_offset is not None else None,
            slope, left, first_key, x_t, heads * K, False, KIND, CHUNK, K, BLOCK_K,
        )
    if NORM and K > BLOCK_K:
        _of_normalized(k, dk + row * K, along, inverse_norm, left, k_t, heads * K, K, BLOCK_K, CHUNK)


@triton.jit(do_not_specialize=["slope", "scale", "tokens", "heads", "sequences", "search_steps", "slots"])
def vector_gradients_kernel(
    q, k, v, x, gain, offset, d, queries, erasers, writers, gates, errors, dr, starts, ends, cu, flags,
    dq, dk, dv, d_beta, dx, d_gain, d_offset, slope, scale, tokens, heads, sequences, search_steps, slots,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    KIND: tl.constexpr, ONE_HALF: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr,
    WRITE: tl.constexpr, EXACT: tl.constexpr, AGAIN: tl.constexpr, GROUP: tl.constexpr,
):
    """v: read where w = 1 only. BLOCK_V holds all of V. EXACT: every chunk, or with AGAIN those of a group of GROUP slots that
    are flagged; else those that are not flagged, a program for each slice of K unless NORM."""
    ALL: tl.constexpr = 1 if EXACT or NORM else (K + BLOCK_K - 1) // BLOCK_K
    slice_k = tl.program_id(0) % ALL
    program = tl.program_id(0) // ALL
    head = (program % heads).to(tl.int64)
    first = program // heads * GROUP
    if EXACT:
        for n in range(0, tl.minimum(GROUP, slots - first) if AGAIN else 1):
            slot = (first + n).to(tl.int64)
            place = slot * heads + head
            batch, start, left = locate_slot(cu, first + n, sequences, search_steps, tokens, CHUNK)
            wanted = left > 0
            if AGAIN:
                wanted = tl.load(flags + place) != 0
            if wanted:
                _exact_at(
                    q, k, v, x, gain, offset, d, gates, errors, dr, starts, ends,
                    dq, dk, dv, d_beta, dx, d_gain, d_offset, slope, scale, tokens, heads, head, place, batch, start, left,
                    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
                    K, V, BLOCK_K, BLOCK_V, CHUNK, LEVELS, KIND, ONE_HALF, LP, PRECISION, NORM, WRITE,
                )
    else:
        place = first.to(tl.int64) * heads + head
        batch, start, left = locate_slot(cu, first, sequences, search_steps, tokens, CHUNK)
        if left <= 0:
            return
        if tl.load(flags + place) != 0:
            return
        _gentle_at(
            k, v, x, gain, offset, d, queries, erasers, writers, gates, errors, dr, starts, ends,
            dq, dk, dv, d_beta, dx, d_gain, d_offset, slope, scale, tokens, heads, head, place, batch, start, left, slice_k,
            k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
            K, V, BLOCK_K, BLOCK_V, CHUNK, KIND, ONE_HALF, LP, PRECISION, NORM, WRITE,
            (K + BLOCK_K - 1) // BLOCK_K if NORM else 1,
        )
# fmt: on
