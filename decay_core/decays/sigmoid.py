"""The plainest decay that reads its input: λ = σ(f).

It is simple decay without its offset, and starts at 1/2. Its paper rows are the DPLR ones with "p = 0", where 0 means that
there is no Δ, not that λ starts at 0.
Source: paper section 5.6, Tables 4 and 9.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from decay_core.decay import Decay
from decay_core.kernel_seam import DecaySource


class Sigmoid(Decay):
    """No parameters of its own."""

    def log_decay(self, f: Tensor, joint: Tensor | None) -> Tensor:
        return F.logsigmoid(f)

    def source(self, f: Tensor, joint: Tensor | None) -> DecaySource | None:
        return DecaySource(x=f, kind="softplus", slope=-1.0)

    def shared_key(self, f: Tensor, log_decay: Tensor, joint: Tensor | None) -> Tensor:
        return torch.sigmoid(-f)
