"""What training one model costs in arithmetic: its parameters and the floating-point operations per token.

Counted per token, forward and backward (twice the forward):

* every linear map, head included: 6 per weight. The embedding is looked up, not multiplied;
* the transition: 3 × its operations on each number of the state. A diagonal one fades a number (1), writes it (2) and reads
  it (2); the delta rule reads it once more, with the key, before it writes; softmax attention reads each key and value of
  the past once (2), of which there are (T + 1) / 2 on average over a text of T tokens.

Not counted, since they are small or the choice of an implementation: norms, activations, the decay's own formula, the
encodings (TPE's recurrence too), what a chunked scan does inside its chunks, and anything computed again.

What is unusual: no closed form. The weights are counted on the class that trains, built without memory. Two points whose
first two layers have parameters of the same shapes are of one make, and that is built whole once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from torch import nn

from decay_core import transitions
from decay_core.design import Refusal
from decay_core.model import ModelConfig, build_model, state_size

FORWARD_AND_BACKWARD = 3
SAMPLE_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Parameters of a model, and how many of them stand in linear maps."""

    parameters: int
    multiplied: int


Layout = tuple[tuple[bool, tuple[int, ...]], ...]
_counted: dict[tuple[Layout, int], Counted] = {}


def count_model(config: ModelConfig) -> Counted:
    """Counts the model of `config`. Points whose first layers have the same parameters are built whole only once."""
    key = (_layout(_shape_only(config)), config.size.layers)
    if key not in _counted:
        model = build_model(config, device="meta")
        linear = (module for module in model.modules() if isinstance(module, nn.Linear))
        _counted[key] = Counted(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            multiplied=sum(module.weight.numel() for module in linear),
        )
    return _counted[key]


@cache
def _layout(config: ModelConfig) -> Layout:
    """Of every parameter of the model with its first layers only: whether it is multiplied, and its shape."""
    few = replace(config, size=replace(config.size, layers=SAMPLE_LAYERS))
    model = build_model(few if fits(few) else config, device="meta")
    own = ((module, value) for module in model.modules() for value in module.parameters(recurse=False))
    return tuple(sorted((isinstance(module, nn.Linear), tuple(value.shape)) for module, value in own))


def fits(config: ModelConfig) -> bool:
    """Whether a model can be built; a fixed decay that needs many layers cannot be with few."""
    try:
        config.check()
    except Refusal:
        return False
    return True


def _shape_only(config: ModelConfig) -> ModelConfig:
    """`config` without what gives a parameter its value and never its shape."""
    p = None if config.point.p is None else 0.5
    return replace(config, point=replace(config.point, p=p), inner_gain_init=None)


@cache
def flops_per_token(config: ModelConfig, length: int) -> float:
    """Operations per token of a text of `length` tokens, forward and backward, as the head of this file says."""
    transition = transitions.get(config.point.transition)
    mean_state = (state_size(config, 1) + state_size(config, length)) / 2  # it grows by as much with every token, or not
    linear = 2 * count_model(config).multiplied
    return float(FORWARD_AND_BACKWARD * (linear + transition.operations * mean_state))
