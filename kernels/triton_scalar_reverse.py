"""The backward pass of the scalar-decay scan in one walk, from the end to the start, for states that fit a program.

Every input is read once, with the state that the forward pass kept at each chunk's start; dS stays on the chip. Where K or V
takes several programs, each adds its share: in fp32, summed afterwards in a fixed order.
What is surprising: `saved` and dq may be one memory. A state of as many rows as its chunk has tokens lies as the chunk's dq
does; no program reads another's, and dq is made from products with the whole state, which is on the chip by then.
Source: the launches are in triton_scalar.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_scalar_tiles import (
    between,
    decay_gradient,
    first_slot,
    gate_parameters,
    get_decays,
    get_kept,
    get_state,
    get_tile,
    inside_pairs,
    locate,
    put_state,
    put_tile,
    running,
)
from kernels.triton_scalar_walk import RUNTIME, STRIDES


# fmt: off
@triton.jit(do_not_specialize=[*RUNTIME, *STRIDES])
def reverse_kernel(
    q, k, v, x, gain, offset, cu, d, saved, d_final,
    dq, dk, dv, d_log, d_initial,
    slope, log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr,
    ALIGN: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):
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
    dq_base = dq + (((slice_v * batches + batch) * tokens + last) * heads + head) * K
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
    slot = first_slot(cu, batch, segment, start, tokens, CHUNK) + chunks - 1
    saved_base = saved + slot * heads * (K * V) + head * V
    if d_final is not None:
        d_state = get_state(d_final + span * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
    else:
        d_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    # masks and offsets hoisted out of the loop would be held in registers, of which there are none left
    for c in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        left = count - (chunks - 1 - c) * CHUNK
        qc = get_tile(q_base, q_offsets, rows, ck, left, K, BLOCK_K, LP)
        kc = get_tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
        vc = get_tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        dc = get_tile(d_base, d_offsets, rows, cv, left, V, BLOCK_V, LP)
        state = get_kept(saved_base, ck, cv, heads, K, V, BLOCK_K, BLOCK_V).to(LP)
        log2 = get_decays(x_base, rows * x_t, rows, left, factor, shift, slope, KIND)
        whole, fraction, whole_total, fraction_total = running(log2, SPLIT)
        from_start = tl.exp2(whole + fraction + log2_scale)
        to_end = tl.exp2((whole_total - whole) + (fraction_total - fraction))
        total = tl.exp2(whole_total + fraction_total)
        d_rounded = d_state.to(LP)
        around = total * tl.sum(tl.sum(state * d_state, 1), 0)

        scores_t = tl.dot(kc, tl.trans(qc), input_precision=PRECISION)
        values_t = tl.dot(vc, tl.trans(dc), input_precision=PRECISION)
        weight_t = between(whole, fraction, rows, log2_scale, True, SPLIT)
        scores_t *= weight_t
        if SPLIT:
            inside = inside_pairs(scores_t * values_t, rows)
        scores_t, values_t = scores_t.to(LP), (values_t * weight_t).to(LP)

        dv_c = tl.dot(kc, d_rounded, input_precision=PRECISION) * to_end[:, None]
        dv_c = tl.dot(scores_t, dc, dv_c, input_precision=PRECISION)
        put_tile(dv_base, dv_offsets, rows, cv, left, dv_c, V, BLOCK_V)

        dk_c = tl.dot(vc, tl.trans(d_rounded), input_precision=PRECISION) * to_end[:, None]
        leaving = tl.sum(dk_c * kc, 1)
        dk_c = tl.dot(values_t, qc, dk_c, input_precision=PRECISION)
        if not SPLIT:
            k_dk = tl.sum(dk_c * kc, 1)
        put_tile(dk_base, dk_offsets, rows, ck, left, dk_c, K, BLOCK_K)

        values = tl.dot(dc, tl.trans(vc), input_precision=PRECISION) * between(whole, fraction, rows, log2_scale, False, SPLIT)
        dq_c = tl.dot(dc, tl.trans(state), input_precision=PRECISION) * from_start[:, None]
        if SPLIT:
            inside += tl.sum(dq_c * qc, 1)
        dq_c = tl.dot(values.to(LP), kc, dq_c, input_precision=PRECISION)
        if not SPLIT:
            inside = tl.sum(dq_c * qc, 1) - k_dk
        put_tile(dq_base, dk_offsets, rows, ck, left, dq_c, K, BLOCK_K)

        d_decay = decay_gradient(inside, leaving, around, rows, log2, SPLIT)
        tl.store(d_log_base + rows * heads, d_decay, mask=rows < left)

        d_state = tl.dot(tl.trans(qc), (dc * from_start[:, None]).to(LP), d_state * total, input_precision=PRECISION)
        q_base -= CHUNK * q_t * ALIGN
        k_base -= CHUNK * k_t * ALIGN
        v_base -= CHUNK * v_t * ALIGN
        d_base -= CHUNK * d_t * ALIGN
        x_base -= CHUNK * x_t
        dq_base -= CHUNK * heads * K
        dk_base -= CHUNK * heads * K
        dv_base -= CHUNK * heads * V
        d_log_base -= CHUNK * heads
        saved_base -= heads * (K * V)
    if d_initial is not None:
        if cu is not None:
            put_state(d_initial + span * (K * V), ck, cv, d_state, K, V, BLOCK_K, BLOCK_V)
        elif segment == 0:
            put_state(d_initial + (batch * heads + head) * (K * V), ck, cv, d_state, K, V, BLOCK_K, BLOCK_V)
# fmt: on
