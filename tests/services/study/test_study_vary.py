"""`vary` multiplies a study by recipes: every combination is a trial, named by what varies and checked like a file."""

import pytest

from services.study.file import StudyError, read_study
from services.study.manifest import check_unchanged, next_manifest
from services.study.plan import make_plan

POINT = [{"decay": "gla"}]
DATA = {"digest": "a" * 64, "source": "sotu", "path": "/data"}


def refused(path):
    with pytest.raises(StudyError) as caught:
        make_plan(read_study(path))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"study file {path}: ")


def test_trials_are_points_times_recipes_times_seeds_named_by_what_varies(study):
    plan = make_plan(study(space=POINT, vary={"lr": [0.001, 3e-5], "weight_decay": [0, 0.1]}))
    recipes = [f"lr{lr}-weight_decay{decay}" for lr in ("0.001", "3e-05") for decay in ("0.0", "0.1")]
    names = [f"gla-vector-nano-{recipe}-s{seed}" for recipe in recipes for seed in (1, 2)]
    assert [trial.name for trial in plan.trials] == names
    assert [(trial.recipe.lr, trial.recipe.weight_decay) for trial in plan.trials[::2]] == [
        (0.001, 0.0), (0.001, 0.1), (3e-5, 0.0), (3e-5, 0.1)
    ]  # fmt: skip
    assert len({trial.id for trial in plan.trials}) == 8


def test_a_varied_trial_is_the_trial_that_a_study_with_that_recipe_has(study):
    varied = make_plan(study(space=POINT, seeds=[1], vary={"lr": [0.001, 0.0003], "betas": [[0.9, 0.99]]}))
    plain = [make_plan(study(space=POINT, seeds=[1], recipe={"lr": lr, "betas": [0.9, 0.99]})).trials[0] for lr in (1e-3, 3e-4)]
    assert [trial.id for trial in varied.trials] == [trial.id for trial in plain]
    assert varied.trials[0].name == "gla-vector-nano-lr0.001-betas0.9_0.99-s1"


def test_the_method_says_the_varied_part_so_that_recipes_are_not_taken_for_seeds(study):
    plan = make_plan(study(space=POINT, vary={"lr": [0.001, 0.003], "decay_weight_decay": [None]}))
    assert [trial.method for trial in plan.trials[::2]] == [
        "gla-vector lr=0.001 decay_weight_decay=none", "gla-vector lr=0.003 decay_weight_decay=none"
    ]  # fmt: skip
    assert make_plan(study(space=POINT)).trials[0].method == "gla-vector"


def test_values_that_are_one_value_are_one_trial(study):
    assert len(make_plan(study(space=POINT, seeds=[1], vary={"lr": [1, 1.0, "1e0"]})).trials) == 1


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"vary": {"leraning_rate": [1]}}, "unknown key 'vary.leraning_rate'; known keys: batch_size"),
        ({"vary": {"batchsize": [1]}}, "unknown key 'vary.batchsize'; did you mean 'batch_size'?"),
        ({"vary": {"lr": 0.1}}, "vary.lr: Input should be a valid list, given 0.1"),
        ({"vary": {"lr": []}}, "vary.lr: List should have at least 1 item"),
        ({"vary": {"lr": None}}, "vary.lr: has no values"),
        ({"vary": {"betas": [[0.9]]}}, "key 'vary.betas.0.1' is missing"),
        ({"recipe": {"betas": [0.9]}}, "key 'recipe.betas.1' is missing"),
        ({"vary": {"lr": [0.1, -1]}}, "vary: recipe: lr must be positive and finite, given -1.0"),
        ({"vary": {"lr": [True]}}, "vary: lr takes no true"),
        ({"vary": {"warmup_steps": [5, 200]}}, "vary: recipe: warmup_steps 200 and decay_steps 5 do not fit into 100 steps"),
        ({"vary": {"steps": [10, 100], "decay_steps": [50]}}, "do not fit into 10 steps"),
        ({"vary": {"batch_size": [8, 9]}}, "recipe.batch_size 9 cannot be shared by resources.workers 2"),
        ({"vary": {"lr": list(range(1, 41)), "eps": list(range(1, 41))}}, "vary: 1600 recipes, at most 1000 are taken"),
        ({"vary": [1]}, "vary: Input should be a valid dictionary"),
        ({"vary": {"lr": [0.1] * 2}, "budget": {"max_trials": 11}}, "budget.max_trials is 11, the space has 12 trials"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_in_one_line(write_study, changes, said):
    assert refused(write_study(**changes)).startswith(said) or said in refused(write_study(**changes))


def test_a_study_may_grow_by_recipes_but_not_lose_one(study):
    started = next_manifest(None, make_plan(study(space=POINT, vary={"lr": [0.001]})), DATA)
    check_unchanged(started, make_plan(study(space=POINT, vary={"lr": [0.001, 0.003]})))
    with pytest.raises(StudyError, match="may grow but not shrink"):
        check_unchanged(started, make_plan(study(space=POINT, vary={"lr": [0.003]})))


def test_a_study_of_an_earlier_release_is_unchanged_under_keys_that_came_since(study):
    plan = make_plan(study())
    started = next_manifest(None, plan, DATA)
    for key in ("vary", "match"):
        del started.study[key]
    del started.study["data"]["max_documents"]
    check_unchanged(started, plan)
    with pytest.raises(StudyError, match=r"recipe.lr \(0.0003 -> 0.1\)"):
        check_unchanged(started, make_plan(study(recipe={"lr": 0.1})))


def test_what_a_study_resolves_to_reads_back_as_the_same_study(study):
    one = study(vary={"lr": [0.001], "betas": [[0.9, 0.99]]}, match="parameters", sizes=["160M"])
    assert type(one).model_validate(one.model_dump(mode="json")) == one
    assert one.model_dump(mode="json")["vary"] == {"lr": [0.001], "betas": [[0.9, 0.99]]}
