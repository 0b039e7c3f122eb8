"""From a study to its trials: point x size x recipe x seed, and what each will cost at an assumed rate.

Nothing here touches a disk. A trial's id is a hash of everything its result depends on by design (point, size, seed, recipe,
data, model options), so the same trial has the same id on every machine, in every attempt and in every study. Surprising:
the number of ranks is not part of the id, because the global batch does not depend on it; it is held in the manifest. Keys
that came after the first release are part of an id only where they differ from their default, so that no id ever changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from decay_core.design import DesignPoint
from decay_core.model import ModelConfig
from decay_core.recipe import Recipe
from decay_core.sizes import get_size
from services.study.cells import Cell, cells, fitting
from services.study.cost import count_model, flops_per_token
from services.study.file import Data, Study, StudyError, VariedRecipe, spelled
from services.study.match import matched
from services.study.storage import canonical_json

# Sustained rates used for estimates, as benchmarks/step_rate.py measures them: one CPU thread of two busy ones at nano size
# with the chunked scan, and an H100 in bf16 at 160M to 410M with the Triton scan (the delta rule has no kernel yet and is
# slower). `resources.assumed_gflops_per_worker` replaces them.
CPU_GFLOPS_PER_THREAD = 30.0
GPU_GFLOPS = 130_000.0
# A Train group costs 16-23 s to start and stop, a warm worker 0.3 s: below this length the warm pool is worth it.
WARM_BELOW_S = 900.0
BYTES_PER_PARAMETER_SAVED = 16  # fp32 weight, two Adam moments, and ZeRO 1 and 2 save a second fp32 weight
CHECKPOINTS = 3  # two are kept while the next is written
FINAL_COPIES = 2  # the final weights lie with the trial and in MLflow
SMALLEST_BPE, LARGEST_BPE = 257, 1 << 20  # as services/data/tokenizers.py trains them; a test holds the two together
# The keys of the first release: always part of an id.
FIRST_POINT = ("decay", "p", "granularity", "share", "position", "form")
FIRST_DATA = ("source", "tokenizer", "boundary", "held_out_percent", "text_field", "max_documents")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point x size x recipe x seed, resolved.

    `content` is what the id is taken of; `parameters` is counted on the real model; `varied` is what `vary` set in the recipe.
    """

    id: str
    name: str
    point: DesignPoint
    size: str
    seed: int
    config: ModelConfig
    recipe: Recipe
    content: dict[str, Any]
    parameters: int
    varied: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def method(self) -> str:
        """What seeds of one size are compared under: the point, and the varied part of the recipe."""
        return " ".join([self.point.name, *(f"{key}={spelled(value)}" for key, value in self.varied.items())])

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.recipe.steps * self.recipe.batch_size * self.recipe.seq_len

    @property
    def flops(self) -> float:
        """Forward and backward of all tokens, as services/study/cost.py counts them."""
        return flops_per_token(self.config, self.recipe.seq_len) * self.tokens


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
    recipes = study.recipes()
    for one in recipes:
        _check_batch(study, one.recipe)
        study.data.check_length(one.recipe.seq_len)
    refused = [cell for cell in judged if cell.reason]
    trials: list[Trial] = []
    for size in dict.fromkeys(study.sizes):
        configs, too = fitting(_config(study, cell.point, size) for cell in judged if not cell.reason)
        refused += too
        configs = matched(configs) if study.match == "parameters" else configs
        trials += [
            _trial(study, config, one, seed) for config in configs for one in recipes for seed in dict.fromkeys(study.seeds)
        ]
    rate = study.resources.assumed_gflops_per_worker or _assumed_gflops(study)
    draft = Plan(study=study, trials=tuple(trials), refused=tuple(refused), backend="warm", gflops_per_worker=rate)
    plan = dataclasses.replace(draft, backend=_backend(draft))
    _check_budget(plan)
    return plan


def _config(study: Study, point: DesignPoint, size: str) -> ModelConfig:
    return ModelConfig(
        point=point,
        size=get_size(size),
        vocab_size=_vocab_size(study.data),
        inner_gain_init=study.model.inner_gain_init,
    )


def _trial(study: Study, config: ModelConfig, one: VariedRecipe, seed: int) -> Trial:
    point, size = config.point, config.size.name
    content: dict[str, Any] = {
        "config": config.to_dict() | {"point": _said(point.to_dict(), _defaults(DesignPoint), FIRST_POINT)},
        "seed": seed,
        "recipe": dataclasses.asdict(one.recipe),
        "data": _said(study.data.model_dump(exclude={"workers"}), Data().model_dump(), FIRST_DATA),  # type: ignore[call-arg]
    }
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return Trial(
        id=digest[:12],
        name="-".join(word for word in (point.name, size, one.label, f"s{seed}") if word),
        point=point,
        size=size,
        seed=seed,
        config=config,
        recipe=one.recipe,
        content=content,
        parameters=count_model(config).parameters,
        varied=one.varied,
    )


def _said(values: dict[str, Any], defaults: dict[str, Any], first: Collection[str]) -> dict[str, Any]:
    """`values` less the keys that are younger than the first release and have their default."""
    return {key: value for key, value in values.items() if key in first or value != defaults.get(key)}


def _defaults(kind: type[DesignPoint]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind)}


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


def _check_batch(study: Study, recipe: Recipe) -> None:
    resources = study.resources
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
