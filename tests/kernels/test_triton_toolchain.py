"""Which ptxas compiles our kernels, and on which GPUs they are chosen: the device is pretended, the choice is not."""

import os
from types import SimpleNamespace

import pytest
import torch

from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
from kernels.select_kernel import select_decay_scan, select_gated_norm
from kernels.triton_toolchain import choose_ptxas


def a_gpu(monkeypatch, major):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))


def half_on_gpu(*shape):
    return SimpleNamespace(
        shape=shape, dtype=torch.bfloat16, is_cuda=True, device=SimpleNamespace(type="cuda"), dim=lambda: len(shape)
    )


@pytest.mark.parametrize("release, taken", [("12.8", False), ("13.0", False), ("13.1", True), ("14.0", True)])
def test_a_ptxas_of_13_1_or_newer_is_taken_on_hopper_and_an_older_one_is_warned_of(
    release, taken, monkeypatch, tmp_path, caplog
):
    a_gpu(monkeypatch, 9)
    ptxas = tmp_path / "bin" / "ptxas"
    ptxas.parent.mkdir()
    ptxas.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
    ptxas.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.setattr("sys.path", [])
    said = choose_ptxas.__wrapped__()
    assert os.environ["TRITON_PTXAS_PATH"] == (str(ptxas) if taken else "")
    assert (release in said) == taken and ("may miscompile" in caplog.text) != taken


def test_a_path_that_is_set_is_kept(monkeypatch):
    a_gpu(monkeypatch, 9)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/some/ptxas")
    assert choose_ptxas.__wrapped__().startswith("/some/ptxas")


@pytest.mark.parametrize("major, name", [(8, "chunked"), (9, "triton"), (12, "chunked")])
def test_the_triton_scan_is_chosen_on_the_gpus_it_was_checked_on_alone(major, name, monkeypatch):
    pytest.importorskip("triton", reason="Triton is for Linux")
    a_gpu(monkeypatch, major)
    monkeypatch.setattr("kernels.triton_toolchain.choose_ptxas", lambda: "not looked for here")
    q, decays = half_on_gpu(1, 8, 2, 64), half_on_gpu(1, 8, 2)
    assert select_decay_scan(q, q, decays).name == name
    assert select_gated_norm(half_on_gpu(1, 8, 128), half_on_gpu(1, 8, 128)).name == name.replace("chunked", "naive")
