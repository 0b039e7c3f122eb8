"""Puts finished trials into a storage as a run would leave them, with made-up figures."""

from __future__ import annotations

from typing import Any

from services.study.ledger import Ledger
from services.study.manifest import next_manifest, write_manifest
from services.study.mechanism import mechanism_code
from services.study.plan import Plan, Trial
from services.study.result import TrialResult
from services.study.storage import Storage

DATA = {"digest": "d" * 64, "source": "sotu", "path": "/data", "spec": {}}


def result_of(trial: Trial, **changes: Any) -> TrialResult:
    """A plausible result of a trial."""
    values: dict[str, Any] = {
        "trial_id": trial.id, "name": trial.name, "method": trial.method, "point": trial.point.to_dict(), "size": trial.size,
        "seed": trial.seed, "parameters": trial.parameters, "steps": trial.recipe.steps, "tokens": trial.tokens,
        "held_out_loss": 4.0, "train_loss_last_100": 3.9, "unigram_entropy": 6.0, "vocab_size": trial.config.vocab_size,
        "tokens_per_second": 1000.0, "wall_s": 9.0, "decay_profile": (), "initial_decay_profile": (),
        "weights_sha256": f"{trial.id}w", "order_hash": f"{trial.seed}o", "world_size": 2, "zero_stage": 0, "device": "cpu",
        "varied": trial.varied, "mechanism": mechanism_code(trial.point),
    }  # fmt: skip
    return TrialResult.model_validate(values | changes)


def start(plan: Plan, storage: Storage, **data: Any) -> None:
    """The study's manifest."""
    write_manifest(storage, next_manifest(None, plan, DATA | data))


def finish(storage: Storage, *results: TrialResult) -> None:
    """Results and their events."""
    for result in results:
        storage.write(f"trials/{result.trial_id}/result.json", result.to_json().encode())
        Ledger(storage).append("finished", result.trial_id)
