"""A tiny corpus and a way to train a trial on real processes without Ray."""

import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.data.corpus import prepare_corpus
from services.data.token_cache import TokenCache, prepare
from services.schedule.jobs import data_record, data_spec, job_of
from services.study.file import Study
from services.study.manifest import Manifest
from services.study.plan import make_plan
from services.study.storage import Storage
from services.train.step_log import parse

NOUNS = ["senate", "treaty", "harvest", "railway", "revenue", "frontier", "commerce", "army", "canal", "tariff", "bank", "law"]
VERBS = ["approves", "delays", "reports", "extends", "abolishes", "requires", "welcomes"]
SCRIPT = Path(__file__).with_name("run_rank.py")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text with some structure, so that a loss can fall."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        words = [f"{NOUNS[(number * 7 + i * i) % 11]} {VERBS[(number + i) % 7]} {i % 37}." for i in range(160)]
        (folder / f"{number:03d}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def tiny_study(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """One trial of 12 steps that takes a second."""
    return Study.model_validate(
        {
            "name": "tiny",
            "question": "does it train?",
            "space": [{"decay": "hgrn2"}],
            "sizes": ["nano"],
            "recipe": {
                "steps": 12, "batch_size": 8, "seq_len": 32, "lr": 0.003, "eval_every": 6, "eval_sequences": 5,
                "checkpoint_every": 4, "telemetry_every": 5,
            },
            "data": {"source": str(corpus), "tokenizer": "bpe-300", "held_out_percent": 10},
            "storage": str(tmp_path_factory.mktemp("unused")),
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def cache(tiny_study: Study, tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """The tokens of `corpus`."""
    return prepare(data_spec(tiny_study), tmp_path_factory.mktemp("tokens"), progress=False)


@pytest.fixture
def launch(tiny_study: Study, cache: TokenCache, process_env: dict[str, str], tmp_path: Path) -> Callable[..., Any]:
    """Starts real ranks on tiny trials, several in the same processes: launch({"name": ..., "workers": 2, ...}, ...).

    `faults` are for these processes alone; `env` is added to their environment.
    """

    def write(
        name: str,
        recipe: dict[str, Any] | None = None,
        grid: dict[str, Any] | None = None,
        task: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        whole = tiny_study.model_dump()
        changed = {
            "recipe": {**whole["recipe"], **(recipe or {})},
            "space": [grid] if grid else whole["space"],
            "vary": changes.pop("vary", {}),
            "data": task or whole["data"],
            "resources": {**whole["resources"], **changes},
        }
        study = Study.model_validate({**whole, **changed})
        plan = make_plan(study)
        data = prepare_corpus(data_spec(study), tmp_path) if task else cache
        manifest = Manifest(study={}, trials={}, data=data_record(data, study.to_recipe()), started_ms=0)
        job = job_of(replace(plan.trials[0], id="trial"), plan, Storage(str(tmp_path / name)), manifest)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(job))
        return path

    def start(
        *jobs: dict[str, Any],
        kill_at: int = 0,
        victim: int = 0,
        faults: list[dict[str, Any]] | None = None,
        env: dict[str, str] | None = None,
    ) -> list[subprocess.Popen[str]]:
        workers = jobs[0].get("workers", 1)
        assert all(job.get("workers", 1) == workers for job in jobs)
        paths = [f"{_free_port()}={write(**job)}" for job in jobs]
        more = dict(env or {})
        if faults is not None:
            more["DECAY_FAULTS"] = str(tmp_path / "faults.json")
            (tmp_path / "faults.json").write_text(json.dumps(faults))
        return [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(rank), str(kill_at if rank == victim else 0), *paths],
                env={**process_env, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(workers)
        ]  # fmt: skip

    return start


@pytest.fixture
def train(launch: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Launches trials and waits for their ends: train({"name": ..., "workers": 2, ...}, ..., kill_at=7)."""

    def run(*jobs: dict[str, Any], kill_at: int = 0, victim: int = 0, **how: Any) -> list[Outcome]:
        processes = launch(*jobs, kill_at=kill_at, victim=victim, **how)
        with ThreadPoolExecutor(len(processes)) as readers:  # what nobody reads stops a process that has said 64 KiB
            reading = [readers.submit(process.communicate) for process in processes]
            _end_together(processes)
            outputs = [said.result() for said in reading]
        assert kill_at or all(process.returncode == 0 for process in processes), outputs
        assert not kill_at or processes[victim].returncode == -signal.SIGKILL, outputs
        lines = [line for line in outputs[0][0].splitlines() if line.startswith(("RESULT ", "FAILED "))]
        said = lines + [""] * (len(jobs) - len(lines))
        folders = [tmp_path / job["name"] / "trials" / "trial" for job in jobs]
        return [Outcome(folder, line, outputs[0][1]) for folder, line in zip(folders, said, strict=True)]

    return run


class Outcome:
    """What a job left: its result or its reason, its step log, and what rank 0 said on stderr."""

    def __init__(self, folder: Path, line: str, stderr: str) -> None:
        self.folder, self._line, self.stderr = folder, line, stderr

    @property
    def result(self) -> dict[str, Any]:
        assert self._line.startswith("RESULT "), self._line + self.stderr
        return dict(json.loads(self._line.removeprefix("RESULT ")))

    @property
    def reason(self) -> str:
        assert self._line.startswith("FAILED "), self._line + self.stderr
        return str(json.loads(self._line.removeprefix("FAILED ")))

    @property
    def steps(self) -> list[dict[str, Any]]:
        return parse((self.folder / "steps.jsonl").read_bytes())

    @property
    def losses(self) -> list[float]:
        return [record["train/loss"] for record in self.steps]


def _end_together(processes: list[subprocess.Popen[str]]) -> None:
    """Waits for all; when one dies the others, which would wait for it in a collective, are killed."""
    end = time.monotonic() + 300
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > end:
            time.sleep(2.0)  # let the others say what they have to say
            for process in processes:
                process.kill()
        time.sleep(0.05)


def _free_port() -> int:
    """A port below the range that the system hands out by itself: a job may bind it seconds after it was chosen here."""
    while True:
        port = random.randint(22_000, 25_999)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
