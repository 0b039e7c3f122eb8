"""What a plan says of time, money and memory: measured where the storage knows it, assumed elsewhere, and which is said."""

import csv
import io
import json
from collections import Counter

import pytest
from finished import finish, result_of, start
from rich.console import Console
from typer.testing import CliRunner

from services.study.accelerators import ACCELERATORS, get_accelerator
from services.study.file import StudyError
from services.study.forecast import TAKEN_GIB, Asked, asked_for, forecast
from services.study.plan import GPU_GFLOPS, make_plan
from services.study.show_plan import show_plan
from services.study.storage import Storage

GPU = {"workers": 2, "gpus_per_worker": 1}
REFUSING = [{"decay": ["gla", "tnl"], "granularity": ["vector", "scalar"], "head_dim": [None, 48]}]


@pytest.fixture
def console():
    return Console(record=True, width=240, file=io.StringIO())


@pytest.fixture
def stored(study, tmp_path):
    """stored(**changes): a study whose storage is this test's, planned, and the study's folder."""

    def make(**changes):
        plan = make_plan(study(storage=str(tmp_path / "runs"), **changes))
        return plan, Storage(str(tmp_path / "runs")).child(plan.study.name)

    return make


def test_without_a_measurement_a_named_gpu_runs_at_the_given_share_of_its_peak(stored):
    plan, _ = stored(resources=GPU, space=[{"decay": "gla"}], seeds=[1])
    seen = forecast(plan, asked_for("h100", 2.0, 0.5))
    (trial,) = plan.trials
    assert seen.seconds(trial) == pytest.approx(trial.flops / (2 * 0.5 * 989.4e12))
    assert seen.device_hours(plan.trials) == pytest.approx(2 * seen.seconds(trial) / 3600)
    assert seen.money(plan.trials) == pytest.approx(2.0 * seen.device_hours(plan.trials))
    assert seen.rates.of(trial).kind == "MFU 50.0%"


def test_the_share_assumed_without_being_told_gives_an_h100_the_rate_it_was_measured_at(stored):
    plan, _ = stored(resources=GPU)
    seen = forecast(plan, asked_for("H100", None, None))
    assert seen.rates.of(plan.trials[0]).gflops == pytest.approx(GPU_GFLOPS)
    assert forecast(plan, asked_for("A100-80GB", None, None)).rates.of(plan.trials[0]).gflops == pytest.approx(
        GPU_GFLOPS * 312 / 989.4
    )


def test_half_a_gpu_a_worker_has_half_the_speed_and_costs_half(stored):
    plan, _ = stored(resources={"workers": 1, "gpus_per_worker": 0.5})
    whole, _ = stored(resources={"workers": 1, "gpus_per_worker": 1})
    half, one = (forecast(p, asked_for("H100", 2.0, 0.1)) for p in (plan, whole))
    assert half.seconds(plan.trials[0]) == pytest.approx(2 * one.seconds(whole.trials[0]))
    assert half.money(plan.trials) == pytest.approx(one.money(whole.trials))


def test_the_same_point_is_taken_at_the_speed_it_was_measured_and_another_scaled_by_its_operations(stored):
    plan, folder = stored(seeds=[1])
    start(plan, folder)
    done, other = plan.trials[0], plan.trials[1]
    finish(folder, result_of(done, tokens_per_second=1000.0, world_size=2))
    seen = forecast(plan, Asked())
    assert seen.seconds(done) == pytest.approx(done.tokens / 1000)
    assert seen.rates.of(done).kind == "measured" and seen.rates.of(other).kind == "other point"
    per_token = {trial.name: trial.flops / trial.tokens for trial in (done, other)}
    assert per_token[other.name] < per_token[done.name]
    assert seen.seconds(other) == pytest.approx(other.tokens / 1000 * per_token[other.name] / per_token[done.name])
    assert "1 finished trial of this size on cpu (study small)" in seen.rates.of(other).source


def test_measurements_of_other_studies_count_and_the_median_is_taken(stored):
    plan, folder = stored(name="earlier", seeds=[1, 2, 3], space=[{"decay": "gla"}])
    start(plan, folder)
    finish(folder, *(result_of(trial, tokens_per_second=speed) for trial, speed in zip(plan.trials, (10.0, 900.0, 1000.0),
                                                                                       strict=True)))  # fmt: skip
    later, _ = stored(name="later", seeds=[9], space=[{"decay": "gla"}])
    seen = forecast(later, Asked())
    assert seen.seconds(later.trials[0]) == pytest.approx(later.trials[0].tokens / 900)
    assert "median of 3 finished trials of this size on cpu (study earlier)" in seen.rates.of(later.trials[0]).source


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({}, "measured"),
        ({"sizes": ["micro"]}, "assumed"),
        ({"recipe": {"precision": "bf16"}}, "assumed"),
        ({"resources": {"threads_per_worker": 4}}, "assumed"),
        ({"resources": GPU}, "assumed"),
        ({"resources": {"workers": 4}}, "measured"),
        ({"recipe": {"lr": 0.5}}, "measured"),
    ],
)
def test_only_trials_run_alike_are_worth_something(stored, changes, kind):
    plan, folder = stored(name="earlier", seeds=[1])
    start(plan, folder)
    finish(folder, *map(result_of, plan.trials))
    later, _ = stored(name="later", seeds=[1], **changes)
    assert {forecast(later, Asked()).rates.of(trial).kind for trial in later.trials} == {kind}


@pytest.mark.parametrize(
    "asked, kind",
    [("H100", "measured"), ("H200", "MFU 13.1%"), ("A100-80GB", "MFU 13.1%"), (None, "measured")],
)
def test_a_measurement_speaks_for_the_device_it_was_made_on(stored, asked, kind):
    plan, folder = stored(resources=GPU, seeds=[1], space=[{"decay": "gla"}])
    start(plan, folder)
    finish(folder, *(result_of(trial, device="NVIDIA H100 80GB HBM3") for trial in plan.trials))
    assert forecast(plan, asked_for(asked, None, None)).rates.of(plan.trials[0]).kind == kind


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"point": 3}', b"\xff"])
def test_a_result_that_cannot_be_read_says_nothing(stored, damage):
    plan, folder = stored(seeds=[1], space=[{"decay": "gla"}])
    start(plan, folder)
    folder.write(f"trials/{plan.trials[0].id}/result.json", damage)
    assert forecast(plan, Asked()).rates.of(plan.trials[0]).kind == "assumed"


def test_what_the_ledger_has_is_taken_off_what_is_left(stored, console):
    plan, folder = stored(seeds=[1])
    start(plan, folder)
    finish(folder, *map(result_of, plan.trials[:2]))
    seen = forecast(plan, asked_for(None, 3.0, None))
    assert [trial.id for trial in seen.to_do] == [trial.id for trial in plan.trials[2:]]
    show_plan(plan.study, console, Asked(price=3.0))
    text = console.export_text()
    assert f"2 finished, 4 to do: about {seen.device_hours(seen.to_do):,.3g} worker-hours" in text
    assert f"({seen.money(seen.to_do):,.2f} at 3 each)" in text


def test_the_budget_is_judged_at_the_assumed_rate_and_measured_ones_only_warn(stored, console):
    plan, folder = stored(seeds=[1])
    start(plan, folder)
    finish(folder, *(result_of(trial, tokens_per_second=0.1) for trial in plan.trials))
    hours = plan.worker_hours * 1.01
    show_plan(plan.study.model_copy(update={"budget": plan.study.budget.model_copy(update={"max_hours": hours})}), console)
    assert f"worker-hours, more than budget.max_hours {hours:g}." in console.export_text()


def test_every_trial_says_where_its_rate_is_from(stored, console):
    plan, folder = stored(seeds=[1], sizes=["nano", "micro"], space=[{"decay": ["gla", "mamba2"]}])
    start(plan, folder)
    finish(folder, result_of(plan.trials[0]))
    show_plan(plan.study, console)
    lines = console.export_text().splitlines()
    kinds = ["measured", "other point", "assumed", "assumed"]
    for trial, kind in zip(plan.trials, kinds, strict=True):
        assert kind in next(line for line in lines if trial.id in line)
    assert [line.split(":")[0] for line in lines if line.startswith("rate ")] == [
        "rate measured", "rate other point", "rate assumed"
    ]  # fmt: skip


def test_a_trial_that_does_not_fit_is_named_with_the_smallest_remedy(stored, console):
    large = {"sizes": ["1.45B"], "seeds": [1], "space": [{"decay": "mamba2", "granularity": "scalar"}],
             "recipe": {"precision": "bf16", "seq_len": 2048, "batch_size": 64}, "data": {"tokenizer": "gpt2"},
             "resources": {"workers": 8, "gpus_per_worker": 1, "zero_stage": 0}}  # fmt: skip
    plan, _ = stored(**large)
    (trial,) = plan.trials
    seen = forecast(plan, asked_for("A100-40GB", None, None))
    room = (40 - TAKEN_GIB) * 2**30
    fitting = [
        (size, stage) for size in (8, 4, 2, 1) for stage in range(4) if seen.memory(trial, stage, size).total <= room
    ]  # fmt: skip
    assert not seen.fits(trial) and fitting[0] == (2, 2)
    show_plan(plan.study, console, seen.asked)
    text = console.export_text()
    assert "1 of 1 trials do not fit on one A100-40GB as the study says;" in text
    assert "they do with micro_batch_size: 2 and zero_stage: 2." in text
    for stage in range(4):
        assert f"{seen.memory(trial, stage).total / 2**30:.1f}" in next(line for line in text.splitlines() if " 8 │" in line)
    assert seen.remedy(trial) == "micro_batch_size: 2 and zero_stage: 2"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gpu", "H1000"], "unknown --gpu 'H1000' (did you mean H100?); known: V100-16GB"),
        (["--price", "inf"], "--price is money for an hour, 0 or more, given inf"),
        (["--price=-1"], "--price is money for an hour, 0 or more, given -1"),
        (["--mfu", "0.3"], "--mfu is a share of a GPU's peak; name it with --gpu"),
        (["--gpu", "H100", "--mfu", "30"], "--mfu is a share of the peak, above 0 and at most 1, given 30"),
        (["--format", "xml"], "unknown --format 'xml'; known: table, csv, json"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_refused(write_study, words, said):
    from services.cli import app

    answer = CliRunner().invoke(app, ["plan", str(write_study()), *words])
    assert isinstance(answer.exception, StudyError) and said in str(answer.exception)


def test_accelerators_are_found_whatever_their_spelling_and_tell_their_devices_apart():
    assert get_accelerator("rtx 4090") is ACCELERATORS["RTX-4090"]
    devices = {"NVIDIA A100-SXM4-40GB": "A100-40GB", "NVIDIA A100-SXM4-80GB": "A100-80GB", "NVIDIA H100 80GB HBM3": "H100",
               "NVIDIA H200": "H200", "NVIDIA GeForce RTX 4090": "RTX-4090", "Tesla V100-SXM2-16GB": "V100-16GB", "cpu": None,
               "": None}  # fmt: skip
    for device, name in devices.items():
        assert [gpu.name for gpu in ACCELERATORS.values() if gpu.is_called(device)] == ([name] if name else [])


def test_a_place_that_cannot_be_read_is_said_and_the_plan_still_made(study, console):
    show_plan(study(storage="nowhere9://bucket/x"), console)
    text = console.export_text()
    assert "12 trials, warm backend" in text and "What is finished already is not known: storage 'nowhere9://bucket/x'" in text


def rows(write_study, kind, *words, **changes):
    from services.cli import app

    answer = CliRunner().invoke(app, ["plan", str(write_study(**changes)), "--format", kind, *words])
    assert answer.exit_code == 0, answer.output
    return list(csv.DictReader(io.StringIO(answer.output))) if kind == "csv" else json.loads(answer.output)


def test_csv_has_one_row_per_cell_and_recipe_refused_ones_too(write_study, tmp_path):
    changes = {"space": REFUSING, "vary": {"lr": [0.001, 0.003]}, "storage": str(tmp_path / "runs")}
    table = rows(write_study, "csv", "--gpu", "H100", "--price", "2", **changes)
    assert Counter(row["status"] for row in table) == {"planned": 6, "refused": 5}
    assert Counter(row["kind"] for row in table if row["status"] == "refused") == {"mathematical": 2, "size": 3}
    first = table[0]
    assert (first["name"], first["seeds"], first["varied"]) == ("gla-vector lr=0.001", "1 2", "lr=0.001")
    assert (first["decay"], first["transition"], first["size"], first["state_size"]) == ("gla", "diagonal", "nano", "8192")
    assert float(first["flops"]) == float(first["flops_per_token"]) * int(first["tokens"])
    assert float(first["gib_zero0"]) > 0 and float(first["money"]) > 0
    refused = [row for row in table if row["kind"] == "size"]
    assert {row["size"] for row in refused} == {"nano"} and refused[0]["nearest"] == "gla-vector"
    assert refused[0]["reason"] == "head_dim 48 does not divide the width 128 of nano"


def test_json_says_the_same_with_counts_beside_it(write_study, tmp_path):
    changes = {"space": REFUSING, "storage": str(tmp_path / "runs")}
    whole, table = rows(write_study, "json", **changes), rows(write_study, "csv", **changes)
    assert whole["refused"]["kind"] == {"size": 3, "mathematical": 2} and whole["trials"] == 6
    assert whole["refused"]["reason"]["tnl has no vector form, only scalar"] == 2
    assert [row["name"] for row in whole["cells"]] == [row["name"] for row in table]
    for one, other in zip(whole["cells"], table, strict=True):
        assert {key: "" if value is None else str(value) for key, value in one.items()} == other


def test_refused_cells_are_counted_by_kind_and_listed_under_their_reason(study, console):
    show_plan(study(space=REFUSING), console)
    text = console.export_text()
    assert "5 cells refused: 3 size, 2 mathematical" in text
    reason = next(line for line in text.splitlines() if "head_dim 48 does not divide the width 128 of nano" in line)
    assert reason.split()[1:6:2] == ["1", "3", "size"]
    cell = next(line for line in text.splitlines() if "gla-scalar-dh48 at nano" in line)
    assert cell.split("│")[2].strip() == "1" and cell.split("│")[3].strip() == "gla-scalar"
