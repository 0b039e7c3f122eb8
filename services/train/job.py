"""What a worker is told: everything one trial needs, as plain JSON values that cross any process border.

A job names its trial by content, its study by storage root, and its data by digest; a worker that finds other data than the
digest says refuses to train (the alternative is a result that nobody can reproduce).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from decay_core.model import ModelConfig
from decay_core.recipe import Recipe


class TrialFailed(RuntimeError):
    """A trial that would fail the same way again: it is recorded with this one line and not retried in this run."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a trial's ranks have, all of it bearing on the bits of its result; `gpus` is per worker.

    `elastic` allows to go on from a checkpoint of another number of ranks.
    """

    workers: int
    threads: int
    gpus: float
    zero_stage: int
    micro_batch_size: int
    deterministic: bool
    elastic: bool = False


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """One trial of one study. `storage` is the study's root, `data` is {spec, digest, path}; the rest as dicts.

    `method` is what seeds are compared under, by default the point's name; `varied` what the study's `vary` set; `driver` the
    number of the driver that started it (services/study/fence.py).
    """

    study: str
    trial: str
    name: str
    seed: int
    storage: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    data: dict[str, Any]
    resources: dict[str, Any]
    method: str = ""
    varied: dict[str, Any] = field(default_factory=dict)
    driver: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @property
    def model_config(self) -> ModelConfig:
        """The model to build."""
        return ModelConfig.from_dict(self.config)

    @property
    def training_recipe(self) -> Recipe:
        """How to train it."""
        values = dict(self.recipe)
        values["betas"] = tuple(values["betas"])
        return Recipe(**values)

    @property
    def rank_resources(self) -> Resources:
        """What the ranks have."""
        return Resources(**self.resources)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among its peers. `device` is "cpu" or "cuda:<index>"."""

    rank: int
    size: int
    device: str

    @property
    def leads(self) -> bool:
        """Rank 0: the one that writes what is written once."""
        return self.rank == 0
