"""Mamba2's decay: a learned rate times a softplus step, both per channel or per head.

log λ = -e^a · softplus(f + δ), which is σ(-f - δ)^{exp a}. What is unusual: the paper's A is log A here (a), and
neither a nor δ depends on time, whatever the subscript in the paper's Eq. 4 suggests. With a shared key the public code
writes k = softplus(f + δ), which has no bound and is not 1 - λ; that is form `as_run`.
Source: paper Eq. 4 and appendix A.2; initialisation as in Mamba2: A ~ U(1, 16), softplus(δ) log-uniform in [0.001,
0.1].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_core.decay import Decay, DecayPlace
from decay_core.kernel_seam import DecaySource
from decay_core.objection import Objection

if TYPE_CHECKING:
    from decay_core.design import Form

RATE_RANGE = (1.0, 16.0)
STEP_RANGE = (1e-3, 1e-1)
STEP_FLOOR = 1e-4


class Mamba2(Decay):
    """The full form; the ablations are subclasses that lack a, δ or both."""

    has_rate: ClassVar[bool] = True  # a, the paper's A
    has_step: ClassVar[bool] = True  # δ, the paper's Δ

    def __init__(self, place: DecayPlace) -> None:
        super().__init__(place)
        self.log_rate = nn.Parameter(torch.empty(place.shape)) if self.has_rate else None
        self.step_bias = nn.Parameter(torch.empty(place.shape)) if self.has_step else None

    @classmethod
    def sharing_refusal(cls, form: Form) -> Objection | None:
        if form == "as_run" and not (cls.has_rate and cls.has_step):
            return Objection("scope", "the public code has no such variant")
        return None

    def draw(self, generator: torch.Generator) -> None:
        if self.log_rate is not None:
            self.log_rate.copy_(_uniform(self.log_rate, RATE_RANGE, generator).log())
        if self.step_bias is not None:
            low, high = STEP_RANGE
            step = _uniform(self.step_bias, (math.log(low), math.log(high)), generator).exp().clamp(min=STEP_FLOOR)
            self.step_bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus

    def log_decay(self, f: Tensor, joint: Tensor | None) -> Tensor:
        step = self._step(f)
        return -step if self.log_rate is None else -self.log_rate.to(f.dtype).exp() * step

    def source(self, f: Tensor, joint: Tensor | None) -> DecaySource | None:
        if self.place.point.share and self.place.point.form == "as_run":
            return None  # the key is the step, not 1 - λ
        gain = None if self.log_rate is None else self.log_rate.float().exp()
        offset = None if self.step_bias is None else self.step_bias.to(torch.float32, copy=True)
        return DecaySource(x=f, kind="softplus", gain=gain, offset=offset)

    def shared_key(self, f: Tensor, log_decay: Tensor, joint: Tensor | None) -> Tensor:
        return self._step(f) if self.place.point.form == "as_run" else super().shared_key(f, log_decay, joint)

    def _step(self, f: Tensor) -> Tensor:
        # logsigmoid, not F.softplus: that one switches to the identity above 20 and is then wrong in float64.
        return -F.logsigmoid(-(f if self.step_bias is None else f + self.step_bias.to(f.dtype)))


def _uniform(like: Tensor, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Uniform fp32 draws of `like`'s shape from the CPU generator."""
    low, high = bounds
    return low + (high - low) * torch.rand(like.shape, generator=generator)
