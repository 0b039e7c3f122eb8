"""The fused gate and norm equals its definition, forward and backward."""

import subprocess
import sys

import torch

SCRIPT = """
import torch
from decay_core import kernel_seam  # makes kernels/ importable
from kernels.gated_norm_naive import gated_norm_naive
from kernels import gated_norm_triton as module
from kernels.gated_norm_triton import gated_norm_triton
module.ROWS_OF_PROGRAMS = 7  # so that programs walk over several rows
torch.manual_seed(0)
for shape in ((2, 3, 64), (5, 96), (1, 1, 768), (0, 64), (40, 8)):
    o, gate = (torch.randn(shape, requires_grad=True) for _ in range(2))
    gain = torch.randn(shape[-1], requires_grad=True)
    dy = torch.randn(shape)
    found = torch.autograd.grad(gated_norm_triton(o, gate, gain, 1e-5), (o, gate, gain), dy)
    y = gated_norm_triton(o, gate, gain, 1e-5)
    wide = [x.detach().double().requires_grad_() for x in (o, gate, gain)]
    expected_y = gated_norm_naive(*wide, 1e-5)
    expected = torch.autograd.grad(expected_y, wide, dy.double())
    for name, a, b in zip(("y", "do", "dgate", "dgain"), (y, *found), (expected_y, *expected)):
        assert a.isfinite().all() and a.shape == b.shape
        error = float((a.double() - b).norm() / b.norm()) if b.numel() and b.norm() else 0.0
        assert error <= 2e-6, (shape, name, error)
o = torch.randn(4, 40, dtype=torch.float32).to(torch.float16)
assert gated_norm_triton(o, o, torch.ones(40), 1e-5).dtype == torch.float16
torch.library.opcheck(torch.ops.decay.gated_norm.default, (torch.randn(3, 32), torch.randn(3, 32), torch.ones(32), 1e-5))
strided = torch.randn(8, 6, 64).transpose(0, 1)
assert torch.equal(gated_norm_triton(strided, strided, torch.ones(64), 1e-5),
                   gated_norm_triton(strided.contiguous(), strided.contiguous(), torch.ones(64), 1e-5))
print("ok")
"""


def test_fused_gate_and_norm_equals_its_definition_with_gradients(process_env):
    """In Triton's interpreter, which has to be chosen before Triton is imported: a process of its own."""
    env = {**process_env, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "ok", done.stdout + done.stderr


def test_the_definition_is_the_models_own_arithmetic():
    from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
    from decay_core.layers import NORM_EPS, RMSNorm
    from kernels.gated_norm_naive import gated_norm_naive

    o, gate = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    norm = RMSNorm(16)
    with torch.no_grad():
        norm.gain.normal_()
    expected = norm(o * torch.sigmoid(gate))
    assert torch.equal(gated_norm_naive(o, gate, norm.gain, NORM_EPS), expected)
