"""The Decay Linear Transformer: a language model whose token mixer forgets by one chosen decay mechanism.

What is unusual: initial weights are a pure function of (configuration, seed), each drawn from its own stream named
after the parameter. Two design points therefore start from the same W_q, embedding and so on, and differ only where
their designs differ. Only tokens below `vocab_size` occur, but the softmax runs over the padded vocabulary, as in the
paper.
Source: the paper (arXiv 2509.05282), Table 5; initialisation as reached by the authors' public training code.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from decay_core import decays, positions, transitions
from decay_core.decay import DecayPlace, wide_dtype
from decay_core.decoding import DecodeState, LayerState
from decay_core.design import DesignPoint, Refusal, nearest_valid
from decay_core.layers import Embedding, GatedLinearUnit, Head, RMSNorm
from decay_core.mixer import LogDecayObserver, TokenMixer
from decay_core.objection import Objection
from decay_core.position import Angles
from decay_core.sizes import Size

VOCAB_MULTIPLE = 256
_INNER_GAIN = {"as_published": 1.0, "as_run": 0.0}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes the model. `inner_gain_init` None takes the form's value: 1 as published, 0 as run."""

    point: DesignPoint
    size: Size
    vocab_size: int
    inner_gain_init: float | None = None

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be positive, given {self.vocab_size}")

    @property
    def padded_vocab(self) -> int:
        """The vocabulary rounded up to a multiple of 256."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def inner_gain(self) -> float:
        """The starting gain of the norm inside the token mixer."""
        return _INNER_GAIN[self.point.form] if self.inner_gain_init is None else self.inner_gain_init

    @property
    def head_dim(self) -> int:
        """The width of a head: the point's own, or the transition's for this size and form."""
        if self.point.head_dim is not None:
            return self.point.head_dim
        return transitions.get(self.point.transition).head_dim(self.size, self.point.form)

    @property
    def heads(self) -> int:
        """Heads of a layer. Raises ValueError where head_dim does not divide the model's width."""
        if self.size.d_model % self.head_dim:
            raise ValueError(f"head_dim {self.head_dim} does not divide d_model {self.size.d_model}")
        return self.size.d_model // self.head_dim

    def places(self) -> list[DecayPlace]:
        """Where the decays of all layers sit."""
        shift = positions.get(self.point.position).layer_shift(self.point.form)
        shape: dict[str, Any] = {"layers": self.size.layers, "heads": self.heads, "head_dim": self.head_dim}
        return [DecayPlace(point=self.point, layer=layer, layer_shift=shift, **shape) for layer in range(self.size.layers)]

    def check(self) -> None:
        """Raises Refusal where the point is invalid, or does not go with this size."""
        self.point.check()
        if (objection := self._objection()) is None:
            return
        nearest = nearest_valid(self.point, lambda point: replace(self, point=point)._objection() is None)
        raise Refusal(objection.text, nearest.name if nearest else None, objection.kind)

    def _objection(self) -> Objection | None:
        if self.size.d_model % self.head_dim:
            text = f"head_dim {self.head_dim} does not divide the width {self.size.d_model} of {self.size.name}"
            return Objection("size", text)
        if self.point.granularity == "paired" and self.head_dim % 2:
            return Objection("size", f"a head of {self.head_dim} channels has no pairs")
        if self.head_dim % (multiple := positions.get(self.point.position).head_multiple):
            text = f"{self.point.position} needs heads of a multiple of {multiple} channels, not of {self.head_dim}"
            return Objection("size", text)
        return decays.get(self.point.decay).place_refusal(self.places()[-1])

    def to_dict(self) -> dict[str, Any]:
        """All fields, nested, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Reads what `to_dict` wrote."""
        rest = {key: value for key, value in values.items() if key not in ("point", "size")}
        return cls(point=DesignPoint.from_dict(values["point"]), size=Size(**values["size"]), **rest)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + glu(norm(x))."""

    def __init__(self, place: DecayPlace, config: ModelConfig) -> None:
        super().__init__()
        width = config.size.d_model
        mixer = transitions.get(place.point.transition).mixer or TokenMixer
        self.mixer_norm, self.mixer = RMSNorm(width), mixer(place, config.inner_gain)
        self.glu_norm, self.glu = RMSNorm(width), GatedLinearUnit(width, config.size.glu_dim)

    def forward(self, x_btd: Tensor, joint: Tensor | None, angles: Angles | None, observe: LogDecayObserver | None) -> Tensor:
        x_btd = x_btd + self.mixer(self.mixer_norm(x_btd), joint, angles, observe)
        out: Tensor = x_btd + self.glu(self.glu_norm(x_btd))
        return out

    def extend(
        self, x_btd: Tensor, joint: Tensor | None, angles: Angles | None, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        """`forward` for new tokens that follow those of `state`, and the state after them."""
        extend = cast(TokenMixer, self.mixer).extend
        mixed, after = extend(self.mixer_norm(x_btd), joint, angles, state)
        x_btd = x_btd + mixed
        return x_btd + self.glu(self.glu_norm(x_btd)), after


class DecayLinearTransformer(nn.Module):
    """The model of one configuration. Use `build_model`: the bare class leaves its weights undrawn."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        size, places = config.size, config.places()
        self.embedding = Embedding(config.padded_vocab, size.d_model)
        self.stream = positions.get(config.point.position).stream_module(config.heads, config.head_dim)
        self.joint_decay = decays.get(config.point.decay).joint_module(places[0])
        self.blocks = nn.ModuleList(Block(place, config) for place in places)
        self._position = transitions.get(config.point.transition).encoding(places[0])
        self.final_norm = RMSNorm(size.d_model)
        self.head = Head(size.d_model, config.padded_vocab)

    def forward(
        self, tokens_bt: Tensor, targets_bt: Tensor | None = None, *, observe: LogDecayObserver | None = None
    ) -> Tensor:
        """Logits (B, T, padded vocabulary), or with targets (B, T) their mean cross-entropy in nats (targets of -100 do
        not count).

        observe(layer, log λ) is called once a layer with a detached fp32 tensor: (B, T, H) for scalar decay, (B, T, H,
        K) for vector decay, (H,) where λ is a constant per head.
        """
        x_btd = self.embedding(tokens_bt)
        if self.stream is not None:
            x_btd, _ = self.stream(x_btd)
        angles = self._angles(x_btd, 0)
        for block, joint in zip(self.blocks, self._joints(), strict=True):
            x_btd = block(x_btd, joint, angles, observe)
        out: Tensor = self.head(self.final_norm(x_btd), targets_bt)
        return out

    @torch.no_grad()
    def extend(self, tokens_bt: Tensor, state: DecodeState | None = None, *, last: int = 0) -> tuple[Tensor, DecodeState]:
        """Reads new tokens (B, T), T >= 1, that follow those of `state`; returns their logits (B, T, padded vocabulary)
        and the state after them. The logits are those of `forward` on the whole text. `last` > 0 computes those of the
        last tokens only: a prompt's others are large and read by nobody."""
        start = 0 if state is None else state.position
        x_btd, stream = self.embedding(tokens_bt), None
        if self.stream is not None:
            x_btd, stream = self.stream(x_btd, None if state is None else state.stream, True)
        angles = self._angles(x_btd, start)
        layers: list[LayerState] = []
        for layer, (block, joint) in enumerate(zip(self.blocks, self._joints(), strict=True)):
            x_btd, after = cast(Block, block).extend(x_btd, joint, angles, None if state is None else state.layers[layer])
            layers.append(after)
        logits: Tensor = self.head(self.final_norm(x_btd[:, -last:]))
        return logits, DecodeState(position=start + tokens_bt.shape[1], layers=tuple(layers), stream=stream)

    def _angles(self, x_btd: Tensor, start: int) -> Angles | None:
        return self._position.angles(x_btd.shape[1], x_btd.device, wide_dtype(x_btd.dtype), start)

    def _joints(self) -> list[Tensor | None]:
        """What the joint module says to every layer."""
        if self.joint_decay is None:
            return [None] * len(self.blocks)
        rows = self.joint_decay()
        return [rows[layer] for layer in range(len(self.blocks))]


def build_model(
    config: ModelConfig, *, device: torch.device | str | None = None, seed: int | None = None
) -> DecayLinearTransformer:
    """Builds the model on `device` (default: CPU) with weights that depend on (config, seed) alone, on every rank and
    device.

    Without a seed the weights are left undrawn, to be loaded. On the device "meta" nothing is drawn and no memory is
    used. The global random state is not touched. Raises Refusal for an invalid design point.
    """
    device = torch.device("cpu" if device is None else device)
    draws = seed is not None and device.type != "meta"
    with torch.device("cpu" if draws else device):
        model = DecayLinearTransformer(config)
    if draws:
        _draw_weights(model, cast(int, seed))
    return model.to(device)


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters of the class that trains, counted without memory."""
    return sum(parameter.numel() for parameter in build_model(config, device="meta").parameters())


def state_size(config: ModelConfig, length: int) -> int:
    """Numbers held for one sequence after `length` tokens while decoding: the states of all layers.

    What a decay or an encoding keeps beside the scan's state (LightNet, TPE) is not counted. Raises Refusal.
    """
    config.check()
    transition, place = transitions.get(config.point.transition), config.places()[0]
    return config.size.layers * transition.state_size(place, transition.encoding(place).width, length)


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int) -> None:
    drawn = 0
    for name, module in model.named_modules():
        if (draw := getattr(module, "draw", None)) is not None:
            draw(torch.Generator().manual_seed(weight_stream(seed, name)))
            drawn += len(list(module.parameters(recurse=False)))
    assert drawn == len(list(model.parameters())), "every parameter belongs to a module that draws it"


def weight_stream(seed: int, name: str) -> int:
    """A generator seed that differs for every parameter's module."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
