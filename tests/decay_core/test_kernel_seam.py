"""Our folder kernels/ and an installed package called kernels live together, whichever Python finds first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
USE_SEAM = """
import torch
from decay_core.kernel_seam import decay_scan, delta_scan, explain_decay_scan, explain_delta_scan
x = torch.ones(1, 3, 1, 2)
o, _ = decay_scan(x, x, x, torch.zeros(1, 3, 1))
assert o[0, :, 0, 0].tolist() == [2.0, 4.0, 6.0], o
assert "chunked" in explain_decay_scan(x, x, x[..., 0])
o, _ = delta_scan(x, x, x, torch.zeros(1, 3, 1), beta_on_write=False)
assert o[0, :, 0, 0].tolist() == [2.0, 4.0, 6.0], o
assert "chunked" in explain_delta_scan(x, x)
"""
USE_FOREIGN = "import kernels; assert kernels.marker == 'theirs'; from kernels import layer; assert layer.deep == 1\n"


def foreign_package(folder):
    package = folder / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("marker = 'theirs'\n")
    (package / "layer.py").write_text("deep = 1\n")
    return folder


def run(code, *path, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("foreign_first_on_path", [True, False])
@pytest.mark.parametrize("foreign_imported_first", [True, False])
def test_seam_and_foreign_package_both_work(tmp_path, foreign_first_on_path, foreign_imported_first):
    path = [foreign_package(tmp_path), ROOT]
    code = USE_FOREIGN + USE_SEAM if foreign_imported_first else USE_SEAM + USE_FOREIGN
    done = run(code, *(path if foreign_first_on_path else reversed(path)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_seam_works_without_a_foreign_package(tmp_path):
    done = run(USE_SEAM, ROOT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_seam_works_when_decay_core_is_on_the_path_without_the_checkout(tmp_path):
    (tmp_path / "decay_core").symlink_to(ROOT / "decay_core")
    done = run(USE_SEAM, tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_kernels_folder_has_no_init_file():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_what_was_taken_is_told_once_for_each_kind_of_tensors():
    from decay_core import kernel_seam

    q, v = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 2, 8)
    kernel_seam.forget_scans()
    assert kernel_seam.scans_taken() == ()
    for _ in range(2):
        kernel_seam.decay_scan(q, q, v, -torch.rand(1, 5, 2))
        kernel_seam.decay_scan(q.double(), None, v.double(), -torch.rand(1, 5, 2, 16, dtype=torch.float64))
        kernel_seam.delta_scan(q, q, v, torch.rand(1, 5, 2))
    assert kernel_seam.scans_taken() == (
        "decay scan: chunked (scalar decay, K=16, V=8, float32 on cpu)",
        "decay scan: chunked (vector decay, K=16, V=8, float64 on cpu)",
        "delta scan: chunked (no decay, K=16, V=8, float32 on cpu)",
    )
    os.environ["DECAY_KERNEL"] = "naive"
    try:
        kernel_seam.decay_scan(q, q, v, -torch.rand(1, 5, 2))
    finally:
        del os.environ["DECAY_KERNEL"]
    assert kernel_seam.scans_taken()[3:] == ("decay scan: naive (scalar decay, K=16, V=8, float32 on cpu)",)
    kernel_seam.forget_scans()
    assert kernel_seam.scans_taken() == ()
