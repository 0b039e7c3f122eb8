"""What Tune schedules: one trial, handed to whichever backend the plan chose. Runs in a Tune actor, trains nothing itself."""

from __future__ import annotations

from typing import Any

from ray import tune

from services.study.ledger import Ledger
from services.study.storage import Storage
from services.train.job import TrialJob


def run_trial(config: dict[str, Any], jobs: dict[str, dict[str, Any]], backend: str, cpus: float, retries: int) -> None:
    """Trains `jobs[config["trial"]]`. A trial that failed for good is recorded in the ledger and reported, not raised."""
    job = TrialJob(**jobs[config["trial"]])
    if backend == "warm":
        from services.schedule.pool import train_in_pool

        answer = train_in_pool(job, cpus)
    else:
        from services.schedule.group import train_in_group

        answer = train_in_group(job, cpus, retries)
    reason = answer.get("failed")
    if reason:
        Ledger(Storage(job.storage)).append("failed", job.trial, reason=reason)
    tune.report({"failed": bool(reason), "trial": job.trial})
