"""Whole studies: a trial without memory, a poison one, a driver that wakes up too late, changed code (F10, F11, F13, F14)."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from harness import end_state, report

from services.study.ledger import Ledger
from services.study.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1200)]

ONE = {"resources": {"workers": 1, "zero_stage": 0, "max_concurrent_trials": 1}}


def test_a_poison_trial_is_quarantined_with_its_evidence_and_the_rest_is_complete(place, quiet, verdict):
    sick = place(trials=2, **ONE)
    poison = {"name": "poison", "point": "train.forward", "where": {"step": 7, "seed": 1}, "action": "fail", "times": 3}
    sick.plan([poison])
    ended = sick.run()
    assert ended.code == 3, ended.log
    assert "Traceback" not in ended.log
    states = Ledger(Storage(str(sick.root))).states(sick.trials)
    assert sorted(state.state for state in states.values()) == ["finished", "quarantined"]
    (evidence,) = [event.details for event in sick.events() if event.kind == "quarantined"]
    assert evidence["from_step"] == 4 and len(evidence["causes"]) == 3
    assert all("RuntimeError: fault poison at train.forward" in cause for cause in evidence["causes"])
    assert "quarantined: its workers died 3 times between step 6 and the next log" in ended.log
    attempts = sum(len(sick.attempts(trial)) for trial in sick.trials)
    assert sick.run().code == 3
    assert sum(len(sick.attempts(trial)) for trial in sick.trials) == attempts, "a quarantined trial was started"
    assert sick.run("--retry-quarantined").code == 0, sick.log()
    verdict("F13", sick, quiet(trials=2, **ONE), asked=3)


PACKED = {"resources": {"workers": 1, "zero_stage": 0, "cpus_per_worker": 0.5, "max_concurrent_trials": 2}}


def test_who_runs_out_of_memory_among_packed_trials_is_started_again_alone_and_its_neighbour_goes_on(place, quiet, verdict):
    packed = place(trials=2, **PACKED)
    packed.plan([{"name": "memory", "point": "train.forward", "where": {"step": 7, "seed": 1}, "action": "out-of-memory"}])
    ended = packed.run()
    assert ended.code == 0, ended.log
    assert "out of memory beside others, go on alone" in ended.log and "Traceback" not in ended.log
    (death,) = [event for event in packed.events() if event.kind == "died"]
    assert "can't allocate memory" in death.details["cause"]
    (neighbour,) = [trial for trial in packed.trials if trial != death.trial]
    assert len(packed.attempts(neighbour)) == 1 and len(packed.attempts(death.trial)) == 2
    again = packed.attempts(death.trial)[-1]
    assert again.details["from_step"] == 4
    finished = [event.time_ns for event in packed.events() if event.kind == "finished" and event.trial == neighbour]
    assert finished and finished[0] < again.time_ns, "it was not started again alone"
    verdict("F10", packed, quiet(trials=2, **ONE), asked=1)


def test_a_driver_that_wakes_after_another_finished_its_study_writes_nothing(place, quiet, verdict):
    study = place(**ONE)
    study.plan([{"name": "sleep", "point": "driver.poll", "visit": 8, "action": "stop"}])
    zombie = study.start()
    end = time.monotonic() + 120
    while not study.fired() or "T (stopped)" not in Path(f"/proc/{zombie.pid}/status").read_text():
        assert time.monotonic() < end and zombie.poll() is None, study.log()
        time.sleep(0.1)
    lease = json.loads((study.root / "lease.json").read_text())
    # the sleeper as another host would see it: silent for two minutes
    (study.root / "lease.json").write_text(json.dumps({**lease, "host": "elsewhere", "renewed": time.time() - 120}))
    assert study.run().code == 0, study.log()
    before = end_state(study), len(study.events())
    zombie.send_signal(signal.SIGCONT)
    assert zombie.wait(timeout=120) == 3, study.log()
    assert "replaced by driver 2" in study.log() or "another driver took it over" in study.log()
    assert (end_state(study), len(study.events())) == before
    verdict("F11", study, quiet(**ONE), asked=1)


@pytest.fixture
def checkout(root, tmp_path):
    """A copy of the product, whose code a test may change."""
    copy = tmp_path / "checkout"
    for name in ("decay_core", "kernels", "services", "tune_spaces"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_changed_code_is_refused_with_both_hashes_and_going_on_is_written_down(place, checkout):
    study = place(**ONE)
    env = {"PYTHONPATH": str(checkout)}
    study.plan([{"name": "stop", "point": "driver.poll", "visit": 6, "action": "kill"}])
    assert study.run(env=env).code == -signal.SIGKILL
    changed = checkout / "decay_core" / "decays" / "hgrn2.py"
    changed.write_text(changed.read_text() + "\nANOTHER_THOUGHT = 1\n")
    before = {path: path.stat().st_mtime_ns for path in study.root.rglob("*") if path.suffix != ".lock"}
    ended = study.run(env=env)
    assert ended.code == 2, ended.log
    assert "code decay_core/decays/hgrn2.py changed: was " in ended.log and "say --accept-drift" in ended.log
    assert {path: path.stat().st_mtime_ns for path in study.root.rglob("*") if path.suffix != ".lock"} == before
    ended = study.run("--accept-drift", env=env)
    assert ended.code == 0, ended.log
    (drift,) = [event.details["accepted"] for event in study.events() if event.kind == "drift"]
    assert drift[0].startswith("code decay_core/decays/hgrn2.py changed")
    report({"fault": "F14", "test": "changed code", "asked": 1, "fired": 1, "passed": 1, "silent": 0, "seconds": [],
            "repeated": []})  # fmt: skip


def test_a_password_in_the_trackers_address_reaches_no_file_and_no_line(place):
    store = place(name="secret", tracking={"uri": "postgresql://mlflow:hunter2@127.0.0.1:9/mlflow"}, **ONE)
    ended = store.run()
    assert ended.code == 2 and "hunter2" not in ended.log
    for path in store.folder.rglob("*"):
        assert path.name == "study.yaml" or not path.is_file() or b"hunter2" not in path.read_bytes(), path
