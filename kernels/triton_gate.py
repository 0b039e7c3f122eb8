"""The decay's formulas as parts of a Triton kernel: log2 λ from what is loaded, and the gradient back through it.

What is surprising:
- log λ is taken in base 2 and held at -150 and above: 2^-150 is 0 in fp32, so λ = 0 is exact and nothing is inf - inf. Where
  it is held, the gradient is 0.
- Near λ = 1 neither log(1 + e) nor 1 - λ is computed as written: both have a short series there.
Source: kernels/decay_source.py is the definition.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
LOG2_FLOOR = tl.constexpr(-150.0)
KINDS = {"log": 0, "softplus": 1, "floor": 2}  # a kernel's KIND


class Gradients(NamedTuple):
    """What a scan's backward launcher returns, each in its input's shape and dtype; None for what was not given.

    x, gain and offset are those of the DecaySource; a gain or an offset that its formula does not use has None.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor
    x: Tensor
    gain: Tensor | None
    offset: Tensor | None
    initial_state: Tensor | None


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1."""
    return tl.where(e < 0.01, e * (1.0 - e * (0.5 - e * (0.33333333 - 0.25 * e))), tl.log2(1.0 + e) * LN_2)


@triton.jit
def _sigmoid(y):
    e = tl.exp2(-tl.abs(y) * LOG2_E)
    return tl.where(y >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(y):
    """log(1 + e^y)."""
    return tl.maximum(y, 0.0) + _log1p(tl.exp2(-tl.abs(y) * LOG2_E))


@triton.jit
def log2_decay(x, gain, offset, slope, KIND: tl.constexpr):
    """log2 λ >= -150 from a fp32 tile x. gain and offset have x's shape or broadcast to it: 1 and 0 where there is none."""
    if KIND == 0:
        log2 = x * LOG2_E
    elif KIND == 1:
        log2 = softplus(slope * x + offset) * (gain * -LOG2_E)
    else:
        forgotten = (1.0 - offset) * _sigmoid(-slope * x)
        # log1p(-y) for y < 1/2; the floor keeps the other branch away from log 0 except where λ is 0 itself
        kept = offset + (1.0 - offset) * _sigmoid(slope * x)
        small = -forgotten * (1.0 + forgotten * (0.5 + forgotten * (0.33333333 + 0.25 * forgotten)))
        log2 = tl.where(forgotten < 0.01, small * LOG2_E, tl.log2(kept))
    return tl.maximum(log2, LOG2_FLOOR)


@triton.jit
def input_gradient(d_log, x, gain, offset, slope, log2, KIND: tl.constexpr):
    """(dx, dgain, doffset) per entry from d log λ ; log2 is what log2_decay gave. Sums over tokens are the caller's."""
    d_log = tl.where(log2 > LOG2_FLOOR, d_log, 0.0)
    if KIND == 0:
        return d_log, d_log, d_log
    elif KIND == 1:
        y = slope * x + offset
        d_y = -gain * _sigmoid(y) * d_log
        return slope * d_y, -softplus(y) * d_log, d_y
    else:
        opened = _sigmoid(slope * x)
        closed = _sigmoid(-slope * x)
        ratio = d_log * closed / tl.maximum(offset + (1.0 - offset) * opened, 1e-37)
        return slope * (1.0 - offset) * opened * ratio, d_log, ratio


@triton.jit
def shared_key(log2):
    """k = 1 - λ from log2 λ."""
    z = log2 * LN_2
    return tl.where(z > -0.05, -z * (1.0 + z * (0.5 + z * (0.16666667 + 0.041666667 * z))), 1.0 - tl.exp2(log2))
