"""A study file is checked to the last key: what is wrong is one line that names the file and the remedy."""

import re
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from small_study import VALID, merged

from services import cli
from services.data import tokenizers
from services.study import plan as plan_module
from services.study.file import RecipeFields, Study, StudyError, read_study
from services.study.plan import make_plan, vocabulary

GOOD = yaml.safe_dump(VALID)


def refusal(path: Path) -> str:
    """The one line that reading or planning the file is refused with; nothing is written beside it."""
    before = {item: item.stat().st_mtime_ns for item in path.parent.rglob("*")}
    with pytest.raises(StudyError) as caught:
        make_plan(read_study(path))
    assert {item: item.stat().st_mtime_ns for item in path.parent.rglob("*")} == before
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"study file {path}")
    return message


def test_the_valid_study_is_valid(write_study):
    assert len(make_plan(read_study(write_study())).trials) == 12


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"recipe": {"learning_rate": 1}}, "unknown key 'recipe.learning_rate'"),
        ({"recipe": {"wieght_decay": 0.1}}, "unknown key 'recipe.wieght_decay'; did you mean 'weight_decay'?"),
        ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'?"),
        ({"space": [{"decay": "gla", "granularty": "vector"}]}, "'space.0.granularty'; did you mean 'granularity'?"),
        ({"resources": {"zero_stages": 1}}, "did you mean 'zero_stage'?"),
        ({"zzz": 1}, "known keys: budget, data,"),
        ({"recipe": {"steps": "many"}}, "recipe.steps: Input should be a valid integer"),
        ({"recipe": {"steps": 1.5}}, "recipe.steps: Input should be a valid integer"),
        ({"recipe": {"steps": True}}, "steps takes no true; correct it in the file"),
        ({"seeds": [True]}, "seeds takes no true"),
        ({"seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0, given -1"),
        ({"seeds": [2**31]}, "seeds.0: Input should be less than 2147483648"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"sizes": ["nanno"]}, "sizes: unknown size 'nanno'; known: nano"),
        ({"recipe": {"steps": 0}}, "recipe: steps must be at least 1, given 0"),
        ({"recipe": {"warmup_steps": 200}}, "do not fit into 100 steps"),
        ({"recipe": {"lr": float("nan")}}, "recipe.lr: Input should be a finite number"),
        ({"recipe": {"steps": 10**40}}, "steps is larger than 9223372036854775807"),
        ({"recipe": {"precision": "fp8"}}, "recipe.precision: Input should be 'fp32' or 'bf16', given 'fp8'"),
        ({"model": {"inner_gain_init": float("inf")}}, "model.inner_gain_init: Input should be a finite number"),
        ({"data": {"held_out_percent": 0.123}}, "not in steps of 0.01"),
        ({"data": {"tokenizer": "gpt-2"}}, "data.tokenizer: unknown 'gpt-2'; use gpt2, or bpe-N"),
        ({"data": {"tokenizer": "bpe-²"}}, "data.tokenizer: unknown"),
        ({"data": {"tokenizer": "bpe-0512"}}, "data.tokenizer: unknown"),
        ({"data": {"tokenizer": "bpe-99999999"}}, "data.tokenizer: unknown"),
        ({"space": []}, "space: List should have at least 1 item"),
        ({"space": [{"decay": []}]}, "space.0.decay: "),
        ({"space": [{"decay": {}}]}, "space.0.decay: "),
        ({"space": [{"decay": ["gla", {"simple_decay": []}]}]}, "space.0.decay.1.simple_decay: "),
        ({"space": [{"decay": "gla", "position": []}]}, "space.0.position: "),
        ({"space": [{"decay": 3}]}, "space.0.decay: "),
        ({"space": [{"decay": {"simple_decay": "x"}}]}, "space.0.decay.simple_decay: Input should be a valid number"),
        ({"space": [{"decay": {"a\nb": "x"}}]}, "space.0.decay.a b: "),
        ({"space": {"decay": "gla"}}, "space: Input should be a valid list"),
        ({"name": "Not A Name"}, "name: String should match pattern"),
        ({"name": "../up"}, "name: String should match pattern"),
        ({"storage": ""}, "storage: String should have at least 1 character"),
        ({"space": [{"decay": "glaa"}]}, "space.0: unknown decay 'glaa' (did you mean gla?)"),
        ({"space": [{"decay": ["gla", "glaa"]}]}, "space.0: unknown decay 'glaa'"),
        ({"space": [{"decay": "gla", "position": ["none", "ropee"]}]}, "space.0: unknown position 'ropee'"),
        ({"space": [{"decay": "gla", "granularity": ["vector", "vec"]}]}, "space.0: unknown granularity 'vec'"),
        ({"space": [{"decay": "gla", "form": ["as_published", "as"]}]}, "space.0: unknown form 'as'"),
        ({"space": [{"decay": ["gla", "simple_decay"]}]}, "space.0: simple_decay needs its starting value p"),
        ({"space": [{"decay": ["gla", {"gla": 0.5}]}]}, "space.0: gla takes no p (given 0.5)"),
        ({"space": [{"decay": {"simple_decay": [0.9, 1]}}]}, "strictly between 0 and 1, given 1"),
        ({"space": [{"decay": "gla"}, {"decay": "gla", "share": True, "granularity": "scalar"}]},
         "space.1 has no valid point: decay=gla, granularity=scalar, share=True"),
        ({"space": [{"decay": "gla", "position": "rope"}]}, "nearest valid: gla-paired-rope"),
        ({"resources": {"workers": 3}}, "recipe.batch_size 8 cannot be shared by resources.workers 3"),
        ({"resources": {"micro_batch_size": 3}}, "micro_batch_size 3 does not divide the 4 sequences"),
        ({"budget": {"max_trials": 11}}, "budget.max_trials is 11, the space has 12 trials"),
        ({"budget": {"max_hours": 1e-9}}, "budget.max_hours is 1e-09, the plan needs about"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_where_and_what_to_do(write_study, changes, said):
    assert said in refusal(write_study(**changes))


@pytest.mark.parametrize("key", ["name", "question", "space", "sizes", "recipe"])
def test_a_missing_key_is_named(write_study, key):
    path = write_study()
    path.write_text(yaml.safe_dump({k: v for k, v in VALID.items() if k != key}))
    assert f"key {key!r} is missing; add it" in refusal(path)


def test_a_missing_key_inside_is_named_with_its_place(write_study):
    path = write_study()
    path.write_text(yaml.safe_dump(VALID).replace("  batch_size: 8\n", ""))
    assert "key 'recipe.batch_size' is missing; add it" in refusal(path)


@pytest.mark.parametrize(
    "content, said",
    [
        (GOOD + "seeds: [7]\n", "key 'seeds' stands twice; keep one"),
        (GOOD.replace("  steps: 100", "  steps: 100\n  steps: 200"), "key 'steps' stands twice; keep one"),
        (b"name: \xff\xfe", "is not UTF-8 text (byte 6); save it as UTF-8"),
        ("name: [unclosed", "no YAML that can be read: line 1: "),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("\tname: x", "no YAML that can be read"),
        ("name: \x00", "no YAML that can be read"),
        ("", "has no keys; write at least name"),
        ("- a\n- b\n", "has no keys"),
        ("just words", "has no keys"),
        (GOOD + "---\nname: two\n", "no YAML that can be read"),
        (GOOD + "1: 2\n", "key 1 is no word"),
        (GOOD + "? [a, b]\n: c\n", "is no word"),
        (GOOD + "? !!set {a}\n: c\n", "is no word"),
        (GOOD + '"\\ud800": 1\n', "is no text (half a character)"),
        (GOOD + "base: &base {a: 1}\nother: {<<: *base}\n", "merging with << is not understood here"),
        ("name: !!python/object:os.system {}\n", "could not determine a constructor for the tag"),
        ("name: !!python/object/apply:os.system ['false']\n", "could not determine a constructor for the tag"),
        ("name: !!python/name:os.system\n", "could not determine a constructor for the tag"),
        ("name: !!int ''\n", "no YAML that can be read"),
        ("name: !!bool maybe\n", "no YAML that can be read"),
        ("name: !!timestamp soon\n", "no YAML that can be read"),
        ("name: 2024-13-45\n", "no YAML that can be read"),
        ("name: *nowhere\n", "found undefined alias"),
        (GOOD.replace("- 1\n", "- " + "9" * 5000 + "\n"), "no YAML that can be read"),
        (GOOD.replace("- 1\n", "- 0x" + "f" * 5000 + "\n"), "seeds is larger than"),
        (GOOD + "more: 0x" + "f" * 5000 + "\n", "more is larger than"),
        ("[" * 5000, "no YAML that can be read"),
        (GOOD + "extra: &x [*x]\n", "unknown key 'extra'"),
        (GOOD.replace("seeds:", "seeds: &x [*x]\nold:"), "seeds.0: Input should be a valid integer, given [["),
        (GOOD.replace("space:", "space: &x [{decay: *x}]\nold:"), "space.0.decay"),
        (GOOD.replace("name: small", 'name: "\\ud800"'), "name: Input should be a valid string"),
    ],
)
def test_a_file_that_is_no_plain_yaml_is_refused_in_one_line(write_study, content, said):
    path = write_study()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refusal(path)


@pytest.mark.parametrize("key", ["question", "seeds", "space", "vary", "data", "unknown"])
def test_an_alias_bomb_is_refused_at_once(write_study, key):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 60))
    path = write_study()
    path.write_text(bomb + f"{key}: *a59\n" + GOOD.replace(f"{key}:", f"old_{key}:"))
    started = time.monotonic()
    assert len(refusal(path)) < 1000
    assert time.monotonic() - started < 5


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    assert "No such file or directory; give the path of a study file" in refusal(tmp_path / "absent.yaml")
    (tmp_path / "folder").mkdir()
    assert "Is a directory" in refusal(tmp_path / "folder")


def test_an_error_is_one_line_even_where_the_input_has_line_breaks():
    error = StudyError("first\nsecond\u2028third")
    assert str(error) == "first second third"


def test_a_well_spelled_impossible_cell_is_listed_and_the_others_run(write_study):
    space = [{"decay": ["gla", "tnl"], "granularity": ["vector", "scalar"]}]
    plan = make_plan(read_study(write_study(space=space)))
    assert [(c.point.name, c.nearest) for c in plan.refused] == [("tnl-vector", "tnl-scalar")]
    assert plan.refused[0].reason.startswith("tnl has no vector form")
    assert [t.point.name for t in plan.trials[::2]] == ["gla-vector", "gla-scalar", "tnl-scalar"]


def test_storage_given_on_the_command_line_replaces_the_files(write_study):
    assert read_study(write_study(storage="a")).storage == "a"
    assert read_study(write_study(storage="a"), storage="b").storage == "b"


def test_numbers_that_yaml_reads_as_words_are_numbers(write_study):
    path = write_study()
    path.write_text(path.read_text().replace("  steps: 100", "  steps: 100\n  lr: 3e-3"))
    assert yaml.safe_load(path.read_text())["recipe"]["lr"] == "3e-3"
    assert read_study(path).to_recipe().lr == 0.003


def test_recipe_has_the_fields_and_defaults_of_the_recipe(study):
    recipe = study().to_recipe()
    assert set(RecipeFields.model_fields) == set(recipe.to_dict())
    assert recipe.lr == 3e-4 and recipe.steps == 100


def test_the_plan_and_the_data_know_the_same_tokenizers():
    assert plan_module.SMALLEST_BPE == tokenizers.SMALLEST_BPE
    assert plan_module.LARGEST_BPE == tokenizers.LARGEST_BPE
    assert vocabulary("gpt2") == tokenizers.GPT2_ENTRIES
    for name in ("bpe-257", "bpe-2048", "bpe-1048576"):
        assert vocabulary(name) == tokenizers.bpe_entries(name)
    for name in ("bpe-256", "bpe-1048577", "bpe-", "bpe-1e3", "BPE-512", "bpe-512 ", ""):
        with pytest.raises(StudyError):
            vocabulary(name)
        with pytest.raises(ValueError):
            tokenizers.check_name(name)


WORDS = st.sampled_from(
    ["", "gla", "none", "vector", "nano", "gpt2", "bpe-512", "x\ny", "\ud800", "½", "2024-01-01", "1e400", "0x10"]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**18, 10**400), st.floats(), WORDS, st.text(max_size=6)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(WORDS | st.sampled_from(["simple_decay", "decay"]), inner, max_size=2)
    ),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [*Study.model_fields, *RecipeFields.model_fields, "decay", "form", "tokenizer", "workers", "max_trials", "x", "a\nb"]
)


def places(node, here=()):
    """Every place of a nested value, as a path of keys."""
    yield here
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(child, (*here, key))


@st.composite
def mutated(draw):
    """The valid study with one to three places dropped, given another value, or given a new key."""
    whole = {"study": merged({"budget": {"max_trials": 50}, "model": {"inner_gain_init": 1.0}})}
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from([place for place in places(whole) if len(place) > 1] or [("study",)]))
        parent = whole
        for key in where[:-1]:
            parent = parent[key]
        change = draw(st.sampled_from(["drop", "set", "add", "as text"]))
        target = parent[where[-1]]
        if change == "drop":
            del parent[where[-1]]
        elif change == "set":
            parent[where[-1]] = draw(VALUES)
        elif change == "as text":
            parent[where[-1]] = str(target)
        elif isinstance(target, dict):
            target[draw(KEYS)] = draw(VALUES)
        elif isinstance(target, list):
            target.append(draw(VALUES))
        else:
            parent[where[-1]] = [target, draw(VALUES)]
    return whole["study"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=mutated())
def test_any_mutation_of_a_study_is_planned_or_refused_in_one_line(tmp_path, raw):
    path = tmp_path / "mutated.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    try:
        plan = make_plan(read_study(path))
    except StudyError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith(f"study file {path}")
        return
    assert plan.trials and len({trial.id for trial in plan.trials}) == len(plan.trials)
    assert all(re.fullmatch("[0-9a-f]{12}", trial.id) for trial in plan.trials)


@st.composite
def malformed(draw):
    """The text of a study file that somebody changed as a value, or that lost, gained or flipped bytes."""
    if draw(st.booleans()):
        return yaml.safe_dump(draw(mutated())).encode("utf-8", "replace")
    data = bytearray(GOOD.encode())
    for _ in range(draw(st.integers(1, 4))):
        here = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["cut", "drop", "flip", "insert", "twice"])):
            case "cut":
                del data[max(here, 1):]
            case "drop":
                del data[here : here + draw(st.integers(1, 20))]
                data = data or bytearray(b"-")
            case "flip":
                data[here] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[here:here] = draw(st.binary(min_size=1, max_size=8))
            case "twice":
                data[here:here] = data[: here // 2]
    return bytes(data)


def planned(path):
    try:
        make_plan(read_study(path))
    except StudyError:
        return False
    return True


def test_500_malformed_studies_end_a_run_with_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys):
    """The whole command `decay run`, up to its exit code; a change that leaves a valid study is drawn again."""
    monkeypatch.chdir(tmp_path)
    refusals = []
    path = tmp_path / "malformed.yaml"

    @settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(text=malformed())
    def run(text):
        path.write_bytes(text)
        assume(not planned(path))
        monkeypatch.setattr(sys, "argv", ["decay", "run", str(path), "--storage", str(tmp_path / "runs")])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert ended.value.code == 2
        assert said.out == "" and len(said.err.splitlines()) == 1 and said.err.startswith(f"decay: study file {path}")
        assert [item.name for item in tmp_path.iterdir()] == [path.name]
        refusals.append(text)

    run()
    assert len(refusals) >= 500
