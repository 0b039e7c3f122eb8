"""`decay doctor` says which kernel runs and why, with a GPU and without; the GPU is pretended, the choice is not."""

import os

import pytest
import torch
from typer.testing import CliRunner

from services.cli import app
from services.study.doctor import DoctorError


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DECAY_")]:
        monkeypatch.delenv(name)


def doctor(*words):
    return CliRunner().invoke(app, ["doctor", *words])


@pytest.fixture
def hopper(monkeypatch):
    """One GPU of the kind that the kernels are chosen on."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    for name, value in {"is_available": True, "device_count": 1, "get_device_name": "a Hopper"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for module in ("select_kernel", "triton_toolchain"):
        monkeypatch.setattr(f"kernels.{module}.choose_ptxas", lambda: "/some/ptxas: version 13.4")


def test_a_machine_without_a_gpu_is_told_that_plain_torch_runs():
    answer = doctor()
    assert answer.exit_code == 0, answer.output
    assert "decay scan on cpu: batch 32, 2048 tokens, 16 heads, keys of 64, values of 64" in answer.output
    rows = [line for line in answer.output.splitlines() if line.startswith("  ")]
    assert [row.split(":")[0].strip() for row in rows] == ["scalar bf16", "scalar fp32", "vector bf16", "vector fp32"]
    assert all("chunked (plain torch in chunks of" in row for row in rows)
    assert f"torch {torch.__version__}" in answer.output and "set: no DECAY_* variable" in answer.output


def test_a_gpu_gets_the_kernels_for_16_bit_tensors_with_their_configuration_and_its_origin(hopper):
    answer = doctor("--seq-len", "100", "--key-dim", "128")
    assert answer.exit_code == 0, answer.output
    lines = answer.output.splitlines()
    assert "GPU: a Hopper" in lines[0] and lines[1] == "ptxas: /some/ptxas: version 13.4"
    assert any(line.startswith("  vector bf16: triton (our Triton kernels serve vector decay, K=128, V=64") for line in lines)
    assert any(line.startswith("  scalar fp32: chunked") and "DECAY_KERNEL=triton asks for them" in line for line in lines)
    configured = [line for line in lines if line.startswith("    configuration from ")]
    assert len(configured) == 2 and all("policy " in line and "chunk " in line for line in configured)


def test_what_is_set_is_shown_and_counts(hopper, monkeypatch):
    monkeypatch.setenv("DECAY_KERNEL_POLICY", "recompute")
    monkeypatch.setenv("DECAY_KERNEL", "triton")
    answer = doctor("--dtype", "fp32", "--granularity", "scalar")
    assert "set: DECAY_KERNEL=triton, DECAY_KERNEL_POLICY=recompute" in answer.output
    assert "  scalar fp32: triton (DECAY_KERNEL asks for it)" in answer.output
    assert "configuration from default, DECAY_KERNEL_POLICY=recompute: policy " in answer.output


def test_the_delta_rule_has_kernels_of_its_own_for_who_asks(hopper, monkeypatch):
    asked = ("--transition", "delta", "--dtype", "bf16", "--head-dim", "128")
    answer = doctor(*asked)
    assert "delta scan on cuda: batch 32" in answer.output
    assert "  scalar bf16: chunked (plain torch" in answer.output and "DECAY_KERNEL=triton asks for them" in answer.output
    monkeypatch.setenv("DECAY_KERNEL", "triton")
    answer = doctor(*asked)
    assert "  scalar bf16: triton (DECAY_KERNEL asks for it)" in answer.output
    assert "configuration from default: chunk " in answer.output


def test_a_width_that_the_kernels_lack_is_told(hopper):
    answer = doctor("--head-dim", "60", "--dtype", "bf16")
    assert answer.output.count("K=60 is no multiple of 8 up to 256") == 2 and "chunked" in answer.output


@pytest.mark.parametrize(
    "words, said",
    [
        (["--device", "cuda"], "--device cuda: this machine has 0 GPUs that torch can use; try cpu"),
        (["--device", "tpu"], "--device tpu is no device that torch knows; try cpu or cuda"),
        (["--device", "meta"], "--device meta: the scans are tested on cpu and cuda alone"),
        (["--dtype", "int8"], "unknown --dtype 'int8'; known: bf16, fp16, fp32, fp64"),
        (["--granularity", "paired"], "unknown --granularity 'paired'; known: scalar, vector"),
        (["--transition", "softmax"], "unknown --transition 'softmax'; known: diagonal, delta"),
        (["--heads", "0"], "--heads 0 is too small; give at least 1"),
        (["--seq-len", "-1"], "--seq-len -1 is too small; give at least 0"),
    ],
)
def test_a_question_without_an_answer_is_refused_in_one_line(words, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refusal = doctor(*words).exception
    assert isinstance(refusal, DoctorError) and said in str(refusal) and "\n" not in str(refusal)


def test_a_wrong_variable_is_refused(monkeypatch):
    monkeypatch.setenv("DECAY_KERNEL", "magic")
    refusal = doctor().exception
    assert isinstance(refusal, DoctorError) and "DECAY_KERNEL=magic: unknown decay scan" in str(refusal)
