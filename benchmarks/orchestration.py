"""What the service costs beyond the training itself, for both backends on this machine.

Prints, from real runs on a local cluster: seconds from `decay run` to the first step, overhead per trial beyond its own steps,
its growth from few to many trials (the warm pool; a Train group starts anew for every trial), processes and memory per trial,
and the ratio of the two backends' times per trial.

    .venv/bin/python benchmarks/orchestration.py [--trials 5,50] [--train-trials 3] [--json OUT]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from services.study.ledger import Ledger
from services.study.storage import Storage
from services.train.step_log import parse

ROOT = Path(__file__).parents[1]
STEPS = 5


def study(name: str, backend: str, trials: int, storage: Path) -> Path:
    """A study of `trials` seeds of STEPS nano steps on the standard library's own documentation."""
    path = storage / f"{name}.yaml"
    text = {
        "name": name,
        "question": "what does the service cost?",
        "space": [{"decay": "hgrn2"}],
        "sizes": ["nano"],
        "seeds": list(range(trials)),
        "recipe": {
            "steps": STEPS, "batch_size": 4, "seq_len": 32, "eval_every": STEPS, "eval_sequences": 4,
            "checkpoint_every": STEPS, "telemetry_every": STEPS,
        },
        "data": {"source": "sotu", "tokenizer": "bpe-512"},
        "resources": {"backend": backend, "max_concurrent_trials": 1},
        "storage": str(storage),
    }  # fmt: skip
    path.write_text(yaml.safe_dump(text))
    return path


NOT_A_TRIAL = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


class Watch(threading.Thread):
    """Samples the processes of the running trial (one at a time here) and their own memory, Ray's daemons left out."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.samples = psutil.Process(pid), []

    def run(self) -> None:
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            try:
                below = [p for p in self.process.children(recursive=True) if _of_trial(p)]
                self.samples.append((len(below), sum(_memory(p) for p in below)))
            except psutil.Error:
                pass
            time.sleep(2.0)


def _of_trial(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith("ray::") and not title.startswith(NOT_A_TRIAL)


def _memory(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().uss)
    except psutil.Error:
        return 0.0


def measure(name: str, backend: str, trials: int, storage: Path) -> dict[str, Any]:
    """Runs one study and reads its own files for the times."""
    path = study(name, backend, trials, storage)
    started = time.time()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "services.cli", "run", str(path)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = Watch(process.pid)
    watch.start()
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(output)
    folder = Storage(str(storage / name))
    first = [event.time_ns / 1e9 for event in Ledger(folder).events() if event.kind == "attempt"]
    ends = sorted(_written(storage / name, trial) for trial in folder.list("trials"))
    gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    steps = statistics.median(_step_seconds(folder, trial) for trial in folder.list("trials"))
    return {
        "backend": backend,
        "trials": trials,
        "to_first_step_s": min(first) - started,
        "per_trial_s": statistics.median(gaps) if gaps else float("nan"),
        "own_steps_s": steps,
        "overhead_s": (statistics.median(gaps) if gaps else float("nan")) - steps,
        "first_quarter_s": statistics.median(gaps[: max(1, len(gaps) // 4)]) if gaps else float("nan"),
        "last_quarter_s": statistics.median(gaps[-max(1, len(gaps) // 4) :]) if gaps else float("nan"),
        "processes_a_trial": max(count for count, _ in watch.samples),
        "memory_gib_a_trial": max(memory for _, memory in watch.samples) / 2**30,
        "wall_s": time.time() - started,
    }


def _written(folder: Path, trial: str) -> float:
    return (folder / "trials" / trial / "result.json").stat().st_mtime


def _step_seconds(folder: Storage, trial: str) -> float:
    records = parse(folder.read(f"trials/{trial}/steps.jsonl") or b"")
    return sum(4 * 32 / record["train/tokens_per_second"] for record in records)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", default="5,50", help="warm pool: numbers of trials to compare")
    parser.add_argument("--train-trials", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    few, many = (int(part) for part in arguments.trials.split(","))
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        measure("prepare", "warm", 1, storage)  # tokens and MLflow's tables, once
        rows = [
            measure("few", "warm", few, storage),
            measure("many", "warm", many, storage),
            measure("train", "train", arguments.train_trials, storage),
        ]
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |")
    print("| " + " | ".join("---" for _ in keys) + " |")
    for row in rows:
        print("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    warm, train = rows[1], rows[2]
    print(f"growth of the warm pool from {few} to {many} trials: {warm['per_trial_s'] / rows[0]['per_trial_s']:.2f} x")
    print(f"inside {many} trials, last quarter / first quarter: {warm['last_quarter_s'] / warm['first_quarter_s']:.2f} x")
    print(f"train backend / warm pool, time per trial: {train['per_trial_s'] / warm['per_trial_s']:.1f} x")
    verdict = "holds" if warm["per_trial_s"] - warm["own_steps_s"] <= 1.0 else "FAILS"
    print(f"warm pool, at most 1 s a trial beyond its steps: {verdict} ({warm['per_trial_s'] - warm['own_steps_s']:.2f} s)")
    print(f"on {os.cpu_count()} cores, {STEPS} steps a trial, one trial at a time")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
