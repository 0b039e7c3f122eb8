"""The studies in tune_spaces/ can be planned, and each asks exactly what its head says."""

import functools
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from decay_core import decays, positions
from decay_core.design import GRANULARITIES
from services.data.sources import find
from services.study.file import read_study
from services.study.plan import make_plan
from services.study.published import rows, runs
from services.study.show_published import Published

ROOT = Path(__file__).parents[3]
SPACES = ROOT / "tune_spaces"
STUDIES = sorted(
    path.relative_to(SPACES).as_posix() for path in SPACES.rglob("*.yaml") if isinstance(yaml.safe_load(path.read_text()), dict)
)
TABLES = {name: name.removeprefix("paper/table").removesuffix(".yaml") for name in STUDIES if "/table" in name}
HYPOTHESIS = "Hypothesis, written before any run: "


@functools.cache
def plan(name):
    return make_plan(read_study(SPACES / name))


def as_text(point):
    return replace(point, form="as_published").name


def ids(name):
    return {trial.id for trial in plan(name).trials}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_its_hypothesis_and_its_budget_and_fits_it(name):
    study = plan(name).study
    assert (SPACES / name).read_text().startswith("# ")
    if "smoke" not in name:
        assert HYPOTHESIS in study.question and len(study.question.split(HYPOTHESIS)[1]) > 40
        assert study.budget.max_trials == len(plan(name).trials)
    assert len(ids(name)) == len(plan(name).trials)


def test_studies_have_different_names():
    assert len({plan(name).study.name for name in STUDIES}) == len(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_sources_are_well_written(name):
    data = plan(name).study.data
    if getattr(data, "recall", None) is None:
        assert find(data.source).description


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_paper_is_exactly_its_rows_as_run(name):
    planned = [(trial.size, as_text(trial.point)) for trial in plan(name).trials]
    assert sorted(planned) == sorted(row.run for row in rows() if row.table == TABLES[name])
    assert {trial.point.form for trial in plan(name).trials} == {"as_run"}
    assert plan(name).refused == () and {trial.seed for trial in plan(name).trials} == {42}


@pytest.mark.parametrize("name", TABLES)
def test_every_trial_of_a_table_shows_its_published_loss_and_the_errata_of_its_row(name):
    shown = Published(plan(name).trials)
    text = "\n".join(shown.lines())
    for trial in plan(name).trials:
        (row,) = [row for row in rows() if row.table == TABLES[name] and row.run == (trial.size, as_text(trial.point))]
        cell = shown.cell(trial)
        assert f"{row.loss:.3f}" in cell
        for number in cell.partition("[")[2].rstrip("]").split(","):
            assert not number or f"[{number}] " in text
    assert "Every row: optimizer" in text


def test_marks_of_a_plan_are_those_of_the_errata():
    trials = {trial.point.name: trial for trial in plan("paper/table7.yaml").trials}
    shown = Published(trials.values())
    numbers = {line.split()[1]: line.split()[0].strip("[]") for line in shown.lines() if line.startswith("[")}
    assert shown.cell(trials["hgrn2-scalar-tpe-as_run"]) == f"2.730 [{numbers['copied-evaluations']}]"
    assert shown.cell(trials["mamba2_no_a-vector-as_run"]) == "2.717"
    both = ",".join(sorted((numbers["gla-temperature"], numbers["rope-is-lrpe"]), key=int))
    assert shown.cell(trials["gla-scalar-rope-as_run"]) == f"2.764 [{both}]"
    large = plan("paper/table3.yaml").trials
    assert Published(large).cell(large[0]).startswith("2.513 / 2.514 [")
    missing = next(t for t in plan("paper/as_published.yaml").trials if t.point.name == "tnl-scalar-tpe")
    assert Published([missing]).cell(missing).startswith("not printed [1")
    assert not Published(plan("smoke.yaml").trials)


def test_a_row_that_two_tables_print_is_one_trial():
    assert len(ids("paper/table2.yaml") & ids("paper/table3.yaml")) == 1
    assert len(ids("paper/table8.yaml") & (ids("paper/table6.yaml") | ids("paper/table7.yaml"))) == 2
    as_run = set().union(*map(ids, TABLES))
    assert len(as_run) == 116  # 117 runs of which 160M TNL + TPE is printed nowhere
    assert ids("paper/figures.yaml") < ids("paper/table6.yaml") | ids("paper/table8.yaml")


@pytest.mark.parametrize("name, size", [("paper/as_published.yaml", "160M"), ("paper/nano.yaml", "nano")])
def test_all_39_configurations_are_planned_as_published(name, size):
    points = {row.point.name for row in runs()}
    assert [trial.size for trial in plan(name).trials] == [size] * 39
    assert {trial.point.name for trial in plan(name).trials} == points and plan(name).refused == ()


def test_as_published_has_the_recipe_of_the_text():
    recipe = plan("paper/as_published.yaml").trials[0].recipe
    assert recipe.betas == (0.9, 0.999) and recipe.decay_weight_decay == 0 and recipe.weight_decay == 0.1


def test_the_factorial_is_the_whole_product_and_every_refusal_has_a_reason():
    planned = plan("factorial.yaml")
    cells = [trial.point for trial in planned.trials] + [cell.point for cell in planned.refused]
    whole = {
        (decay, p, granularity, share, position)
        for decay, granularity, share, position in itertools.product(
            decays.names(), GRANULARITIES, (False, True), positions.names()
        )
        for p in ((0.8, 0.9, 0.95, 0.99) if decays.get(decay).takes_p else (None,))
    }
    diagonal = [c for c in cells if c.transition == "diagonal" and c.form == "as_published"]
    assert {(c.decay, c.p, c.granularity, c.share, c.position) for c in diagonal} == whole and len(diagonal) == len(whole)
    assert all(cell.reason and cell.nearest for cell in planned.refused)
    assert {cell.kind for cell in planned.refused} == {"mathematical", "scope", "kernel"}
    paper = {row.point for row in runs() if row.point.transition != "delta"}
    assert paper <= {trial.point for trial in planned.trials}


def test_dplr_crosses_every_decay_with_both_head_widths_and_both_writes():
    for size in ("160M", "410M"):
        made = Counter()
        for trial in plan("dplr.yaml").trials:
            point = trial.point
            write = point.write or ("beta" if point.granularity == "scalar" else "plain")  # as run
            made[point.decay, point.granularity, trial.config.head_dim, write] += trial.size == size
        five = [("none", "scalar"), *itertools.product(("sigmoid", "simple_decay"), ("scalar", "vector"))]
        assert made == Counter((*one, width, write) for one in five for width in (64, 128) for write in ("beta", "plain"))
    assert {row.run for row in rows() if row.table == "9"} == {
        (trial.size, as_text(trial.point)) for trial in plan("dplr.yaml").trials if trial.point.head_dim is None
    }


def test_ablations_vary_what_they_say():
    weight_decay = {(trial.point, trial.recipe.decay_weight_decay) for trial in plan("weight_decay.yaml").trials}
    assert weight_decay == {(point, value) for point, _ in weight_decay for value in (0.0, 0.1)}
    rates = Counter(trial.point for trial in plan("lr_bands.yaml").trials)
    assert len(rates) == 9 and set(rates.values()) == {5}
    sizes = {trial.parameters for trial in plan("matched.yaml").trials}
    assert max(sizes) / min(sizes) - 1 <= 2e-3
    assert {(trial.size, plan("scale.yaml").study.resources.zero_stage) for trial in plan("scale.yaml").trials} == {
        ("3B", 3), ("7B", 3), ("13B", 3)
    }  # fmt: skip


def test_the_page_of_studies_names_every_file_with_its_trials():
    page = (ROOT / "docs" / "studies.md").read_text()
    listed = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    assert {cells[1].strip(" `"): cells[2].strip() for cells in listed} == {
        name: str(len(plan(name).trials)) for name in STUDIES
    }  # fmt: skip
