"""The walks along time of the delta rule with one decay per head: the state from chunk to chunk, and its gradient in reverse.

Forward, from the state S at a chunk's start, with M of triton_delta_solve.py and Γ_i the decay since the start,

    Z = Γ K S,   R = w V − β Z,   recalled = Z + M R,   U = w V − β recalled,   O = Γ Q S + A U,   S <- Γ_C S + (Γ_C/Γ K)ᵀ U

and in reverse, from the gradient dS at a chunk's end,

    dU = Aᵀ dO + Γ_C/Γ K dS,   dR = dU − Mᵀ β dU,   dS <- Γ_C dS + (Γ Q)ᵀ dO − (Γ K)ᵀ β dR.

What is surprising:
- Columns of the state go by themselves, so a state that is too wide is walked in slices of V, each with all of K.
- What the forward walk leaves beside S is the error of the recall, V − recalled where w = β and −recalled where w = 1: it is
  dβ's other factor, and U and the gradients come from it without a division.
- A normalized key is a row's factor: 1 / |k| goes onto rows of products, never onto a tile that is loaded.
Source: the launches are in triton_delta.py; delta_scan_naive.py is the definition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_delta_solve import RUNTIME, STRIDES, get_beta, get_factor, get_gates, get_total, times_inverse
from kernels.triton_scalar_tiles import between, first_slot, get_state, get_tile, locate, put_state, put_tile

WALK_RUNTIME = [*RUNTIME, "batches", "segments", "length"]


# fmt: off
@triton.jit(do_not_specialize=[*WALK_RUNTIME, *STRIDES])
def forward_kernel(
    q, k, v, inverse, gates, cu, initial, o, final, states, errors,
    log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, NORM: tl.constexpr, PLANES: tl.constexpr,
    WRITE: tl.constexpr, STAGES: tl.constexpr, EACH: tl.constexpr,
):
    """WRITE: w = β, else 1. states: S before each chunk; errors: as v. EACH span's last state, or the last one's of each row,
    goes to `final`. Without o only states and errors are made."""
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    _, slice_v, batch, segment, head, start, count = locate(cu, heads, segments, length, tokens, 1, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    chunks = tl.cdiv(count, CHUNK)
    k_base = k + (batch * k_b + start * k_t + head * k_h) * ALIGN
    k_offsets = rows[:, None] * (k_t * ALIGN) + ck[None, :]
    v_base = v + (batch * v_b + start * v_t + head * v_h) * ALIGN
    v_offsets = rows[:, None] * (v_t * ALIGN) + cv[None, :]
    if o is not None:
        q_base = q + (batch * q_b + start * q_t + head * q_h) * ALIGN
        q_offsets = rows[:, None] * (q_t * ALIGN) + ck[None, :]
        o_base = o + ((batch * tokens + start) * heads + head) * V
    out_offsets = rows[:, None] * (heads * V) + cv[None, :]
    if errors is not None:
        e_base = errors + ((batch * tokens + start) * heads + head) * V
    place = first_slot(cu, batch, segment, start, tokens, CHUNK) * heads + head
    m_base = inverse + place * (CHUNK * CHUNK)
    m_offsets = rows[:, None] * CHUNK + rows[None, :]
    g_base = gates + place * (PLANES * CHUNK)
    span = (batch * segments + segment) * heads + head
    if initial is not None:
        state = get_state(initial + span * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    ahead, ahead_fraction = get_total(g_base, CHUNK, SPLIT)
    factor_ahead = get_factor(g_base, CHUNK, SPLIT)
    beta_ahead = get_beta(g_base, rows, CHUNK)
    for c in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        left = count - c * CHUNK
        kc = get_tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
        mc = tl.load(m_base + m_offsets)
        whole, fraction, inverse_norm = get_gates(g_base, rows, CHUNK, SPLIT, NORM)
        total, total_fraction, factor, beta = ahead, ahead_fraction, factor_ahead, beta_ahead
        g_base += tl.where(c + 1 < chunks, heads * (PLANES * CHUNK), 0)
        ahead, ahead_fraction = get_total(g_base, CHUNK, SPLIT)
        factor_ahead = get_factor(g_base, CHUNK, SPLIT)
        beta_ahead = get_beta(g_base, rows, CHUNK)
        from_start = tl.exp2(whole + fraction)
        to_end = tl.exp2((total - whole) + (total_fraction - fraction))
        rounded = state.to(LP)
        if states is not None:
            put_state(states + (place + c * heads) * (K * V), ck, cv, rounded, K, V, BLOCK_K, BLOCK_V)
        recalled = tl.dot(kc, rounded, input_precision=PRECISION) * (from_start * inverse_norm)[:, None]
        value = get_tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, tl.float32)
        v_base += CHUNK * v_t * ALIGN
        if WRITE:
            rest = (beta * factor)[:, None] * (value - recalled)
        else:
            rest = factor * value - (beta * factor)[:, None] * recalled
        recalled = times_inverse(mc, rest, recalled, LP, PRECISION)
        if WRITE:
            error = value - recalled
            u = beta[:, None] * error
        else:
            error = -recalled
            u = value + beta[:, None] * error
        if errors is not None:
            put_tile(e_base, out_offsets, rows, cv, left, error, V, BLOCK_V)
            e_base += CHUNK * heads * V
        if NORM:
            u *= inverse_norm[:, None]
        if o is not None:
            qc = get_tile(q_base, q_offsets, rows, ck, left, K, BLOCK_K, LP)
            q_base += CHUNK * q_t * ALIGN
            scores = tl.dot(qc, tl.trans(kc), input_precision=PRECISION)
            scores *= between(whole, fraction, rows, log2_scale, False, SPLIT)
            out = tl.dot(qc, rounded, input_precision=PRECISION) * tl.exp2(whole + fraction + log2_scale)[:, None]
            out = tl.dot(scores.to(LP), u.to(LP), out, input_precision=PRECISION)
            put_tile(o_base, out_offsets, rows, cv, left, out, V, BLOCK_V)
            o_base += CHUNK * heads * V
        added = (u * to_end[:, None]).to(LP)
        state = tl.dot(tl.trans(kc), added, state * tl.exp2(total + total_fraction), input_precision=PRECISION)
        k_base += CHUNK * k_t * ALIGN
        m_base += heads * (CHUNK * CHUNK)
    if final is not None:
        if EACH:
            put_state(final + span * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)
        elif segment == segments - 1:
            put_state(final + (batch * heads + head) * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=[*WALK_RUNTIME, *STRIDES])
def reverse_kernel(
    q, k, d, inverse, gates, cu, d_final, dr, d_initial, d_states,
    log2_scale, tokens, batches, heads, segments, length,
    q_b, q_t, q_h, k_b, k_t, k_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, NORM: tl.constexpr, PLANES: tl.constexpr,
    STAGES: tl.constexpr, EACH: tl.constexpr,
):
    """d: dO. dr: dR, as d; d_states: dS after each chunk. EACH span's first dS, or that of each row, goes to d_initial."""
    SLICES_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    _, slice_v, batch, segment, head, start, count = locate(cu, heads, segments, length, tokens, 1, SLICES_V)
    rows = tl.arange(0, CHUNK)
    ck = tl.arange(0, BLOCK_K)
    cv = slice_v * BLOCK_V + tl.arange(0, BLOCK_V)
    chunks = tl.cdiv(count, CHUNK)
    first = start + (chunks - 1) * CHUNK
    q_base = q + (batch * q_b + first * q_t + head * q_h) * ALIGN
    k_base = k + (batch * k_b + first * k_t + head * k_h) * ALIGN
    d_base = d + (batch * d_b + first * d_t + head * d_h) * ALIGN
    q_offsets = rows[:, None] * (q_t * ALIGN) + ck[None, :]
    k_offsets = rows[:, None] * (k_t * ALIGN) + ck[None, :]
    d_offsets = rows[:, None] * (d_t * ALIGN) + cv[None, :]
    dr_offsets = rows[:, None] * (heads * V) + cv[None, :]
    dr_base = dr + ((batch * tokens + first) * heads + head) * V
    place = (first_slot(cu, batch, segment, start, tokens, CHUNK) + tl.maximum(chunks - 1, 0)) * heads + head
    m_base = inverse + place * (CHUNK * CHUNK)
    m_offsets = rows[:, None] * CHUNK + rows[None, :]
    g_base = gates + place * (PLANES * CHUNK)
    span = (batch * segments + segment) * heads + head
    if d_final is not None:
        state = get_state(d_final + span * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    ahead, ahead_fraction = get_total(g_base, CHUNK, SPLIT)
    factor_ahead = get_factor(g_base, CHUNK, SPLIT)
    for c in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        left = count - (chunks - 1 - c) * CHUNK
        kc = get_tile(k_base, k_offsets, rows, ck, left, K, BLOCK_K, LP)
        qc = get_tile(q_base, q_offsets, rows, ck, left, K, BLOCK_K, LP)
        dc = get_tile(d_base, d_offsets, rows, cv, left, V, BLOCK_V, LP)
        mc = tl.load(m_base + m_offsets)
        whole, fraction, inverse_norm = get_gates(g_base, rows, CHUNK, SPLIT, NORM)
        beta = get_beta(g_base, rows, CHUNK)
        total, total_fraction, factor = ahead, ahead_fraction, factor_ahead
        g_base -= tl.where(c + 1 < chunks, heads * (PLANES * CHUNK), 0)
        ahead, ahead_fraction = get_total(g_base, CHUNK, SPLIT)
        factor_ahead = get_factor(g_base, CHUNK, SPLIT)
        from_start = tl.exp2(whole + fraction)
        to_end = tl.exp2((total - whole) + (total_fraction - fraction))
        rounded = state.to(LP)
        put_state(d_states + (place - c * heads) * (K * V), ck, cv, rounded, K, V, BLOCK_K, BLOCK_V)
        scores_t = tl.dot(kc, tl.trans(qc), input_precision=PRECISION)
        scores_t *= between(whole, fraction, rows, log2_scale, True, SPLIT)
        du = tl.dot(kc, rounded, input_precision=PRECISION) * to_end[:, None]
        du = tl.dot(scores_t.to(LP), dc, du, input_precision=PRECISION)
        if NORM:
            du *= inverse_norm[:, None]
        du = times_inverse(tl.trans(mc), (beta * -factor)[:, None] * du, du, LP, PRECISION)
        put_tile(dr_base, dr_offsets, rows, cv, left, du, V, BLOCK_V)
        dr_base -= CHUNK * heads * V
        state *= tl.exp2(total + total_fraction)
        read = (dc * tl.exp2(whole + fraction + log2_scale)[:, None]).to(LP)
        state = tl.dot(tl.trans(qc), read, state, input_precision=PRECISION)
        erased = (du * -(beta * from_start * inverse_norm)[:, None]).to(LP)
        state = tl.dot(tl.trans(kc), erased, state, input_precision=PRECISION)
        q_base -= CHUNK * q_t * ALIGN
        k_base -= CHUNK * k_t * ALIGN
        d_base -= CHUNK * d_t * ALIGN
        m_base -= heads * (CHUNK * CHUNK)
    if d_initial is not None:
        if EACH:
            put_state(d_initial + span * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)
        elif segment == 0:
            put_state(d_initial + (batch * heads + head) * (K * V), ck, cv, state, K, V, BLOCK_K, BLOCK_V)
# fmt: on
