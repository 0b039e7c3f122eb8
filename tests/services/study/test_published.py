"""The paper's rows are all here, each links to a design point, and each erratum to rows."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from decay_core.design import FORMS, DesignPoint
from decay_core.model import ModelConfig
from decay_core.sizes import get_size
from services.cli import app
from services.study.cost import count_model
from services.study.parameter_counts import PAPER_HEADER, paper_counts
from services.study.published import AXES, FOLDER, errata, errata_of, published_loss, published_rows, rows, runs

GOLDEN = list(csv.reader((Path(__file__).parents[2] / "golden" / "parameter_counts.csv").read_text().splitlines()))
EVALUATIONS = ("wiki_ppl", "lmb_ppl", "avg_ppl", "boolq", "piqa", "hella", "wino", "arc_e", "arc_c", "obqa", "siqa", "avg_acc")
ACCURACIES = EVALUATIONS[3:11]


def test_120_rows_are_39_configurations_at_three_sizes_and_three_repeats():
    assert len(rows()) == 120 and len(runs()) == 117
    assert set(Counter(row.point.name for row in runs()).values()) == {3}
    assert Counter(row.size for row in runs()) == {"160M": 39, "410M": 39, "1.45B": 39}
    repeated = [run for run, count in Counter(row.run for row in rows()).items() if count > 1]
    assert sorted(repeated) == [("1.45B", "mamba2-vector"), ("160M", "mamba2-vector"), ("410M", "mamba2-vector")]


def test_each_table_has_the_rows_that_the_paper_prints():
    assert Counter(row.table for row in rows()) == {"2": 30, "3": 5, "4": 5, "6": 29, "7": 30, "8": 10, "9": 10, "": 1}
    (silent,) = [row for row in rows() if row.loss is None]
    assert silent.run == ("160M", "tnl-scalar-tpe") and silent.table == ""
    assert not any(silent.columns[column] for column in ("params_b", "loss", *EVALUATIONS))


def test_every_row_links_to_the_point_it_names():
    for row in rows():
        assert row.point.name == row.columns["point"]
        row.point.check()
        assert row in published_rows(row.point, get_size(row.size))


def test_averages_are_those_of_their_columns_as_far_as_rounding_goes():
    for row in (row for row in rows() if row.loss is not None):
        figures = {column: float(row.columns[column]) for column in EVALUATIONS}
        assert figures["avg_ppl"] == pytest.approx((figures["wiki_ppl"] + figures["lmb_ppl"]) / 2, abs=0.101)
        assert figures["avg_acc"] == pytest.approx(sum(figures[task] for task in ACCURACIES) / 8, abs=0.101)


def test_both_forms_of_a_point_link_to_its_row_and_other_models_link_to_nothing():
    as_run = DesignPoint(decay="sigmoid", granularity="vector", transition="delta", form="as_run")
    assert (
        published_loss(as_run, get_size("160M"))
        == published_loss(replace(as_run, form="as_published"), get_size("160M"))
        == 2.937
    )
    llama = DesignPoint(decay="none", granularity="scalar", position="rope", transition="softmax")
    assert published_loss(llama, get_size("410M")) == 2.72
    unlike = [replace(as_run, write="beta"), replace(as_run, head_dim=128), replace(llama, position="rope_half")]
    for other in (*unlike, DesignPoint(decay="retnet", granularity="scalar"), DesignPoint(decay="mamba2", position="lrpe")):
        assert published_rows(other, get_size("160M")) == ()
    assert published_rows(as_run, get_size("nano")) == ()
    assert published_rows(llama, replace(get_size("160M"), glu_dim=2088)) == (), "match: parameters changed the model"


def test_a_repeated_row_links_twice_and_a_run_without_a_row_has_no_loss():
    assert [row.loss for row in published_rows(DesignPoint(decay="mamba2"), get_size("1.45B"))] == [2.513, 2.514]
    assert published_loss(DesignPoint(decay="tnl", granularity="scalar", position="tpe"), get_size("160M")) is None


@pytest.mark.parametrize("erratum", errata(), ids=lambda erratum: erratum.id)
def test_an_erratum_says_all_that_is_needed_and_selects_rows(erratum):
    assert erratum.kind in {"misprint", "missing", "repeat", "as_run", "confound", "unknown", "outlier"}
    assert erratum.what and erratum.source and erratum.consequence
    assert set(erratum.where) <= set(rows()[0].columns)
    concerned = [row for row in rows() if erratum.concerns(row)]
    assert concerned
    for column, values in erratum.where.items():
        assert {row.columns[column] for row in concerned} == set(values), "every value selects something"


def test_errata_have_different_names():
    names = [entry["id"] for entry in yaml.safe_load((FOLDER / "errata.yaml").read_text(encoding="utf-8"))]
    assert len(names) == len(set(names)) == len(errata())


def test_the_copied_row_is_the_160m_rows_evaluations_and_nothing_else():
    concerned = [row for row in rows() if any(erratum.kind == "misprint" for erratum in errata_of(row))]
    small = published_rows(concerned[0].point, get_size("160M"))
    assert [row.size for row in concerned] == ["410M"]
    assert [concerned[0].columns[c] for c in EVALUATIONS] == [small[0].columns[c] for c in EVALUATIONS]
    evaluated = Counter(tuple(row.columns[c] for c in EVALUATIONS) for row in runs() if row.loss is not None)
    assert sorted(evaluated.values())[-2:] == [1, 2]


def test_every_run_of_the_paper_has_its_parameters():
    assert tuple(GOLDEN[0]) == PAPER_HEADER and len(GOLDEN) == 118
    assert sorted(paper_counts()) == sorted(map(tuple, GOLDEN[1:]))


def test_counts_round_to_what_the_paper_prints():
    counts = {tuple(line[:-1]): int(line[-1]) for line in GOLDEN[1:]}
    printed = [row for row in rows() if row.columns["params_b"]]
    assert len(printed) == 119
    for row in printed:
        axes = next(one for one in runs() if one.run == row.run).columns
        count = counts[tuple(axes[axis] for axis in AXES)]
        assert f"{count / 1e9:.2f}" == f"{float(row.columns['params_b']):.2f}", row.run


def test_the_form_changes_the_parameters_of_the_delta_rule_only():
    for row in (row for row in runs() if row.size == "410M"):
        text, code = (
            count_model(ModelConfig(point=replace(row.point, form=form), size=get_size("410M"), vocab_size=50257))
            for form in FORMS
        )
        assert (text != code) == (row.point.transition == "delta"), row.run


def test_params_prints_the_runs_of_the_paper_and_the_trials_of_a_study():
    answer = CliRunner().invoke(app, ["params", "--format", "csv"])
    assert answer.exit_code == 0 and answer.output.splitlines()[0] == ",".join(GOLDEN[0])
    assert "160M,tpe,TNL,scalar,0,tpe,,164198412" in answer.output.splitlines()
    study = str(FOLDER.parent / "smoke.yaml")
    lines = CliRunner().invoke(app, ["params", study, study, "--format", "csv"]).output.splitlines()
    assert lines[0] == "study,trial,id,size,params" and len(lines) == 9 and lines[1].startswith("smoke,mamba2-vector-nano-s42,")
    assert "mamba2-vector-nano-s42" in CliRunner().invoke(app, ["params", study]).output
