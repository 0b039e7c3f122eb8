"""The token mixer: linear attention whose state forgets, with an output gate and one norm over all heads.

    o_t = S_tᵀ q_t,  S_t = diag(λ_t) S_{t-1} + k_t v_tᵀ,  y = W_o RMSNorm(o ⊙ σ(W_u2 W_u1 x))

What is unusual: no 1/√d scale, no normaliser, the gate comes before the norm, and the norm spans the whole width, not a
head. Vector decay and gate read x through bottlenecks of one head's width. With a shared key, W_k x is the decay's
activation and k = 1 - λ.
Source: the paper's block (arXiv 2509.05282) and its appendix A.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_core import decays, positions
from decay_core.decay import DecayPlace
from decay_core.kernel_seam import decay_scan
from decay_core.layers import Projection, RMSNorm
from decay_core.position import Angles

LogDecayObserver = Callable[[int, Tensor], None]


class Bottleneck(nn.Module):
    """Two linear maps through a narrow width, with nothing between."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = Projection(width, rank)
        self.up = Projection(rank, width)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(self.down(x))
        return up


class TokenMixer(nn.Module):
    """Linear attention with the decay of one design point. Call: x (B, T, d) -> (B, T, d)."""

    def __init__(self, place: DecayPlace, inner_gain: float) -> None:
        super().__init__()
        self.place = place
        width = place.heads * place.head_dim
        self.query, self.key = Projection(width, width), Projection(width, width)
        self.value, self.output = Projection(width, width), Projection(width, width)
        self.output_gate = Bottleneck(width, place.head_dim)
        self.decay = decays.get(place.point.decay)(place)
        self.activation = self._activation(width)
        self.position = positions.get(place.point.position)(place.head_dim, place.point.form)
        self.norm = RMSNorm(width, inner_gain)

    def _activation(self, width: int) -> nn.Module | None:
        """The map from x to the decay's f; None where the shared key is f or the decay reads no input."""
        if self.place.point.share or not self.decay.reads_input:
            return None
        if self.place.point.granularity == "scalar":
            return Projection(width, self.place.heads)
        return Bottleneck(width, self.place.head_dim)

    def forward(
        self,
        x_btd: Tensor,
        joint: Tensor | None = None,
        angles: Angles | None = None,
        observe: LogDecayObserver | None = None,
    ) -> Tensor:
        heads = (self.place.heads, self.place.head_dim)
        q_bthk = torch.unflatten(F.silu(self.query(x_btd)), -1, heads)
        v_bthv = torch.unflatten(self.value(x_btd), -1, heads)
        k_bthk, log_decay = self._key_and_decay(x_btd, joint)
        if observe is not None:
            observe(self.place.layer, log_decay.detach())
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(*x_btd.shape[:2], -1)
        q_bthk, k_bthk = self.position.encode(q_bthk, angles), self.position.encode(k_bthk, angles)
        o_bthv, _ = decay_scan(q_bthk, k_bthk, v_bthv, log_decay)
        # o has no scale and grows with the text where λ is near 1: it stays wide until the norm has absorbed that.
        gated = o_bthv.flatten(-2) * torch.sigmoid(self.output_gate(x_btd)).to(o_bthv.dtype)
        y_btd: Tensor = self.output(self.norm(gated).to(x_btd.dtype))
        return y_btd

    def _key_and_decay(self, x_btd: Tensor, joint: Tensor | None) -> tuple[Tensor, Tensor]:
        """k (B, T, H, K) and log λ (B, T, H), (B, T, H, K) or (H,)."""
        heads = (self.place.heads, self.place.head_dim)
        raw_key = self.key(x_btd)
        f = raw_key if self.activation is None else self.activation(x_btd)
        if self.decay.reads_input:
            f = torch.unflatten(f, -1, self.place.shape)
        log_decay, shared_key = self.decay(f, joint)
        k_bthk = torch.unflatten(F.silu(raw_key), -1, heads) if shared_key is None else shared_key
        return k_bthk, log_decay
