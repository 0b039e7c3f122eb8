"""The backward pass of the scalar-decay scan without kept states: forwards in time for dq, in reverse for dk, dv and dlog λ.

What is surprising: S and dS are never in the same kernel, so ⟨S, dS⟩ is summed from chunk to chunk, and afresh from a
state that the first walk leaves every EVERY chunks, before rounding adds up.
Source: the launches are in triton_scalar.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_scalar_tiles import (
    above_rounding,
    between,
    first_checkpoint,
    gate_parameters,
    get_decays,
    get_state,
    get_tile,
    locate,
    put_state,
    put_tile,
    running,
    suffix_sum,
)
from kernels.triton_scalar_walk import RUNTIME, STRIDES


# fmt: off
@triton.jit(do_not_specialize=[*RUNTIME, *STRIDES])
def dq_kernel(
    q, k, v, x, gain, offset, cu, d, initial, dq, d_log, checkpoints,
    slope, log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr,
    ALIGN: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVERY: tl.constexpr,
):
    """dq, what arrives in dlog λ from earlier tokens (in d_log), and a state every EVERY chunks and at the end."""
    SLICES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    slice_k, slice_v, batch, segment, head, start, count = locate(cu, heads, segments, length, tokens, SLICES_K, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = slice_k * BLOCK_K + tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    q_base = q + (batch * q_b + start * q_t + head * q_h) * ALIGN
    k_base = k + (batch * k_b + start * k_t + head * k_h) * ALIGN
    v_base = v + (batch * v_b + start * v_t + head * v_h) * ALIGN
    d_base = d + (batch * d_b + start * d_t + head * d_h) * ALIGN
    x_base = x + batch * x_b + start * x_t + head * x_h
    dq_base = dq + (((slice_v * batches + batch) * tokens + start) * heads + head) * K
    d_log_base = d_log + (((slice_k * SLICES_V + slice_v) * batches + batch) * tokens + start) * heads + head
    q_offsets = rows[:, None] * (q_t * ALIGN) + ck[None, :]
    k_offsets = rows[:, None] * (k_t * ALIGN) + ck[None, :]
    v_offsets = rows[:, None] * (v_t * ALIGN) + cv[None, :]
    d_offsets = rows[:, None] * (d_t * ALIGN) + cv[None, :]
    dq_offsets = rows[:, None] * (heads * K) + ck[None, :]
    span = (batch * segments + segment) * heads + head
    factor, shift = gate_parameters(gain, offset, head)
    chunks = tl.cdiv(count, CHUNK)
    slot = first_checkpoint(cu, batch, segments, segment, start, length, CHUNK * EVERY)
    checkpoint_base = checkpoints + (slot * heads + head) * (K * V)
    if initial is not None:
        state = get_state(initial + span * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    # masks and offsets hoisted out of the loop would be held in registers, of which there are none left
    for c in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        left = count - c * CHUNK
        qc = get_tile(q_base, q_offsets, rows, ck, left, K, BLOCK_K, LP)
        kc = get_tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
        vc = get_tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        dc = get_tile(d_base, d_offsets, rows, cv, left, V, BLOCK_V, LP)
        log2 = get_decays(x_base, rows * x_t, rows, left, factor, shift, slope, KIND)
        whole, fraction, whole_total, fraction_total = running(log2, SPLIT)
        rounded = state.to(LP)
        if c % EVERY == 0:
            put_state(checkpoint_base, ck, cv, state, K, V, BLOCK_K, BLOCK_V)
            checkpoint_base += heads * (K * V)
        values = tl.dot(dc, tl.trans(vc), input_precision=PRECISION) * between(whole, fraction, rows, log2_scale, False, SPLIT)
        dq_c = tl.dot(dc, tl.trans(rounded), input_precision=PRECISION) * tl.exp2(whole + fraction + log2_scale)[:, None]
        dq_c = tl.dot(values.to(LP), kc, dq_c, input_precision=PRECISION)
        arriving = tl.sum(dq_c * qc, 1)
        put_tile(dq_base, dq_offsets, rows, ck, left, dq_c, K, BLOCK_K)
        tl.store(d_log_base + rows * heads, suffix_sum(arriving), mask=rows < left)
        to_end = tl.exp2((whole_total - whole) + (fraction_total - fraction))
        v_decayed = (vc * to_end[:, None]).to(LP)
        state = tl.dot(tl.trans(kc), v_decayed, state * tl.exp2(whole_total + fraction_total), input_precision=PRECISION)
        q_base += CHUNK * q_t * ALIGN
        k_base += CHUNK * k_t * ALIGN
        v_base += CHUNK * v_t * ALIGN
        d_base += CHUNK * d_t * ALIGN
        x_base += CHUNK * x_t
        dq_base += CHUNK * heads * K
        d_log_base += CHUNK * heads
    put_state(checkpoint_base, ck, cv, state, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=[*RUNTIME, *STRIDES])
def dkv_kernel(
    q, k, v, x, gain, offset, cu, d, checkpoints, d_final,
    dk, dv, d_log, d_initial,
    slope, log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr,
    ALIGN: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVERY: tl.constexpr,
):
    """dk, dv, and dlog λ from what dq_kernel left. `passing` is ⟨S, dS⟩ at the end of the chunk at hand."""
    # dS is rounded there as in dk, or the difference of the two roundings would stay in `passing`.
    SLICES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    slice_k, slice_v, batch, segment, head, start, count = locate(cu, heads, segments, length, tokens, SLICES_K, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = slice_k * BLOCK_K + tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    chunks = tl.cdiv(count, CHUNK)
    last = start + (chunks - 1) * CHUNK
    q_base = q + (batch * q_b + last * q_t + head * q_h) * ALIGN
    k_base = k + (batch * k_b + last * k_t + head * k_h) * ALIGN
    v_base = v + (batch * v_b + last * v_t + head * v_h) * ALIGN
    d_base = d + (batch * d_b + last * d_t + head * d_h) * ALIGN
    x_base = x + batch * x_b + last * x_t + head * x_h
    dk_base = dk + (((slice_v * batches + batch) * tokens + last) * heads + head) * K
    dv_base = dv + (((slice_k * batches + batch) * tokens + last) * heads + head) * V
    d_log_base = d_log + (((slice_k * SLICES_V + slice_v) * batches + batch) * tokens + last) * heads + head
    q_offsets = rows[:, None] * (q_t * ALIGN) + ck[None, :]
    k_offsets = rows[:, None] * (k_t * ALIGN) + ck[None, :]
    v_offsets = rows[:, None] * (v_t * ALIGN) + cv[None, :]
    d_offsets = rows[:, None] * (d_t * ALIGN) + cv[None, :]
    dk_offsets = rows[:, None] * (heads * K) + ck[None, :]
    dv_offsets = rows[:, None] * (heads * V) + cv[None, :]
    span = (batch * segments + segment) * heads + head
    factor, shift = gate_parameters(gain, offset, head)
    slot = first_checkpoint(cu, batch, segments, segment, start, length, CHUNK * EVERY) + tl.cdiv(chunks, EVERY)
    checkpoint_base = checkpoints + (slot * heads + head) * (K * V)
    if d_final is not None:
        d_state = get_state(d_final + span * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
        state = get_state(checkpoint_base, ck, cv, K, V, BLOCK_K, BLOCK_V).to(tl.float32)
        passing = tl.sum(tl.sum(state * d_state.to(LP), 1), 0)
    else:
        d_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        passing = tl.sum(tl.zeros([CHUNK], tl.float32), 0)
    # masks and offsets hoisted out of the loop would be held in registers, of which there are none left
    for c in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        left = count - (chunks - 1 - c) * CHUNK
        qc = get_tile(q_base, q_offsets, rows, ck, left, K, BLOCK_K, LP)
        kc = get_tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
        vc = get_tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        dc = get_tile(d_base, d_offsets, rows, cv, left, V, BLOCK_V, LP)
        arriving = tl.load(d_log_base + rows * heads, mask=rows < left, other=0.0)
        log2 = get_decays(x_base, rows * x_t, rows, left, factor, shift, slope, KIND)
        whole, fraction, whole_total, fraction_total = running(log2, SPLIT)
        from_start = tl.exp2(whole + fraction + log2_scale)
        to_end = tl.exp2((whole_total - whole) + (fraction_total - fraction))
        d_rounded = d_state.to(LP)

        scores_t = tl.dot(kc, tl.trans(qc), input_precision=PRECISION)
        values_t = tl.dot(vc, tl.trans(dc), input_precision=PRECISION)
        weight_t = between(whole, fraction, rows, log2_scale, True, SPLIT)
        scores_t *= weight_t
        scores_t, values_t = scores_t.to(LP), (values_t * weight_t).to(LP)

        dv_c = tl.dot(kc, d_rounded, input_precision=PRECISION) * to_end[:, None]
        dv_c = tl.dot(scores_t, dc, dv_c, input_precision=PRECISION)
        put_tile(dv_base, dv_offsets, rows, cv, left, dv_c, V, BLOCK_V)

        dk_c = tl.dot(vc, tl.trans(d_rounded), input_precision=PRECISION) * to_end[:, None]
        dk_c = tl.dot(values_t, qc, dk_c, input_precision=PRECISION)
        leaving = tl.sum(dk_c * kc, 1)
        put_tile(dk_base, dk_offsets, rows, ck, left, dk_c, K, BLOCK_K)

        d_decay = above_rounding(arriving - suffix_sum(leaving) + passing, log2)
        tl.store(d_log_base + rows * heads, d_decay, mask=rows < left)
        total = tl.exp2(whole_total + fraction_total)
        d_state = tl.dot(tl.trans(qc), (dc * from_start[:, None]).to(LP), d_state * total, input_precision=PRECISION)
        if (chunks - 1 - c) % EVERY == 0:
            checkpoint_base -= heads * (K * V)
            state = get_state(checkpoint_base, ck, cv, K, V, BLOCK_K, BLOCK_V).to(tl.float32)
            passing = tl.sum(tl.sum(state * d_state.to(LP), 1), 0)
        else:
            passing += tl.sum(tl.where(rows == 0, arriving, 0.0), 0) - tl.sum(leaving, 0)
        q_base -= CHUNK * q_t * ALIGN
        k_base -= CHUNK * k_t * ALIGN
        v_base -= CHUNK * v_t * ALIGN
        d_base -= CHUNK * d_t * ALIGN
        x_base -= CHUNK * x_t
        dk_base -= CHUNK * heads * K
        dv_base -= CHUNK * heads * V
        d_log_base -= CHUNK * heads
    if d_initial is not None:
        if cu is not None:
            put_state(d_initial + span * (K * V), ck, cv, d_state, K, V, BLOCK_K, BLOCK_V)
        elif segment == 0:
            put_state(d_initial + (batch * heads + head) * (K * V), ck, cv, d_state, K, V, BLOCK_K, BLOCK_V)
# fmt: on
