"""The token mixer: linear attention whose state forgets, with an output gate and one norm over all heads.

    o_t = S_tᵀ q_t,  y = W_o RMSNorm(o ⊙ σ(W_u2 W_u1 x)), S by the transition, plainly S_t = diag(λ_t) S_{t-1} + k_t v_tᵀ

What is unusual: no 1/√d scale, no normaliser, the gate comes before the norm, and the norm spans the whole width, not a
head. Vector decay and gate read x through bottlenecks of one head's width. With a shared key, W_k x is the decay's
activation and k = 1 - λ.
Source: the paper's block (arXiv 2509.05282) and its appendix A.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_core import decays, transitions
from decay_core.decay import DecayPlace
from decay_core.decoding import LayerState
from decay_core.kernel_seam import DecaySource, fuses, gated_norm
from decay_core.layers import NORM_EPS, Projection, RMSNorm
from decay_core.position import Angles, Position

LogDecayObserver = Callable[[int, Tensor], None]


class Bottleneck(nn.Module):
    """Two linear maps through a narrow width, with nothing between."""

    def __init__(self, width: int, rank: int, width_out: int) -> None:
        super().__init__()
        self.down = Projection(width, rank)
        self.up = Projection(rank, width_out)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(self.down(x))
        return up


class GatedNorm(RMSNorm):
    """RMSNorm(o ⊙ σ(gate)) over the whole width, in fp32 or wider where plain torch computes it, else in the gate's dtype."""

    def forward(self, o_btd: Tensor, gate_btd: Tensor) -> Tensor:  # type: ignore[override]
        return gated_norm(o_btd, gate_btd, self.gain, NORM_EPS)


class TokenMixer(nn.Module):
    """Linear attention with the decay of one design point. Call: x (B, T, d) -> (B, T, d)."""

    def __init__(self, place: DecayPlace, inner_gain: float) -> None:
        super().__init__()
        self.place = place
        width = place.heads * place.head_dim
        self.query, self.key = Projection(width, width), Projection(width, width)
        self.value, self.output = Projection(width, width), Projection(width, width)
        self.output_gate = Bottleneck(width, place.head_dim, width)
        self.decay = decays.get(place.point.decay)(place)
        self.activation = self._activation(width)
        self.transition = transitions.get(place.point.transition)(place)
        self.position = self.transition.encoding(place)
        self.norm = GatedNorm(width, inner_gain)
        plain = type(self.position)
        self._fusible = (
            self.transition.fuses
            and self.decay.reads_input
            and place.point.granularity != "paired"
            and plain.widen_decay is Position.widen_decay
            and (not place.point.share or plain.encode is Position.encode)
        )

    def _activation(self, width: int) -> nn.Module | None:
        """The map from x to the decay's f; None where the shared key is f or the decay reads no input."""
        if self.place.point.share or not self.decay.reads_input:
            return None
        if self.place.point.granularity == "scalar":
            return Projection(width, self.place.heads)
        return Bottleneck(width, self.place.head_dim, math.prod(self.place.shape))

    def forward(
        self,
        x_btd: Tensor,
        joint: Tensor | None = None,
        angles: Angles | None = None,
        observe: LogDecayObserver | None = None,
    ) -> Tensor:
        q_bthk, v_bthv = self._query_and_value(x_btd)
        raw_key, f = self._raw_key_and_f(x_btd)
        source = self._source(q_bthk, v_bthv, f, joint)
        if source is None:
            log_decay, shared_key = self.decay(f, joint)
            if observe is not None:
                observe(self.place.layer, log_decay.detach())
            decay: Tensor | DecaySource = self._widened(log_decay, x_btd)
            key: Tensor | None = self._key(raw_key, shared_key)
        else:
            if observe is not None:
                with torch.no_grad():
                    observe(self.place.layer, self.decay(f, joint)[0])
            decay = source
            key = None if self.place.point.share else self._key(raw_key, None)
        o_bthv, _ = self.transition.scan(x_btd, self._encoded(q_bthk, key, v_bthv, angles), decay, None, False)
        return self._gated_output(x_btd, o_bthv)

    def _source(self, q_bthk: Tensor, v_bthv: Tensor, f: Tensor, joint: Tensor | None) -> DecaySource | None:
        """The decay as a formula, where a kernel forms λ (and a shared key) itself: it is then never in memory."""
        if not (self._fusible and fuses(q_bthk, v_bthv)):
            return None
        source: DecaySource | None = self.decay(f, joint, fused=True)[0]
        return source

    def extend(
        self, x_btd: Tensor, joint: Tensor | None, angles: Angles | None, state: LayerState | None = None
    ) -> tuple[Tensor, LayerState]:
        """Outputs for new tokens that follow those of `state`, and the state after them."""
        before, past = (None, None) if state is None else (state.scan, state.past)
        q_bthk, v_bthv = self._query_and_value(x_btd)
        raw_key, f = self._raw_key_and_f(x_btd)
        log_decay, shared_key = self.decay(f, joint, past)
        qkv = self._encoded(q_bthk, self._key(raw_key, shared_key), v_bthv, angles)
        o_bthv, after = self.transition.scan(x_btd, qkv, self._widened(log_decay, x_btd), before, True)
        assert after is not None, "the scan was asked for its state"
        past = self.decay.remember(f, past) if self.decay.reads_input else None
        return self._gated_output(x_btd, o_bthv), LayerState(scan=after, past=past)

    def _query_and_value(self, x_btd: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.place.heads, self.place.head_dim)
        return torch.unflatten(F.silu(self.query(x_btd)), -1, heads), torch.unflatten(self.value(x_btd), -1, heads)

    def _raw_key_and_f(self, x_btd: Tensor) -> tuple[Tensor, Tensor]:
        """W_k x (B, T, d), and the decay's activation in the shape of one λ each."""
        raw_key = self.key(x_btd)
        f = raw_key if self.activation is None else self.activation(x_btd)
        return raw_key, torch.unflatten(f, -1, self.place.shape) if self.decay.reads_input else f

    def _key(self, raw_key_btd: Tensor, shared_key: Tensor | None) -> Tensor:
        heads = (self.place.heads, self.place.head_dim)
        k_bthk = torch.unflatten(F.silu(raw_key_btd), -1, heads) if shared_key is None else shared_key
        return self.transition.prepare_key(k_bthk)

    def _encoded(
        self, q_bthk: Tensor, k_bthk: Tensor | None, v_bthv: Tensor, angles: Angles | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        k_bthk = None if k_bthk is None else self.position.encode(k_bthk, angles)
        return self.position.encode(q_bthk, angles), k_bthk, v_bthv

    def _widened(self, log_decay: Tensor, x_btd: Tensor) -> Tensor:
        """log λ as the scan takes it, from (H,), (B, T, H), (B, T, H, K) or (B, T, H, K / 2)."""
        if log_decay.dim() == 1:
            return log_decay.expand(*x_btd.shape[:2], -1)
        if log_decay.dim() == 3:
            return log_decay
        if self.place.point.granularity == "paired":
            log_decay = torch.cat([log_decay, log_decay], dim=-1)  # channels i and i + K/2
        return self.position.widen_decay(log_decay)

    def _gated_output(self, x_btd: Tensor, o_bthv: Tensor) -> Tensor:
        # o has no scale and grows with the text where λ is near 1: gate and norm are wide, also where a kernel gave 16 bits.
        gated = self.norm(o_bthv.flatten(-2), self.output_gate(x_btd))
        y_btd: Tensor = self.output(gated.to(x_btd.dtype))
        return y_btd
