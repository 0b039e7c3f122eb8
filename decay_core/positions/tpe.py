"""TPE: one linear recurrence between the embedding and the first block, which replaces the embedding's output.

Per head s_t = λ s_{t-1} + x_t with a learned λ = σ(w), scaled by c = q·k, then one norm and one projection:
W RMSNorm(c s). What is surprising: there is no residual connection and W starts at zero, so that every hidden state is
exactly zero at the first step and the loss is the logarithm of the padded vocabulary. With it the public code numbers the
layers from 1, which TNL's fixed decay reads: its last layer then has λ > 1 (form as_run; as_published does not shift).
Source: the authors' public code; TransNormerLLM's successor gives the recurrence as a position encoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_core.decay import wide_dtype
from decay_core.kernel_seam import decay_scan
from decay_core.layers import Projection, RMSNorm
from decay_core.position import Position, StreamEncoding

if TYPE_CHECKING:
    from decay_core.design import Form


class Tpe(Position):
    """Leaves queries and keys as they are; its work is done before the first block."""

    @classmethod
    def layer_shift(cls, form: Form) -> int:
        return 1 if form == "as_run" else 0

    @classmethod
    def stream_module(cls, heads: int, head_dim: int) -> StreamEncoding:
        return RecurrentStream(heads, head_dim)


class HeadRecurrence(nn.Module):
    """c_j s_t of every head j: (B, T, H, V) -> (B, T, H, V), fp32 or wider. State: (B, H, 1, V)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.empty(heads, head_dim)) for _ in range(2))
        self.decay_logit = nn.Parameter(torch.empty(heads))

    def draw(self, generator: torch.Generator) -> None:
        """q = k = 1 and λ = 1/2."""
        self.query.fill_(1.0)
        self.key.fill_(1.0)
        self.decay_logit.zero_()

    def forward(self, x_bthv: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(x_bthv.device.type, enabled=False):
            wide = wide_dtype(x_bthv.dtype)
            scale = (self.query.to(wide) * self.key.to(wide)).sum(dim=-1)
            shape = x_bthv.shape[:3]
            log_decay = F.logsigmoid(self.decay_logit.to(wide)).expand(shape)
            one = torch.ones(*shape, 1, device=x_bthv.device, dtype=wide)
            return decay_scan(scale.expand(shape)[..., None], one, x_bthv.to(wide), log_decay, state, keep)


class RecurrentStream(StreamEncoding):
    """The recurrence, the norm over the whole width and the projection."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self._heads = (heads, head_dim)
        width = heads * head_dim
        self.recurrence = HeadRecurrence(heads, head_dim)
        self.norm = RMSNorm(width)
        self.output = Projection(width, width, starts_at_zero=True)

    def forward(self, x_btd: Tensor, state: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Tensor | None]:
        s_bthv, state = self.recurrence(torch.unflatten(x_btd, -1, self._heads), state, keep)
        return self.output(self.norm(s_bthv.flatten(-2)).to(x_btd.dtype)), state
