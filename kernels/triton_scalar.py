"""Linear attention with one decay per head and token, as Triton kernels: one program walks along a sequence, chunk by
chunk, and keeps the state on the chip.

    S_t = λ_t S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

What is unusual:
- The backward pass reads the inputs once. Under the policy `states` the forward pass stores the state at each chunk's
  start (in the inputs' dtype) and one reverse walk gives all gradients; under `recompute` nothing is stored, a forward
  walk gives dq and a reverse walk dk and dv.
- dlog λ_t is the sum over the pairs of tokens j < t <= i, split into pairs inside the chunk, pairs with one end in it, and
  pairs around it, ⟨S, dS⟩. Nothing is summed along the whole sequence, so the error does not grow with T. Pairs inside
  are summed as q·dq - k·dk, where i = j cancels; for fp32 inputs pair by pair without i = j, which tells small λ from
  rounding. `recompute` has S and dS in different kernels: it sums from one chunk to the next and starts afresh from a
  stored state every CHECKPOINT chunks.
- Outputs are linear in slices of K and in slices of V. Where a state is too large for one program, each program takes a
  slice; what several programs have a share in is written per slice in fp32 and summed in a fixed order. No atomics: two
  runs give equal bits.
- A sequence with few heads is cut into segments: a first walk finds what each segment adds to the state, a short walk
  over the segments gives each its initial state.
- Decays are handled as log2 λ, no less than -150: 2^-150 is 0 in fp32, so λ = 0 is exact and nothing is inf - inf. An
  exponent is masked before exp2, since λ may be slightly above 1.
- fp32 inputs are multiplied as three tf32 products (tf32x3) and their running log decays summed as whole and fractional
  parts, or rounding at |log2 λ| = 150 per token would show.
- A transposed tile that was computed is never the left operand of tl.dot: Triton 3.4 to 3.7.0 miscompile that on Hopper
  (flash-linear-attention#640). Transposes come from loaded tiles or from a second product.
- Triton's interpreter multiplies bf16 wrongly: there, bf16 tiles are made fp32 first.
Source: decay_scan_naive.py is the definition; the chunked form is that of Mamba-2 (arXiv 2405.21060) and GLA (2312.06635).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHECKPOINT = 8
NARROWEST = 64  # columns of a tile: ptxas 12.8 and 13.0 miscompile many products of 32-wide tiles (triton#10486)
LOG2_FLOOR = tl.constexpr(-150.0)
LOG2_E = tl.constexpr(math.log2(math.e))

# B·H below which the sequence is cut, the programs wanted then (four per multiprocessor of an H100), tokens per segment.
FEW_HEADS, WANTED_PROGRAMS, SEGMENT_TOKENS = 256, 4 * 132, 512


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one walk over the chunks runs; block_k and block_v are the largest slice of a state that one program holds."""

    chunk: int
    warps: int
    stages: int
    block_k: int = 64
    block_v: int = 64
    registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """policy: `states` or `recompute`. dq: the forward-time walk of the backward pass, for `recompute`, in place of backward.

    fp32 inputs under `recompute` have their states computed once more in the backward pass, then go as under `states`.
    """

    policy: str
    forward: Launch
    backward: Launch
    dq: Launch | None = None


def default_config(key_dim: int, value_dim: int, dtype: torch.dtype) -> Config:
    """Returns a configuration that is right for these dims; the fastest ones are the caller's to know."""
    if dtype == torch.float32:
        launch = Launch(chunk=32, warps=4, stages=1, block_k=32, block_v=32)
        return Config(policy="states", forward=launch, backward=launch)
    large = key_dim > 64 or value_dim > 64
    forward = Launch(chunk=64, warps=4, stages=2 if large else 3, block_k=128 if large else 64)
    return Config(policy="states", forward=forward, backward=Launch(chunk=64, warps=4, stages=1))


def _padded(dim: int) -> int:
    return max(NARROWEST, triton.next_power_of_2(dim))


@triton.jit
def _locate(heads, segments, length, tokens, SLICES_K: tl.constexpr, SLICES_V: tl.constexpr):
    """Returns this program's slice of K, of V, its batch entry, segment and head, and its first token and token count."""
    program = tl.program_id(0)
    slice_v = program % SLICES_V
    slice_k = (program // SLICES_V) % SLICES_K
    sequence = program // (SLICES_V * SLICES_K)
    head = (sequence % heads).to(tl.int64)
    segment = (sequence // heads) % segments
    batch = (sequence // heads // segments).to(tl.int64)
    start = segment * length
    return slice_k, slice_v, batch, segment, head, start, tl.minimum(length, tokens - start)


@triton.jit
def _tile(base, offsets, rows, columns, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LP: tl.constexpr):
    """A (chunk, BLOCK) tile as the products' dtype, 0 past the sequence's end and past the last column."""
    mask = rows[:, None] < limit
    if WIDTH % BLOCK != 0:
        mask = mask & (columns[None, :] < WIDTH)
    return tl.load(base + offsets, mask=mask, other=0.0).to(LP)


@triton.jit
def _put(base, offsets, rows, columns, limit, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    mask = rows[:, None] < limit
    if WIDTH % BLOCK != 0:
        mask = mask & (columns[None, :] < WIDTH)
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _get_state(base, ck, cv, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    pointers = base + (ck[:, None] * V + cv[None, :])
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(ck[:, None] < K) & (cv[None, :] < V), other=0.0)


@triton.jit
def _put_state(base, ck, cv, value, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    pointers = base + (ck[:, None] * V + cv[None, :])
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        tl.store(pointers, value.to(base.dtype.element_ty))
    else:
        tl.store(pointers, value.to(base.dtype.element_ty), mask=(ck[:, None] < K) & (cv[None, :] < V))


@triton.jit
def _log2_decays(base, offsets, rows, limit):
    log_decay = tl.load(base + offsets, mask=rows < limit, other=0.0)
    return tl.maximum(log_decay * LOG2_E, LOG2_FLOOR)


@triton.jit
def _running(log2_decay, SPLIT: tl.constexpr):
    """Running sums of log2 λ and its total as (whole, fraction): whole numbers are summed without rounding."""
    if SPLIT:
        whole = tl.floor(log2_decay + 0.5)
        fraction = log2_decay - whole
        return tl.cumsum(whole, 0), tl.cumsum(fraction, 0), tl.sum(whole, 0), tl.sum(fraction, 0)
    else:
        zero = tl.zeros_like(log2_decay)
        return tl.cumsum(log2_decay, 0), zero, tl.sum(log2_decay, 0), tl.full([], 0.0, tl.float32)


@triton.jit
def _between(whole, fraction, rows, log2_scale, TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr):
    """Entry (i, j) is scale times λ's product over the tokens after j up to i, 0 for j > i; TRANSPOSED: entry (j, i)."""
    # The scale goes in as a summand of the later token's exponent: a vector is added to, no tile is multiplied.
    if SPLIT:
        fraction_late = fraction + log2_scale
        if TRANSPOSED:
            power = (whole[None, :] - whole[:, None]) + (fraction_late[None, :] - fraction[:, None])
        else:
            power = (whole[:, None] - whole[None, :]) + (fraction_late[:, None] - fraction[None, :])
    else:
        late = whole + log2_scale
        power = late[None, :] - whole[:, None] if TRANSPOSED else late[:, None] - whole[None, :]
    kept = rows[None, :] >= rows[:, None] if TRANSPOSED else rows[:, None] >= rows[None, :]
    return tl.exp2(tl.where(kept, power, float("-inf")))


@triton.jit
def _suffix_sum(x):
    """Entry t is the sum of entries t and later."""
    return tl.sum(x, 0) - tl.cumsum(x, 0) + x


@triton.jit
def _inside(pairs_t, rows):
    """What the pairs (j, i) inside a chunk give to the suffix sum that is dlog λ; i = j gives nothing and is left out."""
    pairs_t = tl.where(rows[None, :] > rows[:, None], pairs_t, 0.0)
    return tl.sum(pairs_t, 0) - tl.sum(pairs_t, 1)


@triton.jit
def _above_rounding(d_decay, log2_decay):
    """Where terms i = j were subtracted and λ is below fp32's resolution, what is left is their rounding: made 0."""
    return tl.where(log2_decay > -24.0, d_decay, 0.0)


_RUNTIME = ["log2_scale", "tokens", "batches", "heads", "segments", "length"]
_STRIDES = [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "g", "d") for axis in ("b", "t", "h")]


# fmt: off
@triton.jit(do_not_specialize=[*_RUNTIME, *_STRIDES])
def _forward_kernel(
    q, k, v, g, initial, o, final, saved,
    log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    ALIGN: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):
    SLICES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    slice_k, slice_v, batch, segment, head, start, count = _locate(heads, segments, length, tokens, SLICES_K, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = slice_k * BLOCK_K + tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    q_base = q + (batch * q_b + start.to(tl.int64) * q_t + head * q_h) * ALIGN
    k_base = k + (batch * k_b + start.to(tl.int64) * k_t + head * k_h) * ALIGN
    v_base = v + (batch * v_b + start.to(tl.int64) * v_t + head * v_h) * ALIGN
    g_base = g + batch * g_b + start.to(tl.int64) * g_t + head * g_h
    o_base = o + (((slice_k * batches + batch) * tokens + start) * heads + head) * V
    q_offsets = rows[:, None] * (q_t * ALIGN) + ck[None, :]
    k_offsets = rows[:, None] * (k_t * ALIGN) + ck[None, :]
    v_offsets = rows[:, None] * (v_t * ALIGN) + cv[None, :]
    o_offsets = rows[:, None] * (heads * V) + cv[None, :]
    sequence = (batch * segments + segment) * heads + head
    chunks = tl.cdiv(count, CHUNK)
    if saved is not None:
        saved_base = saved + sequence * tl.cdiv(length, CHUNK) * (K * V)
    if initial is not None:
        state = _get_state(initial + sequence * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for c in tl.range(0, chunks, num_stages=STAGES):
        left = count - c * CHUNK
        qc = _tile(q_base, q_offsets, rows, ck, left, K, BLOCK_K, LP)
        kc = _tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
        vc = _tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        whole, fraction, whole_total, fraction_total = _running(_log2_decays(g_base, rows * g_t, rows, left), SPLIT)
        rounded = state.to(LP)
        if saved is not None:
            _put_state(saved_base, ck, cv, rounded, K, V, BLOCK_K, BLOCK_V)
            saved_base += K * V
        from_start = tl.exp2(whole + fraction + log2_scale)
        scores = tl.dot(qc, tl.trans(kc), input_precision=PRECISION) * _between(whole, fraction, rows, log2_scale, False, SPLIT)
        out = tl.dot(qc, rounded, input_precision=PRECISION) * from_start[:, None]
        out = tl.dot(scores.to(LP), vc, out, input_precision=PRECISION)
        _put(o_base, o_offsets, rows, cv, left, out, V, BLOCK_V)
        to_end = tl.exp2((whole_total - whole) + (fraction_total - fraction))
        v_decayed = (vc * to_end[:, None]).to(LP)
        state = tl.dot(tl.trans(kc), v_decayed, state * tl.exp2(whole_total + fraction_total), input_precision=PRECISION)
        q_base += CHUNK * q_t * ALIGN
        k_base += CHUNK * k_t * ALIGN
        v_base += CHUNK * v_t * ALIGN
        g_base += CHUNK * g_t
        o_base += CHUNK * heads * V
    if final is not None:
        if segment == segments - 1:
            _put_state(final + (batch * heads + head) * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=[*_RUNTIME, *_STRIDES])
def _backward_kernel(
    q, k, v, g, d, saved, d_final, dq, dk, dv, dg, d_initial,
    log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    ALIGN: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):
    SLICES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    slice_k, slice_v, batch, segment, head, start, count = _locate(heads, segments, length, tokens, SLICES_K, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = slice_k * BLOCK_K + tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    chunks = tl.cdiv(count, CHUNK)
    last = start.to(tl.int64) + (chunks - 1) * CHUNK
    q_base = q + (batch * q_b + last * q_t + head * q_h) * ALIGN
    k_base = k + (batch * k_b + last * k_t + head * k_h) * ALIGN
    v_base = v + (batch * v_b + last * v_t + head * v_h) * ALIGN
    d_base = d + (batch * d_b + last * d_t + head * d_h) * ALIGN
    g_base = g + batch * g_b + last * g_t + head * g_h
    dq_base = dq + (((slice_v * batches + batch) * tokens + last) * heads + head) * K
    dk_base = dk + (((slice_v * batches + batch) * tokens + last) * heads + head) * K
    dv_base = dv + (((slice_k * batches + batch) * tokens + last) * heads + head) * V
    dg_base = dg + (((slice_k * SLICES_V + slice_v) * batches + batch) * tokens + last) * heads + head
    q_offsets = rows[:, None] * (q_t * ALIGN) + ck[None, :]
    k_offsets = rows[:, None] * (k_t * ALIGN) + ck[None, :]
    v_offsets = rows[:, None] * (v_t * ALIGN) + cv[None, :]
    d_offsets = rows[:, None] * (d_t * ALIGN) + cv[None, :]
    dk_offsets = rows[:, None] * (heads * K) + ck[None, :]
    dv_offsets = rows[:, None] * (heads * V) + cv[None, :]
    sequence = (batch * segments + segment) * heads + head
    saved_base = saved + (sequence * tl.cdiv(length, CHUNK) + chunks - 1) * (K * V)
    if d_final is not None:
        d_state = _get_state(d_final + sequence * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
    else:
        d_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for c in tl.range(0, chunks, num_stages=STAGES):
        left = count - (chunks - 1 - c) * CHUNK
        qc = _tile(q_base, q_offsets, rows, ck, left, K, BLOCK_K, LP)
        kc = _tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
        vc = _tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        dc = _tile(d_base, d_offsets, rows, cv, left, V, BLOCK_V, LP)
        state = _get_state(saved_base, ck, cv, K, V, BLOCK_K, BLOCK_V).to(LP)
        log2_decay = _log2_decays(g_base, rows * g_t, rows, left)
        whole, fraction, whole_total, fraction_total = _running(log2_decay, SPLIT)
        from_start = tl.exp2(whole + fraction + log2_scale)
        to_end = tl.exp2((whole_total - whole) + (fraction_total - fraction))
        total = tl.exp2(whole_total + fraction_total)
        d_rounded = d_state.to(LP)
        around = total * tl.sum(tl.sum(state * d_state, 1), 0)

        scores_t = tl.dot(kc, tl.trans(qc), input_precision=PRECISION)
        values_t = tl.dot(vc, tl.trans(dc), input_precision=PRECISION)
        weight_t = _between(whole, fraction, rows, log2_scale, True, SPLIT)
        scores_t *= weight_t
        if SPLIT:
            inside = _inside(scores_t * values_t, rows)
        scores_t, values_t = scores_t.to(LP), (values_t * weight_t).to(LP)

        dv_c = tl.dot(kc, d_rounded, input_precision=PRECISION) * to_end[:, None]
        dv_c = tl.dot(scores_t, dc, dv_c, input_precision=PRECISION)
        _put(dv_base, dv_offsets, rows, cv, left, dv_c, V, BLOCK_V)

        dk_c = tl.dot(vc, tl.trans(d_rounded), input_precision=PRECISION) * to_end[:, None]
        leaving = tl.sum(dk_c * kc, 1)
        dk_c = tl.dot(values_t, qc, dk_c, input_precision=PRECISION)
        if not SPLIT:
            k_dk = tl.sum(dk_c * kc, 1)
        _put(dk_base, dk_offsets, rows, ck, left, dk_c, K, BLOCK_K)

        values = tl.dot(dc, tl.trans(vc), input_precision=PRECISION) * _between(whole, fraction, rows, log2_scale, False, SPLIT)
        dq_c = tl.dot(dc, tl.trans(state), input_precision=PRECISION) * from_start[:, None]
        if SPLIT:
            inside += tl.sum(dq_c * qc, 1)
        dq_c = tl.dot(values.to(LP), kc, dq_c, input_precision=PRECISION)
        if not SPLIT:
            inside = tl.sum(dq_c * qc, 1) - k_dk
        _put(dq_base, dk_offsets, rows, ck, left, dq_c, K, BLOCK_K)

        if SPLIT:
            left_before = tl.sum(tl.where(rows[:, None] < rows[None, :], leaving[:, None], 0.0), 0)
            d_decay = tl.cumsum(inside, 0, reverse=True) + left_before + around
        else:
            d_decay = _above_rounding(_suffix_sum(inside) + (around + tl.sum(leaving, 0)), log2_decay)
        tl.store(dg_base + rows * heads, d_decay, mask=rows < left)

        d_state = tl.dot(tl.trans(qc), (dc * from_start[:, None]).to(LP), d_state * total, input_precision=PRECISION)
        q_base -= CHUNK * q_t * ALIGN
        k_base -= CHUNK * k_t * ALIGN
        v_base -= CHUNK * v_t * ALIGN
        d_base -= CHUNK * d_t * ALIGN
        g_base -= CHUNK * g_t
        dq_base -= CHUNK * heads * K
        dk_base -= CHUNK * heads * K
        dv_base -= CHUNK * heads * V
        dg_base -= CHUNK * heads
        saved_base -= K * V
    if d_initial is not None:
        if segment == 0:
            _put_state(d_initial + (batch * heads + head) * (K * V), ck, cv, d_state, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=[*_RUNTIME, *_STRIDES])
def _dq_kernel(
    q, k, v, g, d, initial, dq, dg, checkpoints,
    log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    ALIGN: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVERY: tl.constexpr,
):
    """dq, what arrives in dlog λ from earlier chunks, and a state every EVERY chunks and at the end."""
    SLICES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    slice_k, slice_v, batch, segment, head, start, count = _locate(heads, segments, length, tokens, SLICES_K, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = slice_k * BLOCK_K + tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    q_base = q + (batch * q_b + start.to(tl.int64) * q_t + head * q_h) * ALIGN
    k_base = k + (batch * k_b + start.to(tl.int64) * k_t + head * k_h) * ALIGN
    v_base = v + (batch * v_b + start.to(tl.int64) * v_t + head * v_h) * ALIGN
    d_base = d + (batch * d_b + start.to(tl.int64) * d_t + head * d_h) * ALIGN
    g_base = g + batch * g_b + start.to(tl.int64) * g_t + head * g_h
    dq_base = dq + (((slice_v * batches + batch) * tokens + start) * heads + head) * K
    dg_base = dg + (((slice_k * SLICES_V + slice_v) * batches + batch) * tokens + start) * heads + head
    q_offsets = rows[:, None] * (q_t * ALIGN) + ck[None, :]
    k_offsets = rows[:, None] * (k_t * ALIGN) + ck[None, :]
    v_offsets = rows[:, None] * (v_t * ALIGN) + cv[None, :]
    d_offsets = rows[:, None] * (d_t * ALIGN) + cv[None, :]
    dq_offsets = rows[:, None] * (heads * K) + ck[None, :]
    sequence = (batch * segments + segment) * heads + head
    chunks = tl.cdiv(count, CHUNK)
    checkpoint_base = checkpoints + sequence * (tl.cdiv(tl.cdiv(length, CHUNK), EVERY) + 1) * (K * V)
    if initial is not None:
        state = _get_state(initial + sequence * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for c in tl.range(0, chunks, num_stages=STAGES):
        left = count - c * CHUNK
        qc = _tile(q_base, q_offsets, rows, ck, left, K, BLOCK_K, LP)
        kc = _tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
        vc = _tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        dc = _tile(d_base, d_offsets, rows, cv, left, V, BLOCK_V, LP)
        whole, fraction, whole_total, fraction_total = _running(_log2_decays(g_base, rows * g_t, rows, left), SPLIT)
        rounded = state.to(LP)
        if c % EVERY == 0:
            _put_state(checkpoint_base, ck, cv, state, K, V, BLOCK_K, BLOCK_V)
            checkpoint_base += K * V
        values = tl.dot(dc, tl.trans(vc), input_precision=PRECISION) * _between(whole, fraction, rows, log2_scale, False, SPLIT)
        dq_c = tl.dot(dc, tl.trans(rounded), input_precision=PRECISION) * tl.exp2(whole + fraction + log2_scale)[:, None]
        dq_c = tl.dot(values.to(LP), kc, dq_c, input_precision=PRECISION)
        arriving = tl.sum(dq_c * qc, 1)
        _put(dq_base, dq_offsets, rows, ck, left, dq_c, K, BLOCK_K)
        tl.store(dg_base + rows * heads, _suffix_sum(arriving), mask=rows < left)
        to_end = tl.exp2((whole_total - whole) + (fraction_total - fraction))
        v_decayed = (vc * to_end[:, None]).to(LP)
        state = tl.dot(tl.trans(kc), v_decayed, state * tl.exp2(whole_total + fraction_total), input_precision=PRECISION)
        q_base += CHUNK * q_t * ALIGN
        k_base += CHUNK * k_t * ALIGN
        v_base += CHUNK * v_t * ALIGN
        d_base += CHUNK * d_t * ALIGN
        g_base += CHUNK * g_t
        dq_base += CHUNK * heads * K
        dg_base += CHUNK * heads
    _put_state(checkpoint_base, ck, cv, state, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=[*_RUNTIME, *_STRIDES])
def _dkv_kernel(
    q, k, v, g, d, checkpoints, d_final, dk, dv, dg, d_initial,
    log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    ALIGN: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVERY: tl.constexpr,
):
    """dk, dv, and dlog λ from what _dq_kernel left there. `passing` is ⟨S, dS⟩ at the end of the chunk at hand."""
    # dS is rounded there as in dk, or the difference of the two roundings would stay in `passing`.
    SLICES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    slice_k, slice_v, batch, segment, head, start, count = _locate(heads, segments, length, tokens, SLICES_K, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = slice_k * BLOCK_K + tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    chunks = tl.cdiv(count, CHUNK)
    last = start.to(tl.int64) + (chunks - 1) * CHUNK
    q_base = q + (batch * q_b + last * q_t + head * q_h) * ALIGN
    k_base = k + (batch * k_b + last * k_t + head * k_h) * ALIGN
    v_base = v + (batch * v_b + last * v_t + head * v_h) * ALIGN
    d_base = d + (batch * d_b + last * d_t + head * d_h) * ALIGN
    g_base = g + batch * g_b + last * g_t + head * g_h
    dk_base = dk + (((slice_v * batches + batch) * tokens + last) * heads + head) * K
    dv_base = dv + (((slice_k * batches + batch) * tokens + last) * heads + head) * V
    dg_base = dg + (((slice_k * SLICES_V + slice_v) * batches + batch) * tokens + last) * heads + head
    q_offsets = rows[:, None] * (q_t * ALIGN) + ck[None, :]
    k_offsets = rows[:, None] * (k_t * ALIGN) + ck[None, :]
    v_offsets = rows[:, None] * (v_t * ALIGN) + cv[None, :]
    d_offsets = rows[:, None] * (d_t * ALIGN) + cv[None, :]
    dk_offsets = rows[:, None] * (heads * K) + ck[None, :]
    dv_offsets = rows[:, None] * (heads * V) + cv[None, :]
    sequence = (batch * segments + segment) * heads + head
    stored = tl.cdiv(chunks, EVERY)
    checkpoint_base = checkpoints + sequence * (tl.cdiv(tl.cdiv(length, CHUNK), EVERY) + 1) * (K * V) + stored * (K * V)
    if d_final is not None:
        d_state = _get_state(d_final + sequence * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
        state = _get_state(checkpoint_base, ck, cv, K, V, BLOCK_K, BLOCK_V).to(tl.float32)
        passing = tl.sum(tl.sum(state * d_state.to(LP), 1), 0)
    else:
        d_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        passing = tl.sum(tl.zeros([CHUNK], tl.float32), 0)
    for c in tl.range(0, chunks, num_stages=STAGES):
        left = count - (chunks - 1 - c) * CHUNK
        qc = _tile(q_base, q_offsets, rows, ck, left, K, BLOCK_K, LP)
        kc = _tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
        vc = _tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        dc = _tile(d_base, d_offsets, rows, cv, left, V, BLOCK_V, LP)
        arriving = tl.load(dg_base + rows * heads, mask=rows < left, other=0.0)
        log2_decay = _log2_decays(g_base, rows * g_t, rows, left)
        whole, fraction, whole_total, fraction_total = _running(log2_decay, SPLIT)
        from_start = tl.exp2(whole + fraction + log2_scale)
        to_end = tl.exp2((whole_total - whole) + (fraction_total - fraction))
        d_rounded = d_state.to(LP)

        scores_t = tl.dot(kc, tl.trans(qc), input_precision=PRECISION)
        values_t = tl.dot(vc, tl.trans(dc), input_precision=PRECISION)
        weight_t = _between(whole, fraction, rows, log2_scale, True, SPLIT)
        scores_t *= weight_t
        scores_t, values_t = scores_t.to(LP), (values_t * weight_t).to(LP)

        dv_c = tl.dot(kc, d_rounded, input_precision=PRECISION) * to_end[:, None]
        dv_c = tl.dot(scores_t, dc, dv_c, input_precision=PRECISION)
        _put(dv_base, dv_offsets, rows, cv, left, dv_c, V, BLOCK_V)

        dk_c = tl.dot(vc, tl.trans(d_rounded), input_precision=PRECISION) * to_end[:, None]
        dk_c = tl.dot(values_t, qc, dk_c, input_precision=PRECISION)
        leaving = tl.sum(dk_c * kc, 1)
        _put(dk_base, dk_offsets, rows, ck, left, dk_c, K, BLOCK_K)

        d_decay = _above_rounding(arriving - _suffix_sum(leaving) + passing, log2_decay)
        tl.store(dg_base + rows * heads, d_decay, mask=rows < left)
        total = tl.exp2(whole_total + fraction_total)
        d_state = tl.dot(tl.trans(qc), (dc * from_start[:, None]).to(LP), d_state * total, input_precision=PRECISION)
        if (chunks - 1 - c) % EVERY == 0:
            checkpoint_base -= K * V
            state = _get_state(checkpoint_base, ck, cv, K, V, BLOCK_K, BLOCK_V).to(tl.float32)
            passing = tl.sum(tl.sum(state * d_state.to(LP), 1), 0)
        else:
            passing += tl.sum(tl.where(rows == 0, arriving, 0.0), 0) - tl.sum(leaving, 0)
        q_base -= CHUNK * q_t * ALIGN
        k_base -= CHUNK * k_t * ALIGN
        v_base -= CHUNK * v_t * ALIGN
        d_base -= CHUNK * d_t * ALIGN
        g_base -= CHUNK * g_t
        dk_base -= CHUNK * heads * K
        dv_base -= CHUNK * heads * V
        dg_base -= CHUNK * heads
    if d_initial is not None:
        if segment == 0:
            _put_state(d_initial + (batch * heads + head) * (K * V), ck, cv, d_state, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=[*_RUNTIME, *_STRIDES])
def _segment_kernel(
    k, v, g, added, totals,
    log2_scale, tokens, batches, heads, segments, length,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    ALIGN: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What a segment adds to the state at its end; with REVERSE, k and v being q and do, to dS at its start."""
    SLICES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    slice_k, slice_v, batch, segment, head, start, count = _locate(heads, segments, length, tokens, SLICES_K, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = slice_k * BLOCK_K + tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    chunks = tl.cdiv(count, CHUNK)
    first = start.to(tl.int64)
    if REVERSE:
        first += (chunks - 1) * CHUNK
    step = -CHUNK if REVERSE else CHUNK
    k_base = k + (batch * k_b + first * k_t + head * k_h) * ALIGN
    v_base = v + (batch * v_b + first * v_t + head * v_h) * ALIGN
    g_base = g + batch * g_b + first * g_t + head * g_h
    k_offsets = rows[:, None] * (k_t * ALIGN) + ck[None, :]
    v_offsets = rows[:, None] * (v_t * ALIGN) + cv[None, :]
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    log2_total = tl.sum(tl.zeros([CHUNK], tl.float32), 0)
    for c in tl.range(0, chunks, num_stages=STAGES):
        left = count - (chunks - 1 - c if REVERSE else c) * CHUNK
        kc = _tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
        vc = _tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        whole, fraction, whole_total, fraction_total = _running(_log2_decays(g_base, rows * g_t, rows, left), SPLIT)
        if REVERSE:
            weight = tl.exp2(whole + fraction + log2_scale)
        else:
            weight = tl.exp2((whole_total - whole) + (fraction_total - fraction))
        total = whole_total + fraction_total
        state = tl.dot(tl.trans(kc), (vc * weight[:, None]).to(LP), state * tl.exp2(total), input_precision=PRECISION)
        log2_total += total
        k_base += step * k_t * ALIGN
        v_base += step * v_t * ALIGN
        g_base += step * g_t
    sequence = (batch * segments + segment) * heads + head
    _put_state(added + sequence * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)
    tl.store(totals + sequence, tl.exp2(log2_total))


@triton.jit(do_not_specialize=["heads", "segments"])
def _carry_kernel(added, totals, outside, heads, segments, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """Replaces what each segment adds by the state that it starts from; with REVERSE, by dS at its end."""
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    inside = offsets < SIZE
    if outside is not None:
        state = tl.load(outside + (batch * heads + head) * SIZE + offsets, mask=inside, other=0.0)
    else:
        state = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, segments):
        segment = segments - 1 - i if REVERSE else i
        sequence = (batch * segments + segment) * heads + head
        own = tl.load(added + sequence * SIZE + offsets, mask=inside, other=0.0)
        total = tl.load(totals + sequence)
        tl.store(added + sequence * SIZE + offsets, state, mask=inside)
        state = state * total + own
# fmt: on


def forward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool,
    want_saved: bool,
    config: Config,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V) fp32 or None, what backward wants back or None).

    log_decay: natural log of λ, fp32, (B, T, H), any strides. The last axis of q, k and v is contiguous. K, V <= 256.
    """
    walk = _Walk.of(config.forward, q_bthk, v_bthv, scale)
    (batch, _, heads, key_dim), value_dim = q_bthk.shape, v_bthv.shape[-1]
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    starts = walk.states_at_segments(k_bthk, v_bthv, log_decay, initial_state, reverse=False)
    o = walk.partial(v_bthv, walk.slices_k)
    final = q_bthk.new_empty(batch, heads, key_dim, value_dim, dtype=torch.float32) if want_state else None
    saved = None
    if want_saved and config.policy == "states":
        chunks = triton.cdiv(walk.length, config.forward.chunk)
        saved = q_bthk.new_empty(batch * walk.segments * heads, chunks, key_dim, value_dim)
    inputs = {"q": q_bthk, "k": k_bthk, "v": v_bthv}
    walk.run(_forward_kernel, inputs, log_decay, initial=starts, o=o, final=final, saved=saved)
    return _summed(o, v_bthv), final, saved


def backward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    saved: Tensor | None,
    do_bthv: Tensor,
    d_final_state: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Returns (dq, dk, dv in the inputs' dtypes, dlog_decay fp32 (B, T, H), dinitial_state fp32 or None).

    The configuration's policy and, for `states`, its chunk are those of the forward pass.
    """
    if config.policy == "recompute" and q_bthk.dtype == torch.float32:
        # What is summed from chunk to chunk rounds relative to its largest term, which fp32 inputs do not put up with.
        config = Config(policy="states", forward=config.backward, backward=config.backward)
        saved = forward(q_bthk, k_bthk, v_bthv, log_decay, scale, initial_state, False, True, config)[2]
    walk = _Walk.of(config.backward, q_bthk, v_bthv, scale)
    (batch, tokens, heads, key_dim), value_dim = q_bthk.shape, v_bthv.shape[-1]
    d_final_state = None if d_final_state is None else d_final_state.float().contiguous()
    ends = walk.states_at_segments(q_bthk, do_bthv, log_decay, d_final_state, reverse=True)
    dq, dk = walk.partial(q_bthk, walk.slices_v), walk.partial(k_bthk, walk.slices_v)
    dv = walk.partial(v_bthv, walk.slices_k)
    dg = q_bthk.new_empty(walk.slices_k * walk.slices_v, batch, tokens, heads, dtype=torch.float32)
    d_initial = None if initial_state is None else q_bthk.new_empty(batch, heads, key_dim, value_dim, dtype=torch.float32)
    inputs = {"q": q_bthk, "k": k_bthk, "v": v_bthv, "d": do_bthv}
    if config.policy == "states":
        if saved is None or saved.shape[1] != triton.cdiv(walk.length, config.backward.chunk):
            raise ValueError("policy `states`: the forward pass saved no states, or saved them for another chunk")
        outputs = {"dq": dq, "dk": dk, "dv": dv, "dg": dg, "d_initial": d_initial}
        walk.run(_backward_kernel, inputs, log_decay, saved=saved, d_final=ends, **outputs)
    else:
        early = _Walk.of(config.dq or config.backward, q_bthk, v_bthv, scale)
        if (early.launch.chunk, early.slices_k, early.slices_v) != (walk.launch.chunk, walk.slices_k, walk.slices_v):
            raise ValueError("policy `recompute`: the two walks of the backward pass differ in chunk or slices")
        initial_state = None if initial_state is None else initial_state.float().contiguous()
        starts = early.states_at_segments(k_bthk, v_bthv, log_decay, initial_state, reverse=False)
        stored = triton.cdiv(triton.cdiv(walk.length, walk.launch.chunk), CHECKPOINT) + 1
        sizes = (batch * walk.segments * heads, stored, key_dim, value_dim)
        between = {"dg": dg, "checkpoints": q_bthk.new_empty(sizes, dtype=torch.float32), "EVERY": CHECKPOINT}
        early.run(_dq_kernel, inputs, log_decay, initial=starts, dq=dq, **between)
        walk.run(_dkv_kernel, inputs, log_decay, d_final=ends, dk=dk, dv=dv, d_initial=d_initial, **between)
    d_decay = dg[0] if dg.shape[0] == 1 else dg.sum(dim=0)
    return _summed(dq, q_bthk), _summed(dk, k_bthk), _summed(dv, v_bthv), d_decay, d_initial


def _segments(sequences: int, tokens: int) -> tuple[int, int]:
    """How many segments a sequence is cut into, and the tokens of one: a multiple of every chunk, the last may be short."""
    if sequences >= FEW_HEADS:
        return 1, tokens
    wanted = max(1, min(math.ceil(WANTED_PROGRAMS / sequences), tokens // SEGMENT_TOKENS))
    length = 128 * math.ceil(tokens / (128 * wanted))
    return math.ceil(tokens / length), length


def _summed(parts: Tensor, like: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(dim=0).to(like.dtype)


_INTERPRETED = not isinstance(_forward_kernel, triton.runtime.JITFunction)
_TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """One launch's shapes: how heads, segments and slices make programs."""

    launch: Launch
    shape: tuple[int, int, int, int]
    value_dim: int
    dtype: torch.dtype
    log2_scale: float
    segments: int
    length: int

    @classmethod
    def of(cls, launch: Launch, q_bthk: Tensor, v_bthv: Tensor, scale: float) -> _Walk:
        if not scale > 0:
            raise ValueError(f"scale={scale}: it must be positive, since its logarithm is added to those of the decays")
        batch, tokens, heads, _ = q_bthk.shape
        segments, length = _segments(batch * heads, tokens)
        shape = tuple(q_bthk.shape)
        dims = {"shape": shape, "value_dim": v_bthv.shape[-1], "segments": segments, "length": length}
        return cls(launch=launch, dtype=q_bthk.dtype, log2_scale=math.log2(scale), **dims)

    @property
    def block_k(self) -> int:
        return min(self.launch.block_k, _padded(self.shape[3]))

    @property
    def block_v(self) -> int:
        return min(self.launch.block_v, _padded(self.value_dim))

    @property
    def slices_k(self) -> int:
        return triton.cdiv(self.shape[3], self.block_k)

    @property
    def slices_v(self) -> int:
        return triton.cdiv(self.value_dim, self.block_v)

    def run(self, kernel: Any, inputs: dict[str, Tensor], log_decay: Tensor, **others: Any) -> None:
        """Strides travel in units of 16 bytes where all allow it, so that the compiler knows that rows are aligned."""
        batch, tokens, heads, key_dim = self.shape
        unit = 16 // self.dtype.itemsize
        align = unit if all(stride % unit == 0 for x in inputs.values() for stride in x.stride()[:3]) else 1
        strides = {f"{name}_{axis}": x.stride(i) // align for name, x in inputs.items() for i, axis in enumerate("bth")}
        strides |= {f"g_{axis}": log_decay.stride(i) for i, axis in enumerate("bth")}
        counts = {"tokens": tokens, "batches": batch, "heads": heads, "segments": self.segments, "length": self.length}
        single = self.dtype == torch.float32
        product = tl.float32 if single or (_INTERPRETED and self.dtype == torch.bfloat16) else _TRITON_DTYPE[self.dtype]
        limit = {} if self.launch.registers is None else {"maxnreg": self.launch.registers}
        with torch.cuda.device(log_decay.device) if log_decay.is_cuda else nullcontext():
            kernel[(batch * self.segments * heads * self.slices_k * self.slices_v,)](
                **inputs, g=log_decay, **others, log2_scale=self.log2_scale, **counts, **strides,
                K=key_dim, V=self.value_dim, BLOCK_K=self.block_k, BLOCK_V=self.block_v, CHUNK=self.launch.chunk,
                ALIGN=align, LP=product, PRECISION="tf32x3" if single else "tf32", SPLIT=single, STAGES=self.launch.stages,
                num_warps=self.launch.warps, num_stages=self.launch.stages, **limit,
            )  # fmt: skip

    def partial(self, like: Tensor, slices: int) -> Tensor:
        """Room for an output in which `slices` programs have a share: in fp32 where there are several."""
        dtype = like.dtype if slices == 1 else torch.float32
        return like.new_empty(slices, *like.shape, dtype=dtype)

    def states_at_segments(
        self, k: Tensor, v: Tensor, log_decay: Tensor, outside: Tensor | None, *, reverse: bool
    ) -> Tensor | None:
        """(B, segments, H, K, V): the state each segment starts from, or dS at its end; `outside` if there is one segment."""
        if self.segments == 1:
            return outside
        batch, _, heads, key_dim = self.shape
        added = k.new_empty(batch, self.segments, heads, key_dim, self.value_dim, dtype=torch.float32)
        totals = k.new_empty(batch, self.segments, heads, dtype=torch.float32)
        self.run(_segment_kernel, {"k": k, "v": v}, log_decay, added=added, totals=totals, REVERSE=reverse)
        size, block = key_dim * self.value_dim, 1024
        with torch.cuda.device(k.device) if k.is_cuda else nullcontext():
            _carry_kernel[(batch * heads, triton.cdiv(size, block))](
                added, totals, outside, heads, self.segments, SIZE=size, BLOCK=block, REVERSE=reverse
            )
        return added


def saved_like(q_bthk: Tensor, v_bthv: Tensor, config: Config) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the states that `forward` keeps for the backward pass; (0,) where it keeps none."""
    if config.policy != "states":
        return (0,), q_bthk.dtype
    walk = _Walk.of(config.forward, q_bthk, v_bthv, 1.0)
    batch, _, heads, key_dim = q_bthk.shape
    chunks = triton.cdiv(walk.length, config.forward.chunk)
    return (batch * walk.segments * heads, chunks, key_dim, walk.value_dim), q_bthk.dtype
