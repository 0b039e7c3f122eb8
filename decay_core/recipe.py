"""The recipe of a training run: steps, batch, AdamW, the learning-rate schedule and which parameters decay by how much.

What is surprising: weight decay alone moves a decay mechanism. In 20,000 steps at lr 3e-4 an unforced parameter shrinks
to 0.567 of itself, which takes Mamba2's median λ from 0.931 to 0.806. `decay_weight_decay=0` takes the decay
mechanism's parameters out of it.
Source: the paper's training setup and the authors' public training configuration (betas 0.9 and 0.95, weight decay 0.1
on everything; the text says 0.999 and nothing). Schedule: warm-up, stable, decay (WSD).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import nn

from decay_core.decay import DecayMechanism

LONGEST_WARMUP = 1024


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. A step is one optimizer step of `batch_size` sequences over all ranks; intervals are in steps.

    None means: `decay_weight_decay` as `weight_decay`; `warmup_steps` min(1024, 5% of the steps);
    `decay_steps` max(10% of the steps - warm-up, 5% of the steps). Raises ValueError when the numbers do not fit
    together.
    """

    steps: int
    batch_size: int
    seq_len: int
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_weight_decay: float | None = None
    grad_clip: float = 1.0
    warmup_steps: int | None = None
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_every: int
    eval_sequences: int
    checkpoint_every: int
    telemetry_every: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # a list after a trip through JSON
        for word, limit in (("steps", 1), ("batch_size", 1), ("seq_len", 2), ("eval_sequences", 1)):
            _require(getattr(self, word) >= limit, f"{word} must be at least {limit}, given {getattr(self, word)}")
        for word in ("eval_every", "checkpoint_every", "telemetry_every"):
            _require(getattr(self, word) >= 1, f"{word} must be at least 1 step, given {getattr(self, word)}")
        for word in ("lr", "eps", "grad_clip"):
            value = getattr(self, word)
            _require(math.isfinite(value) and value > 0, f"{word} must be positive and finite, given {value}")
        for word in ("weight_decay", "decay_weight_decay"):
            value = getattr(self, word)
            _require(value is None or (math.isfinite(value) and value >= 0), f"{word} must be >= 0, given {value}")
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"betas must be two numbers in [0, 1), given {self.betas}",
        )
        _require(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio must lie in [0, 1], given {self.min_lr_ratio}")
        _require(self.precision in ("fp32", "bf16"), f"precision must be fp32 or bf16, given {self.precision!r}")
        warmup, decay = self.schedule_lengths()
        _require(warmup >= 0 and decay >= 0, f"warmup_steps and decay_steps must be >= 0, given {warmup} and {decay}")
        _require(
            warmup + decay <= self.steps,
            f"warmup_steps {warmup} and decay_steps {decay} do not fit into {self.steps} steps; shorten one of them",
        )

    def schedule_lengths(self) -> tuple[int, int]:
        """(warm-up steps, decay steps), resolved."""
        warmup = min(LONGEST_WARMUP, round(0.05 * self.steps)) if self.warmup_steps is None else self.warmup_steps
        decay = max(round(0.1 * self.steps) - warmup, round(0.05 * self.steps))
        return warmup, decay if self.decay_steps is None else self.decay_steps

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0: linear from 0, constant, then lr·(m + (1-m)(1-√u))."""
        warmup, decay = self.schedule_lengths()
        if step < warmup:
            return self.lr * step / warmup
        into_decay = step - (self.steps - decay)
        if into_decay <= 0 or decay == 0:
            return self.lr
        floor, u = self.min_lr_ratio, min(1.0, into_decay / decay)
        return self.lr * (floor + (1 - floor) * (1 - math.sqrt(u)))

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Reads what `to_dict` wrote; raises ValueError on an unknown or missing key."""
        known = {field.name: field for field in fields(cls)}
        if extra := sorted(set(values) - set(known)):
            raise ValueError(f"recipe: unknown key {extra[0]!r}; known keys: {', '.join(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"recipe: {error}") from error


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Optimizer groups `weights` and, where the model has such parameters, `decay`: dicts of params, weight_decay and
    name.

    `decay` holds the decay mechanisms' own parameters (a, δ, Δ, θ, Λ), not the projections that make f. Order follows
    the model.
    """
    special = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, DecayMechanism)
        for parameter in module.parameters(recurse=False)
    }
    own = recipe.weight_decay if recipe.decay_weight_decay is None else recipe.decay_weight_decay
    weights = [parameter for parameter in model.parameters() if id(parameter) not in special]
    decay = [parameter for parameter in model.parameters() if id(parameter) in special]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": recipe.weight_decay, "name": "weights"}]
    return groups + ([{"params": decay, "weight_decay": own, "name": "decay"}] if decay else [])


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise ValueError(f"recipe: {complaint}")
