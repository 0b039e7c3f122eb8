"""Rotary position encoding of queries and keys, applied after their silu.

`as_published` rotates every pair (i, i + d/2) of a head by t·θ_i, θ_i = 10000^{-2i/d}. What is surprising: the authors'
runs called "RoPE" did not do that. `as_run` is cosine LRPE on half of the dims (lrpe_half), with queries, keys and the
state twice as wide. Neither form has parameters.
With a decay of its own in every channel a rotated score depends on absolute position, not only on the distance; the two
channels of a pair have to share one decay (granularity paired).
Source: paper appendix A.3; RoPE (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decay_core.objection import Objection
from decay_core.position import Angles, Position, rates_of, turning_angles
from decay_core.positions.lrpe_half import LrpeHalf

if TYPE_CHECKING:
    from decay_core.design import DesignPoint, Form


class Rope(Position):
    """Rotation of all pairs, or the wider half-rotation of the authors' runs."""

    head_multiple = 2

    def __init__(self, head_dim: int, form: Form) -> None:
        super().__init__(head_dim, form)
        self._as_run = LrpeHalf(head_dim, form) if form == "as_run" else None

    @classmethod
    def refusal(cls, point: DesignPoint) -> Objection | None:
        if point.form == "as_run" and point.granularity != "scalar":
            return Objection("scope", f"{point.position} with {point.granularity} decay is in none of the paper's runs")
        return breaks_shift_invariance(point)

    @property
    def width(self) -> int:
        return self.head_dim if self._as_run is None else self._as_run.width

    def angles(self, length: int, device: torch.device, dtype: torch.dtype, start: int = 0) -> Angles:
        if self._as_run is not None:
            return self._as_run.angles(length, device, dtype, start)
        return turning_angles(rates_of(self.head_dim, self.head_dim // 2, device, dtype), length, start)

    def encode(self, x_bthk: Tensor, angles: Angles | None) -> Tensor:
        assert angles is not None, "rope has angles"
        return rotate(x_bthk, angles) if self._as_run is None else self._as_run.encode(x_bthk, angles)

    def widen_decay(self, log_decay_bthk: Tensor) -> Tensor:
        return log_decay_bthk if self._as_run is None else self._as_run.widen_decay(log_decay_bthk)


def breaks_shift_invariance(point: DesignPoint) -> Objection | None:
    """Why rotated pairs do not go with the point's granularity; None when they do."""
    if point.granularity != "vector":
        return None
    return Objection(
        "mathematical",
        f"{point.position} with a free decay per channel breaks shift invariance: "
        "both channels of a rotated pair would have to share one decay (granularity paired)",
    )


def rotate(x_bthk: Tensor, angles: Angles) -> Tensor:
    """Rotates the pairs (i, i + d/2) by the angles of (length, 1, d/2)."""
    cos, sin = angles
    first, second = x_bthk.to(cos.dtype).tensor_split([x_bthk.shape[-1] // 2], dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x_bthk.dtype)
