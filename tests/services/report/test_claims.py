"""The paper's claims are asked of its own rows and of results, and answered in three ways."""

import pytest
import yaml
from synthetic_study import trial
from typer.testing import CliRunner

from decay_core.design import DesignPoint
from services.cli import app
from services.report.claims import (
    FAILS,
    HOLDS,
    NOT_TESTABLE,
    PRINTED,
    Claim,
    Place,
    evaluate,
    measured_in,
    measured_in_paper,
    read_claims,
)
from services.report.claims_page import claim_lines
from services.schedule.places import study_storage
from services.schedule.reporting import study_results
from services.study.file import StudyError, read_study
from services.study.manifest import next_manifest, write_manifest
from services.study.plan import make_plan
from services.study.published import FOLDER, errata

SIZES = ["160M", "410M", "1.45B"]
HERE = Place(size="nano", form="as_published")
LEFT, RIGHT = (DesignPoint(decay="mamba2", share=share) for share in (False, True))


def answers(wanted):
    return {
        (verdict.claim.id, verdict.place.size)
        for verdict in evaluate(measured_in_paper())
        if verdict.answer == wanted
    }  # fmt: skip


def claim(pairs, expect, quantifier="all", measure="loss"):
    return Claim(
        id="x", section="x", statement="x", measure=measure, pairs=tuple(pairs), expect=expect, quantifier=quantifier, beware=()
    )


def answer(asked, **losses):
    """The verdict where left and right have these losses."""
    points = {"left": LEFT, "right": RIGHT}
    (verdict,) = evaluate({HERE: {points[name]: {"loss": loss} for name, loss in losses.items()}}, [asked])
    return verdict


def test_exactly_these_claims_fail_on_the_papers_own_numbers():
    every = {("rope-is-negligible", size) for size in SIZES} | {("tpe-is-negligible", size) for size in SIZES}
    small = {("tpe-helps-few", "160M"), ("tpe-helps-few", "410M")}
    assert answers(FAILS) == every | small | {("delta-rule-vector-is-best", "410M")}


def test_claims_on_lambda_cannot_be_tested_on_the_papers_tables_and_all_others_can():
    on_lambda = {claim.id for claim in read_claims() if claim.measure != "loss"}
    assert {claim for claim, _ in answers(NOT_TESTABLE)} == on_lambda
    assert len(answers(HOLDS)) + len(answers(FAILS)) == 3 * (len(read_claims()) - len(on_lambda))


def test_a_missing_row_is_named_and_changes_nothing_that_the_others_decide():
    (verdict,) = [v for v in evaluate(measured_in_paper()) if v.claim.id == "tpe-helps-few" and v.place.size == "160M"]
    assert verdict.answer == FAILS and verdict.missing == ("tnl-scalar-tpe",)


@pytest.mark.parametrize(
    "claim_id, size, differences",
    [
        ("vector-beats-scalar", "160M", [-0.013, -0.033, -0.021, -0.005]),
        ("tpe-is-negligible", "410M", [-0.021, -0.018, -0.023, -0.033, -0.019, -0.022]),
        ("tpe-is-negligible", "1.45B", [0.002, 0.019, 0.013, -0.007, 0.004, 0.005]),
        ("sharing-harms-gla-and-lightnet", "1.45B", [0.053, 0.059]),
        ("simple-decay-beats-mamba2", "160M", [-0.008, -0.007]),
        ("delta-rule-vector-is-best", "410M", [-0.004, 0.002]),
    ],
)
def test_figures_are_the_differences_of_the_printed_losses(claim_id, size, differences):
    place = Place(size=size, form=PRINTED)
    (verdict,) = [v for v in evaluate(measured_in_paper()) if v.claim.id == claim_id and v.place == place]
    assert [case.value for case in verdict.cases] == differences


def test_every_claim_names_points_that_can_be_built_and_errata_that_exist():
    known = {erratum.id for erratum in errata()}
    for asked in read_claims():
        assert asked.quantifier in ("all", "any", "majority") and asked.pairs and set(asked.beware) <= known
        for point in (point for pair in asked.pairs for point in pair if point is not None):
            point.check()
    raw = yaml.safe_load((FOLDER / "claims.yaml").read_text(encoding="utf-8"))
    assert len({entry["id"] for entry in raw}) == len(raw) == len(read_claims())


def test_bounds_are_strict_and_figures_are_those_a_reader_would_compute():
    asked = claim([(LEFT, RIGHT)], {"below": 0.0})
    assert answer(asked, left=2.511, right=2.513).answer == HOLDS
    assert answer(asked, left=2.513, right=2.513).answer == FAILS
    ten = claim([(LEFT, RIGHT)], {"within": 0.01})
    assert answer(ten, left=2.975, right=2.985).answer == FAILS  # -0.01, whatever the floats say
    assert answer(ten, left=2.976, right=2.985).answer == HOLDS


@pytest.mark.parametrize(
    "quantifier, left, right, expected",
    [
        ("all", 1.0, 1.0, HOLDS),
        ("all", 1.0, 9.0, FAILS),
        ("all", 1.0, None, NOT_TESTABLE),
        ("all", 9.0, None, FAILS),
        ("any", 1.0, 9.0, HOLDS),
        ("any", 9.0, 9.0, FAILS),
        ("any", 9.0, None, NOT_TESTABLE),
        ("any", 1.0, None, HOLDS),
        ("majority", 1.0, 9.0, FAILS),
        ("majority", 1.0, 1.0, HOLDS),
        ("majority", 1.0, None, NOT_TESTABLE),
    ],
)
def test_a_quantifier_decides_as_soon_as_the_unknown_cannot_change_it(quantifier, left, right, expected):
    asked = claim([(LEFT, None), (RIGHT, None)], {"below": 2.0}, quantifier)
    losses = {name: loss for name, loss in (("left", left), ("right", right)) if loss is not None}
    assert answer(asked, **losses).answer == expected


def test_a_study_is_asked_at_its_own_sizes_and_forms_over_the_mean_of_its_seeds():
    results = [trial("mamba2-vector", loss=4.0, seed=1), trial("mamba2-vector", loss=4.2, seed=2)]
    results += [trial(f"{decay}-vector", loss=loss) for decay, loss in (("gla", 4.3), ("hgrn2", 4.15), ("lightnet", 4.4))]
    verdicts = evaluate(measured_in(results))
    assert {verdict.place for verdict in verdicts} == {HERE}
    (best,) = [v for v in verdicts if v.claim.id == "mamba2-is-the-best-parameterization"]
    assert best.answer == HOLDS and [case.value for case in best.cases] == pytest.approx([-0.05, -0.2, -0.3])
    (near,) = [v for v in verdicts if v.claim.id == "mamba2-settles-near-0.8"]
    assert near.answer == HOLDS and near.cases[0].value == pytest.approx(0.87)  # the median of layers at 0.81 and 0.93


def test_lines_give_every_figure_and_name_what_is_missing():
    text = "\n".join(claim_lines(evaluate(measured_in_paper())))
    assert "  410M, as printed: fails (closest by 0.002)" in text
    assert "    +0.002  simple_decay_p0.99-vector-delta - simple_decay_p0.99-scalar-delta  (outside)" in text
    assert "    no loss of tnl-scalar-tpe" in text and "    no median lambda of mamba2-vector" in text
    assert f"{len(read_claims())} claims: " in text.splitlines()[-1] and "4 fail somewhere" in text.splitlines()[-1]


def test_values_of_a_varied_recipe_are_asked_apart():
    results = []
    for decay, loss in (("mamba2", 4.0), ("mamba2_no_a", 4.001)):
        for rate in (0.001, 0.003):
            name = {"name": f"{decay}-vector-nano-lr{rate}-s42", "method": f"{decay}-vector lr={rate}"}
            own = {"trial_id": f"{decay}{rate}", "varied": {"lr": rate}, **name}
            results.append(trial(f"{decay}-vector", loss=loss + 10 * rate).model_copy(update=own))
    verdicts = [v for v in evaluate(measured_in(results)) if v.claim.id == "mamba2-does-not-need-a"]
    assert [(v.place.variant, v.answer) for v in verdicts] == [("lr 0.001", HOLDS), ("lr 0.003", HOLDS)]


@pytest.fixture
def finished(tmp_path):
    """finished(file): a study of tune_spaces whose every trial has a result, and its storage."""

    def finish(file):
        study = read_study(FOLDER.parent / file, str(tmp_path))
        plan, storage = make_plan(study), study_storage(study)
        write_manifest(storage, next_manifest(None, plan, {"digest": "d", "source": "s"}))
        for index, one in enumerate(plan.trials):
            about = {"trial_id": one.id, "name": one.name, "method": one.method, "point": one.point.to_dict()}
            result = trial(one.point.name, size=one.size, loss=4.0 + index / 10).model_copy(update=about)
            storage.write(f"trials/{one.id}/result.json", result.to_json().encode())
        return study

    return finish


def test_a_study_is_asked_by_its_file(finished, tmp_path):
    finished("smoke.yaml")
    answered = CliRunner().invoke(app, ["claims", str(FOLDER.parent / "smoke.yaml"), "--storage", str(tmp_path)])
    assert answered.exit_code == 0, answered.output
    assert "    -0.100  mamba2-vector - gla-vector" in answered.output and "  nano, as_published: holds" in answered.output


def test_the_papers_rows_are_asked_without_a_study_and_never_both(tmp_path):
    assert f"{len(read_claims())} claims: " in CliRunner().invoke(app, ["claims", "--published"]).output
    for words in (["claims"], ["claims", str(FOLDER.parent / "smoke.yaml"), "--published"]):
        assert isinstance(CliRunner().invoke(app, words).exception, StudyError)
    empty = CliRunner().invoke(app, ["claims", str(FOLDER.parent / "smoke.yaml"), "--storage", str(tmp_path)])
    assert "has no finished trial in" in str(empty.exception)


def test_results_of_the_papers_points_come_with_its_losses(finished):
    results = {result.method: result.published_loss for result in study_results(finished("first/rope.yaml"))}
    assert results["tnl-scalar-rope"] == results["tnl-scalar-rope-as_run"] == 2.975
    assert set(results.values()) == {2.96, 2.959, 2.985, 2.975}
