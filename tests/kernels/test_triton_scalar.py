"""The Triton kernels for scalar decay equal the definition, outputs and all gradients, in Triton's interpreter on a CPU.

Whether kernels are interpreted is settled when triton is imported, so one process of its own runs all cases (this file as
a script) and prints their errors; the tests read them. Memory is filled with NaN before a kernel writes to it.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NAMES = ["o", "final_state", "dq", "dk", "dv", "dlog_decay", "dinitial_state"]
# Relative norm of the difference. The interpreter cuts bf16 off when it stores, hence more than rounding's 2^-9.
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 6e-3}
POLICIES = ["states", "recompute"]
GATES = ["mild", "small", "zero", "one", "mixed", "fast", "denormal", "tiny", "above one"]
BASE = {"batch": 1, "tokens": 37, "heads": 1, "k": 32, "v": 32, "chunk": 16, "block": 64, "gate": "mild", "dtype": "float32"}


def cases():
    """Name -> a case. fp32 inputs take the path of `states` under either policy, so `recompute` is tried with fp16."""
    table = {f"gate {gate}": {"gate": gate} for gate in GATES}
    table |= {f"{tokens} tokens": {"tokens": tokens} for tokens in (1, 2, 15, 16, 17)}
    table |= {f"K {k} V {v}": {"k": k, "v": v, "tokens": 20} for k, v in ((64, 32), (40, 24), (128, 64), (8, 16))}
    table["K 256 V 128 in slices of 128"] = {"k": 256, "v": 128, "tokens": 20, "block": 128}
    table["K 72 V 40 in slices of 32"] = {"k": 72, "v": 40, "tokens": 20, "block": 32}
    table["no states passed"] = {"states": False}
    table["strided inputs"] = {"strided": True, "batch": 2, "heads": 2}
    segments = {"tokens": 300, "chunk": 64, "segment": 64}
    table["segments"] = {**segments, "heads": 2}
    table["segments, mixed decays, slices, no states"] = {**segments, "gate": "mixed", "states": False, "block": 16}
    table["heads of their own constant decay"] = {"gate": "constant per head", "heads": 3}
    both = {f"{name}, states": {**BASE, **case, "policy": "states"} for name, case in table.items()}
    del table["gate tiny"], table["gate fast"]  # 16-bit: dlog λ is 0 for λ = 1e-8; fp16 has no 1e-10, as dinitial_state is
    table["more chunks than between checkpoints"] = {"tokens": 150}
    table["checkpoints, no states passed"] = {"tokens": 150, "states": False}
    half = {**BASE, "dtype": "float16"}
    both |= {f"{name}, recompute": {**half, **case, "policy": "recompute"} for name, case in table.items()}
    for gate in ("mild", "small", "zero", "mixed"):
        both[f"gate {gate}, float16, states"] = {**half, "gate": gate, "policy": "states"}
    for policy in POLICIES:
        both[f"bfloat16, {policy}"] = {**BASE, "dtype": "bfloat16", "policy": policy}
    both["float32, recompute"] = {**BASE, "policy": "recompute"}
    return both


@pytest.fixture(scope="module")
def errors():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    ran = subprocess.run([sys.executable, __file__], env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", cases())
def test_kernels_equal_the_definition_in_value_and_gradient(name, errors):
    case = cases()[name]
    found = errors[name]
    assert set(found) == set(NAMES if case.get("states", True) else NAMES[:-1])
    for output, error in found.items():
        # dlog λ is a sum of many products of rounded numbers that largely cancel. A NaN is not <= anything.
        assert error <= TOLERANCE[case["dtype"]] * (1.6 if output == "dlog_decay" else 1), output


@pytest.mark.parametrize("policy", POLICIES)
def test_two_runs_give_equal_bits(policy, errors):
    assert errors["equal bits"][policy] is True


@pytest.mark.parametrize("refusal", ["scale", "no saved states", "another chunk"])
def test_what_does_not_fit_is_refused(refusal, errors):
    assert errors["refused"][refusal] is True


def log_decays(gate, shape, generator):
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    levels = torch.tensor([0.0, 1.0, 1e-45, 1e-8, 0.2, 0.999], dtype=torch.float64).log()
    chosen = {
        "mild": torch.nn.functional.logsigmoid(8 * uniform - 2),
        "small": (0.01 + 0.1 * uniform).log(),
        "zero": torch.full(shape, -torch.inf, dtype=torch.float64),
        "one": torch.zeros(shape, dtype=torch.float64),
        "mixed": levels[(6 * uniform).long()],
        "fast": -60 * uniform,
        "denormal": torch.full(shape, math.log(1e-45), dtype=torch.float64),
        "tiny": torch.full(shape, math.log(1e-8), dtype=torch.float64),
        "above one": torch.full(shape, 0.002, dtype=torch.float64),
        "constant per head": torch.linspace(-0.02, -1.5, shape[-1], dtype=torch.float64).expand(shape),
    }[gate]
    return chosen.to(torch.float32) if gate != "constant per head" else chosen[0, 0].to(torch.float32).expand(shape)


def made(case):
    """q, k, v, log decay, initial state, do, dfinal state."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    batch, tokens, heads, k, v = (case[axis] for axis in ("batch", "tokens", "heads", "k", "v"))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    if case.get("strided"):
        packed = normal(batch, heads, tokens, 3 * k).to(dtype).transpose(1, 2)
        q, key, value = packed.split(k, dim=-1)
        gate = log_decays(case["gate"], (heads, tokens, batch), generator).permute(2, 1, 0)
    else:
        q, key, value = (normal(batch, tokens, heads, dim).to(dtype) for dim in (k, k, v))
        gate = log_decays(case["gate"], (batch, tokens, heads), generator)
    states = (normal(batch, heads, k, v), normal(batch, heads, k, v)) if case.get("states", True) else (None, None)
    return q, key, value, gate, states[0], normal(batch, tokens, heads, v).to(dtype), states[1]


def defined(q, k, v, log_decay, initial, do, d_final, scale):
    """The outputs and gradients that the definition and autograd give in float64."""
    from kernels.decay_scan_naive import decay_scan_naive

    leaves = [x.double().detach().requires_grad_() for x in (q, k, v, log_decay, initial) if x is not None]
    o, final = decay_scan_naive(leaves[0] * scale, *leaves[1:], output_final_state=True)
    loss = (o * do.double()).sum() + (0 if d_final is None else (final * d_final.double()).sum())
    return [o.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


def kernel(tensors, scale, config):
    from kernels.decay_source import DecaySource
    from kernels.triton_scalar import backward, forward

    q, k, v, log_decay, initial, do, d_final = tensors
    source = DecaySource(x=log_decay)
    o, final, saved = forward(q, k, v, source, scale, initial, True, True, config)
    found = backward(q, k, v, source, scale, initial, saved, do, d_final, config)
    return [o, final, *found[:4], found.initial_state]


def configured(case):
    from kernels.triton_scalar import Config, Launch

    launch = Launch(chunk=case["chunk"], warps=4, stages=1, block_k=case["block"], block_v=case["block"])
    return Config(policy=case["policy"], forward=launch, backward=launch)


def difference(found, wanted):
    apart, size = (found.double() - wanted).norm().item(), wanted.norm().item()
    return apart / size if size > 1e-30 else apart


def measured(case):
    from kernels import triton_scalar

    triton_scalar.SEGMENT_TOKENS = case.get("segment", 512)
    tensors, scale = made(case), 0.3
    pairs = zip(NAMES, kernel(tensors, scale, configured(case)), defined(*tensors, scale), strict=False)
    return {name: difference(found, wanted) for name, found, wanted in pairs if found is not None}


def refused(case, scale=0.3, **changes):
    from kernels.decay_source import DecaySource
    from kernels.triton_scalar import backward, forward

    q, k, v, log_decay, initial, do, d_final = made(case)
    try:
        log_decay = DecaySource(x=log_decay)
        saved = forward(q, k, v, log_decay, scale, initial, True, True, configured(case))[2]
        saved = changes.get("saved", saved)
        changed = configured({**case, "chunk": changes.get("chunk", case["chunk"])})
        backward(q, k, v, log_decay, scale, initial, saved, do, d_final, changed)
    except ValueError:
        return True
    return False


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    found = {name: measured(case) for name, case in cases().items()}
    found["equal bits"] = {}
    for policy in POLICIES:
        case = {**BASE, "policy": policy, "k": 72, "block": 32}
        runs = [kernel(made(case), 0.3, configured(case)) for _ in range(2)]
        found["equal bits"][policy] = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    case = {**BASE, "policy": "states"}
    found["refused"] = {
        "scale": refused(case, scale=0.0),
        "no saved states": refused(case, saved=None),
        "another chunk": refused(case, chunk=32),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
