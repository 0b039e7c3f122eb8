"""What a plan will take on named hardware: time, memory, disk, money, and how much of it the ledger calls done already.

What is unusual: a refusal never depends on what is said here. `budget` is judged by the plan at its assumed rate, so that a
study cannot be refused because another one ran slowly; a budget that measured rates exceed is a warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from services.study.accelerators import Accelerator, get_accelerator
from services.study.file import StudyError
from services.study.ledger import Ledger, TrialState
from services.study.memory import STAGES, Memory, Ranks, memory_of
from services.study.plan import Plan, Trial
from services.study.rates import Rates, assumed_rate, measurements
from services.study.storage import Storage, StorageError

TAKEN_GIB = 2.0  # of a GPU, by the driver, CUDA's context and NCCL


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says of the hardware; `price` is money for one GPU (or worker) and hour."""

    gpu: Accelerator | None = None
    price: float | None = None
    mfu: float | None = None


def asked_for(gpu: str | None, price: float | None, mfu: float | None) -> Asked:
    """The command line's words checked. Raises StudyError."""
    if mfu is not None and not 0 < mfu <= 1:
        raise StudyError(f"--mfu is a share of the peak, above 0 and at most 1, given {mfu:g}")
    if price is not None and not 0 <= price < math.inf:
        raise StudyError(f"--price is money for an hour, 0 or more, given {price:g}")
    if mfu is not None and gpu is None:
        raise StudyError("--mfu is a share of a GPU's peak; name it with --gpu")
    return Asked(gpu=None if gpu is None else get_accelerator(gpu), price=price, mfu=mfu)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One plan on its hardware. `states` is the ledger's word on every trial; `unread` says why it could not be read."""

    plan: Plan
    asked: Asked
    rates: Rates
    states: dict[str, TrialState]
    unread: str = ""

    def seconds(self, trial: Trial) -> float:
        """Estimated wall time of one trial's steps."""
        return trial.flops / (self.rates.of(trial).gflops * 1e9 * self.plan.study.resources.workers)

    def device_hours(self, trials: Iterable[Trial]) -> float:
        """Hours of GPUs, or of workers where a trial has no GPU."""
        resources = self.plan.study.resources
        return sum(map(self.seconds, trials)) * resources.workers * (resources.gpus_per_worker or 1.0) / 3600

    def money(self, trials: Iterable[Trial]) -> float | None:
        """What `trials` cost at the given price; None without one."""
        return None if self.asked.price is None else self.device_hours(trials) * self.asked.price

    @cached_property
    def to_do(self) -> list[Trial]:
        """The trials that the ledger does not call finished."""
        return [trial for trial in self.plan.trials if self.states[trial.id].state != "finished"]

    @property
    def on_gpus(self) -> bool:
        """Whether hours are hours of GPUs."""
        return self.asked.gpu is not None or self.plan.study.resources.gpus_per_worker > 0

    def memory(self, trial: Trial, stage: int | None = None, micro_batch: int | None = None) -> Memory:
        """Memory of one rank, as the study says or with another ZeRO stage or micro-batch."""
        resources = self.plan.study.resources
        ranks = Ranks(
            stage=resources.zero_stage if stage is None else stage,
            workers=resources.workers,
            micro_batch=micro_batch or resources.micro_batch_size or trial.recipe.batch_size // resources.workers,
        )
        return memory_of(trial.config, trial.recipe, ranks)

    def fits(self, trial: Trial, stage: int | None = None, micro_batch: int | None = None) -> bool:
        """Whether one rank has room on the GPU that was asked about, or on its share of one."""
        assert self.asked.gpu is not None, "only a named GPU has a size"
        share = min(self.plan.study.resources.gpus_per_worker or 1.0, 1.0)
        return self.memory(trial, stage, micro_batch).total <= (self.asked.gpu.memory_gib - TAKEN_GIB) * share * 2**30

    def remedy(self, trial: Trial) -> str:
        """The smallest change that makes a trial fit: a higher ZeRO stage, a smaller micro-batch, or both."""
        stages = [stage for stage in STAGES if stage > self.plan.study.resources.zero_stage]
        for stage in stages:
            if self.fits(trial, stage):
                return f"zero_stage: {stage}"
        for micro_batch in self._smaller(trial):
            if self.fits(trial, None, micro_batch):
                return f"micro_batch_size: {micro_batch}"
            for stage in stages:
                if self.fits(trial, stage, micro_batch):
                    return f"micro_batch_size: {micro_batch} and zero_stage: {stage}"
        return "more workers or a larger GPU"

    def _smaller(self, trial: Trial) -> list[int]:
        """Micro-batches below the study's that divide a rank's sequences, largest first."""
        resources = self.plan.study.resources
        per_rank = trial.recipe.batch_size // resources.workers
        now = resources.micro_batch_size or per_rank
        return [size for size in range(now - 1, 0, -1) if per_rank % size == 0]


def forecast(plan: Plan, asked: Asked) -> Forecast:
    """Reads what the storage knows of this plan; writes nothing."""
    try:
        root = Storage(plan.study.storage)
        found = measurements(root)
        states = Ledger(root.child(plan.study.name)).states(trial.id for trial in plan.trials)
        unread = ""
    except (StorageError, OSError, ImportError) as error:
        found, states, unread = [], {trial.id: TrialState(state="waiting") for trial in plan.trials}, str(error)
    assumed = assumed_rate(plan, asked.gpu, asked.mfu)
    rates = Rates(study=plan.study, assumed=assumed, gpu=asked.gpu, measurements=tuple(found))
    return Forecast(plan=plan, asked=asked, rates=rates, states=states, unread=unread)
