"""TransNormer's decay with a learned λ per head.

θ is log λ itself. What is surprising: the public code means to start from TransNormer's values, but a general
initialiser zeroes θ afterwards, so those runs start without decay (`as_run`: θ = 0, and nothing stops λ from growing
above 1).
`as_published` starts at TransNormer's values and takes min(θ, 0), because growth by λ > 1 over a long text overflows;
as long as θ <= 0 the two are the same function.
Source: paper Table 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decay_core.decay import Decay, DecayPlace
from decay_core.decays.tnl import slopes_as_published


class LearnedTransNormer(Decay):
    """One parameter per head, θ."""

    granularities = ("scalar",)
    reads_input = False

    def __init__(self, place: DecayPlace) -> None:
        super().__init__(place)
        self.theta = nn.Parameter(torch.empty(place.shape))

    def draw(self, generator: torch.Generator) -> None:
        as_run = self.place.point.form == "as_run"
        start = [0.0] * self.place.heads if as_run else slopes_as_published(self.place)
        self.theta.copy_(torch.tensor(start, dtype=torch.float64))

    def log_decay(self, f: Tensor, joint: Tensor | None) -> Tensor:
        theta = self.theta.to(f.dtype)
        # A copy, not the parameter itself: ZeRO-3 takes the parameter's memory away when this forward ends.
        return theta.clone() if self.place.point.form == "as_run" else theta.clamp(max=0.0)
