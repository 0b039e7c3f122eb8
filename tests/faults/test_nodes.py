"""A node is lost without a word, drained, or is the head: the study goes on or resumes, with the same bits (F4, F5)."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from services.study.faults import VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1200)]

PORT, CLIENT, MLFLOW = 27379, 21011, 25871
RAY = str(Path(sys.executable).with_name("ray"))
ONE = {"resources": {"workers": 1, "zero_stage": 0}}
SERVED = {"tracking": {"uri": f"http://127.0.0.1:{MLFLOW}"}, **ONE}


@pytest.fixture
def two_nodes(process_env, tmp_path):
    """A head that takes no work, two nodes of one CPU and MLflow's server on this host; workers meet the faults of `study`."""
    (tmp_path / "study" / "runs").mkdir(parents=True)
    temp = Path(f"/tmp/decay-nodes-{os.getpid()}")
    faults = {VARIABLE: str(tmp_path / "study" / "faults.json")}
    path = os.pathsep.join([str(Path(sys.executable).parent), process_env["PATH"]])
    env = {**process_env, **faults, "PATH": path, "RAY_health_check_period_ms": "1000"}
    head = ["--head", f"--port={PORT}", "--num-cpus=0", f"--temp-dir={temp}", f"--ray-client-server-port={CLIENT}",
            "--include-dashboard=false"]  # fmt: skip
    (tmp_path / "study" / "faults.json").write_text("[]")
    for options in (head, [f"--address=127.0.0.1:{PORT}", "--num-cpus=1"], [f"--address=127.0.0.1:{PORT}", "--num-cpus=1"]):
        command = [RAY, "start", "--disable-usage-stats", *options]
        subprocess.run(command, env=env, check=True, timeout=120, capture_output=True)
    store = f"sqlite:///{tmp_path}/study/runs/mlflow.db"
    serve = [RAY.replace("bin/ray", "bin/mlflow"), "server", f"--port={MLFLOW}", "--workers=1", f"--backend-store-uri={store}",
             f"--artifacts-destination={tmp_path}/artifacts"]  # fmt: skip
    with open(tmp_path / "mlflow.log", "w") as out:
        server = subprocess.Popen(serve, env=env, stdout=out, stderr=out, start_new_session=True)
    end = time.monotonic() + 120
    while not _answers():
        assert server.poll() is None and time.monotonic() < end, (tmp_path / "mlflow.log").read_text()
        time.sleep(0.3)
    yield {**env, "RAY_ADDRESS": f"127.0.0.1:{PORT}"}
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    for process in psutil.process_iter(["cmdline"]):
        if str(temp) in " ".join(process.info["cmdline"] or []):
            process.kill()


def _answers():
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{MLFLOW}/health", timeout=2):
            return True
    except OSError:
        return False


def test_a_study_goes_on_when_a_node_is_lost_without_a_word(two_nodes, place, quiet, verdict):
    expected = quiet(**ONE)
    study = place(**SERVED)
    study.plan([{"name": "node", "point": "train.forward", "where": {"step": 10}, "action": "kill-parent"}])
    ended = study.run(env=two_nodes)
    assert ended.code == 0, ended.log
    states = [event.kind for event in study.events()]
    assert states.count("attempt") == 2 and "failed" not in states
    verdict("F5", study, expected, asked=1)


def test_a_drained_node_is_left_with_a_checkpoint_and_nothing_counts_as_a_failure(two_nodes, place, quiet, verdict):
    expected = quiet(**ONE)
    study = place(**SERVED)
    study.plan([{"name": "drain", "point": "train.forward", "where": {"step": 10}, "action": "slow", "seconds": 8}])
    driver = study.start(env=two_nodes)
    end = time.monotonic() + 200
    while not study.fired():
        assert driver.poll() is None and time.monotonic() < end, study.log()
        time.sleep(0.1)
    drain = [RAY, "drain-node", f"--address=127.0.0.1:{PORT}", "--node-id", study.fired()[0]["node"], "--reason",
             "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "60"]  # fmt: skip
    subprocess.run(drain, env=two_nodes, check=True, timeout=60, capture_output=True)
    assert driver.wait(timeout=300) == 0, study.log()
    kinds = [event.kind for event in study.events()]
    assert kinds.count("preempted") == 1 and "died" not in kinds and "failed" not in kinds, study.log()
    (left_at,) = [event.details["step"] for event in study.events() if event.kind == "preempted"]
    assert [event.details["from_step"] for event in study.attempts(study.trials[0])] == [0, left_at]
    verdict("F4", study, expected, asked=1)


@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_the_loss_of_the_head_costs_at_most_another_run(victim, place, quiet, verdict):
    expected = quiet(**ONE)
    study = place(**ONE)
    study.plan([{"name": "pause", "point": "train.forward", "where": {"step": 10}, "action": "slow", "seconds": 3}])
    driver = study.start(env={"RAY_gcs_rpc_server_reconnect_timeout_s": "5"})
    end = time.monotonic() + 200
    while not study.fired():
        assert driver.poll() is None and time.monotonic() < end, study.log()
        time.sleep(0.1)
    below = psutil.Process(driver.pid).children(recursive=True)
    (head,) = [process for process in below if process.name() == victim]
    head.kill()
    study.note("head", victim, "while a trial trains")
    code = driver.wait(timeout=300)
    assert victim == "raylet" or code != 0, study.log()  # a trial may end before it misses its raylet
    assert code == 0 or study.run().code == 0, study.log()
    left = [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    print(f"{victim}: the job ended with {code}; {len(left)} of its {len(below)} processes were left")
    verdict("F5", study, expected, asked=2)
