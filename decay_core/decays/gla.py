"""Gated linear attention's decay: a sigmoid with a temperature τ = 16.

What is surprising: the paper and its public code disagree on where τ goes, and it matters. σ(f)^{1/τ} (`as_published`)
starts at λ = 0.958; σ(f/τ) (`as_run`) starts at 0.5 and needs f = 47 for 0.95.
Source: paper appendix A.2; GLA (arXiv 2312.06635).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from decay_core.decay import Decay
from decay_core.kernel_seam import DecaySource

TEMPERATURE = 16.0


class GatedLinearAttention(Decay):
    """No parameters of its own."""

    def log_decay(self, f: Tensor, joint: Tensor | None) -> Tensor:
        if self.place.point.form == "as_run":
            return F.logsigmoid(f / TEMPERATURE)
        return F.logsigmoid(f) / TEMPERATURE

    def source(self, f: Tensor, joint: Tensor | None) -> DecaySource | None:
        if self.place.point.form == "as_run":
            return DecaySource(x=f, kind="softplus", slope=-1 / TEMPERATURE)
        gain = torch.full(self.place.shape, 1 / TEMPERATURE, device=f.device)
        return DecaySource(x=f, kind="softplus", slope=-1.0, gain=gain)

    def shared_key(self, f: Tensor, log_decay: Tensor, joint: Tensor | None) -> Tensor:
        if self.place.point.form == "as_run":
            return torch.sigmoid(-f / TEMPERATURE)
        return super().shared_key(f, log_decay, joint)
