"""One process of the kernel benchmark: it does one task for one contestant and appends what it finds to a file, line by line.

    facts      what is measured on
    first      the first call of all kernels that a model needs, with an empty cache
    warm       ours at many shapes, so that its kernels are compiled
    compile    its share of what the rivals' tuning compiles; nothing is launched
    tune       a rival's candidates timed at one shape
    time       errors against fp64, then times, memory and launches, shape by shape

What is surprising: a process of its own, because an illegal access in one contestant takes the whole GPU context with it. Exit
code 3 says that this has happened; what stands in the file by then counts.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_host
from benchmarks.kernel_contestants import CONTESTANTS, Contestant, Inputs, NotHere, Problem, inputs
from benchmarks.kernel_results import OURS
from benchmarks.kernel_shapes import DELTA_CLASSES, VECTOR_CLASSES, Shape, error_shape, short_shape
from benchmarks.kernel_tuning import FEW, Tuning, is_fault

MIB = 2**20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAULTED = 3
Spec = dict[str, Any]


class Worker:
    """What every task needs: its specification, the device, and where records go."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.device = spec, spec["device"]
        self.cuda = self.device == "cuda"
        self.contestant: Contestant = CONTESTANTS[spec.get("contestant", OURS)]
        self.kind: str = spec.get("class", "scalar")
        self.shapes = [Shape.of(numbers) for numbers in spec.get("shapes", [])]
        self.reps: int = spec.get("reps_ms", 60)

    def emit(self, record: str, **found: Any) -> None:
        """One line; it is on disk when this returns."""
        line = {"record": record, "class": self.kind, "contestant": self.contestant.name, **found}
        with open(self.spec["records"], "a") as file:
            file.write(json.dumps(line) + "\n")

    def remark(self, text: str) -> None:
        """Said in the page's remarks, once."""
        self.emit("note", text=f"{self.contestant.name}: {text}")

    def inputs(self, shape: Shape) -> Inputs:
        """For this task's class, dtype and decay."""
        vector = self.kind in VECTOR_CLASSES
        return inputs(shape, vector, DTYPES[self.spec["dtype"]], self.device, self.spec["decay"], kind=self.kind)

    def wait(self) -> None:
        """Until the device has finished; errors of earlier launches come up here."""
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """The median, the caches cleared before each call."""
        return kernel_host.milliseconds(call, self.cuda, self.reps)


def facts(worker: Worker) -> None:
    """What is measured on."""
    worker.emit("facts", **kernel_host.facts(worker.cuda))


def first(worker: Worker) -> None:
    """Seconds from the first call to the end of its work: evaluation, training, and the gate with its norm."""
    shape = worker.shapes[0]
    note = worker.contestant.prepare()
    problem = worker.contestant.problem(worker.inputs(shape))
    seam = importlib.import_module("decay_core.kernel_seam")
    width = shape.heads * shape.value_dim
    o = problem.do.reshape(*problem.do.shape[:2], width).clone().requires_grad_()
    gain = torch.ones(width, device=worker.device, requires_grad=True)
    worker.wait()

    def norm() -> None:
        y = seam.gated_norm(o, o.detach(), gain, 1e-6)
        torch.autograd.grad(y, [o, gain], torch.ones_like(y))

    parts = {}
    with _compiled() as kernels:
        for name, call in (("forward", _without_gradients(problem)), ("training", problem.gradients), ("gated norm", norm)):
            started = time.perf_counter()
            call()
            worker.wait()
            parts[name] = round(time.perf_counter() - started, 2)
    worker.emit("first_call", seconds=round(sum(parts.values()), 2), parts=parts, kernels=len(kernels))
    if worker.contestant.name == OURS:
        given = worker.inputs(error_shape(shape))
        explain = seam.explain_delta_scan if worker.kind in DELTA_CLASSES else seam.explain_decay_scan
        explain = seam.explain_dplr_scan if worker.kind == "delta_general" else explain
        worker.remark(f"{worker.kind}: {explain(given.q, given.v, None if worker.kind == 'delta_none' else given.log_decay)}")
    if note:
        worker.remark(note)


@contextmanager
def _compiled() -> Iterator[list[str]]:
    """Collects the names of kernels that Triton compiles anew."""
    names: list[str] = []
    try:
        knobs = importlib.import_module("triton").knobs.compilation
    except (ImportError, AttributeError):
        yield names
        return

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(str(metadata.get("name")))

    before, knobs.listener = knobs.listener, listen
    try:
        yield names
    finally:
        knobs.listener = before


def _without_gradients(problem: Problem) -> Callable[[], torch.Tensor]:
    @torch.no_grad()
    def call() -> torch.Tensor:
        return problem.call()

    return call


def warm(worker: Worker) -> None:
    """Compiles by calling, for each shape's dims and number of heads."""
    worker.contestant.prepare()
    for at in dict.fromkeys(small(shape) for shape in worker.shapes for small in (error_shape, short_shape)):
        problem = worker.contestant.problem(worker.inputs(at))
        _without_gradients(problem)()
        problem.gradients()
        worker.wait()


def compile_share(worker: Worker) -> None:
    """For every (contestant, class, shape) of `items`: this process's share of the candidates, or of what was kept."""
    tuning = _tuning(worker, "compile", share=tuple(worker.spec["share"]), few=worker.spec["few"])
    for name, kind, numbers in worker.spec["items"]:
        worker.contestant, worker.kind, shape = CONTESTANTS[name], kind, Shape.of(numbers)
        tuning.turn_to(_pins(worker))
        try:
            worker.contestant.prepare()
            with tuning.installed():
                worker.contestant.problem(worker.inputs(short_shape(shape))).gradients()
        except NotHere:
            continue
        except Exception as error:
            worker.remark(f"compiling at {shape}: {type(error).__name__}: {error}"[:400])
        if worker.spec["what"] == "candidates":
            worker.emit("tuning", compile_s=tuning.seconds, configs=tuning.configs)


def _tuning(worker: Worker, mode: str, **more: Any) -> Tuning:
    bench = _brief if worker.cuda else None
    return Tuning(mode=mode, file=_pins(worker), remark=worker.remark, bench=bench, **more)


def _pins(worker: Worker) -> Path:
    return Path(worker.spec["pins"]) / f"{worker.contestant.name}.json"


def _brief(call: Callable[[], Any]) -> float:
    return kernel_host.milliseconds(call, True, 15)


def tune(worker: Worker) -> None:
    """Times the candidates where each kernel is first called; the kept ones are on disk one by one."""
    tuning = _tuning(worker, "tune", few=worker.spec["few"])
    worker.contestant.prepare()
    started = time.perf_counter()
    with _compiled() as compiled, tuning.installed():
        worker.contestant.problem(worker.inputs(worker.shapes[0])).gradients()
        worker.wait()
    spent = time.perf_counter() - started
    chosen = {name: kept["config"] for name, kept in tuning.pins.items()}
    worker.emit("tuning", tune_s=spent, chosen=chosen)
    if compiled:
        worker.remark(f"{len(compiled)} of its kernels were compiled while they were tuned")


def time_shapes(worker: Worker) -> None:
    """Shape by shape, the most important first."""
    if time.time() > worker.spec["deadline"]:
        for shape in worker.shapes:
            _row(worker, shape, skipped="time budget")
        return
    tuning = _tuning(worker, "pinned", few=FEW)
    try:
        worker.spec["remark"] = worker.contestant.prepare()
    except NotHere as reason:
        for shape in worker.shapes:
            _row(worker, shape, skipped=str(reason))
        return
    checked: set[tuple[int, int]] = set()
    for shape in worker.shapes:
        if time.time() > worker.spec["deadline"]:
            _row(worker, shape, skipped="time budget")
            continue
        worker.emit("start", shape=shape.numbers)
        try:
            with tuning.installed() if worker.contestant.tuned else nullcontext():
                trouble = None if shape.dims in checked else _errors(worker, shape)
                checked.add(shape.dims)
                problem, found = _called(worker, shape)
            _times(worker, shape, problem, found if trouble is None else {"failed": trouble, **found})
        except NotHere as reason:
            _row(worker, shape, skipped=str(reason))
        except Exception as error:
            _row(worker, shape, failed=f"{type(error).__name__}: {error}"[:400])
            if is_fault(error):
                raise
        if worker.cuda:
            torch.cuda.empty_cache()
    if worker.spec.get("launches") and worker.cuda:
        _launches(worker, worker.shapes[0])


def _row(worker: Worker, shape: Shape, **found: Any) -> None:
    worker.emit("row", shape=shape.numbers, ours=worker.contestant.ours, remark=worker.spec.get("remark"), **found)


def _errors(worker: Worker, shape: Shape) -> str | None:
    """Measures them; returns what went wrong, if the GPU survives it: the times are still wanted."""
    try:
        _compare(worker, shape)
    except NotHere:
        raise
    except Exception as error:
        if is_fault(error):
            raise
        return f"errors not measured: {type(error).__name__}: {error}"[:400]
    return None


def _compare(worker: Worker, shape: Shape) -> None:
    """Output and gradients with the definition in fp64: norms of the differences relative to the right ones."""
    problem = worker.contestant.problem(worker.inputs(error_shape(shape)))
    got = problem.gradients()
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in problem.leaves.items()}
    o = problem.reference(wide)
    right = (o, *torch.autograd.grad(o, list(wide.values()), problem.do.double()))
    names = ("o", *(f"d{name}" for name in wide))
    found = {name: _error(a, b) for name, a, b in zip(names, got, right, strict=True)}
    worker.emit("errors", dims=list(shape.dims), errors=found)


def _error(got: torch.Tensor, right: torch.Tensor) -> float:
    """NaN where anything is not finite."""
    return float(f"{float((got.double() - right).norm() / right.norm()):.3g}")


def _called(worker: Worker, shape: Shape) -> tuple[Problem, dict[str, Any]]:
    """The problem at a shape, called once, and whether what it gives can be right."""
    problem = worker.contestant.problem(worker.inputs(shape))
    _without_gradients(problem)()
    results = problem.gradients()
    worker.wait()
    found: dict[str, Any] = {}
    if not all(bool(torch.isfinite(x).all()) for x in results):
        found["failed"] = "not finite at this shape"
    if worker.contestant.ours:
        found["same_bits"] = all(torch.equal(a, b) for a, b in zip(results, problem.gradients(), strict=True))
    return problem, found


def _times(worker: Worker, shape: Shape, problem: Problem, found: dict[str, Any]) -> None:
    forward = _without_gradients(problem)
    if worker.cuda:
        found |= {"peak_fwd_mib": _peak(forward), "peak_mib": _peak(problem.gradients)}
    times: dict[str, list[float]] = {"fwd_repeats": [], "fwd_bwd_repeats": []}
    for _ in range(worker.spec["repeats"]):
        for repeats, call in zip(times.values(), (forward, problem.gradients), strict=True):
            repeats.append(round(worker.milliseconds(call), 5))
    if worker.cuda:
        found |= {f"{name}_gpu_repeats": [_gpu(call)] for name, call in (("fwd", forward), ("fwd_bwd", problem.gradients))}
    _row(worker, shape, **found, **times)


def _gpu(call: Callable[[], Any]) -> float:
    return round(kernel_host.gpu_milliseconds(call), 5)


def _peak(call: Callable[[], Any]) -> float:
    """MiB at the peak of a call, above what lies there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


def _launches(worker: Worker, shape: Shape) -> None:
    """Kernels on the GPU per call; last of all, since the profiler stays."""
    try:
        problem = worker.contestant.problem(worker.inputs(shape))
        worker.emit("launches", launches=[_kernels(call) for call in (_without_gradients(problem), problem.gradients)])
    except Exception as error:
        worker.remark(f"launches were not counted: {type(error).__name__}: {error}"[:300])


def _kernels(call: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


TASKS: dict[str, Callable[[Worker], None]] = {
    "facts": facts,
    "first": first,
    "warm": warm,
    "compile": compile_share,
    "tune": tune,
    "time": time_shapes,
}


def main() -> None:
    """Reads the specification, waits for its turn, works."""
    spec = json.loads(sys.argv[1])
    with suppress(ImportError):
        importlib.import_module("triton")
    if spec.get("waits") and not sys.stdin.readline():
        return
    worker = Worker(spec)
    try:
        if worker.cuda and torch.cuda.is_available():
            kernel_host.ptxas()
            torch.cuda.init()
        TASKS[spec["task"]](worker)
    except NotHere as reason:
        worker.remark(str(reason))
    except Exception as error:
        worker.remark(f"{spec['task']}: {type(error).__name__}: {error}"[:600])
        sys.stderr.flush()
        if is_fault(error):
            os._exit(FAULTED)  # no tidying up: that would touch the lost context
        raise


if __name__ == "__main__":
    main()
