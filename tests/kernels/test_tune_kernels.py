"""The tuner outlives a configuration that crashes or hangs, and says what each came to."""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tune_kernels  # noqa: E402
from try_config import Finding, Job  # noqa: E402


def pretend(connection):
    """Stands for try_config.serve: what a job's configuration says happens."""
    while True:
        job = connection.recv()
        fate = job.config["fate"]
        if fate == "crash":
            os._exit(139)
        if fate == "hang":
            time.sleep(600)
        connection.send(Finding(problem=None if fate == "fine" else fate, fatal=fate == "CUDA error", milliseconds=os.getpid()))


def job(fate):
    return Job(granularity="scalar", key_dim=64, value_dim=64, config={"fate": fate})


@pytest.fixture
def crew(monkeypatch):
    monkeypatch.setattr(tune_kernels, "serve", pretend)
    crew = tune_kernels.Crew(1, 20)
    yield crew
    crew.close()


def test_what_a_job_does_to_its_process_does_not_reach_the_next(crew):
    first = crew.ask(job("fine"))
    assert first.problem is None and crew.ask(job("fine")).milliseconds == first.milliseconds  # the same process
    crashed = crew.ask(job("crash"))
    assert crashed.problem == "crashed (exit code 139)" and crew.ask(job("fine")).problem is None
    assert crew.ask(job("wrong numbers")).problem == "wrong numbers"
    before = crew.ask(job("fine")).milliseconds
    assert crew.ask(job("CUDA error")).problem == "CUDA error"
    assert crew.ask(job("fine")).milliseconds != before  # a context that saw an error is not used again
    crew.seconds = 1
    assert crew.ask(job("hang")).problem == "no answer within 1 s"
    crew.seconds = 20
    assert crew.ask(job("fine")).problem is None


def test_only_what_passed_can_be_the_fastest():
    fast, slow = (
        tune_kernels.Tried(label=label, job=job("fine"), finding=Finding(milliseconds=ms, forward_ms=0.2, error=0.5))
        for label, ms in (("a", 0.7), ("b", 0.9))
    )
    wrong = tune_kernels.Tried(label="c", job=job("fine"), finding=Finding(problem="mild: dq is off by 3 times its limit"))
    rows = tune_kernels.markdown([fast, slow, wrong])
    assert rows[0] == "| scalar | 64x64 | a | 0.700 | 0.200 | 0 | 0.50 | fastest |"
    assert rows[1].endswith("|  |") and "off by 3 times" in rows[2] and "fastest" not in rows[2]


def test_labels_say_what_differs_from_the_default():
    default = {"policy": "save", "forward": {"chunk": 64, "warps": 4}, "dq": None}
    config = {"policy": "save", "forward": {"chunk": 64, "warps": 8}, "dq": {"chunk": 32}}
    assert tune_kernels._label(config, default) == "forward.warps 8, dq.chunk 32"
    assert tune_kernels._label(default, default) == ""


@pytest.mark.parametrize("granularity", tune_kernels.CLASSES)
def test_every_candidate_is_a_configuration_and_none_comes_twice(granularity):
    from kernels import decay_scan_triton, delta_scan_triton, dplr_scan_triton
    from kernels.tuned import made

    operators = delta_scan_triton if granularity.startswith("delta") else decay_scan_triton
    config_class = (dplr_scan_triton if granularity == dplr_scan_triton.GRANULARITY else operators).config_class

    for dims in ((64, 64), (128, 64), (256, 256)):
        jobs = tune_kernels.candidates(granularity, dims, "")
        assert jobs[0][0] == "default" and len({label for label, _ in jobs}) == len(jobs)
        for _, candidate in jobs:
            config = made(config_class(granularity), candidate.config, "a candidate")
            assert dataclasses.asdict(config) == candidate.config


def test_a_dry_run_lists_and_needs_no_gpu():
    command = [sys.executable, str(ROOT / "benchmarks" / "tune_kernels.py"), "--dry-run", "--shapes", "64x64"]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "scalar 64x64:" in ran.stdout and "vector 64x64:" in ran.stdout, ran.stderr


@pytest.mark.parametrize("wrong, said", [("64", "'64' is not KxV"), ("64xa", "'64xa' is not KxV")])
def test_a_wrong_shape_is_refused(wrong, said):
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        tune_kernels._dims(wrong)
