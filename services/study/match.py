"""Gives every point of one size the same number of parameters, by the width of its channel mixer.

What is unusual: the width goes in steps of 8, which matrix units like, so the numbers agree to 0.1 % and not exactly; a size
at which one step is more than that is refused, never rounded away. What a step costs is read off two models, and every
result is counted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from decay_core.model import ModelConfig
from services.study.cost import count_model
from services.study.file import StudyError

STEP = 8
LARGEST_RESIDUAL = 1e-3


def matched(configs: Sequence[ModelConfig]) -> list[ModelConfig]:
    """The models of one size with the width at which each agrees best with the first, which keeps its own.

    Raises StudyError naming the residual where it is more than 0.1 %.
    """
    first = configs[0]
    target = count_model(first).parameters
    per_step = count_model(_with_width(first, first.size.glu_dim + STEP)).parameters - target
    found = [_nearest(config, target, per_step) for config in configs]
    for config in found:
        if abs(residual(config, target)) > LARGEST_RESIDUAL:
            raise StudyError(
                f"match: parameters cannot be had at size {config.size.name}: {config.point.name} stays "
                f"{residual(config, target):+.3%} from {first.point.name} (widths go in steps of {STEP}, 0.1 % is asked "
                "for); take a larger size, or match: none"
            )
    return found


def residual(config: ModelConfig, target: int) -> float:
    """By which share of `target` the model is larger."""
    return count_model(config).parameters / target - 1


def _nearest(config: ModelConfig, target: int, per_step: int) -> ModelConfig:
    steps = round((target - count_model(config).parameters) / per_step)
    return _with_width(config, max(config.size.glu_dim + STEP * steps, STEP))


def _with_width(config: ModelConfig, glu_dim: int) -> ModelConfig:
    return replace(config, size=replace(config.size, glu_dim=glu_dim))
