"""Tiles of the scalar-decay kernels: where a program's tokens lie, what is loaded and stored, and what decays make of a chunk.

What is surprising:
- A walk goes along a span of tokens that has a first state of its own: a sequence, a segment of a long one, or one of several
  sequences packed into a row. What is the number of a segment elsewhere is, packed, the number of a sequence.
- Kept states lie in slots, one for each SPAN tokens of a sequence. A packed sequence's slots start at (its first token) // SPAN
  + (its number): no two sequences meet there, and no table is needed, nor a wait for the device.
- Decays are handled as log2 λ, no less than -150. With SPLIT their running sums are kept as whole and fractional parts, or
  rounding at |log2 λ| = 150 per token would show in fp32.
- An exponent is masked before exp2, since λ may be slightly above 1.
Source: the launches are in triton_scalar.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_gate import log2_decay


@triton.jit
def locate(cu, heads, segments, length, tokens, SLICES_K: tl.constexpr, SLICES_V: tl.constexpr):
    """This program's slice of K, of V, its batch entry, segment and head, and its first token and token count."""
    program = tl.program_id(0)
    slice_v = program % SLICES_V
    slice_k = (program // SLICES_V) % SLICES_K
    span = program // (SLICES_V * SLICES_K)
    head = (span % heads).to(tl.int64)
    segment = (span // heads) % segments
    batch = (span // heads // segments).to(tl.int64)
    if cu is not None:
        start = tl.load(cu + segment).to(tl.int64)
        count = (tl.load(cu + segment + 1).to(tl.int64) - start).to(tl.int32)
    else:
        start = (segment * length).to(tl.int64)
        count = tl.minimum(length, tokens - segment * length)
    return slice_k, slice_v, batch, segment, head, start, count


@triton.jit
def first_slot(cu, batch, segment, start, tokens, SPAN: tl.constexpr):
    """The slot of the state at `start`, which is a multiple of SPAN tokens into its sequence."""
    if cu is not None:
        return start // SPAN + segment
    else:
        return batch * tl.cdiv(tokens, SPAN) + start // SPAN


@triton.jit
def first_checkpoint(cu, batch, segments, segment, start, length, SPAN: tl.constexpr):
    """As first_slot, where every segment or packed sequence has one slot more, for its last state."""
    if cu is not None:
        return start // SPAN + 2 * segment
    else:
        return (batch * segments + segment) * (tl.cdiv(length, SPAN) + 1)


@triton.jit
def locate_slot(cu, slot, sequences, search_steps, tokens, SPAN: tl.constexpr):
    """(batch entry, first token, tokens from there to the sequence's end) of a slot; none left where nothing is kept in it."""
    if cu is not None:
        # The last sequence whose first slot is not after this one.
        sequence = slot * 0
        for step in tl.range(0, search_steps):
            later = sequence + (1 << (search_steps - 1 - step))
            exists = later < sequences
            before = tl.load(cu + later, mask=exists, other=0) // SPAN + later <= slot
            sequence = tl.where(exists & before, later, sequence)
        origin = tl.load(cu + sequence).to(tl.int64)
        start = origin + (slot - (origin // SPAN + sequence)) * SPAN
        left = tl.load(cu + sequence + 1).to(tl.int64) - start
        return (slot * 0).to(tl.int64), start, left.to(tl.int32)
    else:
        each = tl.cdiv(tokens, SPAN)
        start = (slot % each * SPAN).to(tl.int64)
        return (slot // each).to(tl.int64), start, (tokens - start).to(tl.int32)


@triton.jit
def get_tile(base, offsets, rows, columns, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LP: tl.constexpr):
    """A (chunk, BLOCK) tile as the products' dtype, 0 past the sequence's end and past the last column."""
    mask = rows[:, None] < limit
    if WIDTH % BLOCK != 0:
        mask = mask & (columns[None, :] < WIDTH)
    return tl.load(base + offsets, mask=mask, other=0.0).to(LP)


@triton.jit
def put_tile(base, offsets, rows, columns, limit, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    mask = rows[:, None] < limit
    if WIDTH % BLOCK != 0:
        mask = mask & (columns[None, :] < WIDTH)
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def get_state(base, ck, cv, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    pointers = base + (ck[:, None] * V + cv[None, :])
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(ck[:, None] < K) & (cv[None, :] < V), other=0.0)


@triton.jit
def put_state(base, ck, cv, value, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    pointers = base + (ck[:, None] * V + cv[None, :])
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        tl.store(pointers, value.to(base.dtype.element_ty))
    else:
        tl.store(pointers, value.to(base.dtype.element_ty), mask=(ck[:, None] < K) & (cv[None, :] < V))


@triton.jit
def get_kept(base, ck, cv, heads, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """A kept state of one head: rows of all heads lie side by side, as tokens' do."""
    pointers = base + (ck[:, None] * (heads * V) + cv[None, :])
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(ck[:, None] < K) & (cv[None, :] < V), other=0.0)


@triton.jit
def put_kept(base, ck, cv, heads, value, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    pointers = base + (ck[:, None] * (heads * V) + cv[None, :])
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=(ck[:, None] < K) & (cv[None, :] < V))


@triton.jit
def gate_parameters(gain, offset, head):
    """A head's gain and offset, 1 and 0 where there is none."""
    factor = tl.load(gain + head) if gain is not None else tl.full([], 1.0, tl.float32)
    shift = tl.load(offset + head) if offset is not None else tl.full([], 0.0, tl.float32)
    return factor, shift


@triton.jit
def get_x(base, offsets, rows, limit):
    return tl.load(base + offsets, mask=rows < limit, other=0.0).to(tl.float32)


@triton.jit
def decays(x, rows, limit, factor, shift, slope, KIND: tl.constexpr):
    """log2 λ; λ = 1 past the sequence's end."""
    log2 = log2_decay(x, factor, shift, slope, KIND)
    if KIND != 0:
        log2 = tl.where(rows < limit, log2, 0.0)
    return log2


@triton.jit
def get_decays(base, offsets, rows, limit, factor, shift, slope, KIND: tl.constexpr):
    return decays(get_x(base, offsets, rows, limit), rows, limit, factor, shift, slope, KIND)


@triton.jit
def running(log2, SPLIT: tl.constexpr):
    """Running sums of log2 λ and its total as (whole, fraction): whole numbers are summed without rounding."""
    if SPLIT:
        whole = tl.floor(log2 + 0.5)
        fraction = log2 - whole
        return tl.cumsum(whole, 0), tl.cumsum(fraction, 0), tl.sum(whole, 0), tl.sum(fraction, 0)
    else:
        zero = tl.zeros_like(log2)
        return tl.cumsum(log2, 0), zero, tl.sum(log2, 0), tl.full([], 0.0, tl.float32)


@triton.jit
def between(whole, fraction, rows, log2_scale, TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr):
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
def suffix_sum(x):
    """Entry t is the sum of entries t and later."""
    return tl.sum(x, 0) - tl.cumsum(x, 0) + x


@triton.jit
def inside_pairs(pairs_t, rows):
    """What the pairs (j, i) inside a chunk give to the suffix sum that is dlog λ; i = j gives nothing and is left out."""
    pairs_t = tl.where(rows[None, :] > rows[:, None], pairs_t, 0.0)
    return tl.sum(pairs_t, 0) - tl.sum(pairs_t, 1)


@triton.jit
def above_rounding(d_decay, log2):
    """Where terms i = j were subtracted and λ is below fp32's resolution, what is left is their rounding: made 0."""
    return tl.where(log2 > -24.0, d_decay, 0.0)


@triton.jit
def decay_gradient(inside, leaving, around, rows, log2, SPLIT: tl.constexpr):
    """dlog λ in a chunk: `leaving`, by token j, are its pairs with tokens after the chunk, `around` those that go over it."""
    if SPLIT:
        left_before = tl.sum(tl.where(rows[:, None] < rows[None, :], leaving[:, None], 0.0), 0)
        return tl.cumsum(inside, 0, reverse=True) + left_before + around
    else:
        return above_rounding(suffix_sum(inside) + (around + tl.sum(leaving, 0)), log2)
