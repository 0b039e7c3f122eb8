"""Runs real studies into real faults and compares what they leave with what a quiet run leaves, bit for bit.

A study is run by `decay run` as a user would, on a cluster of its own. A fault is an entry of the file that DECAY_FAULTS
names (services/study/faults.py); the record that it writes before it acts is the proof that it fired. What is compared is
everything that a study leaves: results, every logged step, weights, optimizer shards and random generators of the last
checkpoint, histograms, the result table and all that MLflow has. Only wall clocks are left out (IGNORED).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from services.study import faults as points
from services.study.ledger import Event, Ledger
from services.study.storage import Storage
from services.train.step_log import parse

IGNORED = {"tokens_per_second", "wall_s", "mlflow_run_id", "train/tokens_per_second", "train_seconds", "tokens/s"}
TIMEOUT_S = 900


def study_dict(name: str = "tiny", steps: int = 24, trials: int = 1, **more: Any) -> dict[str, Any]:
    """A study of `trials` seeds on two ZeRO-2 ranks, a checkpoint every 4 steps: seconds of training."""
    return {
        "name": name,
        "question": "does it end the same?",
        "space": [{"decay": "hgrn2"}],
        "sizes": ["nano"],
        "seeds": list(range(1, trials + 1)),
        "recipe": {
            "steps": steps, "batch_size": 4, "seq_len": 16, "lr": 0.003, "eval_every": 12, "eval_sequences": 4,
            "checkpoint_every": 4, "telemetry_every": 6, **more.pop("recipe", {}),
        },
        "data": {"source": "sotu", "tokenizer": "bpe-300", "max_documents": 40, "held_out_percent": 10},
        "resources": {"workers": 2, "zero_stage": 2, "max_failures": 50, **more.pop("resources", {})},
        **more,
    }  # fmt: skip


@dataclass(kw_only=True)
class Ended:
    """How one `decay run` ended."""

    code: int
    seconds: float
    log: str


@dataclass(kw_only=True)
class Place:
    """One study in a folder of its own, and the faults that wait for it there."""

    folder: Path
    env: dict[str, str]
    study: dict[str, Any] = field(default_factory=study_dict)

    @property
    def root(self) -> Path:
        """Where the study's files are."""
        return self.folder / "runs" / str(self.study["name"])

    @property
    def trials(self) -> list[str]:
        """Trial ids, sorted."""
        folder = self.root / "trials"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def plan(self, faults: list[dict[str, Any]]) -> None:
        """Arms the faults for the runs that follow; what has fired already stays fired."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "faults.json").write_text(json.dumps(faults))

    def start(self, *options: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Starts `decay run` in a session of its own; its words go to `run.log`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "study.yaml"
        path.write_text(yaml.safe_dump(self.study))
        armed = {points.VARIABLE: str(self.folder / "faults.json")} if (self.folder / "faults.json").exists() else {}
        with open(self.folder / "run.log", "a") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "services.cli", "run", str(path), "--storage", str(self.folder / "runs"), *options],
                env={**self.env, **armed, **(env or {})}, stdout=out, stderr=out, text=True, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip

    def run(self, *options: str, env: dict[str, str] | None = None) -> Ended:
        """`decay run` to its end."""
        begun = time.monotonic()
        process = self.start(*options, env=env)
        try:
            code = process.wait(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        return Ended(code=code, seconds=time.monotonic() - begun, log=self.log())

    def log(self) -> str:
        """What all runs said so far."""
        return (self.folder / "run.log").read_text()

    def run_until_complete(self, most: int) -> list[Ended]:
        """Runs again as a scheduler would, until a run ends with 0; fails after `most` runs."""
        ended: list[Ended] = []
        while len(ended) < most:
            ended.append(self.run())
            if ended[-1].code == 0:
                return ended
        raise AssertionError(f"not complete after {most} runs, exit codes {[one.code for one in ended]}:\n{self.log()}")

    def fired(self) -> list[dict[str, Any]]:
        """Records of the faults that fired, oldest first."""
        found = [json.loads(path.read_text()) for path in (self.folder / "faults.json.fired").glob("*.json")]
        return sorted(found, key=lambda record: record["time"])

    def note(self, name: str, point: str, when: str) -> None:
        """Records a fault that the harness itself brought about."""
        body = {"name": name, "point": point, "phase": when, "where": {}, "time": time.time()}
        (self.folder / "faults.json.fired").mkdir(exist_ok=True)
        (self.folder / "faults.json.fired" / f"{name}.json").write_text(json.dumps(body))

    def events(self) -> list[Event]:
        """The study's ledger."""
        return Ledger(Storage(str(self.root))).events()

    def attempts(self, trial: str) -> list[Event]:
        """Starts of a trial, oldest first."""
        return [event for event in self.events() if event.kind == "attempt" and event.trial == trial]


def without_clocks(value: Any) -> Any:
    """`value` less the ignored fields, at any depth."""
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in IGNORED}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def end_state(place: Place) -> dict[str, Any]:
    """All that a finished study left and that must be equal, by name."""
    state: dict[str, Any] = {"table": _table(place.root / "report" / "table.csv"), "mlflow": _tracked(place)}
    for trial in place.trials:
        folder = place.root / "trials" / trial
        last = sorted((folder / "checkpoints").iterdir())[-1]
        complete = json.loads((last / "COMPLETE.json").read_text())
        state[trial] = {
            "result": without_clocks(json.loads((folder / "result.json").read_text())),
            "steps": without_clocks(parse((folder / "steps.jsonl").read_bytes())),
            "weights": _digest(folder / "model" / "model.safetensors"),
            "histograms": _digest(folder / "histograms.parquet"),
            "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
            "position": without_clocks(complete["position"]),
            # weights, optimizer shards and random generators of every rank
            "state": {name: digest for name, digest in complete["files"].items() if name.endswith(".pt")},
        }
    return state


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _table(path: Path) -> list[dict[str, str]]:
    return [without_clocks(row) for row in csv.DictReader(io.StringIO(path.read_text()))]


def _tracked(place: Place) -> dict[str, Any]:
    """Runs, statuses and points of MLflow's store by trial; several points of one (metric, step) show as several."""
    store = sqlite3.connect(place.folder / "runs" / "mlflow.db")
    try:
        tags = "select t.value, r.run_uuid, r.status from runs r join tags t on t.run_uuid = r.run_uuid where t.key = ?"
        runs = store.execute(tags, ("decay.trial",)).fetchall()
        points_of = "select key, step, value from metrics where run_uuid = ? order by key, step, value"
        found = {
            f"{trial} run {number}": {
                "status": status,
                "points": [row for row in store.execute(points_of, (run,)) if row[0] not in IGNORED],
            }
            for number, (trial, run, status) in enumerate(sorted(runs))
        }
        speeds = "select count(*) from metrics where key = 'train/tokens_per_second'"
        parents = store.execute(tags, ("decay.study",)).fetchall()
        return {**found, "parents": sorted(row[2] for row in parents), "speeds": store.execute(speeds).fetchone()[0]}
    finally:
        store.close()


def differences(quiet: Any, other: Any, where: str = "") -> list[str]:
    """Places at which two end states differ; none is what a test asks for."""
    if type(quiet) is not type(other):
        return [f"{where}: {quiet!r:.80} against {other!r:.80}"]
    if isinstance(quiet, dict):
        keys = sorted(quiet.keys() | other.keys())
        return [line for key in keys for line in differences(quiet.get(key), other.get(key), f"{where}/{key}")]
    if isinstance(quiet, list):
        if len(quiet) != len(other):
            return [f"{where}: {len(quiet)} against {len(other)} items"]
        return [line for i, (a, b) in enumerate(zip(quiet, other, strict=True)) for line in differences(a, b, f"{where}/{i}")]
    return [] if quiet == other else [f"{where}: {quiet!r:.80} against {other!r:.80}"]


PHASES = ("train.data", "train.forward", "train.reduce", "train.optimizer", "train.log", "train.logged", "checkpoint.begin",
          "checkpoint.write", "checkpoint.commit", "checkpoint.committed", "finish.weights", "finish.result",
          "finish.done")  # fmt: skip
ON_ALL_RANKS = {"train.data", "train.forward", "train.reduce", "train.optimizer", "checkpoint.begin", "checkpoint.write",
                "finish.weights"}  # fmt: skip


def worker_kills(seed: int, count: int, steps: int, every: int = 4, ranks: int = 2) -> list[dict[str, Any]]:
    """`count` kills of workers: phases in turn, their step and rank drawn from the seed. All of them fire in one study."""
    draw = random.Random(seed)
    kills: list[dict[str, Any]] = []
    for number in range(count):
        point = PHASES[number % len(PHASES)]
        where: dict[str, Any] = {"rank": draw.randrange(ranks)} if point in ON_ALL_RANKS else {}
        visit = 1
        if point in ("train.data", "train.forward", "train.reduce"):
            where["step"] = draw.randrange(2, steps)
        elif point.startswith("checkpoint"):
            where["step"] = every * draw.randrange(1, steps // every)
        elif point == "train.optimizer":
            visit = draw.randrange(1, every)
        elif point.startswith("train.log"):
            where["step"] = every * draw.randrange(1, steps // every)
        kills.append({"name": f"{number:02d}-{point}", "point": point, "where": where, "visit": visit, "action": "kill"})
    return kills


def recovery(place: Place) -> list[tuple[float, int]]:
    """For each fault that fired, in order: seconds until the next attempt stood where it goes on, and steps done twice.

    A fault after which no attempt was needed counts until the trial was finished; one that the next fault followed before
    that says nothing about recovery and is left out.
    """
    events, records = place.events(), place.fired()
    found = []
    for number, record in enumerate(records):
        after = [event for event in events if event.time_ns / 1e9 > record["time"]]
        ends = [event for event in after if event.kind in ("attempt", "finished", "tracked")]
        following = records[number + 1]["time"] if number + 1 < len(records) else math.inf
        if not ends or ends[0].time_ns / 1e9 > following:
            continue
        step, resumed = record["where"].get("step"), ends[0].details.get("from_step")
        repeated = max(0, step - 1 - resumed) if step is not None and resumed is not None else 0
        found.append((ends[0].time_ns / 1e9 - record["time"], repeated))
    return found


def report(row: dict[str, Any]) -> None:
    """Adds a row for tests/faults/table.py."""
    print(json.dumps(row))
    path = os.environ.get("DECAY_FAULT_TABLE")
    if path:
        with open(path, "a") as stream:
            stream.write(json.dumps(row) + "\n")
