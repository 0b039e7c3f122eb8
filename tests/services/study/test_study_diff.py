"""`decay diff` prints what differs between two studies or two trials, and nothing else."""

import io
import re

import pytest
from finished import DATA, finish, result_of, start
from rich.console import Console
from typer.testing import CliRunner

from services.study.compare import read_side
from services.study.diff import diff, differences, result_rows
from services.study.file import StudyError
from services.study.manifest import NAME
from services.study.plan import make_plan
from services.study.storage import Storage, canonical_json

POINTS = {"space": [{"decay": ["mamba2", "gla"]}], "seeds": [1]}


@pytest.fixture
def console():
    return Console(record=True, width=240, file=io.StringIO())


@pytest.fixture
def run(study, tmp_path):
    """run(folder, results, **changes): a started study in a folder, whose trials have results with these changes each."""

    def make(folder, results=None, digest=DATA["digest"], **changes):
        plan = make_plan(study(**POINTS | changes))
        storage = Storage(str(tmp_path / folder))
        start(plan, storage, digest=digest)
        if results is not None:
            finish(storage, *(result_of(trial, **results) for trial in plan.trials))
        return str(tmp_path / folder), plan

    return make


def changed(a, b):
    """{(heading, name): (value of A, value of B)}."""
    return {(one.heading, one.name): (one.a, one.b) for one in differences(read_side(a), read_side(b))}


def refused(*sides):
    with pytest.raises(StudyError) as caught:
        diff(*sides, Console(file=io.StringIO()))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_study_does_not_differ_from_itself_file_or_folder(run, write_study, console):
    path = str(write_study(**POINTS))
    folder, _ = run("a", {})
    assert not diff(path, path, console) and not diff(folder, folder, console)
    assert console.export_text().split("\n") == ["no difference", "no difference", ""]
    assert changed(path, folder) == {}  # a file has not read its text, so it has no digest to differ in


def test_two_files_differ_in_recipe_model_data_resources_and_design(write_study, tmp_path):
    one = tmp_path / "one.yaml"
    one.write_text(write_study(**POINTS).read_text())
    changes = {
        "space": [{"decay": ["mamba2", "tnl"]}], "seeds": [1, 2], "recipe": {"lr": 0.5}, "vary": {"eps": [1e-7]},
        "model": {"inner_gain_init": 0.0}, "data": {"boundary": "eos", "workers": 9}, "match": "none",
        "resources": {"zero_stage": 2, "max_failures": 9},
    }  # fmt: skip
    assert changed(str(one), str(write_study(**changes))) == {
        ("study", "seeds"): ("[1]", "[1, 2]"),
        ("design", "gla-vector"): ("planned", "(not there)"),
        ("design", "tnl-vector"): ("(not there)", "refused: tnl has no vector form, only scalar"),
        ("recipe", "lr"): ("0.0003", "0.5"),
        ("recipe", "vary.eps"): ("(not there)", "[1e-07]"),
        ("model", "inner_gain_init"): ("None", "0.0"),
        ("data", "boundary"): ("none", "eos"),
        ("resources", "zero_stage"): ("0", "2"),
    }


def test_two_folders_differ_in_the_digest_of_their_data_and_in_results(run, console):
    a, plan = run("a", {})
    b, _ = run("b", {"held_out_loss": 4.125, "parameters": 7, "weights_sha256": "other"}, digest="e" * 64)
    assert changed(a, b) == {("data", "digest"): ("d" * 12, "e" * 12)}
    rows = [(name, a, b, less, order, weights, code) for name, a, b, less, _, _, _, _, order, weights, code in
            result_rows(read_side(a), read_side(b))]  # fmt: skip
    assert rows == [(trial.name, "4.0000", "4.1250", "+0.1250", "same", "differ", "same") for trial in plan.trials]
    assert diff(a, b, console)
    assert "A has 2 trials, B 2; 2 are the same trial by their id." in console.export_text()


def test_speed_alone_is_no_difference(run, console):
    (a, _), (b, _) = run("a", {}), run("b", {"tokens_per_second": 5.0, "wall_s": 1.0})
    assert not diff(a, b, console)


def test_a_trial_that_only_one_side_finished_is_listed(run):
    a, _ = run("a", {})
    b, _ = run("b")
    row = next(result_rows(read_side(a), read_side(b)))
    assert row[1:4] == ("4.0000", "", "") and row[-3:] == ("unknown",) * 3


def test_studies_with_another_recipe_pair_their_trials_by_name(run):
    a, _ = run("a", {})
    b, _ = run("b", {"held_out_loss": 3.5}, recipe={"lr": 0.1})
    assert set(read_side(a).trials.values()).isdisjoint(read_side(b).trials.values())
    assert [row[:4] for row in result_rows(read_side(a), read_side(b))] == [
        (f"{name}-vector-nano-s1", "4.0000", "3.5000", "-0.5000") for name in ("mamba2", "gla")
    ]


def test_two_trials_differ_in_design_and_in_the_code_of_their_mechanism(run):
    folder, plan = run("a", {})
    one, other = plan.trials
    found = changed(f"{folder}:{one.name}", f"{folder}:{other.id[:6]}")
    assert found.pop(("design", "decay")) == ("mamba2", "gla")
    assert {key[0] for key in found} == {"code of the mechanism"}
    assert {key[1] for key in found} == {"decay_core/decays/mamba2.py", "decay_core/decays/gla.py"}
    assert re.fullmatch("[0-9a-f]{12}", found["code of the mechanism", "decay_core/decays/gla.py"][1])


def test_the_same_trial_trained_by_other_code_shows_the_file(run):
    (a, plan), (b, _) = run("a", {}), run("b")
    storage = Storage(b)
    for trial in plan.trials:
        code = result_of(trial).mechanism | {"kernels/decay_scan_naive.py": "0" * 64}
        finish(storage, result_of(trial, mechanism=code))
    name = plan.trials[0].name
    found = changed(f"{a}:{name}", f"{b}:{name}")
    assert list(found) == [("code of the mechanism", "kernels/decay_scan_naive.py")]
    assert next(result_rows(read_side(a), read_side(b)))[-1] == "differ"


def test_results_of_an_earlier_release_say_nothing_of_their_code(run, console):
    a, plan = run("a", {"mechanism": {}, "device": "", "point": {"decay": "gla", "p": None, "granularity": "vector",
                                                                 "share": False, "position": "none",
                                                                 "form": "as_published"}})  # fmt: skip
    b, _ = run("b", {})
    name = plan.trials[1].name
    assert changed(f"{a}:{name}", f"{b}:{name}") == {}
    diff(a, b, console)
    assert "no difference" in console.export_text()
    diff(f"{a}:{name}", f"{b}:{plan.trials[0].name}", console)
    assert "A does not say with which code it was trained" in console.export_text()


def test_a_varied_recipe_is_part_of_a_trial(run):
    folder, plan = run("a", vary={"lr": [0.001, 0.002]})
    one, other = plan.trials[:2]
    assert changed(f"{folder}:{one.name}", f"{folder}:{other.name}") == {("recipe", "lr"): ("0.001", "0.002")}


def test_a_trial_whose_width_was_matched_differs_from_the_plain_one_finished_or_not(run):
    points = [{"decay": "mamba2", "granularity": ["vector", "scalar"]}]
    space = {"space": points, "sizes": ["160M"], "data": {"tokenizer": "gpt2"}}
    for results in (None, {}):
        a, _ = run(f"plain{results}", results, **space)
        b, _ = run(f"matched{results}", results, **space, match="parameters")
        name = "mamba2-scalar-160M-s1"
        assert changed(f"{a}:{name}", f"{b}:{name}") == {("design", "GLU width"): ("2,048", "2,088")}


def test_a_manifest_without_keys_that_came_since_is_the_same_study(run):
    (a, _), (b, _) = run("a", {}), run("b", {})
    storage = Storage(b)
    import json

    body = json.loads(storage.read(NAME))
    for key in ("vary", "match"):
        del body["study"][key]
    del body["sha256"]  # earlier releases wrote none
    storage.write(NAME, canonical_json(body).encode())
    assert changed(a, b) == {}


def test_what_cannot_be_compared_is_refused_in_one_line(run, write_study, tmp_path):
    folder, plan = run("a", seeds=list(range(40)))
    path = str(write_study())
    assert "is no study file and holds no study.json" in refused(path, str(tmp_path / "nowhere"))
    assert "is no study file and holds no study.json" in refused(path, f"{tmp_path}/nowhere:abc")
    assert "has no trial 'zzz'; it has gla-vector-nano-s0, gla-vector-nano-s1" in refused(path, f"{folder}:zzz")
    firsts = [trial.id[0] for trial in plan.trials]
    twice = next(first for first in firsts if firsts.count(first) > 1)
    assert f"{twice} begins {firsts.count(twice)} ids" in refused(path, f"{folder}:{twice}")
    assert "is a study and" in refused(path, f"{folder}:{plan.trials[0].id}")


def test_the_exit_code_speaks_only_when_asked(run, monkeypatch):
    from services.cli import app

    (a, _), (b, _) = run("a", {}), run("b", {"held_out_loss": 3.0})
    ends = [CliRunner().invoke(app, ["diff", *words]).exit_code for words in
            ([a, b], [a, b, "--exit-code"], [a, a, "--exit-code"])]  # fmt: skip
    assert ends == [0, 1, 0]
