"""A trial's id is a hash of what its result depends on, and of nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_study import VALID, merged

from services.study.cells import cells
from services.study.cost import flops_per_token
from services.study.file import RecipeFields, Study, StudyError, read_study
from services.study.plan import WARM_BELOW_S, make_plan

TUNE_SPACES = Path(__file__).parents[3] / "tune_spaces"
# Changing one of these orphans every study that has started: its finished trials would be trained again under new ids.
GOLDEN_MAMBA2 = "5e54ec49f368"
GOLDEN_SIMPLE = "1796e07f893b"


def one(**changes):
    """The only trial of a study with one point, one size and one seed."""
    raw = merged({"space": [{"decay": {"simple_decay": 0.9}}], "seeds": [1]} | changes)
    (trial,) = make_plan(Study.model_validate(raw)).trials
    return trial


def test_ids_are_what_they_were_in_the_first_release():
    assert one(space=[{"decay": "mamba2"}]).id == GOLDEN_MAMBA2
    assert one().id == GOLDEN_SIMPLE


# Two of the files in tune_spaces, as they were planned before there was a transition, `vary` or `match`.
FILES = {
    "smoke.yaml": {"mamba2-vector-nano-s42": "75288ae2477c", "simple_decay_p0.99-scalar-nano-s42": "d1911861b0a2"},
    "cluster-smoke.yaml": {"mamba2-scalar-nano-s42": "00d9bff101cc"},
}


@pytest.mark.parametrize("name", FILES)
def test_ids_of_the_study_files_are_what_they_were_before_the_later_axes(name):
    planned = {trial.name: trial.id for trial in make_plan(read_study(TUNE_SPACES / name)).trials}
    assert FILES[name].items() <= planned.items()


def test_ids_do_not_depend_on_the_process_or_the_order_of_keys(process_env):
    backwards = json.dumps({key: VALID[key] for key in reversed(VALID)})
    script = (
        "import json, sys; from services.study.file import Study; from services.study.plan import make_plan;"
        "print(*(t.id for t in make_plan(Study.model_validate(json.load(sys.stdin))).trials))"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", script], input=text, env={**process_env, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout.split()
        for text, seed in ((backwards, "1"), (json.dumps(VALID), "2"))
    ]  # fmt: skip
    here = [trial.id for trial in make_plan(Study.model_validate(VALID)).trials]
    assert len(here) == 12 and printed == [here, here]


def test_trials_are_sizes_times_points_times_seeds_in_file_order(study):
    plan = make_plan(study(sizes=["micro", "nano", "micro"], seeds=[5, 3, 5], space=[{"decay": ["gla", "tnl"],
                                                                                      "granularity": ["scalar"]}]))  # fmt: skip
    assert [trial.name for trial in plan.trials] == [
        f"{point}-{size}-s{seed}" for size in ("micro", "nano") for point in ("gla-scalar", "tnl-scalar") for seed in (5, 3)
    ]
    assert len({trial.id for trial in plan.trials}) == 8


def test_a_cell_that_two_blocks_name_is_one_cell(study):
    both = study(space=[{"decay": ["gla", "gla"]}, {"decay": ["gla", "hgrn2"]}])
    assert [cell.point.decay for cell in cells(both)] == ["gla", "hgrn2"]


OTHER = {
    "steps": 101, "batch_size": 16, "seq_len": 65, "lr": 1e-3, "betas": [0.9, 0.9], "eps": 1e-7, "weight_decay": 0.0,
    "decay_weight_decay": 0.0, "grad_clip": 0.5, "warmup_steps": 3, "decay_steps": 3, "min_lr_ratio": 0.0,
    "precision": "bf16", "eval_every": 51, "eval_sequences": 17, "checkpoint_every": 51, "telemetry_every": 11,
}  # fmt: skip
OTHER_DATA = {
    "source": "python-docs", "tokenizer": "bpe-513", "boundary": "eos", "held_out_percent": 3, "text_field": "body",
    "max_documents": 10,
}  # fmt: skip


def test_every_field_of_the_recipe_and_the_data_is_varied_below():
    assert set(OTHER) == set(RecipeFields.model_fields)
    elsewhere = {"workers", "recall"}  # the one is no part of an id, the other's keys are in test_recall_task.py
    assert set(OTHER_DATA) == set(Study.model_fields["data"].annotation.model_fields) - elsewhere


@pytest.mark.parametrize(
    "change",
    [{"recipe": {key: value}} for key, value in OTHER.items()]
    + [{"data": {key: value}} for key, value in OTHER_DATA.items()]
    + [
        {"model": {"inner_gain_init": 0.5}},
        {"space": [{"decay": {"simple_decay": 0.8}}]},
        {"space": [{"decay": "gla"}]},
        {"space": [{"decay": {"simple_decay": 0.9}, "granularity": "scalar"}]},
        {"space": [{"decay": {"simple_decay": 0.9}, "share": True}]},
        {"space": [{"decay": {"simple_decay": 0.9}, "granularity": "scalar", "position": "rope"}]},
        {"space": [{"decay": {"simple_decay": 0.9}, "form": "as_run"}]},
        {"sizes": ["micro"]},
        {"seeds": [2]},
        {"space": [{"decay": {"simple_decay": 0.9}, "transition": "delta"}]},
        {"space": [{"decay": {"simple_decay": 0.9}, "head_dim": 64}]},
        {"space": [{"decay": {"simple_decay": 0.9}, "granularity": "paired"}]},
        {"vary": {"lr": [0.5]}},
    ],
)
def test_whatever_bears_on_the_result_changes_the_id(change):
    assert one(**change).id != one().id


def test_points_that_differ_on_one_axis_have_ids_of_their_own():
    axes = [{}, {"granularity": "scalar"}, {"granularity": "scalar", "position": "rope"}, {"form": "as_run"}, {"share": True}]
    assert len({one(space=[{"decay": {"simple_decay": 0.9}, **axis}]).id for axis in axes}) == len(axes)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"question": "why?"},
        {"storage": "elsewhere"},
        {"tracking": {"uri": "http://127.0.0.1:5000"}},
        {"budget": {"max_trials": 5}},
        {"data": {"workers": 4}},
        {"vary": {}},
        {"vary": {"lr": [0.0003]}},
        {"match": "none"},
        {"space": [{"decay": {"simple_decay": 0.9}, "transition": "diagonal", "write": None, "head_dim": None}]},
        {"resources": {"workers": 1}},
        {"resources": {"workers": 4, "zero_stage": 2, "micro_batch_size": 1, "deterministic": False, "backend": "train"}},
    ],
)
def test_nothing_else_changes_the_id(change):
    assert one(**change).id == one().id


def test_the_same_trial_in_two_studies_has_one_id(study):
    small = make_plan(study(space=[{"decay": "gla"}], seeds=[1]))
    large = make_plan(study(name="large", space=[{"decay": ["hgrn2", "gla"]}], seeds=[3, 1], sizes=["micro", "nano"]))
    assert small.trials[0].id in {trial.id for trial in large.trials}
    assert len(large.trials) == 8


def test_equal_numbers_written_differently_are_one_trial():
    assert one(recipe={"lr": 1}).id == one(recipe={"lr": 1.0}).id == one(recipe={"lr": "1e0"}).id
    assert one(model={"inner_gain_init": 1}).id == one(model={"inner_gain_init": 1.0}).id


def test_auto_backend_is_warm_for_short_trials_and_train_for_long_ones(study):
    short = make_plan(study(resources={"assumed_gflops_per_worker": 1e6}))
    assert max(map(short.seconds, short.trials)) < WARM_BELOW_S and short.backend == "warm"
    long = make_plan(study(resources={"assumed_gflops_per_worker": 1e-3}))
    assert max(map(long.seconds, long.trials)) > WARM_BELOW_S and long.backend == "train"


@pytest.mark.parametrize("asked", ["warm", "train"])
def test_a_backend_that_is_asked_for_is_taken(study, asked):
    for rate in (1e6, 1e-3):
        assert make_plan(study(resources={"backend": asked, "assumed_gflops_per_worker": rate})).backend == asked


def test_a_given_rate_goes_before_the_assumed_one_which_grows_with_threads(study):
    assert make_plan(study(resources={"assumed_gflops_per_worker": 7.0})).gflops_per_worker == 7.0
    assert make_plan(study(resources={"threads_per_worker": 3})).gflops_per_worker == 90.0


def test_two_ranks_on_one_gpu_are_refused_before_nccl_does(study):
    with pytest.raises(StudyError, match="puts two ranks on one GPU, which NCCL refuses"):
        make_plan(study(resources={"workers": 2, "gpus_per_worker": 0.5}))


def test_the_estimate_is_the_operations_of_all_tokens_at_the_workers_rate(study):
    plan = make_plan(study(resources={"assumed_gflops_per_worker": 2.0}))
    trial = plan.trials[0]
    assert trial.tokens == 100 * 8 * 64
    assert trial.flops == flops_per_token(trial.config, 64) * trial.tokens
    assert plan.seconds(trial) == pytest.approx(trial.flops / (2 * 2e9))


def test_planning_writes_nothing(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_plan(study(storage=str(tmp_path / "runs"))).trials
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_of_the_plan_names_the_study_where_there_is_no_file(study):
    with pytest.raises(StudyError, match=r"^study 'small': budget\.max_trials is 1, the space has 12 trials"):
        make_plan(study(budget={"max_trials": 1}))
