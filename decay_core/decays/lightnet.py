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

from decay_core.decay import Decay, wide_dtype
from decay_core.kernel_seam import DecaySource, running_decay


class LightNet(Decay):
    """No parameters of its own. f is (B, T, ...): axis 1 is time."""

    def forward(
        self, f: Tensor, joint: Tensor | None = None, past: Tensor | None = None, fused: bool = False
    ) -> tuple[Tensor | DecaySource | None, Tensor | None]:
        with torch.autocast(f.device.type, enabled=False):
            if fused:
                return self.source(f, joint), None
            f = f.to(wide_dtype(f.dtype))
            log_decay = F.logsigmoid(_log_total_before(f, past) - f)
            if not self.place.point.share:
                return log_decay, None
            if self.place.point.form == "as_published":
                return log_decay, self.shared_key(f, log_decay, joint)
            first = torch.zeros_like(f[:, :1]) if past is None else past[:, 1].to(f.dtype)
            previous = torch.cat([first, f[:, :-1]], dim=1)
            return log_decay, torch.exp(previous - _log_total_before(f, past) + log_decay)  # z_t = z_{t-1} - log λ_t

    def source(self, f: Tensor, joint: Tensor | None) -> DecaySource | None:
        if self.place.point.share and self.place.point.form == "as_run":
            return None  # the key is not 1 - λ
        return DecaySource(x=running_decay(f))

    def remember(self, f: Tensor, past: Tensor | None) -> Tensor:
        """z_T and f_T: (B, 2, 1, ...)."""
        f = f.to(wide_dtype(f.dtype))
        after = torch.logaddexp(_log_total_before(f, past)[:, -1:], f[:, -1:])
        return torch.stack([after, f[:, -1:]], dim=1)


def _log_total_before(f: Tensor, past: Tensor | None) -> Tensor:
    """z_{t-1} for every t: (B, T, ...) -> (B, T, ...). The tokens before come in as one token of logit z; z_0 = 0."""
    before = torch.zeros_like(f[:, :1]) if past is None else past[:, 0].to(f.dtype)
    return torch.logcumsumexp(torch.cat([before, f[:, :-1]], dim=1), dim=1)
