"""The processes of the kernel benchmark: started, told to begin, ended at their limit, their records gathered as they come.

What is surprising: the JSON file is written again with every record, in one step, so that a run that is killed has left what it
had; and a process that waits for its turn has imported torch by then.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.kernel_contestants import CONTESTANTS, Contestant
from benchmarks.kernel_results import Record, Results, write
from benchmarks.kernel_shapes import Shape

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FAULTED = 3  # the exit code of a worker that has lost its GPU context
Spec = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line asks for."""

    shapes: tuple[Shape, ...]
    classes: tuple[str, ...]
    peers: tuple[str, ...]
    dtype: str
    decay: str
    device: str
    budget_s: float
    quick: bool
    out: Path | None
    jobs: int
    bandwidth_tb_s: float | None

    def contestants(self, kind: str) -> list[Contestant]:
        """Those of one class, ours included."""
        return [c for c in CONTESTANTS.values() if kind in c.classes and (c.ours or c.name in self.peers)]

    def named(self, gpu: str) -> str:
        """The file's name without its ending; what is not measured by default has a name of its own."""
        other = [self.decay * (self.decay != "mild"), self.dtype * (self.dtype != "bf16"), "quick" * self.quick]
        return "-".join(["kernels", gpu, *filter(None, other)])

    @property
    def tuned(self) -> list[tuple[str, str]]:
        """(contestant, class) of all that tune themselves."""
        return [(c.name, kind) for kind in self.classes for c in self.contestants(kind) if c.tuned]


class Run:
    """Starts workers, gathers their records, keeps the file up to date."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder, self.started = settings, folder, time.time()
        self.alive: set[subprocess.Popen[str]] = set()
        self.read: dict[Path, int] = {}
        self.count = 0
        self.path: Path | None = settings.out
        self.results = Results(
            {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "classes": list(settings.classes),
                "dtype": settings.dtype,
                "decay": settings.decay,
                "shapes": [shape.numbers for shape in settings.shapes],
                "bandwidth_tb_s": settings.bandwidth_tb_s,
                "quick": settings.quick,
                "seconds": 0.0,
                "phases": {},
            }
        )
        for name in ("pins", "cache", "records"):
            (folder / name).mkdir()

    def start(self, spec: Spec, waits: bool = False, cache: Path | None = None) -> Worker:
        """A process for what `spec` asks; with `waits` it has imported what it needs and begins when told."""
        self.count += 1
        name = "-".join([f"{self.count:02d}", *(str(spec[key]) for key in ("task", "class", "contestant") if key in spec)])
        given: Spec = {
            "waits": waits,
            "device": self.settings.device,
            "dtype": self.settings.dtype,
            "decay": self.settings.decay,
            "pins": str(self.folder / "pins"),
            "records": str(self.folder / "records" / f"{name}.jsonl"),
            "reps_ms": 20 if self.settings.quick else 60,
            "deadline": self.started + self.settings.budget_s,
            **spec,
        }
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": str(cache or self.folder / "cache"),
            "FLA_CACHE_RESULTS": "0",  # what one process has timed while others ran is not to be believed
            "FLA_TILELANG": "0",
        }
        log = self.folder / "records" / f"{name}.log"
        with open(log, "w") as file:
            command = [sys.executable, "-m", "benchmarks.kernel_worker", json.dumps(given)]
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=file, stderr=file, text=True)
        self.alive.add(process)
        return Worker(self, process, given, log)

    def gather(self) -> list[Record]:
        """New records of all workers, taken into the results; the file is written if there are any."""
        found = []
        for path in sorted((self.folder / "records").glob("*.jsonl")):
            with open(path) as file:
                file.seek(self.read.get(path, 0))
                for line in iter(file.readline, ""):
                    if not line.endswith("\n"):
                        break
                    found.append(json.loads(line))
                    self.read[path] = self.read.get(path, 0) + len(line.encode())
        for record in found:
            self.results.add(record)
            _report(record)
        if found:
            self.save()
        return found

    def save(self) -> None:
        """As it stands."""
        self.results.about["seconds"] = round(self.spent(), 1)
        if self.path is None and self.settings.device == "cuda" and self.results.host.get("gpu"):
            self.path = RESULTS / f"{self.settings.named(gpu_name(self.results.host['gpu']))}.json"
        if self.path is not None:
            write(self.path, self.results.document())

    def spent(self) -> float:
        """Seconds since the start."""
        return time.time() - self.started

    def left(self, part: float = 1.0) -> float:
        """Seconds until this part of the budget is used up, a few at least."""
        return max(5.0, part * self.settings.budget_s - self.spent())

    def note(self, text: str) -> None:
        """Into the page's remarks, and on the screen."""
        self.results.add({"record": "note", "text": text})
        print(f"          {text}", flush=True)

    def phase(self, name: str) -> None:
        """Announces what begins."""
        self.results.about["phases"][name] = round(self.spent(), 1)
        print(f"{self.spent():6.1f} s  {name}", flush=True)

    def stop(self) -> None:
        """Ends what still runs."""
        for process in list(self.alive):
            process.kill()
            process.wait()
            self.alive.discard(process)


class Worker:
    """A process of the benchmark and what it was asked."""

    def __init__(self, run: Run, process: subprocess.Popen[str], spec: Spec, log: Path) -> None:
        self.run, self.process, self.spec, self.log = run, process, spec, log
        self.ended_after_s: float | None = None

    def go(self) -> None:
        """Lets a waiting one begin."""
        if self.spec["waits"] and self.process.stdin is not None:
            with suppress(BrokenPipeError):  # it has died: its exit code says so
                self.process.stdin.write("\n")
                self.process.stdin.flush()

    def finish(self, limit_s: float) -> int:
        """Waits, gathering records; ends it at the limit. Returns its exit code."""
        until = time.time() + limit_s
        while self.process.poll() is None:
            if time.time() > until:
                self.process.kill()
                self.process.wait()
                self.ended_after_s = limit_s
                self.run.note(f"{self.log.stem}: ended after {limit_s:.0f} s")
                break
            self.run.gather()
            time.sleep(0.1)
        self.run.alive.discard(self.process)
        self.run.gather()
        if self.process.returncode not in (0, FAULTED):
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            print(f"          {self.log.stem}: exit code {self.process.returncode} {' '.join(last)[:300]}", flush=True)
        return self.process.returncode


def gpu_name(name: str) -> str:
    """`h100` of `NVIDIA H100 80GB HBM3`; any other name in small letters and hyphens."""
    known = re.search(r"\b(?:GH|GB|[ABHLVPT])\d{1,4}\b", name)
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")
    return known[0].lower() if known else plain


def _report(record: Record) -> None:
    """One line on what a worker has found."""
    about = f"{record['class']:7s} {record['contestant']}"
    if record["record"] == "row":
        times = [" ".join(f"{t:.3f}" for t in record.get(f"{d}_repeats", [])) for d in ("fwd", "fwd_bwd")]
        said = record.get("failed") or record.get("skipped") or f"fwd {times[0]} ms, fwd+bwd {times[1]} ms"
        print(f"          {about} {Shape.of(record['shape'])}: {said}", flush=True)
    elif record["record"] == "errors":
        print(f"          {about} K, V {record['dims']}: errors {record['errors']}", flush=True)
    elif record["record"] == "first_call":
        print(f"          {about}: first call {record['seconds']} s {record['parts']}", flush=True)
    elif record["record"] == "tuning" and "tune_s" in record:
        print(f"          {about}: tuned in {record['tune_s']:.1f} s", flush=True)
    elif record["record"] == "note":
        print(f"          {record['text']}", flush=True)


def side_by_side(workers: list[Worker], limit_s: float) -> None:
    """Waits for workers that run side by side."""
    until = time.time() + limit_s
    for worker in workers:
        worker.finish(max(1.0, until - time.time()))


def in_turn(run: Run, specs: list[Spec]) -> Iterator[Worker]:
    """Workers one at a time: the next one imports while this one works."""
    following: Worker | None = None
    for i, spec in enumerate(specs):
        worker = following or run.start(spec, waits=True)
        following = run.start(specs[i + 1], waits=True) if i + 1 < len(specs) else None
        worker.go()
        yield worker
