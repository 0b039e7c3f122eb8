"""Where the trials of a study stand, as a table for a terminal or a log."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.study.file import Study
from services.study.ledger import Ledger
from services.study.manifest import read_manifest
from services.study.plan import make_plan
from services.study.storage import Storage


def show_status(study: Study, storage: Storage, console: Console) -> None:
    """Prints where every trial of a study stands, from the ledger and the step logs."""
    plan = make_plan(study)
    started = read_manifest(storage) is not None
    states = Ledger(storage).states(trial.id for trial in plan.trials)
    table = Table(title=escape(f"{study.name} in {storage.root}{'' if started else ' (not started)'}"), title_justify="left")
    for column in ("trial", "id", "state", "attempts", "preempted", "died", "step", "loss", "note"):
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
            str(state.preemptions),
            str(state.deaths),
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
