"""A plan as rows for other programs: every cell of the product, refused ones with their reason, as CSV or JSON.

One row is one point at one size with one recipe; its seeds share the row. A point that is refused whatever the size has none.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from typing import Any

from decay_core.model import state_size
from services.study.cells import Cell, by_reason
from services.study.file import StudyError, spelled
from services.study.forecast import Forecast
from services.study.memory import STAGES
from services.study.plan import Trial

FORMATS = ("table", "csv", "json")
COST = (
    "seeds", "trials", "finished", "parameters", "glu_dim", "state_size", "tokens", "flops_per_token", "flops", "seconds",
    "gflops_per_worker", "rate_from", "device_hours", "money", *(f"gib_zero{stage}" for stage in STAGES),
)  # fmt: skip


def check_format(kind: str) -> None:
    """Raises StudyError unless `kind` is one of the formats."""
    if kind not in FORMATS:
        raise StudyError(f"unknown --format {kind!r}; known: {', '.join(FORMATS)}")


def plan_rows(forecast: Forecast) -> list[dict[str, Any]]:
    """Planned rows in the plan's order, then refused ones. Every row has every key; None is unknown or meaningless."""
    groups: dict[Any, list[Trial]] = {}
    for trial in forecast.plan.trials:
        groups.setdefault((trial.config, trial.recipe), []).append(trial)
    return [*(_planned(forecast, trials) for trials in groups.values()), *map(_refused, forecast.plan.refused)]


def as_text(forecast: Forecast, kind: str) -> str:
    """The rows as `csv` or `json` text; JSON has the study and the counts of refusals beside them."""
    rows = plan_rows(forecast)
    if kind == "csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()
    plan = forecast.plan
    by_kind = Counter(cell.kind for cell in plan.refused)
    counts = {"kind": dict(by_kind), "reason": {one[0].reason: len(one) for one in by_reason(plan.refused)}}
    whole = {"study": plan.study.name, "trials": len(plan.trials), "refused": counts, "cells": rows}
    return json.dumps(whole, indent=1) + "\n"


def _planned(forecast: Forecast, trials: list[Trial]) -> dict[str, Any]:
    first, states = trials[0], forecast.states
    rate = forecast.rates.of(first)
    memory = [forecast.memory(first, stage).total / 2**30 if forecast.asked.gpu else None for stage in STAGES]
    values = (
        " ".join(str(trial.seed) for trial in trials), " ".join(trial.id for trial in trials),
        sum(states[trial.id].state == "finished" for trial in trials), first.parameters, first.config.size.glu_dim,
        state_size(first.config, first.recipe.seq_len), first.tokens, first.flops / first.tokens, first.flops,
        forecast.seconds(first), rate.gflops, rate.kind, forecast.device_hours(trials), forecast.money(trials), *memory,
    )  # fmt: skip
    varied = " ".join(f"{key}={spelled(value)}" for key, value in first.varied.items())
    return {
        "name": first.method, "status": "planned", "kind": None, "reason": None, "nearest": None, "size": first.size,
        "varied": varied or None, **first.point.to_dict(), **dict(zip(COST, values, strict=True)),
    }  # fmt: skip


def _refused(cell: Cell) -> dict[str, Any]:
    return {
        "name": cell.point.name, "status": "refused", "kind": cell.kind, "reason": cell.reason,
        "nearest": cell.nearest or None, "size": cell.size or None, "varied": None, **cell.point.to_dict(),
        **dict.fromkeys(COST),
    }  # fmt: skip
