"""Step logs and results as a trial leaves them, and what MLflow has of them."""

import json
from typing import Any

from services.study.result import LayerProfile, TrialResult
from services.study.storage import Storage
from services.track.runs import Tracker

DATA = {"source": "sotu", "digest": "d" * 64}


def record(step: int, speed: float = 1000.0) -> dict[str, Any]:
    """One line of a step log; the speed is what differs between two runs over the same step."""
    return {"step": step, "train/loss": 5.0 - step / 128, "train/tokens_per_second": speed}


def log_of(steps: range, speed: float = 1000.0) -> bytes:
    """The lines of a step log."""
    return b"".join(json.dumps(record(step, speed)).encode() + b"\n" for step in steps)


def points(tracker: Tracker, run_id: str, key: str) -> list[tuple[int, float]]:
    """Everything MLflow stores of one metric, duplicates included."""
    return sorted((metric.step, metric.value) for metric in tracker._client.get_metric_history(run_id, key))


def result_of(trial: str, steps: int) -> TrialResult:
    """A result as a trial of `steps` steps leaves it."""
    layers = tuple(LayerProfile(layer=n, median=0.9, p25=0.8, p75=0.95, mean=0.88, min=0.1, max=0.99) for n in (1, 2))
    point = {"decay": "gla", "p": None, "granularity": "vector", "share": False, "position": "none", "form": "as_run"}
    return TrialResult(
        trial_id=trial, name=trial, method="gla-vector", point=point, size="nano", seed=1, parameters=10, steps=steps,
        tokens=100, held_out_loss=2.5, train_loss_last_100=2.25, unigram_entropy=6.0, vocab_size=512,
        tokens_per_second=99.0, wall_s=1.0, decay_profile=layers, initial_decay_profile=layers, weights_sha256="ab",
        order_hash="cd", world_size=1, zero_stage=0,
    )  # fmt: skip


def write_outcome(storage: Storage, trial: str, result: TrialResult, weights: bytes = b"weights") -> None:
    """The files of a finished trial."""
    storage.write(f"trials/{trial}/model/model.safetensors", weights)
    storage.write(f"trials/{trial}/model/config.json", b"{}")
    storage.write(f"trials/{trial}/result.json", result.to_json().encode())
    storage.write(f"trials/{trial}/histogram.png", b"png")
    for step in (5, 10):
        storage.write(f"trials/{trial}/checkpoints/step_{step:08d}/COMPLETE.json", b"{}")
