"""From a study to its trials: every cell of the design space, kept or refused with its reason, and what each will cost.

Nothing here touches a disk. A trial's id is a hash of everything its result depends on by design (point, size, seed, recipe,
data, model options), so the same trial has the same id on every machine, in every attempt and in every study. Surprising:
the number of ranks is not part of the id, because the global batch does not depend on it; it is held in the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from decay_core.design import DesignPoint, Misspelt, Refusal
from decay_core.model import ModelConfig, count_parameters
from decay_core.recipe import Recipe
from decay_core.sizes import get_size
from services.study.file import Data, DecayChoice, Grid, Study, StudyError
from services.study.storage import canonical_json

# Sustained rates used for estimates, as benchmarks/step_rate.py measures them with the chunked scan: one CPU thread of two busy
# ones at nano size, and an H100 in bf16 at 160M to 410M. `resources.assumed_gflops_per_worker` replaces them.
CPU_GFLOPS_PER_THREAD = 30.0
GPU_GFLOPS = 45_000.0
# A Train group costs 16-23 s to start and stop, a warm worker 0.3 s: below this length the warm pool is worth it.
WARM_BELOW_S = 900.0
BYTES_PER_PARAMETER_SAVED = 16  # fp32 weight, two Adam moments, and ZeRO 1 and 2 save a second fp32 weight
CHECKPOINTS = 3  # two are kept while the next is written
FINAL_COPIES = 2  # the final weights lie with the trial and in MLflow
SMALLEST_BPE, LARGEST_BPE = 257, 1 << 20  # as services/data/tokenizers.py trains them; a test holds the two together


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the product: its point and, when refused, why and the nearest valid one."""

    point: DesignPoint
    reason: str = ""
    nearest: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point x size x seed, resolved. `content` is what the id is taken of; `parameters` is counted on the real model."""

    id: str
    name: str
    point: DesignPoint
    size: str
    seed: int
    config: ModelConfig
    recipe: Recipe
    content: dict[str, Any]
    parameters: int

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.recipe.steps * self.recipe.batch_size * self.recipe.seq_len

    @property
    def flops(self) -> float:
        """Forward and backward, 6 per parameter and token (the embedding looked up, not multiplied, is left out)."""
        embedding = self.config.padded_vocab * self.config.size.d_model
        return 6.0 * (self.parameters - embedding) * self.tokens


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a study will do: its trials, the cells it refuses, the backend and the estimate per trial in seconds."""

    study: Study
    trials: tuple[Trial, ...]
    refused: tuple[Cell, ...]
    backend: str
    gflops_per_worker: float

    def seconds(self, trial: Trial) -> float:
        """Estimated wall time of one trial's steps."""
        return trial.flops / (self.gflops_per_worker * 1e9 * self.study.resources.workers)

    @property
    def worker_hours(self) -> float:
        """Estimated hours of workers over all trials."""
        return sum(self.seconds(trial) for trial in self.trials) * self.study.resources.workers / 3600

    def disk_bytes(self, trials: Iterable[Trial]) -> int:
        """Disk that `trials` take at most: checkpoints and final weights. Tokens are counted where they are made."""
        per_parameter = CHECKPOINTS * BYTES_PER_PARAMETER_SAVED + FINAL_COPIES * 4
        return sum(trial.parameters for trial in trials) * per_parameter


def vocabulary(tokenizer: str) -> int:
    """Entries of a tokenizer known by name: gpt2, or bpe-N trained on the corpus. Raises StudyError."""
    if tokenizer == "gpt2":
        return 50257
    match = re.fullmatch("bpe-([1-9][0-9]{2,6})", tokenizer)
    if match is not None and SMALLEST_BPE <= int(match[1]) <= LARGEST_BPE:
        return int(match[1])
    raise StudyError(
        f"data.tokenizer: unknown {tokenizer!r}; use gpt2, or bpe-N with N from {SMALLEST_BPE} to {LARGEST_BPE}, "
        "such as bpe-2048"
    )


def _vocab_size(data: Data) -> int:
    return vocabulary(data.tokenizer) if data.recall is None else data.recall.vocab_size


def cells(study: Study) -> list[Cell]:
    """Every distinct cell of the study's space, in file order.

    Raises StudyError for a misspelt cell, however many others of its block are valid, and for a block with no valid cell.
    """
    found: dict[DesignPoint, Cell] = {}
    for index, grid in enumerate(study.space):
        block = [_judge(point, index) for point in _product(grid)]
        if all(cell.reason for cell in block):
            first = block[0]
            nearest = f"nearest valid: {first.nearest}" if first.nearest else "change one of its axes"
            raise StudyError(f"space.{index} has no valid point: {_as_written(first.point)}: {first.reason}; {nearest}")
        found.update((cell.point, cell) for cell in block)
    return list(found.values())


def _as_written(point: DesignPoint) -> str:
    return ", ".join(f"{key}={value}" for key, value in point.to_dict().items() if value is not None)


def _judge(point: DesignPoint, block: int) -> Cell:
    try:
        point.check()
    except Misspelt as error:
        raise StudyError(f"space.{block}: {error}") from error
    except Refusal as refusal:
        return Cell(point=point, reason=refusal.reason, nearest=str(refusal.nearest or ""))
    return Cell(point=point)


def _product(grid: Grid) -> list[DesignPoint]:
    axes = (grid.granularity, grid.share, grid.position, grid.form)
    lists: list[list[Any]] = [list(axis) if isinstance(axis, list) else [axis] for axis in axes]
    return [
        DesignPoint(decay=decay, p=p, granularity=granularity, share=share, position=position, form=form)
        for (decay, p), granularity, share, position, form in itertools.product(_decays(grid.decay), *lists)
    ]


def _decays(choice: DecayChoice | list[DecayChoice]) -> list[tuple[str, float | None]]:
    if isinstance(choice, list):
        return [pair for item in choice for pair in _decays(item)]
    if isinstance(choice, str):
        return [(choice, None)]
    return [(name, float(p)) for name, values in choice.items() for p in (values if isinstance(values, list) else [values])]


def make_plan(study: Study) -> Plan:
    """Resolves a study into trials.

    Raises StudyError for a space that is misspelt or has a block without a valid cell, an unknown tokenizer, a batch the
    ranks cannot share, and a budget that is exceeded.
    """
    try:
        return _resolve(study)
    except StudyError as error:
        raise StudyError(f"{study.where}: {error}") from error


def _resolve(study: Study) -> Plan:
    judged = cells(study)
    _check_batch(study)
    trials = tuple(
        _trial(study, cell.point, size, seed)
        for size in dict.fromkeys(study.sizes)
        for cell in judged
        if not cell.reason
        for seed in dict.fromkeys(study.seeds)
    )
    for trial in trials:
        study.data.check_length(trial.recipe.seq_len)
    rate = study.resources.assumed_gflops_per_worker or _assumed_gflops(study)
    refused = tuple(cell for cell in judged if cell.reason)
    draft = Plan(study=study, trials=trials, refused=refused, backend="warm", gflops_per_worker=rate)
    plan = dataclasses.replace(draft, backend=_backend(draft))
    _check_budget(plan)
    return plan


def _trial(study: Study, point: DesignPoint, size: str, seed: int) -> Trial:
    config = ModelConfig(
        point=point,
        size=get_size(size),
        vocab_size=_vocab_size(study.data),
        inner_gain_init=study.model.inner_gain_init,
    )
    recipe = study.to_recipe()
    content: dict[str, Any] = {
        "config": config.to_dict(),
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "data": study.data.model_dump(exclude={"workers"}),
    }
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return Trial(
        id=digest[:12],
        name=f"{point.name}-{size}-s{seed}",
        point=point,
        size=size,
        seed=seed,
        config=config,
        recipe=recipe,
        content=content,
        parameters=count_parameters(config),
    )


def _assumed_gflops(study: Study) -> float:
    resources = study.resources
    if resources.gpus_per_worker > 0:
        return GPU_GFLOPS * min(resources.gpus_per_worker, 1.0)
    return CPU_GFLOPS_PER_THREAD * resources.threads_per_worker


def _backend(plan: Plan) -> str:
    asked = plan.study.resources.backend
    if asked != "auto":
        return asked
    return "warm" if max(plan.seconds(trial) for trial in plan.trials) < WARM_BELOW_S else "train"


def _check_batch(study: Study) -> None:
    recipe, resources = study.to_recipe(), study.resources
    if recipe.batch_size % resources.workers:
        raise StudyError(
            f"recipe.batch_size {recipe.batch_size} cannot be shared by resources.workers {resources.workers}; "
            "make one a multiple of the other"
        )
    if resources.workers > 1 and 0 < resources.gpus_per_worker < 1:
        raise StudyError(
            f"resources.gpus_per_worker {resources.gpus_per_worker:g} with {resources.workers} workers puts two ranks on one "
            "GPU, which NCCL refuses; use gpus_per_worker: 1, or one worker a trial"
        )
    per_rank = recipe.batch_size // resources.workers
    micro = resources.micro_batch_size or per_rank
    if per_rank % micro:
        raise StudyError(
            f"resources.micro_batch_size {micro} does not divide the {per_rank} sequences of a rank; choose a divisor"
        )


def _check_budget(plan: Plan) -> None:
    budget = plan.study.budget
    if budget.max_trials is not None and len(plan.trials) > budget.max_trials:
        raise StudyError(
            f"budget.max_trials is {budget.max_trials}, the space has {len(plan.trials)} trials; "
            "narrow the space or raise the budget"
        )
    if budget.max_hours is not None and plan.worker_hours > budget.max_hours:
        raise StudyError(
            f"budget.max_hours is {budget.max_hours:g}, the plan needs about {plan.worker_hours:.2f} worker-hours; "
            "narrow the space, shorten the recipe or raise the budget"
        )
