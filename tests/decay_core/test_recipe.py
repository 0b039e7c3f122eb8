"""The recipe: the schedule's sums, the defaults for short runs, and which parameters weight decay leaves alone."""

import json
import math
from dataclasses import replace

import pytest

from decay_core.design import DesignPoint
from decay_core.model import ModelConfig, build_model
from decay_core.recipe import Recipe, parameter_groups
from decay_core.sizes import get_size

BASE = Recipe(steps=1000, batch_size=8, seq_len=64, eval_every=100, eval_sequences=8, checkpoint_every=100, telemetry_every=10)
PAPER = replace(BASE, steps=20_000, warmup_steps=1024, decay_steps=976)


def test_paper_schedule_is_stable_until_19024():
    assert PAPER.lr_at(0) == 0
    assert PAPER.lr_at(1023) < PAPER.lr
    assert PAPER.lr_at(1024) == PAPER.lr_at(19_024) == PAPER.lr
    assert PAPER.lr_at(19_025) < PAPER.lr


def test_paper_schedule_sums_to_567_and_shrinks_an_unforced_weight_to_0567():
    rates = [PAPER.lr_at(step) for step in range(PAPER.steps)]
    assert sum(rates) == pytest.approx(5.67, abs=0.01)
    assert math.prod(1 - rate * PAPER.weight_decay for rate in rates) == pytest.approx(0.567, abs=0.002)


def test_decay_phase_ends_at_the_floor_and_follows_one_minus_root():
    assert PAPER.lr_at(19_024 + 244) == pytest.approx(3e-4 * (0.1 + 0.9 * 0.5))  # a quarter in: 1 - √(1/4)
    assert PAPER.lr_at(20_000) == pytest.approx(3e-5)


@pytest.mark.parametrize("steps, lengths", [(20_000, (1000, 1000)), (100_000, (1024, 8976)), (200, (10, 10)), (1, (0, 0))])
def test_default_schedule_lengths(steps, lengths):
    recipe = replace(BASE, steps=steps)
    assert recipe.schedule_lengths() == lengths
    assert all(0 <= recipe.lr_at(step) <= recipe.lr for step in range(0, steps, 7))


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"decay_weight_decay": -1.0}, "decay_weight_decay must be >= 0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio must lie"),
        ({"precision": "fp16"}, "precision must be fp32 or bf16"),
        ({"warmup_steps": 600, "decay_steps": 600}, "do not fit into 1000 steps"),
        ({"decay_steps": -1}, "must be >= 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
    ],
)
def test_recipe_that_does_not_fit_is_refused_in_one_line(change, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        replace(BASE, **change)
    assert "\n" not in str(caught.value)


def test_recipe_survives_json_and_refuses_unknown_and_missing_keys():
    assert Recipe.from_dict(json.loads(json.dumps(PAPER.to_dict()))) == PAPER
    with pytest.raises(ValueError, match="unknown key 'learning_rate'"):
        Recipe.from_dict({**PAPER.to_dict(), "learning_rate": 1})
    with pytest.raises(ValueError, match="missing"):
        Recipe.from_dict({"steps": 3})


@pytest.mark.parametrize(
    "decay, own",
    [
        ("mamba2", {"blocks.0.mixer.decay.log_rate", "blocks.0.mixer.decay.step_bias"}),
        ("hgrn2", {"joint_decay.logits"}),
        ("lightnet", set()),
    ],
)
def test_decay_parameters_are_a_group_of_their_own_and_the_projections_are_not(decay, own):
    size = replace(get_size("nano"), layers=1)
    model = build_model(ModelConfig(point=DesignPoint(decay=decay), size=size, vocab_size=9), device="meta")
    groups = parameter_groups(model, replace(BASE, decay_weight_decay=0.0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert grouped.get("decay", set()) == own
    assert grouped["weights"] == set(names.values()) - own
    assert [group["weight_decay"] for group in groups] == ([0.1, 0.0] if own else [0.1])
    assert all(group["weight_decay"] == 0.1 for group in parameter_groups(model, BASE))
