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
    """log(1 + e) for 0 <= e <= 1, to 2e-7 of itself: the polynomial of degree 8 whose largest relative error is least."""
    p = 0.005232624243944883 * e - 0.029504956677556038
    p = p * e + 0.07822549343109131
    p = p * e - 0.1366320699453354
    p = p * e + 0.1910598874092102
    p = p * e - 0.2484297752380371
    p = p * e + 0.3331909477710724
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return p * e


@triton.jit
def _powers(y):
    """e^-|y| and log(1 + e^-|y|)."""
    e = tl.exp2(tl.abs(y) * -LOG2_E)
    return e, _log1p(e)


@triton.jit
def softplus(y):
    """log(1 + e^y)."""
    _, small = _powers(y)
    return tl.maximum(y, 0.0) + small


@triton.jit
def _sigmoids(y):
    """σ(y) and σ(-y)."""
    e = tl.exp2(tl.abs(y) * -LOG2_E)
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(y >= 0.0, larger, smaller), tl.where(y >= 0.0, smaller, larger)


@triton.jit
def _log2(x, rest):
    """log2 x for 0 <= x <= 1, to 1e-6 of itself from 1 - x as well; below -150 for 0."""
    tiny = x < 1e-30
    bits = tl.where(tiny, x * 1.2676506e30, x).to(tl.int32, bitcast=True)  # 2^100
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # what is left lies between 2/3 and 4/3
    left = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    near = rest < 0.25
    y = tl.where(near, -rest, left)
    p = 0.20278418064117432 * y - 0.22222116589546204
    p = p * y + 0.20179973542690277
    p = p * y - 0.23678652942180634
    p = p * y + 0.288711279630661
    p = p * y - 0.36078956723213196
    p = p * y + 0.4808959662914276
    p = p * y - 0.7213465571403503
    p = p * y + 1.4426950216293335
    whole = tl.where(near, 0.0, (exponent >> 23).to(tl.float32)) - tl.where(tiny, 100.0, 0.0)
    return p * y + whole


@triton.jit
def log2_decay(x, gain, offset, slope, KIND: tl.constexpr):
    """log2 λ >= -150 from a fp32 tile x. gain and offset have x's shape or broadcast to it: 1 and 0 where there is none."""
    if KIND == 0:
        log2 = x * LOG2_E
    elif KIND == 1:
        log2 = softplus(slope * x + offset) * (gain * -LOG2_E)
    else:
        opened, closed = _sigmoids(slope * x)
        log2 = _log2(offset + (1.0 - offset) * opened, (1.0 - offset) * closed)
    return tl.maximum(log2, LOG2_FLOOR)


@triton.jit
def lambda_of(x, offset, slope, log2, KIND: tl.constexpr):
    """λ from what log2_decay was given, or from what it gave, whichever is nearer."""
    if KIND == 2:
        opened, _ = _sigmoids(slope * x)
        return offset + (1.0 - offset) * opened
    else:
        return tl.exp2(log2)


@triton.jit
def input_gradient(d_log, x, gain, offset, slope, log2, KIND: tl.constexpr):
    """(dx, dgain, doffset) per entry from d log λ ; log2 is what log2_decay gave. Sums over tokens are the caller's."""
    if KIND == 0:
        d_log = tl.where(log2 > LOG2_FLOOR, d_log, 0.0)
        return d_log, d_log, d_log
    elif KIND == 1:
        d_log = tl.where(log2 > LOG2_FLOOR, d_log, 0.0)
        y = slope * x + offset
        _, small = _powers(y)
        sigmoid = tl.exp2((tl.minimum(y, 0.0) - small) * LOG2_E)
        d_y = -gain * sigmoid * d_log
        return slope * d_y, -(tl.maximum(y, 0.0) + small) * d_log, d_y
    else:
        opened, closed = _sigmoids(slope * x)
        kept = offset + (1.0 - offset) * opened
        ratio = tl.where(kept > 0.0, d_log * closed / tl.maximum(kept, 1e-37), 0.0)
        return slope * (1.0 - offset) * opened * ratio, d_log, ratio


@triton.jit
def shared_key(log2):
    """k = 1 - λ from log2 λ."""
    z = log2 * LN_2
    return tl.where(z > -0.05, -z * (1.0 + z * (0.5 + z * (0.16666667 + 0.041666667 * z))), 1.0 - tl.exp2(log2))
