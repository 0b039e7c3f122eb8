"""LightNet's kernel in Triton's interpreter against the decay's own formula in float64, with its gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# tokens, channels, standard deviation of f
CASES = {"one token": (1, 8, 1.0), "part of a step": (31, 8, 1.0), "ragged": (100, 72, 3.0), "far apart": (70, 8, 30.0)}

SCRIPT = """
import json, sys, torch
from decay_core.decays.lightnet import _log_total_before
from decay_core import kernel_seam
from kernels.running_decay_triton import running_decay_triton

def errors(tokens, channels, spread):
    torch.manual_seed(0)
    f = (spread * torch.randn(2, tokens, channels)).requires_grad_()
    d_log = torch.randn_like(f)
    found = running_decay_triton(f)
    found = [found.detach(), *torch.autograd.grad(found, f, d_log)]
    wide = f.detach().double().requires_grad_()
    expected = torch.nn.functional.logsigmoid(_log_total_before(wide, None) - wide)
    expected = [expected.detach(), *torch.autograd.grad(expected, wide, d_log.double())]
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected)]

print(json.dumps({name: errors(*case) for name, case in json.loads(sys.argv[1]).items()}))
"""


@pytest.fixture(scope="module")
def found():
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(CASES)]
    finished = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout)


@pytest.mark.parametrize("case", CASES)
def test_log_decay_and_its_gradient_equal_the_definition(found, case):
    assert max(found[case]) <= 1e-6
