"""Rotary position encoding of half a head: only the faster half of the pairs turns.

Pairs (i, i + d/2) with i < d/4 turn by t·θ_i, θ_i = 10000^{-2i/d}; the others stay. It is what the authors'
configurations asked for and their code did not do.
Source: the authors' public configurations (`lrpe_type` 3); pairs and angles as in RoPE (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decay_core.objection import Objection
from decay_core.position import Angles, Position, rates_of, turning_angles
from decay_core.positions.rope import breaks_shift_invariance, rotate

if TYPE_CHECKING:
    from decay_core.design import DesignPoint


class RopeHalf(Position):
    """Rotation of the first half of the pairs."""

    head_multiple = 4

    @classmethod
    def refusal(cls, point: DesignPoint) -> Objection | None:
        return breaks_shift_invariance(point)

    def angles(self, length: int, device: torch.device, dtype: torch.dtype, start: int = 0) -> Angles:
        pairs = self.head_dim // 2
        rates = rates_of(self.head_dim, pairs, device, dtype)
        return turning_angles(torch.where(torch.arange(pairs, device=device) < pairs // 2, rates, 0.0), length, start)

    def encode(self, x_bthk: Tensor, angles: Angles | None) -> Tensor:
        assert angles is not None, "rope_half has angles"
        return rotate(x_bthk, angles)
