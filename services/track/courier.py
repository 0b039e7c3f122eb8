"""The courier: carries what trials wrote to their step logs into MLflow, and into one-line progress, each step once.

It runs in the driver, beside Tune, and reads storage only. What MLflow has not taken stays in the log and is tried again;
training never waits for it. After a restart it asks MLflow for the last step it has and goes on from there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services.study.result import TrialResult
from services.study.storage import Storage
from services.track.runs import MlflowException, Tracker

log = logging.getLogger(__name__)
STEPS = "steps.jsonl"
PRINT_EVERY_S = 10.0
RETRY_S = 15.0
SUMMARY = ("held_out_loss", "train_loss_last_100", "unigram_entropy", "parameters", "tokens_per_second", "weights_sha256")


@dataclass(kw_only=True)
class Delivery:
    """How far one trial's log has been read and sent."""

    name: str
    run_id: str
    steps: int
    offset: int = 0
    rest: bytes = b""
    read_step: int = 0
    sent_step: int | None = None
    marked_running: bool = False
    waiting: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    printed: tuple[int, float] = (0, 0.0)


class Courier:
    """Call `poll` every second or so; `deliver_result` when a trial is finished."""

    def __init__(self, tracker: Tracker, storage: Storage, started_ms: int, say: Callable[[str], None]) -> None:
        self._tracker, self._storage, self._started_ms, self._say = tracker, storage, started_ms, say
        self._deliveries: dict[str, Delivery] = {}
        self._retry_at = 0.0

    def add(self, trial: str, name: str, run_id: str, steps: int) -> None:
        """Watches a trial's log."""
        self._deliveries[trial] = Delivery(name=name, run_id=run_id, steps=steps)

    def poll(self) -> None:
        """Reads what is new in every log, prints progress, and sends what MLflow takes."""
        for trial, delivery in self._deliveries.items():
            self._read(trial, delivery)
            self._print(delivery)
        if time.monotonic() >= self._retry_at:
            self.send_all()

    def send_all(self) -> bool:
        """Sends everything waiting; False when MLflow did not take it (it is tried again later)."""
        try:
            for delivery in self._deliveries.values():
                self._send(delivery)
        except (MlflowException, OSError) as error:
            first = str(error).splitlines()[0][:200]
            log.warning("MLflow did not answer (%s); training goes on, steps are kept and sent later", first)
            self._retry_at = time.monotonic() + RETRY_S
            return False
        return True

    def deliver_result(self, trial: str, result: TrialResult, artifact_limit_bytes: float) -> bool:
        """Sends a finished trial's rest, files and figures and ends its run; False when MLflow did not take it."""
        delivery = self._deliveries[trial]
        self._read(trial, delivery)
        if not self.send_all():
            return False
        try:
            self._files(trial, delivery.run_id, artifact_limit_bytes)
            values = json.loads(result.to_json())
            medians = {f"median_layer_{row.layer:02d}": round(row.median, 6) for row in result.decay_profile}
            self._tracker.set_summary(delivery.run_id, {key: values[key] for key in SUMMARY} | medians)
            self._tracker.mark(delivery.run_id, "FINISHED")
        except (MlflowException, OSError) as error:
            log.warning("MLflow did not take the result of %s (%s); run again to send it", delivery.name, error)
            return False
        return True

    def mark_ended(self, trial: str, status: str) -> None:
        """Ends the run of a trial that did not finish, so that none stays RUNNING."""
        try:
            self._tracker.mark(self._deliveries[trial].run_id, status)
        except (MlflowException, OSError) as error:
            log.warning("MLflow did not take the end of %s (%s)", self._deliveries[trial].name, error)

    def _read(self, trial: str, delivery: Delivery) -> None:
        name = f"trials/{trial}/{STEPS}"
        data = self._storage.read_from(name, delivery.offset)
        if data is None:  # missing, or cut back to a checkpoint: read it again, known steps are skipped below
            delivery.offset, delivery.rest, delivery.last = 0, b"", {}
            data = self._storage.read_from(name, 0) or b""
        delivery.offset += len(data)
        lines = (delivery.rest + data).split(b"\n")
        delivery.rest = lines.pop()
        for line in lines:
            try:
                record = json.loads(line)
                if record["step"] > delivery.last.get("step", 0) + 1:
                    raise ValueError("a step is missing")
            except ValueError:  # the log was cut back and grew past the old offset: start over
                delivery.offset, delivery.rest, delivery.last = 0, b"", {}
                return
            delivery.last = record
            if record["step"] > delivery.read_step:
                delivery.waiting.append(record)
                delivery.read_step = record["step"]

    def _send(self, delivery: Delivery) -> None:
        if not delivery.waiting:
            return
        if delivery.sent_step is None:
            delivery.sent_step = self._tracker.last_step(delivery.run_id)
        if not delivery.marked_running:
            self._tracker.mark(delivery.run_id, "RUNNING")
            delivery.marked_running = True
        while delivery.waiting:
            batch = [record for record in delivery.waiting[:500] if record["step"] > delivery.sent_step]
            if batch:
                delivery.sent_step = self._tracker.log_steps(delivery.run_id, batch, self._started_ms)
            del delivery.waiting[:500]

    def _files(self, trial: str, run_id: str, limit_bytes: float) -> None:
        with self._storage.local_copy(f"trials/{trial}") as folder:
            weights = folder / "model" / "model.safetensors"
            if weights.stat().st_size <= limit_bytes:
                self._tracker.log_folder(run_id, folder / "model", "model")
            else:
                where = f"{self._storage.root}/trials/{trial}/model/model.safetensors"
                self._tracker.log_text(run_id, json.dumps({"weights": where}), "model/location.json")
            for name in ("result.json", "histograms.parquet", "histogram.png"):
                if (folder / name).exists():
                    self._tracker.log_file(run_id, folder / name)
            for complete in sorted((folder / "checkpoints").glob("step_*/COMPLETE.json"))[-1:]:
                self._tracker.log_file(run_id, complete, f"checkpoints/{complete.parent.name}")

    def _print(self, delivery: Delivery) -> None:
        step, when = delivery.printed
        now = time.monotonic()
        done = int(delivery.last.get("step", 0))
        if done == step or (now - when < PRINT_EVERY_S and done < delivery.steps):
            return
        rate = delivery.last.get("train/tokens_per_second", 0.0)
        held = delivery.last.get("held_out/loss")
        ending = f"  held-out {held:.4f}" if held is not None else ""
        self._say(
            f"{delivery.name:<34} step {done:>6}/{delivery.steps}  loss {delivery.last['train/loss']:.4f}"
            f"  {rate:,.0f} tokens/s{ending}"
        )
        delivery.printed = (done, now)
