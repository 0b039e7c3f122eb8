"""Quarantine: a trial that kills its workers at the same place every time is set aside with the evidence; the study goes on.

What is surprising: only deaths after the same logged step, one after the other, count, over all runs of the study. A trial
whose workers are killed at different places has a bad machine, not a bad trial; a lost node and a preemption are no deaths,
and neither is one before the attempt has said that it began: workers that cannot start accuse no trial.
"""

from __future__ import annotations

import json
from typing import Any

from services.study.ledger import Event, Ledger
from services.study.storage import Storage


def last_step(ledger: Ledger, storage: Storage, trial: str) -> dict[str, Any]:
    """What is known of an attempt that just died: where it went on, the last step that it logged, its processes."""
    attempts = [event for event in ledger.events() if event.kind == "attempt" and event.trial == trial]
    details = attempts[-1].details if attempts else {}
    data = storage.read(f"trials/{trial}/steps.jsonl") or b""
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    try:
        step = int(json.loads(lines[-1])["step"]) if lines else 0
    except (ValueError, KeyError, TypeError):
        step = 0
    return {"from_step": details.get("from_step"), "last_step": step, "processes": details.get("processes", [])}


def evidence_of(ledger: Ledger, trial: str, patience: int) -> dict[str, Any] | None:
    """The evidence against a trial that died `patience` times in a row at one place; None where it did not."""
    deaths = _in_a_row(event for event in ledger.events() if event.trial == trial)
    if len(deaths) < patience:
        return None
    where = {key: deaths[-1].details.get(key) for key in ("from_step", "last_step")}
    causes = [str(event.details.get("cause", "")) for event in deaths]
    reason = f"its workers died {len(deaths)} times between step {where['last_step']} and the next log: {causes[-1]}"
    processes = [event.details.get("processes", []) for event in deaths]
    return {**where, "reason": reason, "causes": causes, "processes": processes, "times_ns": [e.time_ns for e in deaths]}


def _in_a_row(events: Any) -> list[Event]:
    deaths: list[Event] = []
    began = False
    for event in events:
        began = began or event.kind == "attempt"
        if event.kind == "released":
            deaths = []
        elif event.kind == "died" and began:
            began = False
            same = bool(deaths) and deaths[-1].details.get("last_step") == event.details.get("last_step")
            deaths = [*deaths, event] if same else [event]
    return deaths
