"""Causal softmax attention as in LLaMA: the token mixer that every linear one is compared with.

What is unusual for this project: no gate, no norm inside, no silu; the scale is 1/√d of a head. A position encoding turns
queries and keys as the text says in both forms, since the public code of this baseline does that.
Source: the paper's baseline (Tables 2, 6 and 7); LLaMA (arXiv 2302.13971).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_core import transitions
from decay_core.decay import DecayPlace
from decay_core.decoding import LayerState
from decay_core.layers import Projection
from decay_core.mixer import LogDecayObserver
from decay_core.position import Angles


class SoftmaxAttention(nn.Module):
    """Call: x (B, T, d) -> (B, T, d). `inner_gain` has no meaning here: there is no inner norm."""

    def __init__(self, place: DecayPlace, inner_gain: float) -> None:
        super().__init__()
        self.place = place
        width = place.heads * place.head_dim
        self.query, self.key = Projection(width, width), Projection(width, width)
        self.value, self.output = Projection(width, width), Projection(width, width)
        self.position = transitions.get(place.point.transition).encoding(place)

    def forward(
        self,
        x_btd: Tensor,
        joint: Tensor | None = None,
        angles: Angles | None = None,
        observe: LogDecayObserver | None = None,
    ) -> Tensor:
        return self.extend(x_btd, joint, angles)[0]

    def extend(
        self, x_btd: Tensor, joint: Tensor | None, angles: Angles | None, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState]:
        """Outputs for new tokens that follow those of `state`, and the state after them."""
        heads = (self.place.heads, self.place.head_dim)
        q, k, v = (torch.unflatten(part(x_btd), -1, heads) for part in (self.query, self.key, self.value))
        q, k = self.position.encode(q, angles), self.position.encode(k, angles)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if state is not None:
            assert state.values is not None
            k, v = torch.cat([state.scan, k], dim=2), torch.cat([state.values, v], dim=2)
        scale = self.place.head_dim**-0.5  # of the head itself, also where an encoding widens it
        if state is None:
            o_bhtv = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:  # new token i sees every earlier one and itself
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
            o_bhtv = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        y_btd: Tensor = self.output(o_bhtv.transpose(1, 2).flatten(-2))
        return y_btd, LayerState(scan=k, values=v)
