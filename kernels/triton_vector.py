"""Linear attention with one decay per key channel, as Triton kernels: forward and every gradient, exact for any λ in [0, 1].

    S_t = diag(λ_t) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

What is surprising:

- Time is cut into chunks. Only the state crosses from one chunk to the next, so the forward pass is one kernel that walks
  along the chunks, and the backward pass is a thin walk in reverse (the gradient of the state) and one kernel that takes
  all chunks at once, with the state before and the state gradient after each chunk at hand.
- Inside a block of tokens the decay between two of them is split as 2^(D_i) · 2^(-D_j), where D counts from the middle of
  the block's total decay. That fits the range of bf16 while no channel loses more than 2^-200 within a block. A chunk
  where some channel does is noted in a flag, and a second launch, whose programs return at once elsewhere, does it again with
  blocks of one token: above the blocks, halves are merged pairwise, the later half's rows carrying the decay since the
  middle and the earlier half's rows the decay up to the middle, so every factor is at most 1. No flag is read by the host.
- log λ is taken in base 2 and clamped at -150, which is λ = 0 in fp32; the gradient there is 0.
- The gradient of log λ_t is a sum over the pairs of tokens that t lies between. It is taken as a running sum of
  q·dq - k·dk inside one chunk only, in fp32 and from the very operands that the products saw, so that pairs on one side of
  t cancel to fp32 accuracy; what comes from outside the chunk is read off the two states.
- Every sum over tokens of log λ is a product with a matrix of 0, 1 and ±1/2, on the tensor cores, of log λ in two halves.
- Products are of bf16 operands for bf16 inputs, tf32 for fp16 inputs (decayed operands need more range than fp16 has) and
  three tf32 products for fp32 inputs; sums are fp32. States between chunks are kept in bf16 for bf16 inputs, else fp32.

Source: the recurrence of the paper (arXiv 2509.05282), diagonal transition; decay_scan_naive.py is the definition.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_ZERO = tl.constexpr(-150.0)  # 2^-150 is 0 in fp32
HALF_RANGE = tl.constexpr(100.0)  # decayed operands stay within 2^±100 of the given ones, which fits bf16 and fp32
GROUP = 16  # chunks that one program of an exact launch looks at
NARROWEST = 64  # columns of a tile: ptxas 12.8 and 13.0 miscompile many products of 32-wide tiles (triton#10486)


@dataclass(frozen=True)
class VectorConfig:
    """How the kernels of one (K, V) are cut; every value changes time and rounding only.

    chunk: tokens between two kept states, and in a step of every kernel but the fused forward pass, which has its own. block:
    tokens within which decays are split around a middle; all three are powers of two from 16 on.
    policy: "save" keeps the forward pass's states for the backward pass, "recompute" makes them again.
    forward: "fused" is one walk along the chunks, "split" a walk that makes states and a kernel that takes all chunks at
    once. backward: the same, "fused" only where K and V each fit one piece.
    key_block, value_block: widest piece of K and V in one program; the fused forward pass has all of K.
    warps, stages, registers (most per thread): of the fused forward pass, then of walks, then of the gradients.
    """

    chunk: int = 64
    forward_chunk: int = 64
    warps: int = 4
    stages: int = 2
    policy: str = "save"
    block: int = 64
    registers: int | None = None
    walk_warps: int = 4
    walk_stages: int = 2
    walk_registers: int | None = None
    gradient_warps: int = 4
    gradient_stages: int = 1
    gradient_registers: int | None = None
    key_block: int = 64
    value_block: int = 64
    forward: str = "fused"
    backward: str = "split"


def default_config(key_dim: int, value_dim: int, dtype: torch.dtype) -> VectorConfig:
    if key_dim <= 64:
        return VectorConfig(forward_chunk=32, stages=3)
    if key_dim <= 128:
        return VectorConfig(forward_chunk=32, warps=8)
    return VectorConfig(forward="split")


@triton.jit
def _mask(first_col, left, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """Which entries of a tile of C rows and BN columns exist: `left` rows, columns below N."""
    mask = (tl.arange(0, C) < left)[:, None]
    if N % BN != 0:
        mask = mask & (first_col + tl.arange(0, BN) < N)[None, :]
    return mask


@triton.jit
def _load(pointer, stride, first_col, left, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    offsets = tl.arange(0, C)[:, None] * stride + first_col + tl.arange(0, BN)[None, :]
    return tl.load(pointer + offsets, mask=_mask(first_col, left, C, N, BN), other=0.0)


@triton.jit
def _store(pointer, stride, first_col, left, x, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    offsets = tl.arange(0, C)[:, None] * stride + first_col + tl.arange(0, BN)[None, :]
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=_mask(first_col, left, C, N, BN))


@triton.jit
def _load_log2(pointer, stride, first_col, left, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    log_decay = _load(pointer, stride, first_col, left, C, N, BN).to(tl.float32)
    return tl.maximum(log_decay * LOG2_E, LOG2_ZERO)


@triton.jit
def _state_offsets(first_value, first_key, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """States lie as (V, K) between kernels, so that no product needs a transposed tile as its left operand."""
    values = first_value + tl.arange(0, BV)[:, None]
    keys = first_key + tl.arange(0, BK)[None, :]
    return values, keys, (values < V) & (keys < K)


@triton.jit
def _halves(x, LP: tl.constexpr):
    high = x.to(LP)
    return high, (x - high.to(tl.float32)).to(LP)


@triton.jit
def _sums(weights, high, low, LP: tl.constexpr):
    """weights (C, C) of small exact numbers times a fp32 matrix given in two halves."""
    if LP == tl.float32:  # noqa: SIM300
        return tl.dot(weights.to(tl.float32), high, input_precision="tf32x3")
    weights = weights.to(LP)
    return tl.dot(weights, low, tl.dot(weights, high))


@triton.jit
def _last_row(x, C: tl.constexpr):
    """In the layout of x, which a sum over the tokens of a loaded tile would not be."""
    return tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], x, 0.0), 0)


@triton.jit
def _up_to(C: tl.constexpr):
    return tl.arange(0, C)[None, :] <= tl.arange(0, C)[:, None]


@triton.jit
def _from(C: tl.constexpr):
    return tl.arange(0, C)[None, :] >= tl.arange(0, C)[:, None]


@triton.jit
def _after(C: tl.constexpr):
    return tl.arange(0, C)[None, :] > tl.arange(0, C)[:, None]


@triton.jit
def _around_middle(C: tl.constexpr, BASE: tl.constexpr):
    """Weights of D: within a block of 2^BASE tokens D_i - D_j is the sum over the tokens after j up to i."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    counted = ((i >> BASE) == (j >> BASE)) & ((j & ((1 << BASE) - 1)) != 0)
    return tl.where(counted, tl.where(j <= i, 0.5, -0.5), 0.0)


@triton.jit
def _level(level, C: tl.constexpr):
    """Merging blocks of 2^level tokens: (which rows are in a later half, weights of the decay to the middle, pairs)."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    late = ((i >> level) & 1) == 1
    weights = ((i >> level) == (j >> level)) & ((late & (j <= i)) | ((late == 0) & (j > i)))
    return late, weights, ((i ^ j) >> level) == 1


@triton.jit
def _same_block(C: tl.constexpr, BASE: tl.constexpr):
    return (tl.arange(0, C)[:, None] >> BASE) == (tl.arange(0, C)[None, :] >> BASE)


@triton.jit
def _pair_weights(q, k, d, high, low, REVERSE: tl.constexpr, C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr,
                  LP: tl.constexpr, IP: tl.constexpr):  # fmt: skip
    """A_ij = Σ_d q_i k_j λ_{j+1}…λ_i for i >= j, or its transpose. q and k in fp32; d from _around_middle."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    queries = (q * tl.exp2(d)).to(LP)
    keys = (k * tl.exp2(-d)).to(LP)
    if REVERSE:
        causal = i <= j
        a = tl.dot(keys, tl.trans(queries), input_precision=IP)
    else:
        causal = i >= j
        a = tl.dot(queries, tl.trans(keys), input_precision=IP)
    a = tl.where(causal & _same_block(C, BASE), a, 0.0)
    for level in tl.static_range(BASE, LOGC):
        late, weights, pairs = _level(level, C)
        x = (tl.where(late, q, k) * tl.exp2(_sums(weights, high, low, LP))).to(LP)
        a += tl.where(causal & pairs, tl.dot(x, tl.trans(x), input_precision=IP), 0.0)
    return a


@triton.jit(do_not_specialize=["T", "H"])
def forward_kernel(
    q, k, v, g, o, initial, final, states, flags, scale, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    HAS_INITIAL: tl.constexpr, WANT_FINAL: tl.constexpr, WANT_STATES: tl.constexpr, EVERY: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr,
    STAGES: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One program walks along one head's chunks with BV columns of the state in registers, and keeps every EVERYth state."""
    bh = tl.program_id(0)
    first_value = tl.program_id(1) * BV
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    bh = bh.to(tl.int64)
    chunks = tl.cdiv(T, C)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    g += b * g_b + h * g_h
    o += (b * T * H + h) * V
    states += bh * tl.cdiv(chunks, EVERY) * (K * V)
    flags += bh * chunks
    row, col, inside = _state_offsets(first_value, 0, V, K, BV, BK)
    if HAS_INITIAL:
        state = tl.load(initial + bh * (K * V) + col * V + row, mask=inside, other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    for c in tl.range(0, chunks, num_stages=STAGES):
        left = T - c * C
        tile_q = _load(q, q_t, 0, left, C, K, BK)
        tile_k = _load(k, k_t, 0, left, C, K, BK)
        tile_v = _load(v, v_t, first_value, left, C, V, BV).to(LP)
        log2 = _load_log2(g, g_t, 0, left, C, K, BK)
        if WANT_STATES:
            tl.store(states + row * K + col, state.to(states.dtype.element_ty), mask=inside & (c % EVERY == 0))
        high, low = _halves(log2, LP)
        tile_q = tile_q.to(tl.float32) * scale
        tile_k = tile_k.to(tl.float32)
        since = _sums(_up_to(C), high, low, LP)
        total = _last_row(since, C)
        if BASE == LOGC:
            # Where a channel is too steep, the chunk's pairs come out as nonsense and are left to the exact launch.
            middle = tl.maximum(0.5 * total, -HALF_RANGE)[None, :]
            queries = tile_q * tl.exp2(since - middle)
            keys = tile_k * tl.exp2(middle - since)
            steep = tl.min(total, 0) < -2 * HALF_RANGE
            a = tl.dot(queries.to(LP), tl.trans(keys.to(LP)), input_precision=IP)
            a = tl.where(_up_to(C), a, 0.0)
            queries *= tl.exp2(middle)
            keys = tile_k * tl.exp2(total[None, :] - since)
        else:
            d = _sums(_around_middle(C, BASE), high, low, LP)
            steep = tl.max(tl.max(tl.abs(d), 1), 0) > HALF_RANGE
            a = _pair_weights(tile_q, tile_k, d, high, low, False, C, BASE, LOGC, LP, IP)
            queries = tile_q * tl.exp2(since)
            keys = tile_k * tl.exp2(total[None, :] - since)
        if LP == tl.float32:  # noqa: SIM300
            # total - since loses the last digits where a chunk forgets much
            keys = tile_k * tl.exp2(_sums(_after(C), high, low, LP))
        tl.store(flags + c, steep.to(tl.int8))
        a = tl.where(steep, 0.0, a)
        out = tl.dot(queries.to(LP), tl.trans(state.to(LP)), input_precision=IP)
        out = tl.dot(a.to(LP), tile_v, out, input_precision=IP)
        _store(o, H * V, first_value, left, out, C, V, BV)
        state = tl.dot(tl.trans(tile_v), keys.to(LP), state * tl.exp2(total)[None, :], input_precision=IP)
        q += C * q_t
        k += C * k_t
        v += C * v_t
        g += C * g_t
        o += C * H * V
        states += tl.where(c % EVERY == EVERY - 1, K * V, 0)
    if WANT_FINAL:
        tl.store(final + bh * (K * V) + col * V + row, state, mask=inside)


@triton.jit(do_not_specialize=["T", "H"])
def states_kernel(
    x, y, g, first_state, last_state, states, flags, scale, T, H,
    x_b, x_t, x_h, y_b, y_t, y_h, g_b, g_t, g_h,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, WANT_LAST: tl.constexpr, WANT_FLAGS: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr,
    STAGES: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """States before each chunk from (k, v), or, in reverse, state gradients after each chunk from (q, do); x is scaled."""
    bh = tl.program_id(0)
    first_value = tl.program_id(1) * BV
    first_key = tl.program_id(2) * BK
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    bh = bh.to(tl.int64)
    chunks = tl.cdiv(T, C)
    start = 0
    step = 1
    if REVERSE:
        start = chunks - 1
        step = -1
    x += b * x_b + h * x_h + (start * C).to(tl.int64) * x_t if REVERSE else b * x_b + h * x_h
    y += b * y_b + h * y_h + (start * C).to(tl.int64) * y_t if REVERSE else b * y_b + h * y_h
    g += b * g_b + h * g_h + (start * C).to(tl.int64) * g_t if REVERSE else b * g_b + h * g_h
    states += (bh * chunks + start) * (K * V)
    values, keys, inside = _state_offsets(first_value, first_key, V, K, BV, BK)
    if HAS_FIRST:
        state = tl.load(first_state + bh * (K * V) + keys * V + values, mask=inside, other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    for n in tl.range(0, chunks, num_stages=STAGES):
        c = start + step * n
        left = T - c * C
        tile_x = _load(x, x_t, first_key, left, C, K, BK)
        tile_y = _load(y, y_t, first_value, left, C, V, BV).to(LP)
        log2 = _load_log2(g, g_t, first_key, left, C, K, BK)
        tl.store(states + values * K + keys, state.to(states.dtype.element_ty), mask=inside)
        high, low = _halves(log2, LP)
        if WANT_FLAGS:
            if BASE == LOGC:
                steep = tl.min(tl.sum(log2, 0), 0) < -2 * HALF_RANGE
            else:
                d = _sums(_around_middle(C, BASE), high, low, LP)
                steep = tl.max(tl.max(tl.abs(d), 1), 0) > HALF_RANGE
            # one row of flags per piece of K: a program writes what it has seen
            tl.store(flags + (tl.program_id(2) * tl.num_programs(0) + bh) * chunks + c, steep.to(tl.int8))
        weights = _up_to(C) if REVERSE else _after(C)
        decay = tl.exp2(_sums(weights, high, low, LP)) * scale
        update = (tile_x.to(tl.float32) * decay).to(LP)
        state = tl.dot(tl.trans(tile_y), update, state * tl.exp2(tl.sum(log2, 0))[None, :], input_precision=IP)
        x += step * C * x_t
        y += step * C * y_t
        g += step * C * g_t
        states += step * (K * V)
    if WANT_LAST:
        tl.store(last_state + bh * (K * V) + keys * V + values, state, mask=inside)


@triton.jit
def _rows_of_chunk(
    q, k, y, g, out, states, scale, left, first_value, q_t, k_t, y_t, g_t, out_t,
    REVERSE: tl.constexpr, ADD: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One chunk's o from v and the state before it, or its dv from do and the state gradient after it.

    With ADD, what `out` holds stands for the state's part.
    """
    a = tl.zeros([C, C], tl.float32)
    rows = tl.zeros([C, BV], tl.float32)
    if ADD:
        rows += _load(out, out_t, first_value, left, C, V, BV).to(tl.float32)
    for first_key in tl.static_range(0, K, BK):
        log2 = _load_log2(g, g_t, first_key, left, C, K, BK)
        high, low = _halves(log2, LP)
        tile_q = _load(q, q_t, first_key, left, C, K, BK).to(tl.float32) * scale
        tile_k = _load(k, k_t, first_key, left, C, K, BK).to(tl.float32)
        if BASE == LOGC:
            since = _sums(_up_to(C), high, low, LP)
            half = 0.5 * _last_row(since, C)
            tile_q *= tl.exp2(since - half[None, :])
            tile_k *= tl.exp2(half[None, :] - since)
            edge = tl.exp2(half)[None, :]
            if REVERSE:
                a = tl.dot(tile_k.to(LP), tl.trans(tile_q.to(LP)), a, input_precision=IP)
                decayed = tile_k * edge
            else:
                a = tl.dot(tile_q.to(LP), tl.trans(tile_k.to(LP)), a, input_precision=IP)
                decayed = tile_q * edge
        else:
            d = _sums(_around_middle(C, BASE), high, low, LP)
            a += _pair_weights(tile_q, tile_k, d, high, low, REVERSE, C, BASE, LOGC, LP, IP)
            if REVERSE:
                decayed = tile_k * tl.exp2(_sums(_after(C), high, low, LP))
            else:
                decayed = tile_q * tl.exp2(_sums(_up_to(C), high, low, LP))
        if not ADD:
            row, col, inside = _state_offsets(first_value, first_key, V, K, BV, BK)
            state = tl.load(states + row * K + col, mask=inside, other=0.0).to(LP)
            rows = tl.dot(decayed.to(LP), tl.trans(state), rows, input_precision=IP)
    if BASE == LOGC:
        a = tl.where(_from(C) if REVERSE else _up_to(C), a, 0.0)
    tile_y = _load(y, y_t, first_value, left, C, V, BV).to(LP)
    rows = tl.dot(a.to(LP), tile_y, rows, input_precision=IP)
    _store(out, out_t, first_value, left, rows, C, V, BV)


@triton.jit
def _flag(flags, bh, c, chunks, heads, PIECES: tl.constexpr):
    """Whether any piece of K saw a decay too steep for blocks in that chunk."""
    steep = tl.load(flags + bh * chunks + c).to(tl.int32)
    for piece in tl.static_range(1, PIECES):
        steep = steep | tl.load(flags + (piece * heads + bh) * chunks + c).to(tl.int32)
    return steep


@triton.jit(do_not_specialize=["T", "H", "heads"])
def rows_kernel(
    q, k, y, g, out, states, flags, scale, T, H, heads,
    q_b, q_t, q_h, k_b, k_t, k_h, y_b, y_t, y_h, g_b, g_t, g_h,
    EXACT: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr,
    LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """_rows_of_chunk for every chunk that is not flagged, or, if EXACT, for those that are."""
    chunks = tl.cdiv(T, C)
    groups = tl.cdiv(chunks, GROUP)
    pid = tl.program_id(0)
    first_value = tl.program_id(1) * BV
    h = (pid % H).to(tl.int64)
    b = (pid // H // groups).to(tl.int64)
    first = pid // H % groups * GROUP
    bh = b * H + h
    if EXACT:
        for c in range(first, tl.minimum(first + GROUP, chunks)):
            if _flag(flags, bh, c, chunks, heads, PIECES) != 0:
                start = tl.cast(c, tl.int64) * C
                _rows_of_chunk(
                    q + b * q_b + h * q_h + start * q_t, k + b * k_b + h * k_h + start * k_t,
                    y + b * y_b + h * y_h + start * y_t, g + b * g_b + h * g_h + start * g_t,
                    out + ((b * T + start) * H + h) * V, states + (bh * chunks + c) * (K * V), scale, T - c * C, first_value,
                    q_t, k_t, y_t, g_t, H * V, REVERSE, ADD, K, V, BK, BV, C, BASE, LOGC, LP, IP,
                )  # fmt: skip
    else:
        if _flag(flags, bh, first, chunks, heads, PIECES) != 0:
            return
        start = first.to(tl.int64) * C
        _rows_of_chunk(
            q + b * q_b + h * q_h + start * q_t, k + b * k_b + h * k_h + start * k_t,
            y + b * y_b + h * y_h + start * y_t, g + b * g_b + h * g_h + start * g_t,
            out + ((b * T + start) * H + h) * V, states + (bh * chunks + first) * (K * V), scale, T - first * C, first_value,
            q_t, k_t, y_t, g_t, H * V, REVERSE, ADD, K, V, BK, BV, C, BASE, LOGC, LP, IP,
        )  # fmt: skip


@triton.jit
def _gentle_gradients(
    q, k, v, g, do, dq, dk, dv, dg, states, dstates, dstate, scale, left, first_key, q_t, k_t, v_t, g_t, do_t, dk_t, dv_t,
    WALK: tl.constexpr, WITH_DV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """What _gradients_of_chunk does, where the chunk is one block; ordered so that few tiles live at a time.

    With WALK the state gradient after the chunk is given as a tile, and the one before the chunk is returned.
    """
    # All loads first: one wait for memory.
    row, col, inside = _state_offsets(0, first_key, V, K, BV, BK)
    tile_v = _load(v, v_t, 0, left, C, V, BV).to(LP)
    tile_do = _load(do, do_t, 0, left, C, V, BV).to(LP)
    state = tl.load(states + row * K + col, mask=inside, other=0.0)
    if not WALK:
        dstate = tl.load(dstates + row * K + col, mask=inside, other=0.0)
    log2 = _load_log2(g, g_t, first_key, left, C, K, BK)
    queries = _load(q, q_t, first_key, left, C, K, BK)
    keys = _load(k, k_t, first_key, left, C, K, BK)

    across = tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
    high, low = _halves(log2, LP)
    d = _sums(_up_to(C), high, low, LP)
    half = 0.5 * _last_row(d, C)
    total_decay = tl.exp2(2 * half)
    half = tl.maximum(half, -HALF_RANGE)  # changed by a steep channel only: see forward_kernel
    edge = tl.exp2(half)
    d -= half[None, :]
    queries = (queries.to(tl.float32) * (tl.exp2(d) * scale)).to(LP)
    keys = (keys.to(tl.float32) * tl.exp2(-d)).to(LP)

    tile_dq = tl.dot(tile_do, state.to(LP), input_precision=IP)
    pairs = tl.dot(tile_do, tl.trans(tile_v), input_precision=IP)
    for first_value in tl.static_range(BV, V, BV):
        tile_v = _load(v, v_t, first_value, left, C, V, BV).to(LP)
        tile_do = _load(do, do_t, first_value, left, C, V, BV).to(LP)
        row, col, inside = _state_offsets(first_value, first_key, V, K, BV, BK)
        state = tl.load(states + row * K + col, mask=inside, other=0.0)
        dstate = tl.load(dstates + row * K + col, mask=inside, other=0.0)
        across += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
        tile_dq = tl.dot(tile_do, state.to(LP), tile_dq, input_precision=IP)
        pairs = tl.dot(tile_do, tl.trans(tile_v), pairs, input_precision=IP)
    pairs = tl.where(_up_to(C), pairs, 0.0).to(LP)
    tile_dq = tl.dot(pairs, keys, tile_dq * edge[None, :], input_precision=IP)
    _store(dq, dk_t, first_key, left, tile_dq * (tl.exp2(d) * scale), C, K, BK)
    gain = queries.to(tl.float32) * tile_dq

    pairs = tl.zeros([C, C], tl.float32)
    tile_dk = tl.zeros([C, BK], tl.float32)
    for first_value in tl.static_range(0, V, BV):
        if V > BV:
            tile_v = _load(v, v_t, first_value, left, C, V, BV).to(LP)
            tile_do = _load(do, do_t, first_value, left, C, V, BV).to(LP)
            row, col, inside = _state_offsets(first_value, first_key, V, K, BV, BK)
            dstate = tl.load(dstates + row * K + col, mask=inside, other=0.0)
        tile_dk = tl.dot(tile_v, dstate.to(LP), tile_dk, input_precision=IP)
        pairs = tl.dot(tile_v, tl.trans(tile_do), pairs, input_precision=IP)
    pairs = tl.where(_from(C), pairs, 0.0).to(LP)
    tile_dk *= edge[None, :]
    total = total_decay * across + tl.sum(keys.to(tl.float32) * tile_dk, 0)
    tile_dk = tl.dot(pairs, queries, tile_dk, input_precision=IP)
    _store(dk, dk_t, first_key, left, tile_dk * tl.exp2(-d), C, K, BK)
    gain -= keys.to(tl.float32) * tile_dk

    high, low = _halves(gain, LP)
    tile_dg = _sums(_from(C), high, low, LP) + total[None, :]
    log2 = _load_log2(g, g_t, first_key, left, C, K, BK)
    _store(dg, dk_t, first_key, left, tl.where(log2 > LOG2_ZERO, tile_dg, 0.0), C, K, BK)

    if WITH_DV:
        tile_dv = tl.dot((keys.to(tl.float32) * edge[None, :]).to(LP), tl.trans(dstate.to(LP)), input_precision=IP)
        a = tl.dot(keys, tl.trans(queries), input_precision=IP)
        tile_dv = tl.dot(tl.where(_from(C), a, 0.0).to(LP), tile_do, tile_dv, input_precision=IP)
        _store(dv, dv_t, 0, left, tile_dv, C, V, BV)
    if WALK:
        # Of a channel steeper than its clamped middle allows, everything above is done again by the exact launch; its
        # decay since the start is 2^(d + half) all the same.
        decayed = (queries.to(tl.float32) * edge[None, :]).to(LP)
        dstate = tl.dot(tl.trans(tile_do), decayed, dstate * total_decay[None, :], input_precision=IP)
    return dstate


@triton.jit
def _gradients_of_chunk(
    q, k, v, g, do, dq, dk, dv, dg, states, dstates, scale, left, first_key, q_t, k_t, v_t, g_t, do_t, dk_t, dv_t,
    WITH_DV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    BASE: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One chunk's dq, dk and dlog λ for BK channels, and its dv where one program has all of K and V."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    log2 = _load_log2(g, g_t, first_key, left, C, K, BK)
    high, low = _halves(log2, LP)
    # dA = do vᵀ and its transpose, and what comes through the states
    pairs = tl.zeros([C, C], tl.float32)
    pairs_t = tl.zeros([C, C], tl.float32)
    dq_state = tl.zeros([C, BK], tl.float32)
    dk_state = tl.zeros([C, BK], tl.float32)
    across = tl.zeros([BK], tl.float32)
    for first_value in tl.static_range(0, V, BV):
        tile_v = _load(v, v_t, first_value, left, C, V, BV).to(LP)
        tile_do = _load(do, do_t, first_value, left, C, V, BV).to(LP)
        values, keys, inside = _state_offsets(first_value, first_key, V, K, BV, BK)
        state = tl.load(states + values * K + keys, mask=inside, other=0.0)
        dstate = tl.load(dstates + values * K + keys, mask=inside, other=0.0)
        across += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
        pairs = tl.dot(tile_do, tl.trans(tile_v), pairs, input_precision=IP)
        pairs_t = tl.dot(tile_v, tl.trans(tile_do), pairs_t, input_precision=IP)
        dq_state = tl.dot(tile_do, state.to(LP), dq_state, input_precision=IP)
        dk_state = tl.dot(tile_v, dstate.to(LP), dk_state, input_precision=IP)
    tile_q = _load(q, q_t, first_key, left, C, K, BK).to(tl.float32) * scale
    tile_k = _load(k, k_t, first_key, left, C, K, BK).to(tl.float32)
    # through the state before the chunk and the state after it
    decay = tl.exp2(_sums(_up_to(C), high, low, LP))
    tile_dq = decay * dq_state
    row = tile_q * tile_dq
    decay = tl.exp2(_sums(_after(C), high, low, LP))
    tile_dk = decay * dk_state
    past = tile_k * tile_dk
    row -= past
    total = tl.exp2(tl.sum(log2, 0)) * across + tl.sum(past, 0)
    if WITH_DV:
        tile_dv = tl.dot((tile_k * decay).to(LP), tl.trans(dstate.to(LP)), input_precision=IP)
    # pairs within a block
    d = _sums(_around_middle(C, BASE), high, low, LP)
    decay = tl.exp2(d)
    growth = tl.exp2(-d)
    queries = (tile_q * decay).to(LP)
    keys_ = (tile_k * growth).to(LP)
    block = _same_block(C, BASE)
    dq_block = tl.dot(tl.where((i >= j) & block, pairs, 0.0).to(LP), keys_, input_precision=IP)
    dk_block = tl.dot(tl.where((i <= j) & block, pairs_t, 0.0).to(LP), queries, input_precision=IP)
    tile_dq += decay * dq_block
    tile_dk += growth * dk_block
    row += queries.to(tl.float32) * dq_block - keys_.to(tl.float32) * dk_block
    if WITH_DV:
        a = tl.where((i <= j) & block, tl.dot(keys_, tl.trans(queries), input_precision=IP), 0.0)
    # pairs across blocks, level by level
    for level in range(BASE, LOGC):
        late, weights, across_blocks = _level(level, C)
        decay = tl.exp2(_sums(weights, high, low, LP))
        x = (tl.where(late, tile_q, tile_k) * decay).to(LP)
        dx = tl.where(across_blocks, tl.where(i > j, pairs, pairs_t), 0.0).to(LP)
        dx = tl.dot(dx, x, input_precision=IP)
        tile_dq += tl.where(late, decay * dx, 0.0)
        tile_dk += tl.where(late, 0.0, decay * dx)
        dx *= x.to(tl.float32)
        row += tl.where(late, dx, -dx)
        if WITH_DV:
            a += tl.where(across_blocks & (i < j), tl.dot(x, tl.trans(x), input_precision=IP), 0.0)
    _store(dq, dk_t, first_key, left, tile_dq * scale, C, K, BK)
    _store(dk, dk_t, first_key, left, tile_dk, C, K, BK)
    if WITH_DV:
        tile_dv = tl.dot(a.to(LP), tile_do, tile_dv, input_precision=IP)
        _store(dv, dv_t, 0, left, tile_dv, C, V, BV)
    row_high, row_low = _halves(row, LP)
    tile_dg = _sums(i <= j, row_high, row_low, LP) + total[None, :]
    _store(dg, dk_t, first_key, left, tl.where(log2 > LOG2_ZERO, tile_dg, 0.0), C, K, BK)


@triton.jit(do_not_specialize=["T", "H", "heads"])
def gradients_kernel(
    q, k, v, g, do, dq, dk, dv, dg, states, dstates, flags, scale, T, H, heads,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, do_b, do_t, do_h,
    EXACT: tl.constexpr, WITH_DV: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, BASE: tl.constexpr, LOGC: tl.constexpr, LP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """_gradients_of_chunk for every chunk that is not flagged, or, if EXACT, for those that are."""
    chunks = tl.cdiv(T, C)
    groups = tl.cdiv(chunks, GROUP)
    pid = tl.program_id(0)
    first_key = tl.program_id(1) * BK
    h = (pid % H).to(tl.int64)
    b = (pid // H // groups).to(tl.int64)
    first = pid // H % groups * GROUP
    bh = b * H + h
    if EXACT:
        for c in range(first, tl.minimum(first + GROUP, chunks)):
            if _flag(flags, bh, c, chunks, heads, PIECES) != 0:
                start = tl.cast(c, tl.int64) * C
                to_k = ((b * T + start) * H + h) * K
                to_v = ((b * T + start) * H + h) * V
                to_state = (bh * chunks + c) * (K * V)
                _gradients_of_chunk(
                    q + b * q_b + h * q_h + start * q_t, k + b * k_b + h * k_h + start * k_t,
                    v + b * v_b + h * v_h + start * v_t, g + b * g_b + h * g_h + start * g_t,
                    do + b * do_b + h * do_h + start * do_t, dq + to_k, dk + to_k, dv + to_v, dg + to_k,
                    states + to_state, dstates + to_state, scale, T - c * C, first_key, q_t, k_t, v_t, g_t, do_t, H * K, H * V,
                    WITH_DV, K, V, BK, BV, C, BASE, LOGC, LP, IP,
                )  # fmt: skip
    else:
        if _flag(flags, bh, first, chunks, heads, PIECES) != 0:
            return
        start = first.to(tl.int64) * C
        q += b * q_b + h * q_h + start * q_t
        k += b * k_b + h * k_h + start * k_t
        v += b * v_b + h * v_h + start * v_t
        g += b * g_b + h * g_h + start * g_t
        do += b * do_b + h * do_h + start * do_t
        to_k = ((b * T + start) * H + h) * K
        dq += to_k
        dk += to_k
        dg += to_k
        dv += ((b * T + start) * H + h) * V
        states += (bh * chunks + first) * (K * V)
        dstates += (bh * chunks + first) * (K * V)
        if BASE == LOGC:
            _gentle_gradients(
                q, k, v, g, do, dq, dk, dv, dg, states, dstates, 0.0, scale, T - first * C, first_key,
                q_t, k_t, v_t, g_t, do_t, H * K, H * V, False, WITH_DV, K, V, BK, BV, C, LP, IP,
            )  # fmt: skip
        else:
            _gradients_of_chunk(
                q, k, v, g, do, dq, dk, dv, dg, states, dstates, scale, T - first * C, first_key,
                q_t, k_t, v_t, g_t, do_t, H * K, H * V, WITH_DV, K, V, BK, BV, C, BASE, LOGC, LP, IP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H"])
def backward_walk_kernel(
    q, k, v, g, do, dq, dk, dv, dg, states, dstates, flags, d_final, d_initial, scale, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, do_b, do_t, do_h,
    HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, STAGES: tl.constexpr, LP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """All gradients in one walk back along a head's chunks; notes the state gradient after a flagged chunk."""
    bh = tl.program_id(0)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    bh = bh.to(tl.int64)
    chunks = tl.cdiv(T, C)
    last = ((chunks - 1) * C).to(tl.int64)
    q += b * q_b + h * q_h + last * q_t
    k += b * k_b + h * k_h + last * k_t
    v += b * v_b + h * v_h + last * v_t
    g += b * g_b + h * g_h + last * g_t
    do += b * do_b + h * do_h + last * do_t
    to_k = ((b * T + last) * H + h) * K
    dq += to_k
    dk += to_k
    dg += to_k
    dv += ((b * T + last) * H + h) * V
    states += (bh * chunks + chunks - 1) * (K * V)
    dstates += (bh * chunks + chunks - 1) * (K * V)
    row, col, inside = _state_offsets(0, 0, V, K, BV, BK)
    if HAS_FINAL:
        dstate = tl.load(d_final + bh * (K * V) + col * V + row, mask=inside, other=0.0)
    else:
        dstate = tl.zeros([BV, BK], tl.float32)
    for n in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - n
        least = tl.min(tl.sum(_load_log2(g, g_t, 0, T - c * C, C, K, BK), 0), 0)
        steep = (least < -2 * HALF_RANGE).to(tl.int8)
        tl.store(flags + bh * chunks + c, steep)
        tl.store(dstates + row * K + col, dstate.to(dstates.dtype.element_ty), mask=inside & (steep != 0))
        dstate = _gentle_gradients(
            q, k, v, g, do, dq, dk, dv, dg, states, dstates, dstate, scale, T - c * C, 0,
            q_t, k_t, v_t, g_t, do_t, H * K, H * V, True, True, K, V, BK, BV, C, LP, IP,
        )  # fmt: skip
        q -= C * q_t
        k -= C * k_t
        v -= C * v_t
        g -= C * g_t
        do -= C * do_t
        dq -= C * H * K
        dk -= C * H * K
        dg -= C * H * K
        dv -= C * H * V
        states -= K * V
        dstates -= K * V
    if HAS_INITIAL:
        tl.store(d_initial + bh * (K * V) + col * V + row, dstate, mask=inside)


def forward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    log_decay_bthk: Tensor,
    scale: float,
    initial_state_bhkv: Tensor | None,
    want_state: bool,
    want_saved: bool,
    config: VectorConfig,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns (o, final state or None, states before each chunk or None: what backward may be given)."""
    batch, length, heads, _ = q_bthk.shape
    value_dim = v_bthv.shape[-1]
    initial_state_bhkv = _state(initial_state_bhkv)
    o = v_bthv.new_empty(batch, length, heads, value_dim)
    final = _state_like(q_bthk, value_dim) if want_state else None
    split = config.forward == "split"
    kept = _Cut(q_bthk, value_dim, config, config.chunk)
    cut = kept if split else _Cut(q_bthk, value_dim, config, min(config.chunk, config.forward_chunk))
    keep = want_saved and config.policy == "save"
    states = kept.new_states() if keep or split else None
    if split:
        flags = cut.new_flags()
        _walk(cut, k_bthk, v_bthv, log_decay_bthk, 1.0, initial_state_bhkv, final, states, flags, reverse=False)
        for exact in (False, True):
            _rows(cut, q_bthk, k_bthk, v_bthv, log_decay_bthk, scale, o, states, flags, exact=exact, reverse=False)
    else:
        flags = cut.new_flags(pieces=1)
        forward_kernel[(batch * heads, triton.cdiv(value_dim, cut.block_v))](
            q_bthk, k_bthk, v_bthv, log_decay_bthk, o, _or(initial_state_bhkv, o), _or(final, o), _or(states, o), flags,
            float(scale), length, heads,
            *_strides(q_bthk), *_strides(k_bthk), *_strides(v_bthv), *_strides(log_decay_bthk),
            HAS_INITIAL=initial_state_bhkv is not None, WANT_FINAL=want_state, WANT_STATES=keep,
            EVERY=kept.chunk // cut.chunk, BK=cut.whole_k, BV=cut.block_v, STAGES=config.stages, **cut.common, **cut.blocks,
            num_warps=config.warps, num_stages=config.stages, **_registers(config.registers),
        )  # fmt: skip
        _rows(cut, q_bthk, k_bthk, v_bthv, log_decay_bthk, scale, o, None, flags, exact=True, reverse=False)
    return o, final, states if keep else None


def backward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    log_decay_bthk: Tensor,
    scale: float,
    initial_state_bhkv: Tensor | None,
    saved: Tensor | None,
    do_bthv: Tensor,
    d_final_state_bhkv: Tensor | None,
    config: VectorConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Returns (dq, dk, dv, dlog_decay, d_initial_state or None)."""
    batch, length, heads, key_dim = q_bthk.shape
    value_dim = v_bthv.shape[-1]
    initial_state_bhkv, d_final_state_bhkv = _state(initial_state_bhkv), _state(d_final_state_bhkv)
    cut = _Cut(q_bthk, value_dim, config, config.chunk)
    states = saved
    if states is None:
        states = cut.new_states()
        _walk(cut, k_bthk, v_bthv, log_decay_bthk, 1.0, initial_state_bhkv, None, states, None, reverse=False)
    d_initial = torch.empty_like(initial_state_bhkv) if initial_state_bhkv is not None else None
    dstates = cut.new_states()
    dq = q_bthk.new_empty(batch, length, heads, key_dim)
    dk = k_bthk.new_empty(batch, length, heads, key_dim)
    dv = v_bthv.new_empty(batch, length, heads, value_dim)
    dlog = torch.empty_like(dq, dtype=torch.float32)
    with_dv = cut.block_k >= key_dim and cut.block_v >= value_dim
    walk = config.backward == "fused" and with_dv and config.block >= config.chunk
    flags = cut.new_flags()
    if walk:
        backward_walk_kernel[(batch * heads,)](
            q_bthk, k_bthk, v_bthv, log_decay_bthk, do_bthv, dq, dk, dv, dlog, states, dstates, flags,
            _or(d_final_state_bhkv, dlog), _or(d_initial, dlog), float(scale), length, heads,
            *_strides(q_bthk), *_strides(k_bthk), *_strides(v_bthv), *_strides(log_decay_bthk), *_strides(do_bthv),
            HAS_FINAL=d_final_state_bhkv is not None, HAS_INITIAL=d_initial is not None, BK=cut.block_k, BV=cut.block_v,
            STAGES=config.gradient_stages, **cut.sizes, num_warps=config.gradient_warps, num_stages=config.gradient_stages,
            **_registers(config.gradient_registers),
        )  # fmt: skip
    else:
        _walk(cut, q_bthk, do_bthv, log_decay_bthk, scale, d_final_state_bhkv, d_initial, dstates, flags, reverse=True)
    for exact in (True,) if walk else (False, True):
        group, blocks = (GROUP, cut.exact_blocks) if exact else (1, cut.blocks)
        gradients_kernel[(batch * heads * triton.cdiv(cut.chunks, group), triton.cdiv(key_dim, cut.block_k))](
            q_bthk, k_bthk, v_bthv, log_decay_bthk, do_bthv, dq, dk, dv, dlog, states, dstates, flags, float(scale), length,
            heads, batch * heads, *_strides(q_bthk), *_strides(k_bthk), *_strides(v_bthv), *_strides(log_decay_bthk),
            *_strides(do_bthv),
            EXACT=exact, WITH_DV=with_dv, PIECES=flags.shape[0], GROUP=group, BK=cut.block_k, BV=cut.block_v,
            **cut.common, **blocks, num_warps=4 if exact else config.gradient_warps, num_stages=1,
            **_registers(None if exact else config.gradient_registers),
        )  # fmt: skip
        if not with_dv:
            _rows(cut, q_bthk, k_bthk, do_bthv, log_decay_bthk, scale, dv, dstates, flags, exact=exact, reverse=True)
    return dq, dk, dv, dlog, d_initial


class _Cut:
    """Sizes that all kernels of one call share."""

    def __init__(self, q_bthk: Tensor, value_dim: int, config: VectorConfig, chunk: int) -> None:
        batch, length, heads, key_dim = q_bthk.shape
        self.config, self.device, self.chunk = config, q_bthk.device, chunk
        self.batch_heads, self.key_dim, self.value_dim = batch * heads, key_dim, value_dim
        self.chunks = triton.cdiv(length, chunk)
        self.whole_k = max(NARROWEST, triton.next_power_of_2(key_dim))
        self.block_k = min(config.key_block, self.whole_k)
        self.block_v = min(config.value_block, max(NARROWEST, triton.next_power_of_2(value_dim)))
        bf16 = q_bthk.dtype == torch.bfloat16
        self.state_dtype = torch.bfloat16 if bf16 else torch.float32
        # triton's interpreter multiplies bf16 tiles wrongly
        operand = tl.bfloat16 if bf16 and not _interpreted() else tl.float32
        precision = "tf32x3" if q_bthk.dtype == torch.float32 else "tf32"
        log_chunk = chunk.bit_length() - 1
        self.sizes = dict(K=key_dim, V=value_dim, C=chunk, LP=operand, IP=precision)
        self.common = dict(LOGC=log_chunk, **self.sizes)
        self.blocks = dict(BASE=min(config.block, chunk).bit_length() - 1)
        self.exact_blocks = dict(BASE=0)

    def new_states(self) -> Tensor:
        shape = (self.batch_heads, self.chunks, self.value_dim, self.key_dim)
        return torch.empty(shape, dtype=self.state_dtype, device=self.device)

    def new_flags(self, pieces: int | None = None) -> Tensor:
        pieces = triton.cdiv(self.key_dim, self.block_k) if pieces is None else pieces
        return torch.empty(pieces, self.batch_heads, self.chunks, dtype=torch.int8, device=self.device)


def _walk(
    cut: _Cut, x: Tensor, y: Tensor, log_decay: Tensor, scale: float, first: Tensor | None, last: Tensor | None,
    states: Tensor, flags: Tensor | None, *, reverse: bool,
) -> None:  # fmt: skip
    heads = x.shape[2]
    config = cut.config
    states_kernel[(cut.batch_heads, triton.cdiv(cut.value_dim, cut.block_v), triton.cdiv(cut.key_dim, cut.block_k))](
        x, y, log_decay, _or(first, states), _or(last, states), states, _or(flags, states), float(scale), x.shape[1], heads,
        *_strides(x), *_strides(y), *_strides(log_decay),
        REVERSE=reverse, HAS_FIRST=first is not None, WANT_LAST=last is not None, WANT_FLAGS=flags is not None,
        BK=cut.block_k, BV=cut.block_v, STAGES=config.walk_stages, **cut.common, **cut.blocks,
        num_warps=config.walk_warps, num_stages=config.walk_stages, **_registers(config.walk_registers),
    )  # fmt: skip


def _rows(
    cut: _Cut, q: Tensor, k: Tensor, y: Tensor, log_decay: Tensor, scale: float, out: Tensor, states: Tensor | None,
    flags: Tensor, *, exact: bool, reverse: bool,
) -> None:  # fmt: skip
    group, blocks = (GROUP, cut.exact_blocks) if exact else (1, cut.blocks)
    grid = (cut.batch_heads * triton.cdiv(cut.chunks, group), triton.cdiv(cut.value_dim, cut.block_v))
    rows_kernel[grid](
        q, k, y, log_decay, out, _or(states, out), flags, float(scale), q.shape[1], q.shape[2], cut.batch_heads,
        *_strides(q), *_strides(k), *_strides(y), *_strides(log_decay),
        EXACT=exact, REVERSE=reverse, ADD=states is None, PIECES=flags.shape[0], GROUP=group,
        BK=cut.block_k, BV=cut.block_v, **cut.common, **blocks, num_warps=4, num_stages=1,
    )  # fmt: skip


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _state(state_bhkv: Tensor | None) -> Tensor | None:
    return None if state_bhkv is None else state_bhkv.to(torch.float32).contiguous()


def _state_like(q_bthk: Tensor, value_dim: int) -> Tensor:
    batch, _, heads, key_dim = q_bthk.shape
    return torch.empty(batch, heads, key_dim, value_dim, dtype=torch.float32, device=q_bthk.device)


def _registers(most: int | None) -> dict[str, int]:
    return {} if most is None else {"maxnreg": most}


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel's pointer argument is never None: that would be one more thing to compile for."""
    return stand_in if tensor is None else tensor


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, time and head; an axis of one has none, so that no kernel is compiled anew for it."""
    batch, time, head = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return batch, time, head


def saved_like(q_bthk: Tensor, v_bthv: Tensor, config: VectorConfig) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the states that `forward` keeps for the backward pass; (0,) where it keeps none."""
    if config.policy != "save":
        return (0,), q_bthk.dtype
    cut = _Cut(q_bthk, v_bthv.shape[-1], config, config.chunk)
    return (cut.batch_heads, cut.chunks, cut.value_dim, cut.key_dim), cut.state_dtype
