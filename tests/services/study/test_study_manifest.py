"""A study that has started may grow, and is refused in one line when it was changed, shrunk or damaged."""

import hashlib
import json
from dataclasses import replace

import pytest

from services.study.file import StudyError
from services.study.ledger import Ledger
from services.study.manifest import (
    NAME,
    ROOT,
    check_unchanged,
    code_digest,
    drift,
    next_manifest,
    read_manifest,
    write_manifest,
)
from services.study.plan import make_plan

DATA = {"digest": "a" * 64, "source": "sotu", "path": "/data"}


@pytest.fixture
def started(study, storage):
    """The manifest of the small study as it stands on the disk after a start."""
    write_manifest(storage, next_manifest(None, make_plan(study()), DATA))
    return read_manifest(storage)


def refused(call, *args):
    with pytest.raises(StudyError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_study_that_never_started_has_no_manifest(storage):
    assert read_manifest(storage) is None


def test_the_manifest_is_read_back_as_it_was_written(study, storage, started):
    assert started == next_manifest(started, make_plan(study()), DATA)
    assert started.data == DATA and len(started.trials) == 12 and started.started_ms > 1.7e12


def test_the_same_study_again_is_unchanged(study, started):
    check_unchanged(started, make_plan(study()))


@pytest.mark.parametrize(
    "grown, trials",
    [
        ({"seeds": [1, 2, 3]}, 18),
        ({"seeds": [3, 2, 1]}, 18),
        ({"sizes": ["nano", "micro"]}, 24),
        ({"space": [{"decay": ["mamba2", "gla", {"simple_decay": [0.9, 0.99]}], "granularity": ["vector", "scalar"]}]}, 16),
        ({"question": "and now?", "budget": {"max_trials": 99}, "storage": "moved"}, 12),
        ({"data": {"workers": 3}, "resources": {"backend": "train", "max_failures": 0, "max_concurrent_trials": 1}}, 12),
    ],
)
def test_a_study_may_grow(study, started, grown, trials):
    plan = make_plan(study(**grown))
    check_unchanged(started, plan)
    after = next_manifest(started, plan, DATA)
    assert len(after.trials) == trials and started.trials.items() <= after.trials.items()
    assert after.started_ms == started.started_ms


def test_growing_keeps_the_start_time_and_the_runs(study, started):
    tracked = replace(started, tracking={"uri": "sqlite:///x", "runs": {"a": "b"}}, started_ms=5)
    after = next_manifest(tracked, make_plan(study(seeds=[1, 2, 3])), DATA)
    assert (after.started_ms, after.tracking) == (5, tracked.tracking)


@pytest.mark.parametrize(
    "shrunk, gone",
    [
        ({"seeds": [1]}, "mamba2-scalar-nano-s2, mamba2-vector-nano-s2, simple_decay_p0.9-scalar-nano-s2"),
        ({"sizes": ["micro"]}, "mamba2-scalar-nano-s1"),
        ({"space": [{"decay": {"simple_decay": [0.9, 0.99]}, "granularity": ["vector", "scalar"]}]}, "mamba2-vector-nano-s1"),
    ],
)
def test_a_study_may_not_shrink(study, started, shrunk, gone):
    said = refused(check_unchanged, started, make_plan(study(**shrunk)))
    assert gone in said and "may grow but not shrink: put them back" in said


@pytest.mark.parametrize(
    "change, said",
    [
        ({"recipe": {"lr": 0.5}}, "recipe.lr (0.0003 -> 0.5)"),
        ({"recipe": {"steps": 200}}, "recipe.steps (100 -> 200)"),
        ({"recipe": {"betas": [0.9, 0.999]}}, "recipe.betas ([0.9, 0.95] -> [0.9, 0.999])"),
        ({"data": {"tokenizer": "bpe-600"}}, "data.tokenizer (bpe-512 -> bpe-600)"),
        ({"model": {"inner_gain_init": 0.0}}, "model.inner_gain_init (None -> 0.0)"),
        ({"resources": {"workers": 1}}, "resources.workers (2 -> 1)"),
        ({"resources": {"zero_stage": 1}}, "resources.zero_stage (0 -> 1)"),
        ({"resources": {"deterministic": False}}, "resources.deterministic (True -> False)"),
        ({"name": "other"}, "name (small -> other)"),
    ],
)
def test_a_changed_key_is_named_with_both_values(study, started, change, said):
    message = refused(check_unchanged, started, make_plan(study(**change)))
    assert f"has started with other values of {said}; change them back" in message


def test_the_number_of_ranks_may_change_where_the_study_says_so_and_nothing_else_with_it(study, started):
    check_unchanged(started, make_plan(study(resources={"elastic": True, "workers": 4, "micro_batch_size": 1})))
    assert "resources.workers (2 -> 4)" in refused(check_unchanged, started, make_plan(study(resources={"workers": 4})))
    also = {"elastic": True, "workers": 4, "zero_stage": 1}
    assert "resources.zero_stage (0 -> 1)" in refused(check_unchanged, started, make_plan(study(resources=also)))


def test_several_changed_keys_are_all_named(study, started):
    plan = make_plan(study(recipe={"lr": 0.5, "steps": 200}, resources={"workers": 1}))
    message = refused(check_unchanged, started, plan)
    assert "recipe.lr (0.0003 -> 0.5), recipe.steps (100 -> 200), resources.workers (2 -> 1);" in message


def test_other_data_under_the_same_name_is_refused(study, started):
    said = refused(next_manifest, started, make_plan(study()), {**DATA, "digest": "b" * 64})
    assert "data of sotu changed: digest was aaaaaaaaaaaa, is bbbbbbbbbbbb; restore it" in said and "--accept-drift" in said


def test_another_tokenizer_and_other_code_are_refused_with_both_hashes_and_accepted_on_demand(study, started):
    plan = make_plan(study())
    file = next(name for name in started.code if name.startswith("decay_core/decays/"))
    assert len(started.code[file]) == 64 and "services/train/loop.py" in started.code
    old = replace(started, data={**DATA, "tokenizer_sha256": "c" * 64}, code={**started.code, file: "e" * 64})
    data = {**DATA, "tokenizer_sha256": "d" * 64}
    said = refused(next_manifest, old, plan, data)
    assert "tokenizer changed: was cccccccccccc, is dddddddddddd" in said
    assert f"code {file} changed: was eeeeeeeeeeee, is {started.code[file][:12]}" in said
    accepted = next_manifest(old, plan, data, accept_drift=True)
    assert accepted.code == started.code and len(drift(old, accepted)) == 2


CODE = '''"""What it is."""
import math


class Wave:
    """A wave."""

    def at(self, x):
        """Its height."""
        return "# no comment" + str(math.sin(x))  # a comment
'''


@pytest.mark.parametrize(
    "old, new, same",
    [
        ('"""What it is."""', '"""Something else\n\nand more."""\n# and a comment', True),
        ('        """Its height."""\n', "", True),
        ("  # a comment", "", True),
        ("# no comment", "# no comments", False),
        ("math.sin", "math.cos", False),
        ("    def at", "    y = 1\n\n    def at", False),
    ],
)
def test_the_digest_of_code_is_that_of_what_runs(old, new, same):
    assert old in CODE
    assert (code_digest(CODE.replace(old, new)) == code_digest(CODE)) is same


def test_a_study_of_an_earlier_release_whose_files_are_what_they_were_goes_on(study, started):
    of_bytes = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in started.code}
    old = replace(started, code=of_bytes)
    assert not of_bytes.items() & started.code.items()
    assert next_manifest(old, make_plan(study()), DATA).code == started.code
    old = replace(started, code={**of_bytes, "services/train/loop.py": "e" * 64})
    assert "code services/train/loop.py changed: was eeeeeeeeeeee" in refused(next_manifest, old, make_plan(study()), DATA)


def test_a_finished_study_may_be_looked_at_with_newer_code(study, started):
    old = replace(started, code={**started.code, "services/train/loop.py": "e" * 64})
    assert next_manifest(old, make_plan(study()), DATA, idle=True).code == old.code


def test_a_manifest_of_an_earlier_release_takes_the_code_of_today(study, started):
    assert next_manifest(replace(started, code={}), make_plan(study()), DATA).code == started.code


def test_a_password_in_an_address_is_not_kept(study, storage):
    uri = "postgresql://mlflow:hunter2@db/mlflow"
    manifest = next_manifest(None, make_plan(study(tracking={"uri": uri})), DATA)
    write_manifest(storage, manifest)
    assert b"hunter2" not in storage.read(NAME) and b"postgresql://mlflow:***@db/mlflow" in storage.read(NAME)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b"\xff", b"{}", b'{"study": {}}', b"[" * 100_000, "cut", "trials", "digest"],
    ids=lambda content: str(content)[:16],
)
def test_a_damaged_manifest_is_refused_by_name_and_stays(storage, started, content):
    whole = storage.read(NAME)
    body = json.loads(whole)
    if content == "cut":
        content = whole[: len(whole) // 2]
    elif content == "trials":
        content = json.dumps({**body, "trials": 3}).encode()
    elif content == "digest":
        content = json.dumps({**body, "data": {}}).encode()
    storage.write(NAME, content)
    said = refused(read_manifest, storage)
    assert said.startswith(f"{storage.root}/study.json is damaged (") and "move the folder away to start over" in said
    assert storage.read(NAME) == content


def test_a_manifest_that_is_gone_while_the_ledger_stands_is_no_fresh_start(storage, started):
    Ledger(storage).append("run")
    storage.delete(NAME)
    assert f"{storage.root}/study.json is gone although the study has a ledger" in refused(read_manifest, storage)
