"""Where the scans get log λ from: given as it is, or as an activation f and the formula that makes it, to be fused.

    log         log λ = x
    softplus    log λ = -gain · softplus(slope · x + offset)
    floor       log λ = log(ℓ + (1 - ℓ) σ(slope · x)), ℓ in `offset`

What is unusual: three formulas cover the field. Simple decay, the sigmoid and GLA are softplus with a negative slope, Mamba2
and its ablations with slope 1, HGRN2 is a floor (its first layer, without one, a softplus again). LightNet's decay is a running
sum over time and is made before the scan.
Source: paper appendix A.2; kernels/triton_gate.py holds the same formulas for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["log", "softplus", "floor"]
# what a formula reads beside x and slope
PARAMETERS: dict[str, tuple[str, ...]] = {"log": (), "softplus": ("gain", "offset"), "floor": ("offset",)}


@dataclass(frozen=True, kw_only=True)
class DecaySource:
    """x: (B, T, H) for one λ per head or (B, T, H, K) for one per key channel, any float dtype.

    gain, offset: (H,) or (H, K), the shape of one token of x, fp32 or wider; None is gain 1 and offset 0. slope: a number.
    """

    x: Tensor
    kind: Kind = "log"
    slope: float = 1.0
    gain: Tensor | None = None
    offset: Tensor | None = None

    @property
    def vector(self) -> bool:
        """Whether there is one λ per key channel."""
        return self.x.dim() == 4

    def log_decay(self) -> Tensor:
        """log λ in x's shape, in fp32 or float64, by plain torch: the definition of what the kernels fuse."""
        x = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        if self.kind == "log":
            return x
        offset = None if self.offset is None else self.offset.to(x.dtype)
        x = x if self.slope == 1 else self.slope * x
        if self.kind == "softplus":
            x = x if offset is None else x + offset
            step = -F.logsigmoid(-x)
            return -step if self.gain is None else -self.gain.to(x.dtype) * step
        assert offset is not None, "a floor has its ℓ in `offset`"
        forgotten = (1 - offset) * torch.sigmoid(-x)  # 1 - λ
        near_one = torch.log1p(-forgotten.clamp(max=0.5))
        near_floor = torch.logaddexp(offset.log(), torch.log1p(-offset) + F.logsigmoid(x))
        return torch.where(forgotten < 0.5, near_one, near_floor)

    def shared_key(self) -> Tensor:
        """k = 1 - λ in x's shape, without the subtraction."""
        return -torch.expm1(self.log_decay())

    def formed(self) -> DecaySource:
        """The same decay given as log λ itself."""
        return self if self.kind == "log" else replace(self, x=self.log_decay(), kind="log", slope=1.0, gain=None, offset=None)
