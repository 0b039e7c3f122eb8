"""A trial has one run in MLflow, found again by its tag; what is there is compared and never written twice."""

import socket
import subprocess
import sys
import time

import pytest
from step_logs import DATA, points, record

from services.track import runs as runs_module
from services.track.runs import STUDY_TAG, TRIAL_TAG, Tracker, TrackingError, check_reachable, default_uri

PARAMS = {"decay": "gla", "p": None, "recipe.lr": 3e-4, "share": False, "long": "x" * 900}

DRIVER = """
import sys, time
from pathlib import Path
from services.track.runs import Tracker
uri, study, artifacts, start = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
time.sleep(max(0.0, start - time.time()))
tracker = Tracker(uri, Path(artifacts))
tracker.open_study(study, "which?")
for trial in ("a", "b"):
    run = tracker.open_trial(trial, trial, {"decay": "gla"}, {"source": "s", "digest": "d"})
    tracker.mark(run, "RUNNING")
    tracker.log_steps(run, [{"step": n, "train/loss": 1.0} for n in range(1, 20)], 1000)
    tracker.mark(run, "FINISHED")
tracker.mark(tracker.parent, "FINISHED")
print("done")
"""


def all_runs(tracker):
    return tracker._client.search_runs([tracker._experiment])


def test_a_trial_has_parameters_a_data_set_a_parent_and_waits(tracker, name):
    run_id = tracker.open_trial("t1", "gla-vector-nano-s1", PARAMS, DATA)
    run = tracker._client.get_run(run_id)
    assert run.info.run_name == "gla-vector-nano-s1" and tracker.status(run_id) == "SCHEDULED"
    assert run.data.params == {**{k: str(v) for k, v in PARAMS.items()}, "long": "x" * 500}
    assert run.data.tags["mlflow.parentRunId"] == tracker.parent and run.data.tags[TRIAL_TAG] == "t1"
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("sotu", "d" * 36)
    parent = tracker._client.get_run(tracker.parent)
    assert parent.info.run_name == name and parent.data.tags[STUDY_TAG] == name
    assert parent.data.tags["mlflow.note.content"] == "which?" and tracker.status(tracker.parent) == "RUNNING"


def test_runs_are_found_again_and_not_created_twice(open_tracker):
    first = open_tracker()
    ids = [first.open_trial(t, t, PARAMS, DATA) for t in ("t1", "t2")]
    again = open_tracker()
    assert again.parent == first.parent
    assert [again.open_trial(t, t, PARAMS, DATA) for t in ("t1", "t2")] == ids
    assert len(all_runs(again)) == 3
    assert len(again._client.get_run(ids[0]).inputs.dataset_inputs) == 1


def test_a_trial_of_the_same_id_in_another_study_has_a_run_of_its_own(tracker, store, name, tmp_path):
    other = Tracker(store, tmp_path)
    other.open_study(f"{name}-other", "which?")
    assert tracker.open_trial("t1", "t1", PARAMS, DATA) != other.open_trial("t1", "t1", PARAMS, DATA)


def test_opening_a_trial_again_leaves_its_status(tracker):
    run_id = tracker.open_trial("t1", "t1", PARAMS, DATA)
    tracker.mark(run_id, "FINISHED")
    tracker.open_trial("t1", "t1", PARAMS, DATA)
    assert tracker.status(run_id) == "FINISHED"


@pytest.mark.parametrize("change", [{"recipe.lr": 1e-3}, {"p": 0.9}, {"long": "x" * 499}])
def test_changed_parameters_are_refused(tracker, change):
    run_id = tracker.open_trial("t1", "t1", PARAMS, DATA)
    with pytest.raises(TrackingError) as caught:
        tracker.open_trial("t1", "t1", {**PARAMS, **change}, DATA)
    (key,) = change
    assert f"MLflow run {run_id} has {key}=" in str(caught.value) and "rename this study" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tracker._client.get_run(run_id).data.params[key] == str(PARAMS[key])[:500]


def test_a_driver_killed_while_it_created_a_run_is_made_good(tracker, open_tracker):
    bare = tracker._find_or_create(TRIAL_TAG, "t1", "t1", {"mlflow.parentRunId": tracker.parent})
    again = open_tracker()
    assert again.open_trial("t1", "t1", PARAMS, DATA) == bare
    run = again._client.get_run(bare)
    assert run.data.params["recipe.lr"] == "0.0003" and len(run.inputs.dataset_inputs) == 1


def test_statuses_end_as_they_are_told_and_a_run_can_go_on(tracker):
    run_id = tracker.open_trial("t1", "t1", PARAMS, DATA)
    for status in ("RUNNING", "KILLED", "RUNNING", "FAILED", "RUNNING", "FINISHED", "FINISHED"):
        tracker.mark(run_id, status)
        assert tracker.status(run_id) == status
    assert tracker._client.get_run(run_id).info.end_time is not None


def test_steps_sent_twice_are_there_once(tracker):
    run_id = tracker.open_trial("t1", "t1", PARAMS, DATA)
    records = [record(step) for step in range(1, 31)]
    assert tracker.last_step(run_id) == 0
    for _ in range(2):
        assert tracker.log_steps(run_id, records, 1_000) == 30
    assert points(tracker, run_id, "train/loss") == [(n, 5 - n / 128) for n in range(1, 31)]
    assert tracker.last_step(run_id) == 30
    stamps = {m.step: m.timestamp for m in tracker._client.get_metric_history(run_id, "train/loss")}
    assert stamps[1] == 2_000 and stamps[30] == 31_000


def test_more_metrics_than_one_call_takes_are_sent_in_whole_steps(tracker, monkeypatch):
    run_id = tracker.open_trial("t1", "t1", PARAMS, DATA)
    calls = []
    log_batch = tracker._client.log_batch

    def counted(*args, **kwargs):
        calls.append({metric.step for metric in kwargs["metrics"]})
        assert len(kwargs["metrics"]) <= runs_module.BATCH_METRICS
        return log_batch(*args, **kwargs)

    monkeypatch.setattr(tracker._client, "log_batch", counted)
    wide = [{"step": step, **{f"decay/layer_{n:02d}": float(n) for n in range(150)}} for step in range(1, 21)]
    assert tracker.log_steps(run_id, wide, 0) == 20
    assert len(calls) > 2 and sorted(step for call in calls for step in call) == list(range(1, 21))
    assert points(tracker, run_id, "decay/layer_149") == [(n, 149.0) for n in range(1, 21)]


def test_a_value_that_is_none_is_left_out(tracker):
    run_id = tracker.open_trial("t1", "t1", PARAMS, DATA)
    tracker.log_steps(run_id, [{"step": 1, "train/loss": 1.0, "held_out/loss": None}], 0)
    assert set(tracker._client.get_run(run_id).data.metrics) == {"train/loss"}


@pytest.mark.slow
def test_two_drivers_that_create_one_store_at_once_both_work(tmp_path, process_env):
    uri = default_uri(tmp_path / "fresh")
    start = str(time.time() + 15)  # both have imported MLflow by then
    command = [sys.executable, "-c", DRIVER, uri]
    drivers = [
        subprocess.Popen([*command, study, str(tmp_path / study), start], env=process_env, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for study in ("one", "two")
    ]  # fmt: skip
    outputs = [driver.communicate(timeout=240) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    for study in ("one", "two"):
        tracker = Tracker(uri, tmp_path / study)
        tracker.open_study(study, "which?")
        runs = all_runs(tracker)
        assert sorted(run.data.tags.get(TRIAL_TAG, "") for run in runs) == ["", "a", "b"]
        for run in runs:
            if TRIAL_TAG in run.data.tags:
                assert run.info.status == "FINISHED"
                assert len(points(tracker, run.info.run_id, "train/loss")) == 19


def test_a_store_that_can_be_made_is_reachable_and_is_not_made_by_looking(tmp_path):
    check_reachable(default_uri(tmp_path / "not" / "yet"))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
        for uri, said in ((dead, "does not answer"), ("file:///tmp/x", "scheme 'file' is not usable"),
                          ("mlruns", "scheme '(none)' is not usable"), ("ftp://x", "give sqlite:///, http")):  # fmt: skip
            with pytest.raises(TrackingError) as caught:
                check_reachable(uri)
            assert f"tracking.uri {uri}" in str(caught.value) and said in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_database_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TrackingError, match="choose another place"):
        check_reachable(default_uri(tmp_path / "file" / "x"))
