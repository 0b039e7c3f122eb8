"""What Tune schedules: one trial, handed to whichever backend the plan chose. Runs in a Tune actor, trains nothing itself.

A worker that dies is answered here, without Tune: the death goes into the ledger with what is known of it, and the trial is
tried again on new workers. Tune's own retries are left for the loss of whole nodes, which take this actor with them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ray
from ray import tune

from services.study.fence import Fence, Fenced
from services.study.ledger import Ledger
from services.study.quarantine import evidence_of, last_step
from services.study.storage import Storage
from services.train.job import TrialJob
from services.train.notice import due

log = logging.getLogger(__name__)


def run_trial(
    config: dict[str, Any],
    jobs: dict[str, dict[str, Any]],
    backend: str,
    cpus: float,
    retries: int,
    patience: int,
    alone: bool,
) -> None:
    """Trains `jobs[config["trial"]]`, again after up to `retries` deaths of its workers.

    A trial that failed for good, or died `patience` times at one place, is recorded in the ledger and reported, not raised. So
    is one that ran out of memory while it was not `alone`: its neighbours go on, and the driver starts it again after them.
    """
    job = TrialJob(**jobs[config["trial"]])
    try:
        tune.report({"trial": job.trial, "ended": _train(job, _backend(backend, cpus), retries, patience, alone)})
    except Fenced as replaced:
        log.warning("trial %s: %s", job.trial, replaced)
        tune.report({"trial": job.trial, "ended": "fenced"})


def _backend(name: str, cpus: float) -> Callable[[TrialJob], dict[str, Any]]:
    if name == "warm":
        from services.schedule.pool import train_in_pool

        return lambda job: train_in_pool(job, cpus)
    from services.schedule.group import train_in_group

    return lambda job: train_in_group(job, cpus)


def _train(job: TrialJob, train: Callable[[TrialJob], dict[str, Any]], retries: int, patience: int, alone: bool) -> str:
    """Ends with how the trial ended: result, failed, quarantined, preempted, crowded or fenced."""
    storage = Storage(job.storage)
    ledger = Ledger(storage, Fence(storage=storage, driver=job.driver))
    deaths = 0
    while True:
        if ledger.states([job.trial])[job.trial].state == "finished":  # before the node of this actor was lost
            return "result"
        if due(storage, job.driver):
            return "preempted"
        try:
            answer = train(job)
        except Exception as error:  # whatever Ray, torch or the loop raised: the workers are gone
            if _node_was_lost(error):
                raise
            cause = first_cause(error)
            ledger.append("died", job.trial, cause=cause, **last_step(ledger, storage, job.trial))
            deaths += 1
            evidence = evidence_of(ledger, job.trial, patience)
            if evidence is not None:
                ledger.append("quarantined", job.trial, **evidence)
                return "quarantined"
            if not alone and ran_out_of_memory(error):
                return "crowded"
            if deaths > retries:
                ledger.append("failed", job.trial, reason=f"workers died: {cause}")
                return "failed"
            continue
        if "failed" in answer:
            ledger.append("failed", job.trial, reason=answer["failed"])
        return next(iter(answer))


def _node_was_lost(error: Exception) -> bool:
    return isinstance(error, ray.exceptions.NodeDiedError) or "node has died" in str(error).lower()


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what a worker lacked: Ray's monitor, CUDA's allocator, torch's on the host, or Python's says so."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return True
    said = str(error)
    return any(words in said for words in ("OutOfMemoryError", "CUDA out of memory", "DefaultCPUAllocator", "MemoryError"))


def first_cause(error: BaseException) -> str:
    """One line of what killed a worker: the last line of Ray's text, where it puts the reason."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process ended without a word (killed, or out of memory)"
    return (lines or [type(error).__name__])[-1][:500]
