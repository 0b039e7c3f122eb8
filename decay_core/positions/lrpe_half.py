"""Cosine LRPE on the first half of a head's dims: the encoding that the paper's rows called "RoPE" really ran.

θ_i = 10000^{-2i/d} for i < d/2; the other dims become [x, 0]. Queries, keys and the state are twice as wide.
Source: the authors' public code, which hard-codes it; the paper's text says RoPE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from decay_core.objection import Objection
from decay_core.positions.lrpe import Lrpe

if TYPE_CHECKING:
    from decay_core.design import DesignPoint


class LrpeHalf(Lrpe):
    """LRPE of which half the dims turn."""

    head_multiple = 2

    @classmethod
    def refusal(cls, point: DesignPoint) -> Objection | None:
        if point.form == "as_run":
            return Objection("scope", "in form as_run this encoding is what position rope is: one name is enough")
        return None

    @property
    def turning(self) -> int:
        return self.head_dim // 2
