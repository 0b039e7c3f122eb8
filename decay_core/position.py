"""What every position encoding is: something that rotates or widens queries and keys before the scan.

What is unusual: an encoding has no parameters here, and it may widen queries and keys (and so the state). Angles are at
least fp32: t·θ reaches 2048 rad, which bf16 cannot tell from 2040.
Source: paper appendix A.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from decay_core.design import DesignPoint, Form

BASE = 10_000.0  # of the angles, as in RoPE (arXiv 2104.09864)
Angles = tuple[Tensor, Tensor]


class Position:
    """One position encoding for heads of width `head_dim`."""

    def __init__(self, head_dim: int, form: Form) -> None:
        self.head_dim = head_dim
        self.form = form

    @classmethod
    def refusal(cls, point: DesignPoint) -> str | None:
        """Why this encoding does not go with `point`; None when it does. `point` is valid otherwise."""
        return None

    def angles(self, length: int, device: torch.device, dtype: torch.dtype) -> Angles | None:
        """(cos, sin), each (length, 1, pairs), computed once for all layers; None where nothing rotates."""
        return None

    def encode(self, x_bthk: Tensor, angles: Angles | None) -> Tensor:
        """Encodes queries or keys: (B, T, H, head_dim) -> (B, T, H, width), width >= head_dim."""
        return x_bthk
