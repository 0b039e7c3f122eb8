"""Cosine LRPE on all dims: queries and keys become [x cos tθ; x sin tθ], twice as wide, and so does the state.

θ_i = 10000^{-2i/d} for all i < d. What is unusual: every channel is rotated by itself, so a score depends on the distance
alone whatever decay each channel has; rotary encoding needs pairs with a common decay for that.
Source: LRPE (arXiv 2307.09270); the paper's text excludes it, its public code ran the half of it (lrpe_half).
"""

from __future__ import annotations

import torch
from torch import Tensor

from decay_core.position import Angles, Position, rates_of, turning_angles


class Lrpe(Position):
    """Turns the first `turning` dims of a head; the others keep their value and gain a zero."""

    @property
    def turning(self) -> int:
        """How many dims turn."""
        return self.head_dim

    @property
    def width(self) -> int:
        return 2 * self.head_dim

    def angles(self, length: int, device: torch.device, dtype: torch.dtype, start: int = 0) -> Angles:
        return turning_angles(rates_of(self.head_dim, self.turning, device, dtype), length, start)

    def encode(self, x_bthk: Tensor, angles: Angles | None) -> Tensor:
        assert angles is not None, "lrpe has angles"
        cos, sin = angles
        turned, still = x_bthk.to(cos.dtype).tensor_split([self.turning], dim=-1)
        parts = [turned * cos, still, turned * sin, torch.zeros_like(still)]
        return torch.cat(parts, dim=-1).to(x_bthk.dtype)

    def widen_decay(self, log_decay_bthk: Tensor) -> Tensor:
        return torch.cat([log_decay_bthk, log_decay_bthk], dim=-1)
