"""LightNet's decay: the new token's weight in a running softmax over time decides how much is forgotten.

z_t = log(1 + Σ_{i<=t} e^{f_i}), λ_t = e^{z_{t-1} - z_t}. What is unusual: a virtual first step of logit 0 (the 1) keeps
λ_1 = σ(-f_1) away from 0, and λ_t is near t/(t+1) whatever was learned, so its median depends on the length of the
text. The difference of two large sums is never taken: λ_t = σ(z_{t-1} - f_t) and 1 - λ_t = σ(f_t - z_{t-1}) are the
same numbers.
With a shared key the public code is off by one, k_t = e^{f_{t-1} - z_t} (`as_run`); the method is k_t = e^{f_t - z_t} =
1 - λ_t.
Source: paper appendix A.2; LightNet (arXiv 2405.21022).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from decay_core.decay import Decay


class LightNet(Decay):
    """No parameters of its own. f is (B, T, ...): axis 1 is time."""

    def log_decay(self, f: Tensor, joint: Tensor | None) -> Tensor:
        return F.logsigmoid(_log_total_before(f) - f)

    def shared_key(self, f: Tensor, log_decay: Tensor, joint: Tensor | None) -> Tensor:
        if self.place.point.form == "as_published":
            return super().shared_key(f, log_decay, joint)
        previous = torch.cat([torch.zeros_like(f[:, :1]), f[:, :-1]], dim=1)
        return torch.exp(previous - _log_total_before(f) + log_decay)  # z_t = z_{t-1} - log λ_t


def _log_total_before(f: Tensor) -> Tensor:
    """z_{t-1} for every t: (B, T, ...) -> (B, T, ...), with z_0 = 0."""
    virtual = torch.zeros_like(f[:, :1])
    return torch.logcumsumexp(torch.cat([virtual, f[:, :-1]], dim=1), dim=1)
