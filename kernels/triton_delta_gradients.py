"""The gradients of the delta rule with one decay per head, for all chunks at once, from what the walks have kept.

With U, dR and the states S before and dS after a chunk, D = β dR and the scores P = scale Γ ⊙ (dO Uᵀ), N = −Γ ⊙ (D Uᵀ), the
latter without its diagonal,

    dQ = scale Γ dO Sᵀ + P K        dK = −Γ D Sᵀ + N K  +  Γ_C/Γ U dSᵀ + Pᵀ Q + Nᵀ K        dV = w dR        dβ = dR · error

and dlog λ_t is the sum from t on of q·dq + k·(dk's first half − its second), and of what goes over the chunk's end.

What is surprising:
- dK's second half is made transposed, (K, chunk), so that P and N stand on the right of their products: a transposed tile
  that was computed is never the left operand (flash-linear-attention#640), and each is made once.
- Slices of K go by themselves, over V in pieces that are read again rather than held. Where keys are normalized a slice of
  dK waits for the sum k·dk over all of K: then one program does all slices, and corrects what it has written.
- dlog λ holds terms i = j that cancel; below fp32's resolution of λ what is left of them is rounding, and made 0.
Source: triton_delta_walk.py has the equations that these are derivatives of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_delta_solve import RUNTIME, STRIDES, get_beta, get_gates, get_total
from kernels.triton_scalar_tiles import above_rounding, between, get_state, get_tile, locate_slot, put_tile, suffix_sum


# fmt: off
@triton.jit(do_not_specialize=[*RUNTIME, "batches", "slots", "count", *STRIDES])
def gradients_kernel(
    q, k, v, d, gates, errors, dr, starts, ends, cu, dq, dk, dv, d_beta, d_log,
    log2_scale, tokens, batches, heads, slots, count, sequences, search_steps,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, NORM: tl.constexpr, PLANES: tl.constexpr,
    WRITE: tl.constexpr, APART: tl.constexpr, STAGES: tl.constexpr,
):
    """v: read where w = 1 only. d_log is None where there is no decay. APART: a program for each slice of K, with a share in
    d_log, (slices, B, T, H). A program
    does `count` slots, one if it has one stage."""
    ALL: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SLICES: tl.constexpr = 1 if APART else ALL  # that this program does
    slice_k = tl.program_id(0) % ALL if APART else 0
    program = tl.program_id(0) // ALL if APART else tl.program_id(0)
    head = (program % heads).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    for n in tl.range(0, count if STAGES > 1 else 1, num_stages=STAGES, disable_licm=True):
        slot = program // heads * count + n
        batch, start, left = locate_slot(cu, slot, sequences, search_steps, tokens, CHUNK)
        left = tl.where(slot < slots, left, 0)
        place = tl.minimum(slot, slots - 1).to(tl.int64) * heads + head
        row = (batch * tokens + start) * heads + head
        g_base = gates + place * (PLANES * CHUNK)
        whole, fraction, inverse_norm = get_gates(g_base, rows, CHUNK, SPLIT, NORM)
        beta = get_beta(g_base, rows, CHUNK)
        total, total_fraction = get_total(g_base, CHUNK, SPLIT)
        from_start = tl.exp2(whole + fraction)
        to_end = tl.exp2((total - whole) + (total_fraction - fraction))

        d_base = d + (batch * d_b + start * d_t + head * d_h) * ALIGN
        if not WRITE:
            v_base = v + (batch * v_b + start * v_t + head * v_h) * ALIGN
        read = tl.zeros([CHUNK, CHUNK], tl.float32)
        erased = tl.zeros([CHUNK, CHUNK], tl.float32)
        d_betas = tl.zeros([CHUNK], tl.float32)
        for first_value in tl.static_range(0, V, BLOCK_V):
            cv = first_value + tl.arange(0, BLOCK_V)
            out_offsets = rows[:, None] * (heads * V) + cv[None, :]
            error = get_tile(errors + row * V, out_offsets, rows, cv, left, V, BLOCK_V, tl.float32)
            drc = get_tile(dr + row * V, out_offsets, rows, cv, left, V, BLOCK_V, tl.float32)
            d_betas += tl.sum(drc * error, 1)
            u = beta[:, None] * error
            if not WRITE:
                u += get_tile(v_base, rows[:, None] * (v_t * ALIGN) + cv[None, :], rows, cv, left, V, BLOCK_V, tl.float32)
            if slice_k == 0:
                put_tile(dv + row * V, out_offsets, rows, cv, left, drc * beta[:, None] if WRITE else drc, V, BLOCK_V)
            u = (u * inverse_norm[:, None]).to(LP)
            minus_d = (drc * (-beta * inverse_norm)[:, None]).to(LP)
            dc = get_tile(d_base, rows[:, None] * (d_t * ALIGN) + cv[None, :], rows, cv, left, V, BLOCK_V, LP)
            read = tl.dot(dc, tl.trans(u), read, input_precision=PRECISION)
            erased = tl.dot(minus_d, tl.trans(u), erased, input_precision=PRECISION)
        if slice_k == 0:
            tl.store(d_beta + row + rows * heads, d_betas, mask=rows < left)
        read = (read * between(whole, fraction, rows, log2_scale, False, SPLIT)).to(LP)
        weight = tl.where(rows[:, None] > rows[None, :], between(whole, fraction, rows, 0.0, False, SPLIT), 0.0)
        erased = (erased * weight).to(LP)

        q_base = q + (batch * q_b + start * q_t + head * q_h) * ALIGN
        k_base = k + (batch * k_b + start * k_t + head * k_h) * ALIGN
        inside = tl.zeros([CHUNK], tl.float32)
        leaving = tl.zeros([CHUNK], tl.float32)
        along = tl.zeros([CHUNK], tl.float32)
        around = tl.zeros([BLOCK_K], tl.float32)
        for piece in tl.static_range(0, SLICES):
            ck = (slice_k + piece) * BLOCK_K + tl.arange(0, BLOCK_K)
            dk_offsets = rows[:, None] * (heads * K) + ck[None, :]
            kc = get_tile(k_base, rows[:, None] * (k_t * ALIGN) + ck[None, :], rows, ck, left, K, BLOCK_K, LP)
            qc = get_tile(q_base, rows[:, None] * (q_t * ALIGN) + ck[None, :], rows, ck, left, K, BLOCK_K, LP)
            early = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            dq_c = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            for first_value in tl.static_range(0, V, BLOCK_V):
                cv = first_value + tl.arange(0, BLOCK_V)
                if V > BLOCK_V:
                    out_offsets = rows[:, None] * (heads * V) + cv[None, :]
                    minus_d = get_tile(dr + row * V, out_offsets, rows, cv, left, V, BLOCK_V, tl.float32)
                    minus_d = (minus_d * (-beta * inverse_norm)[:, None]).to(LP)
                    dc = get_tile(d_base, rows[:, None] * (d_t * ALIGN) + cv[None, :], rows, cv, left, V, BLOCK_V, LP)
                state = get_state(starts + place * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V).to(LP)
                dq_c = tl.dot(dc, tl.trans(state), dq_c, input_precision=PRECISION)
                early = tl.dot(minus_d, tl.trans(state), early, input_precision=PRECISION)
            dq_c = tl.dot(read, kc, dq_c * tl.exp2(whole + fraction + log2_scale)[:, None], input_precision=PRECISION)
            inside += tl.sum(dq_c * qc, 1)
            put_tile(dq + row * K, dk_offsets, rows, ck, left, dq_c, K, BLOCK_K)
            early = tl.dot(erased, kc, early * from_start[:, None], input_precision=PRECISION)
            k_early = tl.sum(early * kc, 1)

            late_t = tl.zeros([BLOCK_K, CHUNK], tl.float32)
            for first_value in tl.static_range(0, V, BLOCK_V):
                cv = first_value + tl.arange(0, BLOCK_V)
                if V > BLOCK_V:
                    out_offsets = rows[:, None] * (heads * V) + cv[None, :]
                    u = beta[:, None] * get_tile(errors + row * V, out_offsets, rows, cv, left, V, BLOCK_V, tl.float32)
                    if not WRITE:
                        v_offsets = rows[:, None] * (v_t * ALIGN) + cv[None, :]
                        u += get_tile(v_base, v_offsets, rows, cv, left, V, BLOCK_V, tl.float32)
                    u = (u * inverse_norm[:, None]).to(LP)
                    state = get_state(starts + place * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V).to(LP)
                d_state = get_state(ends + place * (K * V), ck, cv, K, V, BLOCK_K, BLOCK_V).to(LP)
                around += tl.sum(state.to(tl.float32) * d_state, 1)
                late_t = tl.dot(d_state, tl.trans(u), late_t, input_precision=PRECISION)
            late_t *= to_end[None, :]
            kc_t = tl.trans(kc).to(tl.float32)
            leaving += tl.sum(late_t * kc_t, 0)
            late_t = tl.dot(tl.trans(qc), read, late_t, input_precision=PRECISION)
            late_t = tl.dot(tl.trans(kc), erased, late_t, input_precision=PRECISION)
            k_late = tl.sum(late_t * kc_t, 0)
            inside += k_early - k_late
            dk_c = early + tl.trans(late_t)
            if NORM:
                along += k_early + k_late
                if SLICES == 1:
                    dk_c -= kc * (along * inverse_norm * inverse_norm)[:, None]
            put_tile(dk + row * K, dk_offsets, rows, ck, left, dk_c, K, BLOCK_K)
        if NORM and SLICES > 1:
            tl.debug_barrier()
            for piece in tl.static_range(0, SLICES):
                ck = piece * BLOCK_K + tl.arange(0, BLOCK_K)
                dk_offsets = rows[:, None] * (heads * K) + ck[None, :]
                kc = get_tile(k_base, rows[:, None] * (k_t * ALIGN) + ck[None, :], rows, ck, left, K, BLOCK_K, tl.float32)
                dk_c = get_tile(dk + row * K, dk_offsets, rows, ck, left, K, BLOCK_K, tl.float32)
                dk_c -= kc * (along * inverse_norm * inverse_norm)[:, None]
                put_tile(dk + row * K, dk_offsets, rows, ck, left, dk_c, K, BLOCK_K)
        if d_log is not None:
            around_c = tl.sum(around, 0) * tl.exp2(total + total_fraction) + tl.sum(leaving, 0)
            previous = tl.load(g_base + rows - 1, mask=rows > 0, other=0.0)
            d_decay = above_rounding(suffix_sum(inside) + around_c, whole - previous)
            share = (row * 0 + slice_k) * batches * tokens * heads
            tl.store(d_log + share + row + rows * heads, d_decay, mask=rows < left)
# fmt: on
