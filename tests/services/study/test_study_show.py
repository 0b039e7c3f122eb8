"""Plan and status print what a person needs, whatever characters their texts hold."""

import io
import json

import pytest
from rich.console import Console

from services.study.file import StudyError
from services.study.ledger import Ledger
from services.study.manifest import next_manifest, write_manifest
from services.study.plan import make_plan
from services.study.show import duration, last_record, show_status
from services.study.show_plan import show_plan


@pytest.fixture
def console():
    return Console(record=True, width=200, file=io.StringIO())


def row(text, *words):
    """The one line of the output that holds all words."""
    found = [line for line in text.splitlines() if all(word in line for word in words)]
    assert len(found) == 1, (words, found)
    return found[0]


def test_the_plan_lists_every_trial_with_its_id_and_cost(study, console):
    plan = show_plan(study(), console)
    text = console.export_text()
    for trial in plan.trials:
        assert f"{trial.parameters:,}" in row(text, trial.name, trial.id) and f"{trial.tokens:,}" in row(text, trial.id)
    assert "plan of small: does it plan?" in text
    assert "12 trials, warm backend, 2 worker(s) each (ZeRO 0, 0 GPU, 1 CPU a worker)" in text
    assert "rate assumed: 30 GFLOP/s a worker (30 a thread)." in text and "refused" not in text


def test_the_plan_lists_refused_cells_with_reason_and_nearest(study, console):
    show_plan(study(space=[{"decay": ["gla", "tnl"], "position": ["none", "rope"], "granularity": "scalar"},
                           {"decay": ["gla", "tnl"]}]), console)  # fmt: skip
    text = console.export_text()
    assert "1 cells refused: 1 mathematical" in text
    assert row(text, "tnl has no vector form, only scalar").split()[1:6:2] == ["1", "1", "mathematical"]
    assert row(text, "tnl-vector").split()[1:6:2] == ["tnl-vector", "1", "tnl-scalar"]


def test_the_plan_says_which_rate_was_given(study, console):
    show_plan(study(resources={"assumed_gflops_per_worker": 1234.0}), console)
    assert "1,234 GFLOP/s a worker (resources.assumed_gflops_per_worker)" in console.export_text()


def test_a_refused_study_prints_nothing(study, console):
    with pytest.raises(StudyError):
        show_plan(study(budget={"max_trials": 1}), console)
    assert console.export_text() == ""


def test_brackets_in_a_text_are_printed_and_not_taken_for_markup(study, storage, console):
    asked = study(question="is [bold] better than [/tmp/x]?")
    plan = show_plan(asked, console)
    Ledger(storage).append("failed", plan.trials[0].id, reason="workers died: [rank0] [/dev/shm] full")
    write_manifest(storage, next_manifest(None, plan, {"digest": "d", "source": "s"}))
    show_status(asked, storage, console)
    text = console.export_text()
    assert "is [bold] better than [/tmp/x]?" in text and "workers died: [rank0] [/dev/shm] full" in text


def test_status_of_a_study_that_never_started_says_so_and_writes_nothing(study, storage, console):
    show_status(study(), storage, console)
    text = console.export_text()
    assert "(not started)" in text and "0 of 12 trials finished" in text
    assert not storage.exists(".")


def cells(text, words):
    """The cells of that row."""
    return [cell.strip() for cell in row(text, words).split("│")[1:-1]]


def test_status_shows_where_every_trial_stands(study, storage, console):
    plan = make_plan(study())
    write_manifest(storage, next_manifest(None, plan, {"digest": "d", "source": "s"}))
    ledger = Ledger(storage)
    a, b, c, d = [trial.id for trial in plan.trials[:4]]
    for kind, trial, details in (
        ("attempt", a, {}), ("attempt", a, {}), ("attempt", b, {}), ("finished", b, {}), ("tracked", b, {}),
        ("attempt", c, {}), ("finished", c, {}), ("attempt", d, {}), ("preempted", d, {}),
        ("died", d, {}), ("died", d, {}), ("failed", d, {"reason": "loss is nan at step 9"}),
    ):  # fmt: skip
        ledger.append(kind, trial, **details)
    lines = [json.dumps({"step": step, "train/loss": 9 / step}) for step in (1, 2)]
    storage.write(f"trials/{a}/steps.jsonl", ("\n".join(lines) + '\n{"step": 3, "tra').encode())
    show_status(study(), storage, console)
    text = console.export_text()
    assert "not started" not in text
    assert cells(text, a) == [plan.trials[0].name, a, "started", "2", "0", "0", "2/100", "4.5000", ""]
    assert "finished │ 1" in row(text, b) and "not in MLflow" not in row(text, b)
    assert "not in MLflow yet: run again" in row(text, c)
    assert cells(text, d)[2:6] == ["failed", "1", "1", "2"] and "loss is nan at step 9" in row(text, d)
    assert "waiting" in row(text, plan.trials[4].id) and "2 of 12 trials finished" in text


@pytest.mark.parametrize("log", [b"", b'{"step": 1', b"damaged\n", b"3\n", b"[1]\n"])
def test_a_log_without_a_whole_last_record_shows_none(storage, log):
    storage.write("trials/x/steps.jsonl", log)
    assert last_record(storage, "x") == {}
    assert last_record(storage, "never") == {}


def test_durations_are_said_in_the_unit_a_person_would_use():
    spoken = [duration(seconds) for seconds in (0.2, 59, 60, 5400, 86400, 200000)]
    assert spoken == ["0 s", "59 s", "1.0 min", "1.5 h", "1.0 d", "2.3 d"]
