"""The model as Hugging Face's transformers knows it, so that `from_pretrained`, `generate` and `Trainer` work with it.

Nothing else in the project imports this file or transformers; `decay export` copies it, and what it imports, into every
export. What is surprising:

* Padding would change a recurrent state. Rows with equally many padding tokens on their left are read together, without
  them, so that a row of a padded batch gives what it gives alone; padding elsewhere is refused where a cache is kept.
* The softmax runs over the padded vocabulary, as in training, and so does the loss; but logits of ids that no tokenizer
  has leave as -inf, so that none is ever generated.
* Loaded in bf16, parameters that are no matrix, table or gain (decays, above all) stay fp32: λ near 1 does not survive bf16.
* Reading into a cache (`use_cache=True`) computes no gradient, so it has to be asked for; `generate` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from decay_core.decoding import DecodeState
from decay_core.layers import Embedding, Projection, RMSNorm
from decay_core.model import DecayLinearTransformer, ModelConfig, weight_stream

LOSS_OPTIONS = {"num_items_in_batch", "shift_labels"}  # what transformers' loss takes beside logits and labels
Group = tuple[Tensor, DecodeState]  # rows of a batch (int64), and what they have read
DERIVED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


class DecayConfig(PretrainedConfig):
    """`design` is `ModelConfig.to_dict()`; the names that other tools look for follow from it. `seed` fixes the initial
    weights of a model that is built rather than loaded."""

    model_type = "decay"

    def __init__(self, design: dict[str, Any] | None = None, seed: int = 0, **others: Any) -> None:
        self.design, self.seed = design, seed
        if design is not None:  # transformers builds a bare one to find out defaults
            config = ModelConfig.from_dict(design)
            self.vocab_size, self.hidden_size = config.padded_vocab, config.size.d_model
            self.num_hidden_layers, self.num_attention_heads = config.size.layers, config.heads
            _check_derived(self, others)
        super().__init__(**{"tie_word_embeddings": False, **others})

    def to_model_config(self) -> ModelConfig:
        """The configuration as decay_core knows it. Raises ValueError where there is none."""
        if self.design is None:
            raise ValueError("this DecayConfig has no design: give DecayConfig(design=ModelConfig(...).to_dict())")
        return ModelConfig.from_dict(self.design)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Rows of a batch (int64) that have the same number of tokens: those to read now, and the state before them."""

    rows: Tensor
    tokens: Tensor
    state: DecodeState | None


@dataclass(kw_only=True)
class DecayCache:
    """What a batch has read: rows that are equally far, and their state. Never changed in place by the model.

    `length` counts tokens and the padding before them, as transformers does.
    """

    groups: tuple[Group, ...]
    length: int
    is_compileable: bool = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far."""
        return self.length

    def select(self, rows: Tensor) -> DecayCache:
        """The cache of a batch whose row i is row `rows[i]` (int64) of this one, as beam search needs it."""
        chosen = []
        for old_rows, state in self.groups:
            new, place = (rows[:, None] == old_rows).nonzero(as_tuple=True)
            if new.numel():
                chosen.append((new, state.select(place)))
        return DecayCache(groups=tuple(chosen), length=self.length)


class DecayForCausalLM(PreTrainedModel, GenerationMixin):
    """A Decay Linear Transformer of one design point."""

    config_class = DecayConfig
    base_model_prefix = "model"
    _is_stateful = True  # transformers then refuses what needs to go back in the text

    def __init__(self, config: DecayConfig) -> None:
        super().__init__(config)
        self.model = DecayLinearTransformer(config.to_model_config())
        self._keep_in_fp32_modules_strict = set(_delicate(self))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DecayCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, padded vocabulary), -inf where an id does not exist and 0 at padding on the left.

        labels (B, T): the tokens themselves, shifted here; -100 does not count. Raises ValueError, one line, for what is not
        supported.
        """
        _check(input_ids, past_key_values, others)
        assert input_ids is not None
        keeps = bool(use_cache) or past_key_values is not None
        if keeps and labels is not None and torch.is_grad_enabled():
            raise ValueError("labels and a cache do not go together: reading into a cache computes no gradient; use one")
        last = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        readings = list(_readings(input_ids, attention_mask, past_key_values, keeps))
        parts, groups = self._read(readings, keeps, last)
        logits = _in_order(parts, readings, min(last, input_ids.shape[1]) or input_ids.shape[1])
        kept = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        seen = input_ids.shape[1] + (0 if past_key_values is None else past_key_values.length)
        output = CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels, others),
            logits=kept.masked_fill(self._without_token(logits), -torch.inf),
            past_key_values=DecayCache(groups=tuple(groups), length=seen) if use_cache else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else tuple(output.to_tuple())

    def _loss(self, logits: Tensor, labels: Tensor, others: dict[str, Any]) -> Tensor:
        options = {name: value for name, value in others.items() if name in LOSS_OPTIONS}
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return loss

    def _without_token(self, logits: Tensor) -> Tensor:
        """Which ids of the padded vocabulary stand for nothing: (V,) bool."""
        return torch.arange(logits.shape[-1], device=logits.device) >= self.model.config.vocab_size

    def _read(self, readings: list[Reading], keeps: bool, last: int) -> tuple[list[Tensor], list[Group]]:
        """Logits of every reading (those of the `last` tokens, 0: all), and the states after them where `keeps`."""
        if not keeps:
            return [self.model(reading.tokens)[:, -last:] for reading in readings], []
        logits, groups = [], []
        for reading in readings:
            part, state = self.model.extend(reading.tokens, reading.state, last=last)
            logits.append(part)
            groups.append((reading.rows, state))
        return logits, groups

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` then leaves the cache to us

    def _reorder_cache(self, past_key_values: DecayCache, beam_idx: Tensor) -> DecayCache:
        return past_key_values.select(beam_idx)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        draw = getattr(module, "draw", None)
        if draw is not None:
            name = next(name for name, candidate in self.model.named_modules() if candidate is module)
            draw(torch.Generator().manual_seed(weight_stream(self.config.seed, name)))

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head; it shares nothing with the embedding."""
        return self.model.head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused: the vocabulary is part of the design that a result belongs to."""
        raise ValueError("the vocabulary of a Decay Linear Transformer cannot be resized: build another model")


def register() -> None:
    """Makes `AutoConfig` and `AutoModelForCausalLM` know the model in this process, without `trust_remote_code`."""
    AutoConfig.register(DecayConfig.model_type, DecayConfig, exist_ok=True)
    AutoModelForCausalLM.register(DecayConfig, DecayForCausalLM, exist_ok=True)


def _delicate(model: nn.Module) -> Iterator[str]:
    """Names of the modules whose own parameters must not lose precision."""
    for name, module in model.named_modules():
        if not isinstance(module, (Projection, Embedding, RMSNorm)) and list(module.parameters(recurse=False)):
            yield name


def _check_derived(config: DecayConfig, others: dict[str, Any]) -> None:
    for name in DERIVED:
        if others.pop(name, own := getattr(config, name)) != own:
            raise ValueError(f"{name} follows from the design of this model and is {own}; leave it out")


def _check(input_ids: Tensor | None, cache: object, others: dict[str, Any]) -> None:
    if input_ids is None or input_ids.shape[1] == 0:
        raise ValueError("input_ids with at least one token are needed")
    if cache is not None and not isinstance(cache, DecayCache):
        raise ValueError(f"past_key_values must be what this model returned, given a {type(cache).__name__}")
    given = (name for name, value in others.items() if value is not None and value is not False)
    wanted = sorted(name for name in given if name not in LOSS_OPTIONS)
    if wanted:
        raise ValueError(f"{wanted[0]} is not supported by this model; leave it out")


def _readings(input_ids: Tensor, attention_mask: Tensor | None, cache: DecayCache | None, keeps: bool) -> Iterator[Reading]:
    """The batch in parts that can be read as they are."""
    columns = input_ids.shape[1]
    if cache is not None:
        if attention_mask is not None and not attention_mask[:, -columns:].all():
            raise ValueError("padding after the first tokens would change the state; pad on the left and in the first call")
        for rows, state in cache.groups:
            yield Reading(rows=rows, tokens=input_ids.index_select(0, rows), state=state)
        return
    if attention_mask is None:
        yield Reading(rows=torch.arange(input_ids.shape[0], device=input_ids.device), tokens=input_ids, state=None)
        return
    padding = _padding(attention_mask.bool(), input_ids, keeps)
    for width in sorted(set(padding.tolist())):
        rows = (padding == width).nonzero().squeeze(1)
        yield Reading(rows=rows, tokens=input_ids[rows, width:], state=None)


def _padding(mask: Tensor, input_ids: Tensor, keeps: bool) -> Tensor:
    """How many columns of each row are padding on its left. Padding on the right is harmless where no state is kept."""
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}, given {tuple(mask.shape)}")
    first = mask.int().argmax(dim=1)
    after = mask.shape[1] - mask.flip(1).int().argmax(dim=1)
    if not (after - first == mask.sum(dim=1)).all():
        raise ValueError("attention_mask may hide columns on the left and right of a row's tokens, not all and none between")
    if keeps and not mask[:, -1].all():
        raise ValueError("padding on the right would change the state; pad on the left (padding_side='left')")
    return first


def _in_order(parts: list[Tensor], readings: list[Reading], columns: int) -> Tensor:
    """The readings' logits as those of the whole batch; 0 where a row has no token."""
    whole = torch.cat([F.pad(part, (0, 0, columns - part.shape[1], 0)) for part in parts])
    if len(parts) == 1:
        return whole
    return whole.index_select(0, torch.cat([reading.rows for reading in readings]).argsort())
