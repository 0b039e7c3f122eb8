"""Plans and states as tables for a terminal or a log."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.study.file import Study
from services.study.ledger import Ledger
from services.study.manifest import read_manifest
from services.study.plan import CPU_GFLOPS_PER_THREAD, GPU_GFLOPS, Plan, make_plan
from services.study.storage import Storage


def show_plan(study: Study, console: Console) -> Plan:
    """Prints the plan of a study; returns it. Writes nothing. Raises StudyError as `make_plan` does."""
    plan = make_plan(study)
    table = Table(title=escape(f"plan of {study.name}: {study.question.strip()}"), title_justify="left")
    for name, justify in (("trial", "left"), ("id", "left"), ("parameters", "right"), ("tokens", "right"),
                          ("PFLOP", "right"), ("about", "right")):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for trial in plan.trials:
        table.add_row(
            trial.name,
            trial.id,
            f"{trial.parameters:,}",
            f"{trial.tokens:,}",
            f"{trial.flops / 1e15:,.3g}",
            duration(plan.seconds(trial)),
        )
    console.print(table)
    resources = study.resources
    console.print(
        f"{len(plan.trials)} trials, {plan.backend} backend, {resources.workers} worker(s) each "
        f"(ZeRO {resources.zero_stage}, {resources.gpus_per_worker:g} GPU, {resources.cpus_per_worker:g} CPU a worker); "
        f"about {plan.worker_hours:.3g} worker-hours in all at {_rate(plan)}; "
        f"{plan.disk_bytes(plan.trials) / 2**30:.2f} GiB of checkpoints and weights."
    )
    if plan.refused:
        refused = Table(title=f"{len(plan.refused)} cells refused", title_justify="left")
        for column in ("point", "reason", "nearest valid point"):
            refused.add_column(column)
        for cell in plan.refused:
            refused.add_row(cell.point.name, escape(cell.reason), cell.nearest)
        console.print(refused)
    return plan


def _rate(plan: Plan) -> str:
    resources = plan.study.resources
    if resources.assumed_gflops_per_worker:
        return f"{plan.gflops_per_worker:,.0f} GFLOP/s a worker (resources.assumed_gflops_per_worker)"
    assumed, what = (GPU_GFLOPS, "GPU") if resources.gpus_per_worker else (CPU_GFLOPS_PER_THREAD, "thread")
    return f"{plan.gflops_per_worker:,.0f} GFLOP/s a worker (assumed: {assumed:,.0f} a {what})"


def show_status(study: Study, storage: Storage, console: Console) -> None:
    """Prints where every trial of a study stands, from the ledger and the step logs."""
    plan = make_plan(study)
    started = read_manifest(storage) is not None
    states = Ledger(storage).states(trial.id for trial in plan.trials)
    table = Table(title=escape(f"{study.name} in {storage.root}{'' if started else ' (not started)'}"), title_justify="left")
    for column in ("trial", "id", "state", "attempts", "step", "loss", "note"):
        table.add_column(column, no_wrap=column != "note")
    for trial in plan.trials:
        state = states[trial.id]
        last = last_record(storage, trial.id)
        loss = f"{last['train/loss']:.4f}" if "train/loss" in last else ""
        table.add_row(
            trial.name,
            trial.id,
            state.state,
            str(state.attempts),
            f"{last.get('step', 0)}/{trial.recipe.steps}",
            loss,
            escape(state.reason) or ("" if state.tracked or state.state != "finished" else "not in MLflow yet: run again"),
        )
    console.print(table)
    finished = sum(state.state == "finished" for state in states.values())
    console.print(f"{finished} of {len(plan.trials)} trials finished")


def last_record(storage: Storage, trial: str) -> dict[str, Any]:
    """The last whole line of a trial's step log; empty when there is none or it is damaged."""
    data = storage.read(f"trials/{trial}/steps.jsonl") or b""
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    try:
        return dict(json.loads(lines[-1])) if lines else {}
    except (ValueError, TypeError):
        return {}


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
