"""Softmax attention over all earlier tokens: the LLaMA baseline, which has no state and no decay.

It is chosen with decay none and granularity scalar. As run, the largest size has 16 heads and not the 32 of the paper's
Table 5; the number of parameters is the same.
Source: the paper's Table 2, row LLaMA; the module is decay_core/baseline.py.
"""

from __future__ import annotations

from decay_core import positions
from decay_core.baseline import SoftmaxAttention
from decay_core.decay import DecayPlace
from decay_core.design import DesignPoint, Form
from decay_core.objection import Objection
from decay_core.position import Position
from decay_core.sizes import Size
from decay_core.transition import Transition

MOST_HEADS_AS_RUN = 16


class Softmax(Transition):
    """No parameters beside those of its mixer."""

    reads_decay = False
    operations = 2  # a query meets every key and every value once
    mixer = SoftmaxAttention

    @classmethod
    def refusal(cls, point: DesignPoint) -> Objection | None:
        plain = DesignPoint(decay="none", granularity="scalar")
        if (point.decay, point.granularity, point.share) != (plain.decay, plain.granularity, plain.share):
            return Objection(
                "mathematical", "softmax attention has no state that could decay: it goes with decay none, granularity scalar"
            )
        return None

    @classmethod
    def head_dim(cls, size: Size, form: Form) -> int:
        return size.d_model // min(size.heads, MOST_HEADS_AS_RUN) if form == "as_run" else size.head_dim

    @classmethod
    def encoding(cls, place: DecayPlace) -> Position:
        # As run too: the public code of this baseline rotates as the paper's text says.
        return positions.get(place.point.position)(place.head_dim, "as_published")

    @classmethod
    def state_size(cls, place: DecayPlace, key_width: int, length: int) -> int:
        return length * place.heads * (key_width + place.head_dim)
