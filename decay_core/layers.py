"""The parts of the model that have nothing to do with decay: projections, the norm, the channel mixer, embedding and
head.

What is unusual: creating a layer draws no random numbers, `build_model` does that from its own generator. The norm's
epsilon is added to the sum of squares, not to their mean. The head computes the loss itself, in slices, because its
logits are the largest tensor of a step.
Source: the paper's model and the authors' public model code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decay_core.decay import wide_dtype

INIT_STD = 0.02
INIT_CUT = 3 * INIT_STD  # the normal is truncated here
NORM_EPS = 1e-5  # inside the sum of squares
IGNORED_TARGET = -100
LOGITS_AT_ONCE = 2**28  # elements; 1 GiB in fp32


class Projection(nn.Linear):
    """A linear map without bias whose weight is drawn later; `starts_at_zero` makes that the zero map."""

    def __init__(self, d_in: int, d_out: int, *, starts_at_zero: bool = False) -> None:
        super().__init__(d_in, d_out, bias=False)
        self.starts_at_zero = starts_at_zero

    def reset_parameters(self) -> None:
        """Draws nothing: the global random state stays untouched."""

    def draw(self, generator: torch.Generator) -> None:
        """Truncated normal, std 0.02 cut at ±0.06, or zero."""
        self.weight.zero_() if self.starts_at_zero else draw_truncated(self.weight, generator)


class Embedding(nn.Embedding):
    """Token embedding whose weight is drawn later."""

    def reset_parameters(self) -> None:
        """Draws nothing: the global random state stays untouched."""

    def draw(self, generator: torch.Generator) -> None:
        """Truncated normal, std 0.02 cut at ±0.06."""
        draw_truncated(self.weight, generator)


class RMSNorm(nn.Module):
    """y = √d · x / √(Σ x² + 1e-5) ⊙ gain over the last axis, in fp32 or wider, returned in x's dtype."""

    def __init__(self, width: int, gain: float = 1.0) -> None:
        super().__init__()
        self.gain_at_start = gain
        self.gain = nn.Parameter(torch.empty(width))

    def draw(self, generator: torch.Generator) -> None:
        """The gain's starting value, the same in every channel."""
        self.gain.fill_(self.gain_at_start)

    def forward(self, x: Tensor) -> Tensor:
        wide, width = wide_dtype(x.dtype), x.shape[-1]
        # torch's epsilon belongs to the mean of squares.
        return F.rms_norm(x.to(wide), (width,), self.gain.to(wide), NORM_EPS / width).to(x.dtype)


class GatedLinearUnit(nn.Module):
    """The channel mixer W₃(silu(W₁x) ⊙ W₂x); W₃ starts at zero, so the branch adds nothing at first."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = Projection(width, inner)
        self.up = Projection(width, inner)
        self.down = Projection(inner, width, starts_at_zero=True)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return down


class Head(Projection):
    """The output projection onto the padded vocabulary, and the loss over it."""

    def forward(self, x_btd: Tensor, targets_bt: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); with targets their mean cross-entropy (those of -100 do not count), in fp32 or wider."""
        if targets_bt is None:
            return F.linear(x_btd, self.weight)
        x_nd, targets_n = x_btd.flatten(0, 1), targets_bt.flatten()
        rows = max(1, LOGITS_AT_ONCE // self.out_features)
        if x_nd.shape[0] <= rows:
            total = _summed_loss(x_nd, self.weight, targets_n)
        else:  # logits of a slice live only while the slice is worked on; they are computed again in the backward pass
            total = torch.stack(
                [
                    checkpoint(_summed_loss, x, self.weight, y, use_reentrant=False, preserve_rng_state=False)
                    for x, y in zip(torch.split(x_nd, rows), torch.split(targets_n, rows), strict=True)
                ]
            ).sum()
        return total / (targets_n != IGNORED_TARGET).sum()


def _summed_loss(x_nd: Tensor, weight_vd: Tensor, targets_n: Tensor) -> Tensor:
    logits = F.linear(x_nd, weight_vd)
    return F.cross_entropy(logits.to(wide_dtype(logits.dtype)), targets_n, ignore_index=IGNORED_TARGET, reduction="sum")


def draw_truncated(weight: Tensor, generator: torch.Generator) -> None:
    """Fills `weight` from a normal of std 0.02 truncated at ±0.06."""
    nn.init.trunc_normal_(weight, std=INIT_STD, a=-INIT_CUT, b=INIT_CUT, generator=generator)
