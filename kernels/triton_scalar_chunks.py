"""The backward pass of the scalar-decay scan for all chunks at once, from the states and state gradients that walks have kept.

What is surprising:
- One program has all of a chunk. It goes over K in slices and adds up what needs all of K, so that every gradient leaves whole
  and nothing is written to be summed. dv has a pass over the slices of its own: with dq and dk it would not fit the registers.
- Where states are kept for every second chunk only (EVERY = 2), a program reads the other chunk as well: the earlier one's k
  and v stand for what its S lacks, or the later one's q and do for what its dS lacks.
Source: the launches are in triton_scalar.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_scalar_tiles import (
    between,
    decay_gradient,
    gate_parameters,
    get_decays,
    get_kept,
    get_tile,
    inside_pairs,
    locate_slot,
    put_tile,
    running,
)
from kernels.triton_scalar_walk import RUNTIME, STRIDES


# fmt: off
@triton.jit(do_not_specialize=[*RUNTIME, *STRIDES, "search_steps"])
def chunk_kernel(
    q, k, v, x, gain, offset, cu, d, starts, ends,
    dq, dk, dv, d_log, search_steps,
    slope, log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr,
    ALIGN: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVERY: tl.constexpr,
):
    """starts, ends: S before and dS after each slot of EVERY chunks. dv is None where a walk has made it. BLOCK_V holds V."""
    SLICES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    # A large S is read when dS has left its shared memory, and one program more fits a multiprocessor.
    LATE: tl.constexpr = EVERY == 1 and BLOCK_K * BLOCK_V > 64 * 64
    head = (tl.program_id(0) % heads).to(tl.int64)
    chunk = tl.program_id(0) // heads
    slot = chunk // EVERY
    batch, start, left = locate_slot(cu, slot, segments, search_steps, tokens, CHUNK * EVERY)
    later = chunk % EVERY
    if left <= later * CHUNK:
        return
    rows = tl.arange(0, CHUNK)
    cv = tl.arange(0, BLOCK_V)
    own = start + later * CHUNK
    q_base = q + (batch * q_b + own * q_t + head * q_h) * ALIGN
    k_base = k + (batch * k_b + own * k_t + head * k_h) * ALIGN
    v_base = v + (batch * v_b + own * v_t + head * v_h) * ALIGN
    d_base = d + (batch * d_b + own * d_t + head * d_h) * ALIGN
    x_base = x + batch * x_b + own * x_t + head * x_h
    row = (batch * tokens + own) * heads + head
    factor, shift = gate_parameters(gain, offset, head)
    left_own = left - later * CHUNK
    kept = slot.to(tl.int64) * heads * (K * V) + head * V
    q_offsets = rows[:, None] * (q_t * ALIGN)
    k_offsets = rows[:, None] * (k_t * ALIGN)
    dc = get_tile(d_base, rows[:, None] * (d_t * ALIGN) + cv[None, :], rows, cv, left_own, V, BLOCK_V, LP)
    log2 = get_decays(x_base, rows * x_t, rows, left_own, factor, shift, slope, KIND)
    whole, fraction, whole_total, fraction_total = running(log2, SPLIT)
    from_start = tl.exp2(whole + fraction + log2_scale)
    to_end = tl.exp2((whole_total - whole) + (fraction_total - fraction))
    if EVERY == 2:
        # The other chunk of the slot. For the later of the two it comes before, and its k and v are wanted; for the earlier one
        # it comes after, and its q and do are. `fade` is its decay.
        to_other = CHUNK - 2 * later * CHUNK
        left_other = left_own - to_other
        if later == 1:
            key_base = k_base + to_other * k_t * ALIGN
            key_offsets = k_offsets
            value_base = v_base + to_other * v_t * ALIGN
            value_t = v_t * ALIGN
        else:
            key_base = q_base + to_other * q_t * ALIGN
            key_offsets = q_offsets
            value_base = d_base + to_other * d_t * ALIGN
            value_t = d_t * ALIGN
        value = get_tile(value_base, rows[:, None] * value_t + cv[None, :], rows, cv, left_other, V, BLOCK_V, LP)
        x_other = x_base + to_other * x_t
        log2_other = get_decays(x_other, rows * x_t, rows, left_other, factor, shift, slope, KIND)
        other, other_fraction, other_total, other_fraction_total = running(log2_other, SPLIT)
        power = tl.where(later == 1, other_total - other, other + log2_scale)
        power += tl.where(later == 1, other_fraction_total - other_fraction, other_fraction)
        value = (value * tl.exp2(power)[:, None]).to(LP)
        fade = tl.exp2(other_total + other_fraction_total)
    if SLICES_K == 1:
        ck = tl.arange(0, BLOCK_K)
        qc = get_tile(q_base, q_offsets + ck[None, :], rows, ck, left_own, K, BLOCK_K, LP)
        kc = get_tile(k_base, k_offsets + ck[None, :], rows, ck, left_own, K, BLOCK_K, LP)
        d_state = get_kept(ends + kept, ck, cv, heads, K, V, BLOCK_K, BLOCK_V).to(LP)
        if EVERY == 2:
            key = get_tile(key_base, key_offsets + ck[None, :], rows, ck, left_other, K, BLOCK_K, LP)

    if dv is not None:
        scores_t = tl.zeros([CHUNK, CHUNK], tl.float32)
        scores_other = tl.zeros([CHUNK, CHUNK], tl.float32)
        dv_c = tl.zeros([CHUNK, BLOCK_V], tl.float32)
        for piece in tl.range(0, SLICES_K, num_stages=STAGES):
            if SLICES_K > 1:
                ck = piece * BLOCK_K + tl.arange(0, BLOCK_K)
                qc = get_tile(q_base, q_offsets + ck[None, :], rows, ck, left_own, K, BLOCK_K, LP)
                kc = get_tile(k_base, k_offsets + ck[None, :], rows, ck, left_own, K, BLOCK_K, LP)
                d_state = get_kept(ends + kept, ck, cv, heads, K, V, BLOCK_K, BLOCK_V).to(LP)
                if EVERY == 2:
                    key = get_tile(key_base, key_offsets + ck[None, :], rows, ck, left_other, K, BLOCK_K, LP)
            scores_t = tl.dot(kc, tl.trans(qc), scores_t, input_precision=PRECISION)
            dv_c = tl.dot(kc, d_state, dv_c, input_precision=PRECISION)
            if EVERY == 2 and later == 0:
                scores_other = tl.dot(kc, tl.trans(key), scores_other, input_precision=PRECISION)
        if EVERY == 2 and later == 0:
            dv_c = tl.dot(scores_other.to(LP), value, dv_c * fade, input_precision=PRECISION)
        scores_t *= between(whole, fraction, rows, log2_scale, True, SPLIT)
        dv_c = tl.dot(scores_t.to(LP), dc, dv_c * to_end[:, None], input_precision=PRECISION)
        put_tile(dv + row * V, rows[:, None] * (heads * V) + cv[None, :], rows, cv, left_own, dv_c, V, BLOCK_V)

    vc = get_tile(v_base, rows[:, None] * (v_t * ALIGN) + cv[None, :], rows, cv, left_own, V, BLOCK_V, LP)
    values = tl.dot(dc, tl.trans(vc), input_precision=PRECISION)
    values = (values * between(whole, fraction, rows, log2_scale, False, SPLIT)).to(LP)
    values_t = tl.dot(vc, tl.trans(dc), input_precision=PRECISION)
    values_t *= between(whole, fraction, rows, log2_scale, True, SPLIT)
    weighted_t = values_t.to(LP)
    if EVERY == 2:
        if later == 1:
            across = tl.dot(dc, tl.trans(value), input_precision=PRECISION).to(LP)
        else:
            across = tl.dot(vc, tl.trans(value), input_precision=PRECISION).to(LP)
        around_other = tl.zeros([CHUNK], tl.float32)
    inside = tl.zeros([CHUNK], tl.float32)
    leaving = tl.zeros([CHUNK], tl.float32)
    around = tl.zeros([BLOCK_K], tl.float32)
    for piece in tl.range(0, SLICES_K, num_stages=STAGES):
        if SLICES_K > 1:
            ck = piece * BLOCK_K + tl.arange(0, BLOCK_K)
            qc = get_tile(q_base, q_offsets + ck[None, :], rows, ck, left_own, K, BLOCK_K, LP)
            kc = get_tile(k_base, k_offsets + ck[None, :], rows, ck, left_own, K, BLOCK_K, LP)
            d_state = get_kept(ends + kept, ck, cv, heads, K, V, BLOCK_K, BLOCK_V).to(LP)
            if EVERY == 2:
                key = get_tile(key_base, key_offsets + ck[None, :], rows, ck, left_other, K, BLOCK_K, LP)
        if not LATE:
            state = get_kept(starts + kept, ck, cv, heads, K, V, BLOCK_K, BLOCK_V).to(LP)
            around += tl.sum(state.to(tl.float32) * d_state, 1)
        if SPLIT:
            inside += inside_pairs(tl.dot(kc, tl.trans(qc), input_precision=PRECISION) * values_t, rows)

        dk_c = tl.dot(vc, tl.trans(d_state), input_precision=PRECISION)
        if EVERY == 2 and later == 0:
            dk_c = tl.dot(across, key, dk_c * fade, input_precision=PRECISION)
        dk_c *= to_end[:, None]
        leaving += tl.sum(dk_c * kc, 1)
        dk_c = tl.dot(weighted_t, qc, dk_c, input_precision=PRECISION)
        if not SPLIT:
            inside -= tl.sum(dk_c * kc, 1)
        columns = rows[:, None] * (heads * K) + ck[None, :]
        put_tile(dk + row * K, columns, rows, ck, left_own, dk_c, K, BLOCK_K)

        if LATE:
            state = get_kept(starts + kept, ck, cv, heads, K, V, BLOCK_K, BLOCK_V).to(LP)
            around += tl.sum(state.to(tl.float32) * d_state, 1)
        dq_c = tl.dot(dc, tl.trans(state), input_precision=PRECISION)
        if EVERY == 2 and later == 1:
            dq_c = tl.dot(across, key, dq_c * fade, input_precision=PRECISION)
        dq_c *= from_start[:, None]
        if SPLIT:
            inside += tl.sum(dq_c * qc, 1)
        dq_c = tl.dot(values, kc, dq_c, input_precision=PRECISION)
        if not SPLIT:
            inside += tl.sum(dq_c * qc, 1)
        put_tile(dq + row * K, columns, rows, ck, left_own, dq_c, K, BLOCK_K)

        if EVERY == 2:
            if later == 1:
                seen = tl.dot(value, tl.trans(d_state), input_precision=PRECISION)
            else:
                seen = tl.dot(value, tl.trans(state), input_precision=PRECISION)
            around_other += tl.sum(seen * key, 1)
    around_c = tl.sum(around, 0)
    if EVERY == 2:
        around_c = around_c * fade + tl.sum(around_other, 0)
    d_decay = decay_gradient(inside, leaving, around_c * tl.exp2(whole_total + fraction_total), rows, log2, SPLIT)
    tl.store(d_log + row + rows * heads, d_decay, mask=rows < left_own)
# fmt: on
