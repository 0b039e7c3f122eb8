"""The Decay Linear Transformer: a language model whose token mixer forgets by one chosen decay mechanism.

What is unusual: initial weights are a pure function of (configuration, seed), each drawn from its own stream named
after the parameter. Two design points therefore start from the same W_q, embedding and so on, and differ only where
their designs differ. Only tokens below `vocab_size` occur, but the softmax runs over the padded vocabulary, as in the
paper.
Source: the paper (arXiv 2509.05282), Table 5; initialisation as reached by the authors' public training code.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from decay_core import decays
from decay_core.decay import DecayPlace, wide_dtype
from decay_core.design import DesignPoint
from decay_core.layers import Embedding, GatedLinearUnit, Head, RMSNorm
from decay_core.mixer import LogDecayObserver, TokenMixer
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
        self.mixer_norm, self.mixer = RMSNorm(width), TokenMixer(place, config.inner_gain)
        self.glu_norm, self.glu = RMSNorm(width), GatedLinearUnit(width, config.size.glu_dim)

    def forward(
        self, x_btd: Tensor, joint: Tensor | None, angles: Angles | None, observe: LogDecayObserver | None
    ) -> Tensor:
        x_btd = x_btd + self.mixer(self.mixer_norm(x_btd), joint, angles, observe)
        out: Tensor = x_btd + self.glu(self.glu_norm(x_btd))
        return out


class DecayLinearTransformer(nn.Module):
    """The model of one configuration. Use `build_model`: the bare class leaves its weights undrawn."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.point.check()
        self.config = config
        size = config.size
        places = [
            DecayPlace(point=config.point, layer=i, layers=size.layers, heads=size.heads, head_dim=size.head_dim)
            for i in range(size.layers)
        ]
        self.embedding = Embedding(config.padded_vocab, size.d_model)
        self.joint_decay = decays.get(config.point.decay).joint_module(places[0])
        self.blocks = nn.ModuleList(Block(place, config) for place in places)
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
        joint = None if self.joint_decay is None else self.joint_decay()
        blocks = cast(list[Block], list(self.blocks))
        dtype = wide_dtype(x_btd.dtype)
        angles = blocks[0].mixer.position.angles(tokens_bt.shape[1], tokens_bt.device, dtype)
        for layer, block in enumerate(blocks):
            x_btd = block(x_btd, None if joint is None else joint[layer], angles, observe)
        out: Tensor = self.head(self.final_norm(x_btd), targets_bt)
        return out


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


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int) -> None:
    drawn = 0
    for name, module in model.named_modules():
        if (draw := getattr(module, "draw", None)) is not None:
            draw(torch.Generator().manual_seed(_stream(seed, name)))
            drawn += len(list(module.parameters(recurse=False)))
    assert drawn == len(list(model.parameters())), "every parameter belongs to a module that draws it"


def _stream(seed: int, name: str) -> int:
    """A generator seed that differs for every parameter's module."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
