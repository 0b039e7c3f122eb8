"""Simple decay, the paper's proposal: a sigmoid with a learned offset that starts at a chosen λ = p.

log λ = log σ(f + Δ) with Δ = log(p / (1 - p)) at the start. Δ is learned, per channel or per head.
Source: paper section 5.5, Table 8.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_core.decay import Decay, DecayPlace
from decay_core.kernel_seam import DecaySource


class SimpleDecay(Decay):
    """One parameter, the offset Δ."""

    takes_p = True

    def __init__(self, place: DecayPlace) -> None:
        super().__init__(place)
        self.offset = nn.Parameter(torch.empty(place.shape))

    def draw(self, generator: torch.Generator) -> None:
        p = self.place.point.p
        assert p is not None, "a checked design point has p"
        self.offset.fill_(math.log(p / (1 - p)))

    def log_decay(self, f: Tensor, joint: Tensor | None) -> Tensor:
        return F.logsigmoid(f + self.offset.to(f.dtype))

    def source(self, f: Tensor, joint: Tensor | None) -> DecaySource | None:
        return DecaySource(x=f, kind="softplus", slope=-1.0, offset=-self.offset.float())

    def shared_key(self, f: Tensor, log_decay: Tensor, joint: Tensor | None) -> Tensor:
        return torch.sigmoid(-f - self.offset.to(f.dtype))
