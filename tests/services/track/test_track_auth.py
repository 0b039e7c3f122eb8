"""The MLflow server that cluster/ starts, started here on SQLite: who has no password is turned away, the driver comes in."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]

PASSWORD = "correct-horse-battery"
ASK = """
import sys
from services.track.runs import Tracker, TrackingError, check_reachable
try:
    check_reachable(sys.argv[1])
except TrackingError as refused:
    print("REFUSED", refused)
else:
    tracker = Tracker(sys.argv[1], None)
    tracker.open_study("auth", "who may write?")
    print("OPENED", tracker.parent)
"""


@pytest.fixture
def server(root, process_env, tmp_path):
    """The container of cluster/mlflow.yaml as a process: its own arguments and variables, another port, SQLite for Postgres."""
    objects = yaml.safe_load_all((root / "cluster" / "mlflow.yaml").read_text())
    (deployment,) = [item for item in objects if item["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = (root / "cluster" / "mlflow-auth.ini").read_text()
    assert "database_uri = postgresql:///mlflow" in config
    (tmp_path / "auth.ini").write_text(config.replace("postgresql:///mlflow", f"sqlite:///{tmp_path}/auth.db"))
    own = {"--host": "0.0.0.0", "--port": str(port), "--backend-store-uri": f"sqlite:///{tmp_path}/mlflow.db",
           "--artifacts-destination": str(tmp_path / "artifacts"), "--allowed-hosts": f"127.0.0.1:{port}"}  # fmt: skip
    given = [word.partition("=") for word in container["command"][2:]]
    arguments = [f"{option}={own.get(option, value)}" for option, _, value in given]
    env = {entry["name"]: entry.get("value", PASSWORD) for entry in container["env"]}
    env["MLFLOW_AUTH_CONFIG_PATH"] = str(tmp_path / "auth.ini")
    with open(tmp_path / "server.log", "w") as out:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("mlflow")), "server", *arguments],
            env={**process_env, **env}, stdout=out, stderr=out, start_new_session=True, cwd=tmp_path,
        )  # fmt: skip
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 240
    while status(f"{url}/health") != 200:
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "server.log").read_text()
        time.sleep(0.5)
    yield url
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def status(url):
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def ask(server, process_env, tmp_path, **env):
    command = [sys.executable, "-c", ASK, server]
    return subprocess.run(command, env={**process_env, **env}, cwd=tmp_path, capture_output=True, text=True, timeout=200).stdout


def test_who_has_no_password_is_turned_away_and_a_driver_with_it_comes_in(server, process_env, tmp_path):
    assert status(f"{server}/api/2.0/mlflow/experiments/search?max_results=1") == 401
    assert status(f"{server}/") == 401
    said = ask(server, process_env, tmp_path)
    assert said.startswith("REFUSED tracking.uri") and "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said
    assert len(said.splitlines()) == 1
    wrong = ask(server, process_env, tmp_path, MLFLOW_TRACKING_USERNAME="admin", MLFLOW_TRACKING_PASSWORD="guess")
    assert wrong.startswith("REFUSED tracking.uri")
    right = ask(server, process_env, tmp_path, MLFLOW_TRACKING_USERNAME="admin", MLFLOW_TRACKING_PASSWORD=PASSWORD)
    assert right.startswith("OPENED "), right
    assert PASSWORD not in said + wrong + right + (tmp_path / "server.log").read_text()
