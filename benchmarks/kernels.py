"""How fast and how exact the decay scans are on this GPU, against flash-linear-attention, softmax attention and Mamba-2's scan.

Compiles first, then times, one process per contestant; each is held against an fp64 definition and its error stands beside its
time. Writes benchmarks/results/kernels-<gpu>.json as it goes, and its tables beside it as Markdown. Needs a GPU, and for the
rivals `pip install fla-core==0.6.0 einops`.

    .venv/bin/python benchmarks/kernels.py [--quick] [--budget-seconds 400] [--classes scalar,vector] [--peers chunk_gla]
    .venv/bin/python benchmarks/kernels.py --render benchmarks/results/kernels-h100.json

What is unusual: a rival's tuning takes minutes when it runs by itself. Here all cores compile its candidates, one process times
them at the first shape, and its kernels keep the best at every shape. Ours is timed before and after its rivals.
Exit code: 0 measured, 1 something of ours is wrong or crashed, 2 nothing measured (no GPU, wrong arguments).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

# The checkout comes before this folder, where a file has the name of the folder kernels/; this process imports neither.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernel_contestants import CONTESTANTS, DECAYS
from benchmarks.kernel_results import OURS, failures
from benchmarks.kernel_run import FAULTED, Run, Settings, Spec, Worker, in_turn, side_by_side
from benchmarks.kernel_shapes import (
    CLASSES,
    DECAY_CLASSES,
    DELTA_CLASSES,
    DELTA_SHAPES,
    SHAPES,
    SOFTMAX,
    Shape,
    WrongArgument,
    error_shape,
)
from benchmarks.kernel_table import render
from benchmarks.kernel_tuning import FEW

RESTARTS = 3  # of a worker that has lost its GPU context
COMPILED, TUNED, CHOSEN = 0.4, 0.6, 0.7  # of the budget, by when each phase has to end
PROCESS_S = 150.0  # longer, and a timing process hangs


def measure(run: Run) -> int:
    """All phases; returns the exit code."""
    run.phase("what is measured on")
    run.start({"task": "facts"}).finish(150)
    if not run.results.host.get("gpu"):
        print("kernels: no GPU that torch can use; run this on a host with an NVIDIA GPU", file=sys.stderr)
        return 2
    for name, work in PHASES.items():
        run.phase(name)
        try:
            work(run)
        except Exception as error:  # the phases after it go on with what there is
            run.note(f"{name}: {type(error).__name__}: {error}")
            run.stop()
    run.phase("end")
    run.save()
    document = run.results.document()
    page = render(document)
    if run.path is not None:
        run.path.with_suffix(".md").write_text(page)
    print("\n" + page)
    for kind in run.settings.classes:
        if not any(ratio["class"] == kind for ratio in document["ratios"]):
            print(f"kernels: no ratio was measured for {kind} decay", file=sys.stderr)
    print(f"{run.path or 'nothing'} written, {run.spent():.0f} s")
    wrong = failures(document)
    for line in wrong:
        print(f"kernels: {line}", file=sys.stderr)
    return 1 if wrong else 0


def first_calls(run: Run) -> None:
    """Ours, each in an empty cache of its own, side by side where there are cores for it; then the caches are put together."""
    shape, workers, caches = run.settings.shapes[0].numbers, [], []
    for kind in run.settings.classes:
        for name in (c.name for c in run.settings.contestants(kind) if c.ours):
            caches.append(run.folder / f"cold-{kind}-{name}")
            spec = {"task": "first", "class": kind, "contestant": name, "shapes": [shape]}
            workers.append(run.start(spec, cache=caches[-1]))
            if run.settings.jobs < 8:
                workers[-1].finish(run.left(COMPILED))
    side_by_side(workers, run.left(COMPILED))
    for cache in caches:
        if cache.is_dir():
            shutil.copytree(cache, run.folder / "cache", dirs_exist_ok=True)


def compile_all(run: Run) -> None:
    """The rivals' candidates at the first shape, ours at the others, on all cores."""
    first, *others = run.settings.shapes
    alike: dict[tuple[int, int], list[list[int]]] = {}
    for shape in others:
        alike.setdefault(shape.dims, []).append(shape.numbers)
    warming = [
        run.start({"task": "warm", "class": kind, "contestant": contestant.name, "shapes": shapes})
        for kind in run.settings.classes
        for contestant in run.settings.contestants(kind)
        if contestant.ours
        for shapes in alike.values()
    ]
    items = [(name, kind, first.numbers) for name, kind in run.settings.tuned]
    few = 2 * FEW if run.settings.quick else None
    side_by_side([*_compiling(run, items, few, "candidates", len(warming)), *warming], run.left(COMPILED))


def compile_chosen(run: Run) -> None:
    """Rivals' kernels know the number of heads and the batch when they are compiled: once more for every shape."""
    shapes = [*run.settings.shapes[1:], *dict.fromkeys(error_shape(shape) for shape in run.settings.shapes)]
    tuned = [(name, kind) for name, kind in run.settings.tuned if (run.folder / "pins" / f"{name}.json").exists()]
    items = [(name, kind, shape.numbers) for shape in shapes for name, kind in tuned]
    side_by_side(_compiling(run, items, FEW, "chosen", 0), run.left(CHOSEN))


def _compiling(run: Run, items: list[Any], few: int | None, what: str, busy: int) -> list[Worker]:
    of = max(1, run.settings.jobs - busy // 2)
    spec = {"task": "compile", "items": items, "few": few, "what": what}
    return [run.start({**spec, "share": [i, of]}) for i in range(of)] if items else []


def tune(run: Run) -> None:
    """One rival at a time, alone on the GPU."""
    few, shape = 2 * FEW if run.settings.quick else None, run.settings.shapes[0].numbers
    specs = [
        {"task": "tune", "class": kind, "contestant": name, "shapes": [shape], "few": few} for name, kind in run.settings.tuned
    ]
    for worker, spec in zip(in_turn(run, specs), specs, strict=True):
        code = worker.finish(run.left(TUNED))
        for _ in range(RESTARTS):
            if code == FAULTED:
                code = run.start(spec).finish(run.left(TUNED))


def time_all(run: Run) -> None:
    """Ours, its rivals, ours again; then what is compared with no one."""
    specs = timing_order(run.settings)
    for worker, spec in zip(in_turn(run, specs), specs, strict=True):
        code = worker.finish(min(PROCESS_S, run.left() + 20))
        for _ in range(RESTARTS):
            left = _not_begun(run, worker) if code else []
            if not left or run.spent() > run.settings.budget_s:
                break
            worker = run.start({**spec, "shapes": left})
            code = worker.finish(min(PROCESS_S, run.left() + 20))


def timing_order(settings: Settings) -> list[Spec]:
    """What the timing processes are asked, the most important first."""
    shapes = [shape.numbers for shape in settings.shapes]

    def spec(kind: str, name: str, **more: Any) -> Spec:
        return {"task": "time", "class": kind, "contestant": name, "shapes": shapes, "repeats": 2, "launches": True, **more}

    specs: list[Spec] = []
    for kind in settings.classes:
        rivals = [c.name for c in settings.contestants(kind) if not c.ours and not c.optional]
        specs += [spec(kind, OURS), *(spec(kind, name) for name in rivals), spec(kind, OURS, launches=False)]
    for kind in (*settings.classes, SOFTMAX):
        begun = {(given["class"], given["contestant"]) for given in specs}
        specs += [spec(kind, c.name) for c in settings.contestants(kind) if (kind, c.name) not in begun]
    return specs


def _not_begun(run: Run, worker: Worker) -> list[list[int]]:
    """The shapes that a worker which died had not begun; the one it died at gets a row that says so."""
    file, spec = Path(worker.spec["records"]), worker.spec
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    begun = [record["shape"] for record in records if record["record"] == "start"]
    ended = [record["shape"] for record in records if record["record"] == "row"]
    why = {"failed": f"its process died (exit code {worker.process.returncode})"}
    if worker.ended_after_s is not None:
        slow = worker.ended_after_s >= PROCESS_S
        why = {"failed": f"ended after {PROCESS_S:.0f} s"} if slow else {"skipped": "time budget"}
    for shape in [shape for shape in begun or spec["shapes"][:1] if shape not in ended]:
        about = {"class": spec["class"], "contestant": spec["contestant"], "ours": CONTESTANTS[spec["contestant"]].ours}
        run.results.add({"record": "row", **about, "shape": shape, **why})
    return [shape for shape in spec["shapes"] if shape not in begun and shape not in ended] if begun else []


PHASES = {
    "first calls, cold cache": first_calls,
    "compiling": compile_all,
    "tuning the rivals": tune,
    "compiling what was chosen, for every shape": compile_chosen,
    "timing": time_all,
}


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise WrongArgument(message)


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; raises WrongArgument."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="B,T,H,D or B,T,H,K,V, several separated by blanks or semicolons")
    parser.add_argument("--classes", default=",".join(DECAY_CLASSES), help="of " + ", ".join(CLASSES))
    parser.add_argument("--peers", help="rivals, by name; `all` adds those that are left out by default")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"))
    parser.add_argument("--decay", default="mild", choices=tuple(DECAYS))
    parser.add_argument("--out", type=Path, help="the JSON file, by default benchmarks/results/kernels-<gpu>.json")
    parser.add_argument("--quick", action="store_true", help="the first shape, short timings, few candidates for rivals")
    parser.add_argument("--budget-seconds", type=float, default=400.0, help="after which what is left is skipped")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--bandwidth", type=float, help="TB/s of the floor")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a self-check, its times mean nothing")
    parser.add_argument("--keep", type=Path, help="an empty folder for logs and compiled kernels")
    parser.add_argument("--render", type=Path, help="print this JSON file as Markdown and end")
    return parser.parse_args(words)


def settings(given: argparse.Namespace) -> Settings:
    """Raises WrongArgument."""
    classes = _known("--classes", given.classes, CLASSES)
    shapes = DELTA_SHAPES if set(classes) <= set(DELTA_CLASSES) else SHAPES
    if given.shapes is not None:
        shapes = tuple(Shape.parse(text) for text in given.shapes.replace(";", " ").split())
    rivals = tuple(name for name, c in CONTESTANTS.items() if not c.ours)
    default = ",".join(name for name in rivals if not CONTESTANTS[name].optional)
    asked = default if given.peers is None else ",".join(rivals) if given.peers == "all" else given.peers
    peers = _known("--peers", asked, rivals)
    if given.budget_seconds <= 0 or given.jobs < 1 or not shapes:
        raise WrongArgument("--budget-seconds and --jobs are positive, and --shapes names a shape")
    return Settings(
        shapes=shapes[:1] if given.quick else shapes,
        classes=tuple(classes),
        peers=tuple(peers),
        dtype=given.dtype,
        decay=given.decay,
        device=given.device,
        budget_s=given.budget_seconds,
        quick=given.quick,
        out=given.out,
        jobs=given.jobs,
        bandwidth_tb_s=given.bandwidth,
    )


def _known(option: str, text: str, names: tuple[str, ...]) -> list[str]:
    asked = [name for name in text.split(",") if name]
    unknown = [name for name in asked if name not in names]
    if unknown or (not asked and option == "--classes"):
        raise WrongArgument(f"{option}: unknown {', '.join(unknown) or 'nothing'}; there are {', '.join(names)}")
    return asked


def main(words: list[str]) -> int:
    """Returns the exit code."""
    try:
        given = parse(words)
        if given.render is not None:
            print(render(_read(given.render)), end="")
            return 0
        asked = settings(given)
        if given.keep is not None:
            given.keep.mkdir(parents=True, exist_ok=True)
            if any(given.keep.iterdir()):
                raise WrongArgument(f"--keep: {given.keep} is not empty")
    except WrongArgument as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the workers end too
    with tempfile.TemporaryDirectory() as folder:
        run = Run(asked, (given.keep or Path(folder)).resolve())
        try:
            return measure(run)
        finally:
            run.stop()


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        return document
    except (OSError, ValueError) as error:
        raise WrongArgument(f"--render: {path} cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
