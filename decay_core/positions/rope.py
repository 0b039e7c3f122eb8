"""Rotary position encoding of queries and keys, applied after their silu.

`as_published` rotates every pair (i, i + d/2) of a head by t·θ_i, θ_i = 10000^{-2i/d}. What is surprising: the authors'
runs called "RoPE" did not do that. `as_run` is cosine LRPE on half of the dims: x becomes [x cos tθ; x sin tθ] with θ =
0 for the second half of the dims, so queries, keys and the state are twice as wide. Neither form has parameters.
With a decay of its own in every channel a rotated score depends on absolute position, not only on the distance.
Source: paper appendix A.3; RoPE (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decay_core.position import BASE, Angles, Position

if TYPE_CHECKING:
    from decay_core.design import DesignPoint


class Rope(Position):
    """Rotation of all dims, or the wider half-rotation of the authors' runs."""

    @classmethod
    def refusal(cls, point: DesignPoint) -> str | None:
        if point.granularity != "vector":
            return None
        if point.form == "as_run":
            return f"{point.position} with vector decay is in none of the paper's runs"
        return (
            f"{point.position} with a free decay per channel breaks shift invariance: "
            "both channels of a rotated pair would have to share one decay"
        )

    def angles(self, length: int, device: torch.device, dtype: torch.dtype) -> Angles:
        pairs = self.head_dim // 2
        pair = torch.arange(pairs, device=device, dtype=dtype)
        time = torch.arange(length, device=device, dtype=dtype)
        angle = time[:, None, None] * BASE ** (-2 * pair / self.head_dim)
        return angle.cos(), angle.sin()

    def encode(self, x_bthk: Tensor, angles: Angles | None) -> Tensor:
        assert angles is not None, "rope has angles"
        cos, sin = angles
        first, second = x_bthk.to(cos.dtype).tensor_split([self.head_dim // 2], dim=-1)
        if self.form == "as_run":  # the unrotated half has cos 1 and sin 0
            parts = [first * cos, second, first * sin, torch.zeros_like(second)]
        else:
            parts = [first * cos - second * sin, first * sin + second * cos]
        return torch.cat(parts, dim=-1).to(x_bthk.dtype)
