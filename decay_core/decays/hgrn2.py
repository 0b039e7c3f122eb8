"""HGRN2's decay: a sigmoid above a floor that rises with depth, so that deep layers cannot forget quickly.

λ = ℓ + (1 - ℓ) σ(f). What is unusual: the floors ℓ of all layers come from one table of logits Λ, by a softmax over the
layers and a running sum, so that 0 = ℓ_0 <= ℓ_1 <= ...; layer 0 has no floor and takes its own branch, since log ℓ_0
does not exist.
Source: paper appendix A.2; HGRN2 (arXiv 2404.07904). The public code runs softmax and sum in bf16, here they are fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_core.decay import Decay, DecayMechanism, DecayPlace, wide_dtype
from decay_core.kernel_seam import DecaySource


class LowerBounds(DecayMechanism):
    """The floors of all layers: forward() returns (layers, *place.shape)."""

    def __init__(self, place: DecayPlace) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(place.layers, *place.shape))

    def draw(self, generator: torch.Generator) -> None:
        self.logits.fill_(1.0)  # any constant gives the same floors, l / layers

    def forward(self) -> Tensor:
        logits = self.logits
        with torch.autocast(logits.device.type, enabled=False):
            shares = logits.to(wide_dtype(logits.dtype)).softmax(dim=0)
            return shares.cumsum(dim=0) - shares[:1]


class Hgrn2(Decay):
    """No parameters of its own: the floor comes from the joint module."""

    @classmethod
    def joint_module(cls, place: DecayPlace) -> LowerBounds:
        return LowerBounds(place)

    def log_decay(self, f: Tensor, joint: Tensor | None) -> Tensor:
        if self.place.layer == 0:
            return F.logsigmoid(f)
        floor = self._floor(f, joint)
        forgotten = (1 - floor) * torch.sigmoid(-f)  # 1 - λ
        near_one = torch.log1p(-forgotten.clamp(max=0.5))
        near_floor = torch.logaddexp(floor.log(), torch.log1p(-floor) + F.logsigmoid(f))  # λ > 1 by rounding near 1
        return torch.where(forgotten < 0.5, near_one, near_floor)

    def source(self, f: Tensor, joint: Tensor | None) -> DecaySource | None:
        if self.place.layer == 0:
            return DecaySource(x=f, kind="softplus", slope=-1.0)
        return DecaySource(x=f, kind="floor", offset=self._floor(f, joint).float())

    def shared_key(self, f: Tensor, log_decay: Tensor, joint: Tensor | None) -> Tensor:
        open_part = torch.sigmoid(-f)
        return open_part if self.place.layer == 0 else (1 - self._floor(f, joint)) * open_part

    @staticmethod
    def _floor(f: Tensor, joint: Tensor | None) -> Tensor:
        assert joint is not None, "hgrn2's layers above the first read the joint lower bounds"
        return joint.to(wide_dtype(f.dtype))
