"""How much memory one rank of a trial needs, by ZeRO stage: what it holds all the time, and what one micro-batch adds.

Held, in bytes per parameter: weight 4, gradient 4, Adam's two moments 8, and from stage 1 on a second fp32 weight of the
rank's own share. Stage 1 shares the optimizer's part out over the ranks, stage 2 the gradients too, stage 3 the weights too,
where as much as DeepSpeed keeps gathered comes on top. A communication buffer comes with every stage but 0.

Added by a micro-batch: what autograd saves for the backward pass, in bf16 a copy of every weight that is multiplied, and the
logits of as many tokens as the head works on at once, three times in fp32 (itself, its softmax, its gradient).
What is unusual: the first is measured, not derived. A model of two layers with one or two heads runs on a few tokens on the
CPU, and what it saves is scaled up linearly in tokens, layers, heads and widths, which is exact; points that differ in their
decay alone are taken to save the same (they differ by a tenth at most).
With a fused kernel a GPU saves less in the scan than the plain torch scan that is run here.
Not counted: the allocator's gaps and CUDA's own. The CPU saves more around a norm than CUDA does, so the sum is 4 to 10 %
above the peak that an H100 showed (160M to 1.45B, vector, scalar and softmax, bf16 and fp32), which about covers the gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from decay_core import decays
from decay_core.layers import LOGITS_AT_ONCE
from decay_core.model import DecayLinearTransformer, ModelConfig
from decay_core.recipe import Recipe
from decay_core.sizes import Size
from services.study.cost import count_model, fits

STAGES = (0, 1, 2, 3)
LARGEST_BUCKET = 200_000_000  # elements, as services/train/engine.py sets it; a test holds the two together
BYTES_PER_LOGIT = 12
MOST_GATHERED = 1_000_000_000  # elements: DeepSpeed's own bound on what stage 3 keeps gathered (max_live_parameters)
TOKENS = (128, 192)  # whole chunks of every scan, the first one left behind: its state is no more than zeros
NARROW = 8  # columns of the GLU that is measured
STREAM, FIRST, BLOCK, HEAD = "stream", "first block", "block", "head"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How a trial is spread: ZeRO stage, number of ranks, sequences of one forward of one rank."""

    stage: int
    workers: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    copies: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.copies + self.activations


def memory_of(config: ModelConfig, recipe: Recipe, ranks: Ranks) -> Memory:
    """What one rank needs while it trains `config` by `recipe`."""
    counted = count_model(config)
    every, own = counted.parameters, counted.parameters / ranks.workers
    bf16 = recipe.precision == "bf16"
    return Memory(
        weights=4 * (own + min(every, MOST_GATHERED) if ranks.stage >= 3 else every),
        gradients=4 * (own if ranks.stage >= 2 else every),
        optimizer=12 * own if ranks.stage >= 1 else 8 * every,
        buffers=4 * min(LARGEST_BUCKET, every) if ranks.stage >= 1 else 0,
        copies=2 * counted.multiplied if bf16 else 0,
        activations=activation_bytes(config, ranks.micro_batch * recipe.seq_len, bf16),
    )


def activation_bytes(config: ModelConfig, tokens: int, bf16: bool) -> float:
    """What one forward pass over `tokens` leaves for the backward pass, logits included."""
    saved = saved_per_token(config, bf16)
    rows = min(tokens, max(1, LOGITS_AT_ONCE // config.padded_vocab))
    logits = BYTES_PER_LOGIT * config.padded_vocab * rows
    return tokens * (saved[STREAM] + config.size.layers * saved[BLOCK]) + logits


_by_head: dict[Any, dict[str, tuple[float, float]]] = {}  # per token: with one head, and for every further one
_by_width: dict[bool, float] = {}  # per token of a layer and column of the GLU, the same for every point


def saved_per_token(config: ModelConfig, bf16: bool) -> dict[str, float]:
    """Bytes that autograd saves per token once a model and once a layer: affine in heads and in the GLU's width."""
    point = config.point
    key = (replace(point, decay="", p=None), decays.get(point.decay).reads_input, config.head_dim, bf16)
    if key not in _by_head:
        with _one_thread():
            one, two = (_slope(_narrow(config, heads, NARROW), bf16) for heads in (1, 2))
            if bf16 not in _by_width:
                wide = _slope(_narrow(config, 1, 2 * NARROW), bf16)
                _by_width[bf16] = (wide[BLOCK] - one[BLOCK]) / NARROW
        _by_head[key] = {part: (one[part], two[part] - one[part]) for part in (STREAM, BLOCK)}
    saved = {part: first + (config.heads - 1) * further for part, (first, further) in _by_head[key].items()}
    saved[BLOCK] += (config.size.glu_dim - NARROW) * _by_width[bf16]
    return saved


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small take many times longer on several threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _narrow(config: ModelConfig, heads: int, glu_dim: int) -> ModelConfig:
    size = Size(name="narrow", d_model=heads * config.head_dim, layers=2, heads=heads, glu_dim=glu_dim)
    narrow = replace(config, size=size, vocab_size=1)
    return narrow if fits(narrow) else replace(narrow, size=replace(size, layers=config.size.layers))


def _slope(config: ModelConfig, bf16: bool) -> dict[str, float]:
    """Bytes per token, free of what does not grow with the text: masks, and the copies of weights.

    A layer is what the second of two saves; what the first saves more, or less, is there once a model.
    """
    model = DecayLinearTransformer(config)
    model.blocks = model.blocks[:2]
    few, many = (_saved(model, tokens, bf16) for tokens in TOKENS)
    slope = {part: (many[part] - few[part]) / (TOKENS[1] - TOKENS[0]) for part in few}
    return {STREAM: slope[STREAM] + slope[FIRST] - slope[BLOCK], BLOCK: slope[BLOCK]}


def _saved(model: DecayLinearTransformer, tokens: int, bf16: bool) -> dict[str, int]:
    """Bytes that autograd saves of one forward, each storage once, by the part of the model that saves it first."""
    parts = {FIRST: model.blocks[0], BLOCK: model.blocks[1], HEAD: model.head}
    found, where = dict.fromkeys((STREAM, *parts), 0), [STREAM]
    known: dict[int, Any] = {value.untyped_storage()._cdata: value for value in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = tensor  # kept, so that no other storage gets its place
            found[where[0]] += storage.nbytes()
        return tensor

    hooks = [hook for part, module in parts.items() for hook in _mark(part, module, where)]
    text = torch.zeros(1, tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, bf16):
        model(text, text)
    for hook in hooks:
        hook.remove()
    return found


def _mark(part: str, module: nn.Module, where: list[str]) -> list[Any]:
    """Makes `where` say `part` while `module` runs."""

    def enter(*_: Any) -> None:
        where[0] = part

    def leave(*_: Any) -> None:
        where[0] = STREAM

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
