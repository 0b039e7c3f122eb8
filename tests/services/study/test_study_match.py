"""`match: parameters` sets the channel mixer's width so that the points of a size agree in parameters, or refuses."""

import io

import pytest
from rich.console import Console

from decay_core.model import ModelConfig, build_model
from services.study.file import StudyError
from services.study.plan import make_plan
from services.study.show_plan import show_plan

SPACE = [
    {"decay": ["mamba2", "gla", {"simple_decay": 0.9}], "granularity": ["vector", "scalar"]},
    {"decay": "gla", "share": True},
    {"decay": "none", "granularity": "scalar", "transition": "softmax", "position": "rope"},
    {"decay": {"simple_decay": 0.99}, "transition": "delta", "form": "as_run"},
]
LARGE = {"space": SPACE, "sizes": ["160M"], "seeds": [1], "data": {"tokenizer": "gpt2"}}


def test_every_point_agrees_with_the_first_within_a_thousandth_in_steps_of_8(study):
    plan = make_plan(study(**LARGE, match="parameters"))
    target = plan.trials[0].parameters
    assert (plan.trials[0].config.size.glu_dim, target) == (2048, 164_804_352)
    for trial in plan.trials:
        built = build_model(ModelConfig.from_dict(trial.content["config"]), device="meta")
        assert trial.parameters == sum(value.numel() for value in built.parameters())
        assert abs(trial.parameters - target) <= target / 1000, trial.name
        assert trial.config.size.glu_dim % 8 == 0
        assert built.blocks[0].glu.up.out_features == trial.config.size.glu_dim
    unmatched = make_plan(study(**LARGE))
    assert max(abs(trial.parameters - target) for trial in unmatched.trials) > target / 1000


def test_no_narrower_or_wider_step_would_agree_better(study):
    plan = make_plan(study(**LARGE, match="parameters"))
    target, step = plan.trials[0].parameters, 8 * 3 * 768 * 12  # three maps of the GLU in 12 layers
    assert all(abs(trial.parameters - target) <= step / 2 for trial in plan.trials)


def test_widths_that_change_change_the_id_and_others_do_not(study):
    matched, plain = (make_plan(study(**LARGE, match=how)).trials for how in ("parameters", "none"))
    same = [one.config.size == other.config.size for one, other in zip(matched, plain, strict=True)]
    assert True in same and False in same
    assert [one.id == other.id for one, other in zip(matched, plain, strict=True)] == same


def test_a_size_that_cannot_be_matched_is_refused_with_its_residual(study):
    with pytest.raises(StudyError) as caught:
        make_plan(study(space=SPACE, match="parameters"))
    said = str(caught.value)
    # In each of two layers a vector f has 128 x 32 x 2 weights and 256 decays, a scalar one 128 x 4 and 8: 15,856 in all, of
    # which three steps of 6,144 (8 x 3 x 128 in two layers) give back 2,576 too many of the 492,928.
    assert "match: parameters cannot be had at size nano: mamba2-scalar stays +0.523% from mamba2-vector" in said
    assert "match: none" in said
    assert len(said.splitlines()) == 1


def test_the_plan_prints_width_and_residual(study):
    console = Console(record=True, width=200, file=io.StringIO())
    plan = show_plan(study(**LARGE, match="parameters"), console)
    lines = console.export_text().splitlines()
    for trial in plan.trials:
        (line,) = [line for line in lines if trial.id in line]
        off = trial.parameters / plan.trials[0].parameters - 1
        assert f" {trial.config.size.glu_dim} " in line and f" {off:+.4%} " in line
