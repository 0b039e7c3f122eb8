"""What every position encoding is: something that rotates or widens queries and keys before the scan, or a layer of its
own between the embedding and the first block.

What is unusual: an encoding may widen queries and keys (and so the state); the decay of a widened channel is that of the
channel it came from. Angles are at least fp32: t·θ reaches 2048 rad, which bf16 cannot tell from 2040.
Source: paper appendix A.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from decay_core.design import DesignPoint, Form
    from decay_core.objection import Objection

BASE = 10_000.0  # of the angles, as in RoPE (arXiv 2104.09864)
Angles = tuple[Tensor, Tensor]


class Position:
    """One position encoding for heads of width `head_dim`."""

    head_multiple: ClassVar[int] = 1  # what the width of a head must be a multiple of

    def __init__(self, head_dim: int, form: Form) -> None:
        self.head_dim = head_dim
        self.form = form

    @classmethod
    def refusal(cls, point: DesignPoint) -> Objection | None:
        """Why this encoding does not go with `point`; None when it does. `point` is valid otherwise."""
        return None

    @classmethod
    def layer_shift(cls, form: Form) -> int:
        """By how much the layer's number is off where a decay reads it."""
        return 0

    @classmethod
    def stream_module(cls, heads: int, head_dim: int) -> StreamEncoding | None:
        """The layer that replaces the embedding's output, where the encoding is one."""
        return None

    @property
    def width(self) -> int:
        """The width of an encoded query or key."""
        return self.head_dim

    def angles(self, length: int, device: torch.device, dtype: torch.dtype, start: int = 0) -> Angles | None:
        """(cos, sin), each (length, 1, pairs), of the positions from `start` on, computed once for all layers; None
        where nothing rotates."""
        return None

    def encode(self, x_bthk: Tensor, angles: Angles | None) -> Tensor:
        """Encodes queries or keys: (B, T, H, head_dim) -> (B, T, H, width)."""
        return x_bthk

    def widen_decay(self, log_decay_bthk: Tensor) -> Tensor:
        """log λ of the encoded channels: (B, T, H, head_dim) -> (B, T, H, width)."""
        return log_decay_bthk


class StreamEncoding(nn.Module):
    """A layer between embedding and first block: forward(x (B, T, d), state, keep) -> (x (B, T, d), state or None)."""


def turning_angles(rates: Tensor, length: int, start: int) -> Angles:
    """(cos, sin) of t·rate for `length` positions from `start` on, each (length, 1, rates)."""
    time = torch.arange(start, start + length, device=rates.device, dtype=rates.dtype)
    angle = time[:, None, None] * rates
    return angle.cos(), angle.sin()


def rates_of(head_dim: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """θ_i = 10000^{-2i/d} for i < count."""
    return BASE ** (-2 * torch.arange(count, device=device, dtype=dtype) / head_dim)
