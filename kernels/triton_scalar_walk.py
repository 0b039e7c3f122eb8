"""The walk along time of the scalar-decay kernels: a state from chunk to chunk, and what is read from it.

What is surprising: one kernel is the forward pass, the walk that makes the gradient dS of the state, and the one that finds
what a segment adds. Backwards in time v's gradient has the form of the output, with other names:

    S  <- λ S + k vᵀ,  o = Sᵀ q        dS <- λ (dS + q doᵀ),  dv = (dS + q doᵀ)ᵀ k

so with REVERSE the tensors q, k, v are k, q, do, and o is dv. Without o only the states are made, and q is not read.
Source: the launches are in triton_scalar.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_scalar_tiles import (
    between,
    decays,
    first_slot,
    gate_parameters,
    get_state,
    get_tile,
    get_x,
    locate,
    put_kept,
    put_state,
    put_tile,
    running,
)

RUNTIME = ["slope", "log2_scale", "tokens", "batches", "heads", "segments", "length"]
STRIDES = [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "x", "d") for axis in ("b", "t", "h")]


# fmt: off
@triton.jit(do_not_specialize=[*RUNTIME, *STRIDES])
def walk_kernel(
    q, k, v, x, gain, offset, cu, initial, o, final, saved, totals,
    slope, log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, x_b, x_t, x_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr,
    ALIGN: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    REVERSE: tl.constexpr, EVERY: tl.constexpr, EACH: tl.constexpr,
):
    """States go to `saved` every EVERY chunks: S before them; with REVERSE, dS after them. EACH segment's last one, or the last
    segment's only, goes to `final`; with REVERSE, its first one. `totals`: the decay over the segment."""
    SLICES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    slice_k, slice_v, batch, segment, head, start, count = locate(cu, heads, segments, length, tokens, SLICES_K, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = slice_k * BLOCK_K + tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    chunks = tl.cdiv(count, CHUNK)
    first = start
    if REVERSE:
        first += (chunks - 1) * CHUNK
    step = -CHUNK if REVERSE else CHUNK
    k_base = k + (batch * k_b + first * k_t + head * k_h) * ALIGN
    v_base = v + (batch * v_b + first * v_t + head * v_h) * ALIGN
    x_base = x + batch * x_b + first * x_t + head * x_h
    k_offsets = rows[:, None] * (k_t * ALIGN) + ck[None, :]
    v_offsets = rows[:, None] * (v_t * ALIGN) + cv[None, :]
    if o is not None:
        q_base = q + (batch * q_b + first * q_t + head * q_h) * ALIGN
        q_offsets = rows[:, None] * (q_t * ALIGN) + ck[None, :]
        o_base = o + (((slice_k * batches + batch) * tokens + first) * heads + head) * V
        o_offsets = rows[:, None] * (heads * V) + cv[None, :]
    if saved is not None:
        slot = first_slot(cu, batch, segment, start, tokens, CHUNK * EVERY)
    factor, shift = gate_parameters(gain, offset, head)
    span = (batch * segments + segment) * heads + head
    if initial is not None:
        state = get_state(initial + span * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    log2_total = tl.full([], 0.0, tl.float32)
    # x is fetched a chunk ahead by hand: the compiler does that for what is at least 4 bytes wide only.
    ahead = get_x(x_base, rows * x_t, rows, tl.minimum(count - (chunks - 1) * CHUNK, count) if REVERSE else count)
    for c in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - c if REVERSE else c
        left = count - chunk * CHUNK
        if STAGES == 1:
            kc = get_tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
            vc = get_tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        log2 = decays(ahead, rows, left, factor, shift, slope, KIND)
        x_base += step * x_t
        ahead = get_x(x_base, rows * x_t, rows, tl.where(c + 1 < chunks, left - step, 0))
        whole, fraction, whole_total, fraction_total = running(log2, SPLIT)
        from_start = tl.exp2(whole + fraction + log2_scale)
        to_end = tl.exp2((whole_total - whole) + (fraction_total - fraction))
        rounded = state.to(LP)
        if saved is not None:
            saved_base = saved + (slot + chunk // EVERY) * heads * (K * V) + head * V
            if EVERY == 1:
                put_kept(saved_base, ck, cv, heads, rounded, K, V, BLOCK_K, BLOCK_V)
            else:
                due = (chunk % EVERY == EVERY - 1) | (c == 0) if REVERSE else chunk % EVERY == 0
                if due:
                    put_kept(saved_base, ck, cv, heads, rounded, K, V, BLOCK_K, BLOCK_V)
        if STAGES > 1:  # loaded ahead of time: waited for where they stand here, not sooner
            kc = get_tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
            vc = get_tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, LP)
        if o is not None:
            qc = get_tile(q_base, q_offsets, rows, ck, left, K, BLOCK_K, LP)
            scores = tl.dot(qc, tl.trans(kc), input_precision=PRECISION)
            scores *= between(whole, fraction, rows, log2_scale, REVERSE, SPLIT)
            out = tl.dot(qc, rounded, input_precision=PRECISION) * (to_end if REVERSE else from_start)[:, None]
            out = tl.dot(scores.to(LP), vc, out, input_precision=PRECISION)
            put_tile(o_base, o_offsets, rows, cv, left, out, V, BLOCK_V)
            q_base += step * q_t * ALIGN
            o_base += step * heads * V
        v_decayed = (vc * (from_start if REVERSE else to_end)[:, None]).to(LP)
        state = tl.dot(tl.trans(kc), v_decayed, state * tl.exp2(whole_total + fraction_total), input_precision=PRECISION)
        if totals is not None:
            log2_total += whole_total + fraction_total
        k_base += step * k_t * ALIGN
        v_base += step * v_t * ALIGN
    if final is not None:
        if EACH:
            put_state(final + span * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)
        elif segment == (0 if REVERSE else segments - 1):
            put_state(final + (batch * heads + head) * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)
    if totals is not None:
        tl.store(totals + span, tl.exp2(log2_total))


@triton.jit(do_not_specialize=["heads", "segments"])
def carry_kernel(added, totals, outside, heads, segments, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
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
        span = (batch * segments + segment) * heads + head
        own = tl.load(added + span * SIZE + offsets, mask=inside, other=0.0)
        total = tl.load(totals + span)
        tl.store(added + span * SIZE + offsets, state, mask=inside)
        state = state * total + own
# fmt: on
