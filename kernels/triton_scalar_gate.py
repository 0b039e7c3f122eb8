"""From the gradient of log λ to that of what λ is made from, for one λ per head and token.

What is unusual: this is a kernel of its own, of few bytes. In the walks the formula's derivative would cost registers that they
do not have. Sums over tokens, for a head's gain and offset, are left as one number per program, and summed in a fixed order.
Source: the formulas are in triton_gate.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_gate import input_gradient, log2_decay


# fmt: off
@triton.jit(do_not_specialize=["slope", "slices", "rows", "tokens", "heads", "x_b", "x_t", "x_h"])
def gate_kernel(
    d_log, x, gain, offset, dx, d_gain, d_offset, slope, slices, rows, tokens, heads, x_b, x_t, x_h,
    ROWS: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr,
):
    """d_log: (slices, rows, heads), of which the sum over slices is meant; rows are those of all sequences. d_gain, d_offset:
    (programs along the rows, heads)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (row < rows)[:, None] & (head < heads)[None, :]
    entries = row[:, None].to(tl.int64) * heads + head[None, :]
    gradient = tl.zeros([ROWS, HEADS], tl.float32)
    for part in tl.range(0, slices):
        gradient += tl.load(d_log + part * rows.to(tl.int64) * heads + entries, mask=inside, other=0.0)
    x_rows = (row // tokens).to(tl.int64) * x_b + (row % tokens).to(tl.int64) * x_t
    x_entries = x_rows[:, None] + head[None, :] * x_h
    xs = tl.load(x + x_entries, mask=inside, other=0.0).to(tl.float32)
    factor = tl.full([1, HEADS], 1.0, tl.float32)
    shift = tl.full([1, HEADS], 0.0, tl.float32)
    if gain is not None:
        factor = tl.load(gain + head, mask=head < heads, other=1.0)[None, :]
    if offset is not None:
        shift = tl.load(offset + head, mask=head < heads, other=0.0)[None, :]
    log2 = log2_decay(xs, factor, shift, slope, KIND)
    d_x, d_factor, d_shift = input_gradient(gradient, xs, factor, shift, slope, log2, KIND)
    tl.store(dx + entries, d_x.to(dx.dtype.element_ty), mask=inside)
    sums = tl.program_id(0) * heads + head
    if d_gain is not None:
        tl.store(d_gain + sums, tl.sum(d_factor, 0), mask=head < heads)
    if d_offset is not None:
        tl.store(d_offset + sums, tl.sum(d_shift, 0), mask=head < heads)
# fmt: on
