"""Whole studies on a real Ray head: jobs, kills, two drivers, refusals, the two backends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def finish(process, seconds=400):
    """The exit code of a decay process."""
    return process.wait(timeout=seconds)


@pytest.fixture(scope="module")
def quiet(request, tmp_path_factory):
    """Shared by the kill tests: {file key: (storage, folder)} of a run that nothing disturbed."""
    return {}


def undisturbed(quiet, write_study, decay, ray_head, tmp_path, left, **study):
    """Runs a study once without disturbance and remembers what it left."""
    key = repr(sorted(study.items()))
    if key not in quiet:
        storage = tmp_path / "quiet"
        path = write_study(**study)
        assert finish(decay("run", str(path), "--storage", str(storage), address=ray_head["address"])) == 0, log(tmp_path)
        quiet[key] = left(storage, study["name"])
    return quiet[key]


def log(folder: Path, name: str = "decay.log") -> str:
    return (folder / name).read_text()


KILLED = {"name": "kill", "decays": ("hgrn2",), "steps": 60}


def test_a_submitted_study_ends_in_mlflow_and_a_second_submission_trains_nothing(
    ray_head, write_study, process_env, tmp_path, left, root
):
    storage = tmp_path / "runs"
    path = write_study("job", resources={"workers": 2, "zero_stage": 2, "max_concurrent_trials": 1})
    inside = root / "tune_spaces" / f"test-job-{os.getpid()}.yaml"
    inside.write_text(path.read_text())
    excludes = '{"excludes": [".venv", ".git", "runs", "tests"]}'
    command = [
        str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", ray_head["dashboard"],
        "--working-dir", str(root), "--runtime-env-json", excludes, "--",
        sys.executable, "-m", "services.cli", "run", f"tune_spaces/{inside.name}", "--storage", str(storage),
    ]  # fmt: skip
    try:
        first = subprocess.run(command, env=process_env, capture_output=True, text=True, timeout=400)
        assert first.returncode == 0, first.stdout + first.stderr
        job = left(storage, "job")
        assert len(job.runs()) == 2
        assert job.statuses() == {"FINISHED"}
        for trial in job.trials():
            assert [step for step, _ in job.tracked_losses(trial)] == list(range(1, 31))
            assert job.result(trial, "world_size") == 2
        before = {trial: job.attempts(trial) for trial in job.trials()}
        weights = {p: p.stat().st_mtime_ns for p in storage.glob("job/trials/*/model/*")}
        second = subprocess.run(command, env=process_env, capture_output=True, text=True, timeout=200)
        assert second.returncode == 0, second.stdout + second.stderr
        assert "0 to run" in second.stdout
        assert {trial: job.attempts(trial) for trial in job.trials()} == before == dict.fromkeys(before, 1)
        assert {p: p.stat().st_mtime_ns for p in storage.glob("job/trials/*/model/*")} == weights
        assert job.statuses() == {"FINISHED"}
    finally:
        inside.unlink()


@pytest.mark.parametrize("backend", ["warm", "train"])
def test_resume_after_a_killed_worker_gives_same_bits(
    backend, quiet, ray_head, write_study, decay, tmp_path, left, wait
):
    expected = undisturbed(quiet, write_study, decay, ray_head, tmp_path, left, **KILLED)
    storage = tmp_path / "killed"
    path = write_study(**KILLED, resources={"backend": backend})
    driver = decay("run", str(path), "--storage", str(storage), address=ray_head["address"], log="killed.log")
    killed = left(storage, "kill")
    trial = expected.trials()[0]
    pid = wait(lambda: worker_pid_after(killed, trial, step=20), 120, "a worker past step 20")
    os.kill(pid, signal.SIGKILL)
    assert finish(driver) == 0, log(tmp_path, "killed.log")
    assert killed.attempts(trial) == 2
    same_end(expected, killed, trial)


def test_resume_after_a_killed_driver_gives_same_bits(quiet, ray_head, write_study, decay, tmp_path, left, wait):
    expected = undisturbed(quiet, write_study, decay, ray_head, tmp_path, left, **KILLED)
    storage = tmp_path / "killed"
    path = write_study(**KILLED)
    arguments = ("run", str(path), "--storage", str(storage))
    driver = decay(*arguments, address=ray_head["address"], log="killed.log")
    killed = left(storage, "kill")
    trial = expected.trials()[0]
    worker = wait(lambda: worker_pid_after(killed, trial, step=20), 120, "a worker past step 20")
    driver.kill()
    driver.wait()
    wait(lambda: not os.path.exists(f"/proc/{worker}"), 60, "the dead driver's worker to end")
    assert "RUNNING" in killed.statuses(), "the kill came too late to leave a RUNNING run behind"
    assert finish(decay(*arguments, address=ray_head["address"], log="killed.log")) == 0, log(tmp_path, "killed.log")
    assert killed.attempts(trial) == 2
    same_end(expected, killed, trial)


def test_a_second_driver_is_refused_while_the_first_lives(ray_head, write_study, decay, tmp_path, left, wait):
    storage = tmp_path / "runs"
    path = write_study("pair", decays=("hgrn2",), steps=120)
    arguments = ("run", str(path), "--storage", str(storage))
    first = decay(*arguments, address=ray_head["address"], log="first.log")
    wait(lambda: (storage / "pair" / "lease.json").exists(), 120, "the first driver's lease")
    second = decay(*arguments, address=ray_head["address"], log="second.log")
    assert finish(second) == 2
    assert f"is being run by process {first.pid}" in one_line(log(tmp_path, "second.log"))
    first.kill()
    first.wait()
    third = decay(*arguments, address=ray_head["address"], log="third.log")
    assert finish(third) == 0, log(tmp_path, "third.log")


def test_both_backends_and_any_order_give_the_same_bits(ray_head, write_study, decay, tmp_path, left):
    ends = {}
    for backend, decays in (("warm", ("hgrn2", "gla")), ("warm", ("gla", "hgrn2")), ("train", ("gla", "hgrn2"))):
        storage = tmp_path / f"{backend}-{decays[0]}"
        resources = {"backend": backend, "max_concurrent_trials": 1}
        path = write_study("bits", decays=decays, steps=12, resources=resources)
        assert finish(decay("run", str(path), "--storage", str(storage), address=ray_head["address"])) == 0, log(tmp_path)
        done = left(storage, "bits")
        ends[storage.name] = {t: (done.result(t, "weights_sha256"), done.losses(t)) for t in done.trials()}
    first = ends.pop("warm-hgrn2")
    assert len(first) == 2
    assert all(end == first for end in ends.values())


def test_a_study_grows_but_does_not_change(ray_head, write_study, decay, tmp_path, left):
    storage = tmp_path / "runs"
    path = write_study("grow", decays=("hgrn2",), steps=10)
    arguments = ("run", str(path), "--storage", str(storage))
    assert finish(decay(*arguments, address=ray_head["address"])) == 0, log(tmp_path)
    grown = left(storage, "grow")
    first = grown.trials()
    write_study("grow", decays=("hgrn2",), steps=10, seeds=(1, 2))
    assert finish(decay(*arguments, address=ray_head["address"])) == 0, log(tmp_path)
    assert len(grown.trials()) == 2
    assert grown.attempts(first[0]) == 1
    write_study("grow", decays=("hgrn2",), steps=11, seeds=(1, 2))
    changed = decay(*arguments, address=ray_head["address"], log="changed.log")
    assert finish(changed) == 2
    assert "recipe.steps (10 -> 11)" in one_line(log(tmp_path, "changed.log"))


def test_more_gpus_than_the_cluster_has_are_refused_and_nothing_is_written(ray_head, write_study, decay, tmp_path):
    storage = tmp_path / "runs"
    path = write_study("gpus", resources={"workers": 2, "gpus_per_worker": 1})
    refused = decay("run", str(path), "--storage", str(storage), address=ray_head["address"])
    assert finish(refused) == 2
    assert "needs 2 GPU (2 workers), the cluster has 0" in one_line(log(tmp_path))
    assert not storage.exists()


def test_changed_data_is_refused_by_digest(ray_head, write_study, decay, tmp_path, corpus):
    storage = tmp_path / "runs"
    mine = tmp_path / "text"
    mine.mkdir()
    for file in sorted(corpus.iterdir()):
        (mine / file.name).write_text(file.read_text())
    path = write_study("drift", decays=("hgrn2",), steps=10, seeds=(1,))
    study = yaml.safe_load(path.read_text())
    study["data"]["source"] = str(mine)
    path.write_text(yaml.safe_dump(study))
    arguments = ("run", str(path), "--storage", str(storage))
    assert finish(decay(*arguments, address=ray_head["address"])) == 0, log(tmp_path)
    (mine / "000.txt").write_text("another text " * 40)
    for cache in (storage / "data").iterdir():
        subprocess.run(["rm", "-r", str(cache)], check=True)
    study["seeds"] = [1, 2]
    path.write_text(yaml.safe_dump(study))
    before = sorted(str(p) for p in (storage / "drift").rglob("*"))
    refused = decay(*arguments, address=ray_head["address"], log="refused.log")
    assert finish(refused) == 2
    assert "changed: digest was" in one_line(log(tmp_path, "refused.log"))
    assert sorted(str(p) for p in (storage / "drift").rglob("*")) == before


def test_a_tracker_that_does_not_answer_is_refused_and_nothing_is_written(write_study, decay, tmp_path):
    storage = tmp_path / "runs"
    path = write_study("deaf", tracking={"uri": "http://127.0.0.1:9"})
    assert finish(decay("run", str(path), "--storage", str(storage))) == 2
    assert "does not answer" in one_line(log(tmp_path))
    assert not storage.exists()


def worker_pid_after(study, trial, step):
    """The pid of rank 0 once the trial's log is past `step`."""
    path = study.folder / "trials" / trial / "steps.jsonl"
    if not path.exists() or not study.losses(trial) or study.losses(trial)[-1][0] < step:
        return None
    attempts = [event for event in study.ledger.events() if event.kind == "attempt" and event.trial == trial]
    return int(attempts[-1].details["processes"][0].rsplit(":", 1)[1])


def same_end(expected, killed, trial):
    """Losses, weights, sample order and MLflow equal those of the undisturbed run, each step once, no run left RUNNING."""
    assert killed.losses(trial) == expected.losses(trial)
    for key in ("weights_sha256", "order_hash", "held_out_loss", "decay_profile"):
        assert killed.result(trial, key) == expected.result(trial, key)
    assert killed.tracked_losses(trial) == expected.tracked_losses(trial)
    assert len(killed.runs()) == 1
    assert killed.statuses() == {"FINISHED"}


def one_line(text: str) -> str:
    """The one line that a refusal prints."""
    lines = [line for line in text.splitlines() if line.startswith("decay: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]
