"""Whole studies on a real Ray head: jobs, kills, two drivers, refusals, the two backends."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


TWO_RANKS = {"workers": 2, "zero_stage": 2}
KILLED = {"name": "kill", "decays": ("hgrn2",), "steps": 60, "resources": TWO_RANKS}


@pytest.fixture
def checkout(root, tmp_path):
    """What a user submits from: a copy of the product's folders."""
    copy = tmp_path / "checkout"
    for name in ("decay_core", "kernels", "services", "tune_spaces"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / ".rayignore", copy)
    return copy


@pytest.fixture
def in_checkout(checkout, process_env):
    """Runs a command in the checkout as a user would; returns what it printed, standard output first."""
    bin_first = os.pathsep.join([str(Path(sys.executable).parent), process_env["PATH"]])
    env = {**process_env, "PYTHONPATH": str(checkout), "PATH": bin_first}

    def run(*command, code=0):
        done = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True, timeout=400)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_a_submitted_study_ends_in_mlflow_and_a_second_submission_trains_nothing(
    ray_head, write_study, tmp_path, left, checkout, in_checkout
):
    storage = tmp_path / "runs"
    study = write_study("job", resources={"workers": 2, "zero_stage": 2, "max_concurrent_trials": 1})
    shutil.copy(study, checkout / "tune_spaces" / "job.yaml")
    in_checkout(
        "ray", "job", "submit", "--address", ray_head["dashboard"], "--working-dir", ".", "--",
        "python", "-m", "services.cli", "run", "tune_spaces/job.yaml", "--storage", str(storage),
    )  # fmt: skip
    job = left(storage, "job")
    assert len(job.runs()) == 2
    assert job.statuses() == {"FINISHED"}
    for trial in job.trials():
        assert [step for step, _ in job.tracked_losses(trial)] == list(range(1, 31))
        assert job.result(trial, "world_size") == 2
    before = everything(storage / "job" / "trials")
    again = in_checkout(
        sys.executable, "-m", "services.cli", "submit", "tune_spaces/job.yaml", "--storage", str(storage),
        "--address", ray_head["dashboard"], "--accept-drift", "--retry-quarantined",
    )  # fmt: skip
    assert "2 finished, 0 to run" in again
    assert everything(storage / "job" / "trials") == before
    assert {trial: job.attempts(trial) for trial in job.trials()} == dict.fromkeys(job.trials(), 1)
    assert job.statuses() == {"FINISHED"}


def test_a_decay_added_as_one_file_is_planned_counted_trained_and_reported(
    ray_head, write_study, tmp_path, left, checkout, in_checkout, root
):
    page = (root / "docs" / "add-a-decay.md").read_text()
    source = page.split("```python\n")[1].split("```")[0]
    (checkout / "decay_core" / "decays" / "toy.py").write_text(source)
    shutil.copytree(root / "tests", checkout / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", checkout)
    golden = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/decay_core/test_decays.py", "-k"]
    assert "same_decays" in in_checkout(*golden, "toy or registry", code=1)  # the one line is missing
    table = checkout / "tests" / "decay_core" / "test_decays.py"
    row = '    "toy": Row(0.8808, 164_795_136, ALL, (1.025509700767809, -0.058076054168897315)),\n'
    table.write_text(table.read_text().replace('    "tnl": Row', row + '    "tnl": Row'))
    in_checkout(*golden, "toy or registry")
    shutil.copy(write_study("added", decays=("toy", "gla")), checkout / "tune_spaces" / "added.yaml")
    storage = tmp_path / "runs"
    command = [sys.executable, "-m", "services.cli"]
    assert "toy-vector-nano-s1" in in_checkout(*command, "plan", "tune_spaces/added.yaml")
    in_checkout(
        *command, "submit", "tune_spaces/added.yaml", "--storage", str(storage), "--address", ray_head["dashboard"]
    )
    study = left(storage, "added")
    results = {study.result(trial, "method"): trial for trial in study.trials()}
    assert set(results) == {"toy-vector", "gla-vector"} and study.statuses() == {"FINISHED"}
    counted = {method: study.result(trial, "parameters") for method, trial in results.items()}
    assert counted["toy-vector"] == counted["gla-vector"] + 2 * 128  # one offset a channel in two layers
    assert study.losses(results["toy-vector"])[-1][1] < study.losses(results["toy-vector"])[0][1]
    assert "toy-vector" in (storage / "added" / "report" / "report.md").read_text()


def test_resume_after_a_killed_worker_of_a_train_group_gives_same_bits(
    quiet, ray_head, write_study, decay, tmp_path, left, wait
):
    """The warm pool's workers, and the driver, are killed in tests/faults."""
    expected = undisturbed(quiet, write_study, decay, ray_head, tmp_path, left, **KILLED)
    storage = tmp_path / "killed"
    path = write_study(**{**KILLED, "resources": {**TWO_RANKS, "backend": "train"}})
    driver = decay("run", str(path), "--storage", str(storage), address=ray_head["address"], log="killed.log")
    killed = left(storage, "kill")
    trial = expected.trials()[0]
    pid = wait(lambda: worker_pid_after(killed, trial, step=20), 120, "a worker past step 20")
    os.kill(pid, signal.SIGKILL)
    assert finish(driver) == 0, log(tmp_path, "killed.log")
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
    first.kill()  # that a dead driver's lease is taken over at once is seen above, where a killed driver's study goes on
    first.wait()


def test_a_warm_worker_gives_the_same_bits_in_any_order(ray_head, write_study, decay, tmp_path, left):
    """That the two backends agree is seen above: the Train group's resumed run is compared with the warm pool's quiet one."""
    ends = []
    for decays in (("hgrn2", "gla"), ("gla", "hgrn2")):
        storage = tmp_path / decays[0]
        path = write_study("bits", decays=decays, steps=12, resources={"max_concurrent_trials": 1})
        assert finish(decay("run", str(path), "--storage", str(storage), address=ray_head["address"])) == 0, log(tmp_path)
        done = left(storage, "bits")
        ends.append({t: (done.result(t, "weights_sha256"), done.losses(t)) for t in done.trials()})
    assert len(ends[0]) == 2
    assert ends[0] == ends[1]


def test_sigterm_saves_every_trial_and_ends_a_run_in_order(ray_head, write_study, decay, tmp_path, left, wait):
    storage = tmp_path / "runs"
    # long enough that no machine finishes it before the signal has been heard
    path = write_study("stop", decays=("hgrn2",), steps=4000, recipe={"checkpoint_every": 100})
    arguments = ("run", str(path), "--storage", str(storage))
    driver = decay(*arguments, address=ray_head["address"], log="stopped.log")
    stopped = left(storage, "stop")
    steps = storage / "stop" / "trials"
    wait(lambda: list(steps.glob("*/checkpoints/step_00000100")), 120, "the first checkpoint")
    driver.terminate()
    assert finish(driver, 90) == 3, log(tmp_path, "stopped.log")
    assert "Traceback" not in log(tmp_path, "stopped.log")
    assert "RUNNING" not in stopped.statuses()
    assert not (storage / "stop" / "lease.json").exists()
    (trial,) = stopped.trials()
    (left_at,) = [event.details["step"] for event in stopped.ledger.events() if event.kind == "preempted"]
    assert left_at > 100 and stopped.losses(trial)[-1][0] == left_at
    assert (storage / "stop" / "trials" / trial / "checkpoints" / f"step_{left_at:08d}").exists()
    assert stopped.ledger.states([trial])[trial].state == "started", "a notice is no failure"


def test_a_study_grows_but_neither_its_file_nor_its_data_may_change(
    ray_head, write_study, decay, tmp_path, corpus, left
):
    storage = tmp_path / "runs"
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    data = {"source": str(text), "tokenizer": "bpe-300", "held_out_percent": 10}

    def run(log_name, **changes):
        path = write_study("grow", **{"decays": ("hgrn2",), "steps": 10, "data": data, **changes})
        return finish(decay("run", str(path), "--storage", str(storage), address=ray_head["address"], log=log_name))

    assert run("first.log") == 0, log(tmp_path, "first.log")
    grown = left(storage, "grow")
    first = grown.trials()
    assert run("grown.log", seeds=(1, 2)) == 0, log(tmp_path, "grown.log")
    assert len(grown.trials()) == 2
    assert grown.attempts(first[0]) == 1
    before = everything(storage / "grow")
    assert run("changed.log", seeds=(1, 2), steps=11) == 2
    assert "recipe.steps (10 -> 11)" in one_line(log(tmp_path, "changed.log"))
    elsewhere = write_study("grow", decays=("hgrn2",), steps=10, data=data, recipe={"seq_len": 100_000})
    short = decay("run", str(elsewhere), "--storage", str(tmp_path / "new"), address=ray_head["address"], log="short.log")
    assert finish(short) == 2
    assert "less than one sequence" in one_line(log(tmp_path, "short.log"))
    assert not (tmp_path / "new").exists()
    caches = everything(storage / "data")
    (text / "000.txt").write_text("another text " * 40)
    assert run("drift.log", seeds=(1, 2, 3)) == 2
    assert "changed: digest was" in one_line(log(tmp_path, "drift.log"))
    assert everything(storage / "grow") == before
    assert everything(storage / "data") == caches


def test_the_commands_on_a_finished_study_say_what_it_did(ray_head, write_study, decay, process_env, tmp_path):
    storage = tmp_path / "runs"
    path = write_study("said", steps=10)
    assert finish(decay("resume", str(path), "--storage", str(storage), log="early.log")) == 2
    assert "has not started" in one_line(log(tmp_path, "early.log"))
    assert finish(decay("run", str(path), "--storage", str(storage), address=ray_head["address"])) == 0, log(tmp_path)
    told = log(tmp_path)
    assert "unigram entropy" in told
    assert f"mlflow ui --backend-store-uri sqlite:///{storage}/mlflow.db" in told
    report = storage / "said" / "report"
    assert "hgrn2-vector" in (report / "report.md").read_text()
    assert (report / "report.html").stat().st_size > 10_000
    assert (report / "figures" / "decay-nano.png").read_bytes().startswith(b"\x89PNG")
    for folder in (report, *storage.glob("said/trials/*/checkpoints")):
        assert any(folder.iterdir())
    shutil.rmtree(report)
    script = (
        "import sys; from typer.testing import CliRunner; from services.cli import app; "
        "[print(r.output) or r.exit_code and sys.exit(r.exit_code) for words in ({commands}) "
        "for r in [CliRunner().invoke(app, [words[0], {path!r}, '--storage', {storage!r}, *words[1:]])]]"
    )
    commands = "['plan'], ['status'], ['report'], ['resume'], ['clean', '--dry-run'], ['clean']"
    code = script.format(commands=commands, path=str(path), storage=str(storage))
    done = subprocess.run([sys.executable, "-c", code], env=process_env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("2 trials, warm backend", "2 of 2 trials finished", "would free", "in 2 checkpoints"):
        assert words in done.stdout
    assert (report / "report.md").exists()
    assert not list(storage.glob("said/trials/*/checkpoints/step_*"))
    assert len(list(storage.glob("said/trials/*/model/model.safetensors"))) == 2


def test_more_gpus_than_the_cluster_has_are_refused_and_nothing_is_written(ray_head, write_study, decay, tmp_path):
    storage = tmp_path / "runs"
    path = write_study("gpus", resources={"workers": 2, "gpus_per_worker": 1})
    refused = decay("run", str(path), "--storage", str(storage), address=ray_head["address"])
    assert finish(refused) == 2
    assert "needs 2 GPU (2 workers), the cluster has 0" in one_line(log(tmp_path))
    assert not storage.exists()


def test_a_tracker_that_does_not_answer_is_refused_and_nothing_is_written(write_study, decay, tmp_path):
    storage = tmp_path / "runs"
    path = write_study("deaf", tracking={"uri": "http://127.0.0.1:9"})
    assert finish(decay("run", str(path), "--storage", str(storage))) == 2
    assert "does not answer" in one_line(log(tmp_path))
    assert not storage.exists()


def test_sqlite_on_several_nodes_is_refused_with_the_remedy(ray_head, write_study, decay, process_env, tmp_path, wait):
    """Last of this file: the second node stays until the head goes."""
    storage = tmp_path / "runs"
    path = write_study("nodes")
    join = [str(Path(sys.executable).with_name("ray")), "start", f"--address={ray_head['address']}", "--num-cpus=1"]
    subprocess.run([*join, "--disable-usage-stats"], env=process_env, check=True, timeout=120, capture_output=True)
    assert finish(decay("run", str(path), "--storage", str(storage), address=ray_head["address"])) == 2
    assert "the cluster has 2 nodes; start `mlflow server`" in one_line(log(tmp_path))
    assert not storage.exists()


def worker_pid_after(study, trial, step):
    """The pid of the last rank once the trial's log is past `step`."""
    path = study.folder / "trials" / trial / "steps.jsonl"
    if not path.exists() or not study.losses(trial) or study.losses(trial)[-1][0] < step:
        return None
    attempts = [event for event in study.ledger.events() if event.kind == "attempt" and event.trial == trial]
    return int(attempts[-1].details["processes"][-1].rsplit(":", 1)[1])


def same_end(expected, killed, trial):
    """Losses, weights, sample order and MLflow equal those of the undisturbed run, each step once, no run left RUNNING."""
    assert killed.losses(trial) == expected.losses(trial)
    for key in ("weights_sha256", "order_hash", "held_out_loss", "decay_profile"):
        assert killed.result(trial, key) == expected.result(trial, key)
    assert killed.tracked_losses(trial) == expected.tracked_losses(trial)
    assert len(killed.runs()) == 1
    assert killed.statuses() == {"FINISHED"}


def everything(folder: Path) -> dict[str, int]:
    """All files below a folder with their times of change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix != ".lock"}


def one_line(text: str) -> str:
    """The one line that a refusal prints."""
    lines = [line for line in text.splitlines() if line.startswith("decay: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]
