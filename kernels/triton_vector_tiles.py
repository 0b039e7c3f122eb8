"""Tiles of the vector-decay kernels: where a program's tokens lie, what is loaded and stored, and sums of log λ over tokens.

What is surprising:
- A walk along time goes over a span of tokens with its own first state: a whole sequence, or one of the segments that a long
  one is cut into. Kernels that take all chunks at once go by a chunk's number. Where sequences are packed both are looked up
  in tables, which hold more entries than there are pieces: one past the last has no tokens.
- Every sum over tokens of log λ is a product with a matrix of 0, 1 and ±1/2, on the tensor cores. log λ goes in as two halves,
  or, where what is loaded is log λ itself in few enough digits, as it is (ONE_HALF): that product is exact.
- Past a sequence's end λ is 1 and everything else 0, so that a short last chunk needs no care.
Source: the launches are in triton_vector.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_gate import LOG2_E, log2_decay

LOG_FLOOR = tl.constexpr(-104.0)  # below log 2^-150, and exact in 16 bits


@triton.jit
def span_of(spans, T, H, segments, length, C: tl.constexpr):
    """(batch entry, head, number of the span's head, first token, tokens, first chunk) of the program that walks along it."""
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    span = pid // H
    if spans is not None:
        b = h * 0
        start = tl.load(spans + span * 3)
        count = tl.load(spans + span * 3 + 1)
        chunk = tl.load(spans + span * 3 + 2)
    else:
        b = (span // segments).to(tl.int64)
        start = span % segments * length
        count = tl.minimum(length, T - start)
        chunk = b * tl.cdiv(T, C) + start // C
    return b, h, pid.to(tl.int64), start.to(tl.int64), count, chunk.to(tl.int64)


@triton.jit
def chunk_of(table, chunk, T, C: tl.constexpr):
    """(batch entry, first token, tokens from there to the sequence's end) of a chunk."""
    if table is not None:
        b = (chunk * 0).to(tl.int64)
        start = tl.load(table + chunk * 3)
        left = tl.load(table + chunk * 3 + 1)
    else:
        each = tl.cdiv(T, C)
        b = (chunk // each).to(tl.int64)
        start = chunk % each * C
        left = tl.minimum(C, T - start)
    return b, start.to(tl.int64), left


@triton.jit
def mask_of(first_col, left, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """Which entries of a tile of C rows and BN columns exist: `left` rows, columns below N."""
    mask = (tl.arange(0, C) < left)[:, None]
    if N % BN != 0:
        mask = mask & (first_col + tl.arange(0, BN) < N)[None, :]
    return mask


@triton.jit
def load_tile(pointer, stride, first_col, left, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    offsets = tl.arange(0, C)[:, None] * stride + first_col + tl.arange(0, BN)[None, :]
    return tl.load(pointer + offsets, mask=mask_of(first_col, left, C, N, BN), other=0.0)


@triton.jit
def store_tile(pointer, stride, first_col, left, x, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    offsets = tl.arange(0, C)[:, None] * stride + first_col + tl.arange(0, BN)[None, :]
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=mask_of(first_col, left, C, N, BN))


@triton.jit
def load_row(pointer, first_col, otherwise, N: tl.constexpr, BN: tl.constexpr):
    """A head's gain or offset as one row; `otherwise` where there is none."""
    columns = first_col + tl.arange(0, BN)
    if pointer is None:
        return tl.full([1, BN], otherwise, tl.float32)
    else:
        return tl.load(pointer + columns, mask=columns < N, other=otherwise).to(tl.float32)[None, :]


@triton.jit
def log2_of(x, gain, offset, slope, first_col, left, KIND: tl.constexpr, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """log2 λ from a tile as it was loaded."""
    log2 = log2_decay(x.to(tl.float32), gain, offset, slope, KIND)
    if KIND == 0:
        return log2
    else:
        return tl.where(mask_of(first_col, left, C, N, BN), log2, 0.0)


@triton.jit
def rounded(x, LP: tl.constexpr):
    """A fp32 tile in the products' dtype, in pairs: of one that is widened again the compiler would round each number alone."""
    if LP == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, is_pure=True, pack=2)
    else:
        return x.to(LP)


@triton.jit
def operand(x, LP: tl.constexpr, IP: tl.constexpr):
    """A fp32 tile as the products see it, for sums outside of them that are to cancel against theirs."""
    if LP == tl.float32 and IP == "tf32":
        return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)  # 10 digits, as tf32 has
    else:
        return rounded(x, LP)


@triton.jit
def halves(x, LP: tl.constexpr):
    high = rounded(x, LP)
    return high, rounded(x - high.to(tl.float32), LP)


@triton.jit
def decay_halves(x, log2, ONE_HALF: tl.constexpr, LP: tl.constexpr):
    """What decay_sums sums."""
    if ONE_HALF:
        high = tl.maximum(x.to(tl.float32), LOG_FLOOR).to(LP)
        return high, high
    else:
        return halves(log2, LP)


@triton.jit
def sums(weights, high, low, LP: tl.constexpr):
    """weights (C, C) of small exact numbers times a fp32 matrix given in two halves."""
    if LP == tl.float32:
        return tl.dot(weights.to(tl.float32), high, input_precision="tf32x3")
    else:
        weights = weights.to(LP)
        return tl.dot(weights, low, tl.dot(weights, high))


@triton.jit
def decay_sums(weights, high, low, ONE_HALF: tl.constexpr, LP: tl.constexpr):
    """Sums over tokens of log2 λ."""
    if ONE_HALF:
        return tl.dot(weights.to(LP), high, input_precision="tf32") * LOG2_E
    else:
        return sums(weights, high, low, LP)


@triton.jit
def up_to(C: tl.constexpr):
    return tl.arange(0, C)[None, :] <= tl.arange(0, C)[:, None]


@triton.jit
def from_on(C: tl.constexpr):
    return tl.arange(0, C)[None, :] >= tl.arange(0, C)[:, None]


@triton.jit
def after(C: tl.constexpr):
    return tl.arange(0, C)[None, :] > tl.arange(0, C)[:, None]


@triton.jit
def around_middle(C: tl.constexpr):
    """Weights of D, counted from the middle of a chunk's total: D_i - D_j is the sum over the tokens after j up to i."""
    return tl.where(tl.arange(0, C)[None, :] <= tl.arange(0, C)[:, None], 0.5, -0.5)


@triton.jit
def merging(level, C: tl.constexpr):
    """Merging blocks of 2^level tokens: (which rows are in a later half, weights of the decay to the middle, pairs)."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    late = ((i >> level) & 1) == 1
    weights = ((i >> level) == (j >> level)) & ((late & (j <= i)) | ((late == 0) & (j > i)))
    return late, weights, ((i ^ j) >> level) == 1


@triton.jit
def crossing(level, C: tl.constexpr):
    """The transpose of merging's weights: of which rows token i sums the pairs, for those that it lies between."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    late = ((i >> level) & 1) == 1
    return ((i >> level) == (j >> level)) & ((late & (j >= i)) | ((late == 0) & (j < i)))


@triton.jit
def state_offsets(first_value, first_key, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """States lie as (V, K) between kernels, so that no product needs a transposed tile as its left operand."""
    values = first_value + tl.arange(0, BV)[:, None]
    keys = first_key + tl.arange(0, BK)[None, :]
    return values, keys, (values < V) & (keys < K)


@triton.jit
def load_state(
    states, flags, flags_piece, log2, first_value, first_key, EXACT: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A tile of a chunk's state as it was kept, or, if EXACT, in fp32 and at the chunk's edge.

    A flagged chunk's was kept at the edge by the walks along those pieces of K that were steep, at the middle by the others.
    """
    values, keys, inside = state_offsets(first_value, first_key, V, K, BV, BK)
    state = tl.load(states + values * K + keys, mask=inside, other=0.0)
    if EXACT:
        state = state.to(tl.float32)
        if PIECES > 1:
            steep = tl.load(flags + first_key // PIECE * flags_piece) != 0
            state *= tl.exp2(tl.where(steep, 0.0, tl.sum(log2, 0) * -0.5))[None, :]
    return state


@triton.jit
def flagged(flags, chunk, h, H, chunks, PIECES: tl.constexpr):
    """Whether any piece of K saw a decay too steep for blocks in that chunk."""
    steep = tl.load(flags + chunk * H + h).to(tl.int32)
    for piece in tl.static_range(1, PIECES):
        steep = steep | tl.load(flags + (piece * chunks + chunk) * H + h).to(tl.int32)
    return steep != 0
