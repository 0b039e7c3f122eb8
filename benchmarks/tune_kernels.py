"""Finds the fastest right configuration of the Triton decay scans on this GPU and writes it to kernels/tuned.json.

Every candidate of a launcher is compiled and compared with the definition in float64, many at a time; those that pass are
timed one at a time (forward and backward, bf16, median of 20 with a cold cache), and the fastest of a class and its dims
becomes a row of the table. What is unusual: a candidate that crashes or hangs costs its process, not the run.

    .venv/bin/python benchmarks/tune_kernels.py [--classes scalar,vector] [--shapes 64x64,128x64] [--only WORDS] [--dry-run]
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import importlib
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import triton
from try_config import REPEATS, Finding, Job, serve

from decay_core import kernel_seam

CLASSES = ("scalar", "vector", "delta_scalar", "delta_vector", "delta_general")
LAUNCHERS = {"delta_scalar": "triton_delta", "delta_general": "triton_dplr"}  # others are named as their class
SHAPES = "64x64,128x64,128x128,32x32,64x128,256x64,256x128,256x256"  # in order of importance: K x V
TOKENS, HEADS = 2048, 16
BATCH_WIDTH = 32 * 128  # batch times (K + V): as much memory for every shape
LOCK = Path(tempfile.gettempdir()) / "tune_kernels.lock"


class Crew:
    """Processes that try configurations, each started again when a job kills it."""

    def __init__(self, size: int, seconds: float) -> None:
        self.seconds = seconds
        self.context = multiprocessing.get_context("spawn")
        self.free: SimpleQueue[Any] = SimpleQueue()
        for _ in range(size):
            self.free.put(None)  # started when first needed

    def ask(self, job: Job) -> Finding:
        """One job's finding; a crash and a time-out are findings too."""
        member = self.free.get()
        process, connection = member or self._start()
        connection.send(job)
        try:
            if not connection.poll(self.seconds):
                finding = Finding(problem=f"no answer within {self.seconds:.0f} s", fatal=True)
            else:
                finding = connection.recv()
        except (EOFError, OSError):
            process.join(5)
            finding = Finding(problem=f"crashed (exit code {process.exitcode})", fatal=True)
        self.free.put(self._stop(process) if finding.fatal else (process, connection))
        return finding

    def close(self) -> None:
        """Ends all processes."""
        while not self.free.empty():
            if (member := self.free.get()) is not None:
                self._stop(member[0])

    def _start(self) -> tuple[Any, Any]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    @staticmethod
    def _stop(process: Any) -> None:
        process.kill()
        process.join()


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate and what is known of it."""

    label: str
    job: Job
    finding: Finding


def candidates(granularity: str, dims: tuple[int, int], only: str) -> list[tuple[str, Job]]:
    """(label, job) of what the launcher proposes; the label says where it differs from the default."""
    launcher = importlib.import_module(f"kernels.{LAUNCHERS.get(granularity, f'triton_{granularity}')}")
    default = asdict(launcher.default_config(*dims, torch.bfloat16))
    proposed = [asdict(config) for config in launcher.candidates(*dims, torch.bfloat16)]
    configs = [default, *(config for config in proposed if config != default)]
    labelled = [(_label(config, default) or "default", config) for config in configs]
    sizes = {"granularity": granularity, "key_dim": dims[0], "value_dim": dims[1]}
    return [(label, Job(config=config, **sizes)) for label, config in labelled if only in label]


def _label(config: dict[str, Any], default: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for name, value in config.items():
        usual = default.get(name)
        if isinstance(value, dict):
            parts.append(_label(value, usual if isinstance(usual, dict) else {}, f"{prefix}{name}."))
        elif value != usual:
            parts.append(f"{prefix}{name} {value}")
    return ", ".join(filter(None, parts))


def checked(jobs: list[tuple[str, Job]], processes: int, seconds: float) -> list[Tried]:
    """All candidates of all groups, compiled and checked side by side."""
    crew = Crew(processes, seconds)
    with ThreadPoolExecutor(max_workers=processes) as threads:
        findings = list(threads.map(lambda item: crew.ask(item[1]), jobs))
    crew.close()
    return [Tried(label=label, job=job, finding=found) for (label, job), found in zip(jobs, findings, strict=True)]


def timed(one: Crew, group: list[Tried], deadline: float) -> list[Tried]:
    """The candidates of one class and dims, those that passed timed one by one; fastest first."""
    return sorted((_timed(one, candidate, deadline) for candidate in group), key=_rank)


def _timed(one: Crew, candidate: Tried, deadline: float) -> Tried:
    if candidate.finding.problem is not None:
        return candidate
    width = candidate.job.key_dim + candidate.job.value_dim
    job = replace(candidate.job, timed=True, shape=(max(1, BATCH_WIDTH // width), TOKENS, HEADS))
    if time.monotonic() > deadline:
        found = Finding(problem="not timed: out of time")
    else:
        with _alone():
            found = one.ask(job)
    kept = {"error": candidate.finding.error, "seconds": candidate.finding.seconds}
    return replace(candidate, job=job, finding=replace(found, **kept))


def _rank(candidate: Tried) -> tuple[bool, float]:
    return candidate.finding.problem is not None, candidate.finding.milliseconds


@contextmanager
def _alone() -> Iterator[None]:
    """Nobody else's timing at the same time."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def markdown(tried: list[Tried]) -> list[str]:
    """Rows of the table, the fastest first."""
    rows = []
    for candidate in tried:
        found, job = candidate.finding, candidate.job
        what = f"| {job.granularity} | {job.key_dim}x{job.value_dim} | {candidate.label} "
        if found.problem is not None:
            rows.append(f"{what}| – | – | – | – | {found.problem.replace('|', '/')} |")
        else:
            verdict = "fastest" if candidate is tried[0] else ""
            times = f"{found.milliseconds:.3f} | {found.forward_ms:.3f} | {found.peak_mib:.0f} | {found.error:.2f}"
            rows.append(f"{what}| {times} | {verdict} |")
    return rows


def row_of(best: Tried) -> Any:
    """The table's row of the fastest."""
    from kernels.decay_scan_triton import architecture_of
    from kernels.tuned import Row

    job = best.job
    versions = f"torch {torch.__version__}, triton {triton.__version__}; ptxas: {kernel_seam.explain_toolchain().split(',')[0]}"
    return Row(
        architecture=architecture_of(torch.device("cuda")), granularity=job.granularity, key_dim=job.key_dim,
        value_dim=job.value_dim, config=job.config, milliseconds=round(best.finding.milliseconds, 4),
        shape=[*job.shape, job.key_dim, job.value_dim], gpu=torch.cuda.get_device_name(), versions=versions,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )  # fmt: skip


def main() -> None:
    """Tunes, prints and writes."""
    from kernels.tuned import TABLE, write_rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=_classes, default="scalar,vector", help=f"of {', '.join(CLASSES)}")
    parser.add_argument("--shapes", type=_shapes, default=SHAPES, help="K x V of each, such as 64x64,128x64")
    parser.add_argument("--only", default="", help="candidates whose label holds this text; `default` is the default's")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates, run and write nothing")
    parser.add_argument("--table", type=Path, default=TABLE, help="file to write")
    parser.add_argument("--processes", type=int, default=14, help="that compile and check side by side")
    parser.add_argument("--seconds", type=float, default=90.0, help="for one candidate, compiling included")
    parser.add_argument("--minutes", type=float, default=1e6, help="after these no further candidate is timed")
    arguments = parser.parse_args()
    groups = [(kind, dims) for dims in arguments.shapes for kind in arguments.classes]
    listed = {(kind, dims): candidates(kind, dims, arguments.only) for kind, dims in groups}
    if arguments.dry_run:
        for (kind, dims), jobs in listed.items():
            print(f"{kind} {dims[0]}x{dims[1]}: {len(jobs)} candidates", *(f"  {label}" for label, _ in jobs), sep="\n")
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU here: --dry-run lists the candidates")
    deadline = time.monotonic() + 60 * arguments.minutes
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16")
    print(f"ptxas: {kernel_seam.explain_toolchain()}; medians of {REPEATS}; errors as shares of their limits", end="\n\n")
    print("| class | K x V | configuration | fwd+bwd ms | fwd ms | peak MiB | error | |\n|---|---|---|---|---|---|---|---|")
    all_jobs = [job for jobs in listed.values() for job in jobs]
    all_tried, one = iter(checked(all_jobs, arguments.processes, arguments.seconds)), Crew(1, arguments.seconds)
    for jobs in listed.values():
        tried = timed(one, list(islice(all_tried, len(jobs))), deadline)
        print("\n".join(markdown(tried)), flush=True)
        if tried and tried[0].finding.problem is None:
            write_rows(arguments.table, [row_of(tried[0])])
    one.close()


def _shapes(text: str) -> list[tuple[int, int]]:
    return [_dims(part) for part in text.split(",")]


def _dims(text: str) -> tuple[int, int]:
    key_dim, _, value_dim = text.partition("x")
    if not (key_dim.isdigit() and value_dim.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not KxV, such as 64x64")
    return int(key_dim), int(value_dim)


def _classes(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := sorted(set(chosen) - set(CLASSES)):
        raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known: {', '.join(CLASSES)}")
    return chosen


if __name__ == "__main__":
    main()
