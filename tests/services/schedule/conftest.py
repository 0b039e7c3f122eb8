"""A real Ray head for the file that asks for it, small studies, and ways to read what a run left in MLflow and on the disk."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from services.study.ledger import Ledger
from services.study.storage import Storage
from services.train.step_log import parse

PORT, DASHBOARD, CLIENT = 26379, 28265, 21001


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory: pytest.TempPathFactory, process_env: dict[str, str]) -> Iterator[dict[str, str]]:
    """A head node of its own, with a dashboard for jobs; yields the addresses."""
    temp = Path(f"/tmp/decay-test-{os.getpid()}")  # short: Ray's sockets live below it
    log = tmp_path_factory.mktemp("ray") / "start.log"
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={PORT}", "--num-cpus=4",
        f"--dashboard-port={DASHBOARD}", f"--ray-client-server-port={CLIENT}", f"--temp-dir={temp}",
        "--disable-usage-stats", "--dashboard-host=127.0.0.1",
    ]  # fmt: skip
    env = {**process_env, "PATH": os.pathsep.join([str(Path(sys.executable).parent), process_env["PATH"]])}  # as activated
    with open(log, "w") as out:
        subprocess.run(command, env=env, stdout=out, stderr=out, check=True, timeout=120)
    wait_for(_dashboard_answers, 120, "Ray's dashboard")
    yield {"address": f"127.0.0.1:{PORT}", "dashboard": f"http://127.0.0.1:{DASHBOARD}"}
    for process in psutil.process_iter(["cmdline"]):  # only this head's processes: a user's Ray is left alone
        if str(temp) in " ".join(process.info["cmdline"] or []):
            process.kill()


def _dashboard_answers() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{DASHBOARD}/api/version", timeout=5):
            return True
    except urllib.error.HTTPError:  # it wants a token: it is there
        return True
    except OSError:
        return False


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text with some structure."""
    folder = tmp_path_factory.mktemp("corpus")
    nouns = ["senate", "treaty", "harvest", "railway", "revenue", "frontier", "commerce", "army", "canal", "bank", "law"]
    verbs = ["approves", "delays", "reports", "extends", "abolishes", "requires", "welcomes"]
    for number in range(60):
        words = [f"{nouns[(number * 7 + i * i) % 11]} {verbs[(number + i) % 7]} {i % 37}." for i in range(160)]
        (folder / f"{number:03d}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture
def write_study(corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small study file: write_study(steps=40, workers=2, decays=[...], ...)."""

    def write(
        name: str = "small", decays: Any = ("hgrn2", "mamba2"), seeds: Any = (1,), steps: int = 30, **more: Any
    ) -> Path:
        study = {
            "name": name,
            "question": "does it run, stop and go on?",
            "space": [{"decay": list(decays)}],
            "sizes": ["nano"],
            "seeds": list(seeds),
            "recipe": {
                "steps": steps, "batch_size": 8, "seq_len": 32, "lr": 0.003, "eval_every": 20, "eval_sequences": 4,
                "checkpoint_every": 10, "telemetry_every": 10, **more.pop("recipe", {}),
            },
            "data": more.pop("data", {"source": str(corpus), "tokenizer": "bpe-300", "held_out_percent": 10}),
            "resources": {"workers": 1, "cpus_per_worker": 1, **more.pop("resources", {})},
            **more,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(study))
        return path

    return write


@pytest.fixture
def decay(process_env: dict[str, str], tmp_path: Path, root: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `decay ...` as a process of its own; its output goes to a file named by `log`."""

    def start(*arguments: str, address: str | None = None, log: str = "decay.log") -> subprocess.Popen[str]:
        env = {**process_env, **({"RAY_ADDRESS": address} if address else {})}
        with open(tmp_path / log, "a") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "services.cli", *arguments], env=env, stdout=out, stderr=out, text=True, cwd=tmp_path
            )

    return start


class Left:
    """What a study left: step logs, weights, ledger, MLflow."""

    def __init__(self, storage: Path, name: str) -> None:
        self.folder = storage / name
        self.ledger = Ledger(Storage(str(self.folder)))
        self._database = storage / "mlflow.db"
        self._name = name

    @cached_property
    def _client(self) -> MlflowClient:  # late: the driver makes the database, not the test
        return MlflowClient(f"sqlite:///{self._database}")

    def trials(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "trials").iterdir())

    def result(self, trial: str, key: str) -> Any:
        return json.loads((self.folder / "trials" / trial / "result.json").read_text())[key]

    def losses(self, trial: str) -> list[tuple[int, float]]:
        records = parse((self.folder / "trials" / trial / "steps.jsonl").read_bytes())
        return [(record["step"], record["train/loss"]) for record in records]

    def attempts(self, trial: str) -> int:
        return sum(event.kind == "attempt" and event.trial == trial for event in self.ledger.events())

    def runs(self) -> list[Any]:
        experiment = self._client.get_experiment_by_name(self._name)
        found = self._client.search_runs([experiment.experiment_id])
        return [run for run in found if "decay.trial" in run.data.tags]

    def statuses(self) -> set[str]:
        experiment = self._client.get_experiment_by_name(self._name)
        return {run.info.status for run in self._client.search_runs([experiment.experiment_id])}

    def tracked_losses(self, trial: str) -> list[tuple[int, float]]:
        run = next(run for run in self.runs() if run.data.tags["decay.trial"] == trial)
        return [(m.step, m.value) for m in self._client.get_metric_history(run.info.run_id, "train/loss")]


@pytest.fixture
def left() -> Callable[[Path, str], Left]:
    """Opens what a study left."""
    return Left


def wait_for(what: Callable[[], Any], seconds: float, why: str) -> Any:
    """Polls until `what` is truthy; fails saying `why` otherwise."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = what()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s in vain for {why}")


@pytest.fixture
def wait() -> Callable[..., Any]:
    """The polling function."""
    return wait_for
