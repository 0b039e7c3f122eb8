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

from services.study import faults
from services.study.result import TrialResult
from services.study.secrets import first_line
from services.study.storage import Storage
from services.track.runs import MlflowException, Tracker

log = logging.getLogger(__name__)
STEPS = "steps.jsonl"
PRINT_EVERY_S = 10.0
RETRY_S = 15.0
SEND_AT_ONCE = 500  # steps; what is sent is forgotten, so a failure in between repeats at most these
AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
SUMMARY = (
    "held_out_loss", "held_out_accuracy", "train_loss_last_100", "unigram_entropy", "parameters", "state_size",
    "tokens_per_second", "weights_sha256",
)  # fmt: skip


@dataclass(kw_only=True)
class Delivery:
    """How far one trial's log has been read and sent."""

    name: str
    run_id: str
    steps: int
    offset: int = 0
    read_step: int = 0
    sent_step: int | None = None
    marked_running: bool = False
    waiting: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    printed: tuple[int, float] = (0, 0.0)


class Courier:
    """Call `poll` every second or so; `deliver_result` when a trial is finished."""

    def __init__(
        self,
        tracker: Tracker,
        storage: Storage,
        started_ms: int,
        say: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` raises Fenced when this driver was replaced; it is asked before anything is sent."""
        self._check = check
        self._tracker, self._storage, self._started_ms, self._say = tracker, storage, started_ms, say
        self._deliveries: dict[str, Delivery] = {}
        self._retry_at = 0.0
        self.patient = True

    def add(self, trial: str, name: str, run_id: str, steps: int) -> None:
        """Watches a trial's log."""
        self._deliveries[trial] = Delivery(name=name, run_id=run_id, steps=steps)

    def ready(self) -> bool:
        """Whether MLflow may be asked again; after a failure it is left alone for RETRY_S (while `patient`)."""
        return not self.patient or time.monotonic() >= self._retry_at

    def poll(self) -> None:
        """Reads what is new in every log, prints progress, and sends what MLflow takes."""
        for trial, delivery in self._deliveries.items():
            self._read(trial, delivery)
            self._print(delivery)
        if self.ready():
            self.send_all()

    def send_all(self) -> bool:
        """Sends everything waiting; False when MLflow did not take all of it (the rest is tried again later).

        A run that MLflow refuses does not hold up the others; a server that is away is asked once.
        """
        taken = True
        self._check()
        for delivery in self._deliveries.values():
            try:
                self._send(delivery)
            except (MlflowException, OSError) as error:
                log.warning("MLflow did not take steps of %s (%s); training goes on, they are kept and sent later",
                            delivery.name, first_line(error))  # fmt: skip
                self._retry_at = time.monotonic() + RETRY_S
                taken = False
                if not isinstance(error, MlflowException) or error.error_code in AWAY:
                    break
        return taken

    def deliver_result(self, trial: str, result: TrialResult, artifact_limit_bytes: float) -> bool:
        """Sends a finished trial's rest, files and figures and ends its run; False when MLflow did not take it.

        A step log that lacks steps is no reason to call the trial tracked: False, and a warning that names the file.
        """
        self._check()
        delivery = self._deliveries[trial]
        self._read(trial, delivery)
        if delivery.read_step < result.steps:
            log.warning("%s/trials/%s/%s ends at step %d of %d; restore it, or MLflow will not have the rest",
                        self._storage.root, trial, STEPS, delivery.read_step, result.steps)  # fmt: skip
            return False
        try:
            self._send(delivery)
            self._files(trial, delivery.run_id, artifact_limit_bytes)
            values = json.loads(result.to_json())
            medians = {f"median_layer_{row.layer:02d}": round(row.median, 6) for row in result.decay_profile}
            summary = {key: values[key] for key in SUMMARY if values[key] is not None}
            summary["kernels"] = "; ".join(values.get("kernels", ()))
            self._tracker.set_summary(delivery.run_id, summary | medians)
            self._tracker.mark(delivery.run_id, "FINISHED")
        except (MlflowException, OSError) as error:
            log.warning("MLflow did not take the result of %s (%s); it is kept and sent later, at the latest by the next run",
                        delivery.name, first_line(error))  # fmt: skip
            self._retry_at = time.monotonic() + RETRY_S
            return False
        return True

    def mark_ended(self, trial: str, status: str) -> None:
        """Ends the run of a trial that did not finish, so that none stays RUNNING."""
        self._check()
        try:
            self._tracker.mark(self._deliveries[trial].run_id, status)
        except (MlflowException, OSError) as error:
            log.warning("MLflow did not take the end of %s (%s)", self._deliveries[trial].name, first_line(error))

    def _read(self, trial: str, delivery: Delivery) -> None:
        """Takes in the whole lines that are new. A log that was cut back to a checkpoint is read again from its start."""
        name = f"trials/{trial}/{STEPS}"
        if not self._read_on(name, delivery):
            delivery.offset, delivery.last = 0, {}
            self._read_on(name, delivery)

    def _read_on(self, name: str, delivery: Delivery) -> bool:
        """Reads from the offset; False where what stands there does not continue what was read before."""
        data = self._storage.read_from(name, delivery.offset)
        if data is None:
            return False
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            record = _record(line)
            if record is None or record["step"] != delivery.last.get("step", 0) + 1:
                return False
            delivery.offset += len(line)
            delivery.last = record
            if record["step"] > delivery.read_step:  # a known step written again has another speed, and is the same point
                delivery.waiting.append(record)
                delivery.read_step = record["step"]
        return True

    def _send(self, delivery: Delivery) -> None:
        if not delivery.waiting:
            return
        if delivery.sent_step is None:
            delivery.sent_step = self._tracker.last_step(delivery.run_id)
        delivery.waiting = [record for record in delivery.waiting if record["step"] > delivery.sent_step]
        if delivery.waiting and not delivery.marked_running:
            self._tracker.mark(delivery.run_id, "RUNNING")
            delivery.marked_running = True
        while delivery.waiting:
            self._check()
            delivery.sent_step = self._tracker.log_steps(delivery.run_id, delivery.waiting[:SEND_AT_ONCE], self._started_ms)
            faults.point("driver.send")
            del delivery.waiting[:SEND_AT_ONCE]

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
        if not delivery.last or done == step or (now - when < PRINT_EVERY_S and done < delivery.steps):
            return
        rate = delivery.last.get("train/tokens_per_second", 0.0)
        held = delivery.last.get("held_out/loss")
        ending = f"  held-out {held:.4f}" if held is not None else ""
        right = delivery.last.get("held_out/accuracy")
        ending += f", {right:.1%} right" if right is not None else ""
        self._say(
            f"{delivery.name:<34} step {done:>6}/{delivery.steps}  loss {delivery.last['train/loss']:.4f}"
            f"  {rate:,.0f} tokens/s{ending}"
        )
        delivery.printed = (done, now)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
