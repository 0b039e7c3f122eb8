"""Cleaning frees what no run needs any more, and never a checkpoint that saves work."""

import pytest

from services.study.clean import clean_checkpoints, parse_size
from services.study.file import StudyError
from services.study.lease import LeaseHeld, take
from services.study.ledger import Ledger
from services.study.manifest import Manifest, write_manifest

MIB = 2**20


@pytest.fixture
def started(storage):
    """A study of trials a (finished), b and c (not), each with checkpoints of 1 MiB, weights and a result."""
    write_manifest(storage, Manifest(study={}, trials={x: x.upper() for x in "abc"}, data={"digest": "d"}, started_ms=1))
    for trial, steps in (("a", (50, 100)), ("b", (20, 30, 40)), ("c", (5, 35))):
        for step in steps:
            checkpoint(storage, trial, f"step_{step:08d}")
        storage.write(f"trials/{trial}/model/model.safetensors", b"weights")
        storage.write(f"trials/{trial}/steps.jsonl", b"")
    Ledger(storage).append("finished", "a")
    Ledger(storage).append("attempt", "b")
    return storage


def checkpoint(storage, trial, name, complete=True):
    storage.write(f"trials/{trial}/checkpoints/{name}/deepspeed/weights.pt", bytes(MIB - 2))
    if complete:
        storage.write(f"trials/{trial}/checkpoints/{name}/COMPLETE.json", b"{}")


def left(storage):
    return {t: [int(n[5:13]) for n in storage.list(f"trials/{t}/checkpoints")] for t in "abc"}


def test_only_the_checkpoints_of_finished_trials_go(started):
    lines = clean_checkpoints(started, None, dry_run=False)
    assert left(started) == {"a": [], "b": [20, 30, 40], "c": [5, 35]}
    assert lines == [
        "freed 1.0 MiB  trials/a/checkpoints/step_00000050",
        "freed 1.0 MiB  trials/a/checkpoints/step_00000100",
        "freed 2.0 MiB in 2 checkpoints",
    ]
    for trial in "abc":
        assert started.read(f"trials/{trial}/model/model.safetensors") == b"weights"
        assert started.exists(f"trials/{trial}/steps.jsonl")


def test_a_dry_run_says_the_same_and_removes_nothing(started):
    before = left(started)
    would = clean_checkpoints(started, "3MiB", dry_run=True)
    assert left(started) == before
    assert [line.replace("would free", "freed") for line in would] == clean_checkpoints(started, "3MiB", dry_run=False)
    assert len(would) == 5


@pytest.mark.parametrize(
    "quota, b, c",
    [("5MiB", [20, 30, 40], [5, 35]), ("4MiB", [20, 30, 40], [35]), ("3MiB", [30, 40], [35]), ("0", [40], [35])],
)
def test_a_quota_takes_the_oldest_but_never_the_newest_of_an_unfinished_trial(started, quota, b, c):
    clean_checkpoints(started, quota, dry_run=False)
    assert left(started) == {"a": [], "b": b, "c": c}


def test_what_a_killed_writer_left_does_not_count_as_the_newest(started):
    checkpoint(started, "b", "step_00000050.tmp-1234abcd")
    checkpoint(started, "c", "step_00000045", complete=False)
    clean_checkpoints(started, "0", dry_run=False)
    assert started.list("trials/b/checkpoints") == ["step_00000040"]
    assert started.list("trials/c/checkpoints") == ["step_00000035"]


def test_a_running_study_is_not_cleaned(started):
    before = left(started)
    running = take(started)
    with pytest.raises(LeaseHeld, match="is being run by process"):
        clean_checkpoints(started, "0", dry_run=False)
    assert left(started) == before
    running.release()
    clean_checkpoints(started, "0", dry_run=False)
    assert left(started) != before


def test_a_study_can_run_after_it_was_cleaned(started):
    clean_checkpoints(started, None, dry_run=False)
    with pytest.raises(StudyError):
        clean_checkpoints(started, "much", dry_run=False)
    take(started).release()


def test_a_study_that_never_started_has_nothing_to_clean(storage):
    with pytest.raises(StudyError, match="nothing to clean"):
        clean_checkpoints(storage, None, dry_run=False)
    assert not storage.exists(".")


@pytest.mark.parametrize(
    "text, size",
    [("0", 0), ("1048576", MIB), ("20GiB", 20 * 2**30), ("500 MB", 500_000_000), ("1.5KiB", 1536), (" 2 tib ", 2 * 2**40)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 GiBB", "1e3", "1,5GB", "nan", "inf", "9" * 400, "1GiB 2"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(StudyError, match="is no size; write one such as 20GiB"):
        parse_size(text)
