"""The Triton kernels of a vector decay give the naive scan's numbers and gradients, for every decay, shape and cut.

They run in Triton's interpreter, which must be chosen before triton is imported: one subprocess computes all cases and prints
its errors, the tests read them. The interpreter knows no bf16 arithmetic and no races; the GPU tests are elsewhere.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# gate, (B, T, H, K, V), dtype, fields of the config
CASES = {
    "mild decay": ("mild", (1, 130, 2, 64, 64), "float32", {}),
    "median λ of 0.3": ("fast", (1, 100, 1, 64, 64), "float32", {}),
    "λ from 0 to 1, mixed": ("mixed", (1, 100, 1, 64, 64), "float32", {}),
    "whole channels below e^-60": ("channels", (1, 100, 1, 64, 64), "float32", {}),
    "λ = 0": ("zero", (1, 70, 1, 32, 32), "float32", {}),
    "λ = 1": ("one", (1, 130, 1, 32, 32), "float32", {}),
    "λ = 0 every other token": ("alternating", (1, 70, 1, 32, 32), "float32", {}),
    "λ the smallest number": ("denormal", (1, 70, 1, 32, 32), "float32", {}),
    "a token": ("mixed", (2, 1, 2, 32, 32), "float32", {}),
    "15 tokens": ("mixed", (1, 15, 1, 32, 32), "float32", {}),
    "63 tokens": ("mixed", (1, 63, 1, 32, 32), "float32", {}),
    "64 tokens": ("mixed", (1, 64, 1, 32, 32), "float32", {}),
    "65 tokens": ("mixed", (1, 65, 1, 32, 32), "float32", {}),
    "more keys than values": ("channels", (1, 70, 1, 128, 64), "float32", {}),
    "more values than keys": ("channels", (1, 70, 1, 32, 136), "float32", {}),
    "wide": ("channels", (1, 70, 1, 128, 128), "float32", {}),
    "widest": ("mixed", (1, 20, 1, 256, 72), "float32", {}),
    "multiples of 8": ("mixed", (1, 70, 1, 40, 24), "float32", {}),
    "one piece of 128 channels": ("mild", (1, 70, 1, 128, 64), "float32", {"key_block": 128}),
    "chunks of 32": ("mixed", (1, 100, 1, 32, 32), "float32", {"chunk": 32, "forward_chunk": 16}),
    "forward chunks of 32": ("mixed", (1, 200, 1, 32, 32), "float32", {"forward_chunk": 32}),
    "blocks of 16": ("fast", (1, 70, 1, 32, 32), "float32", {"block": 16}),
    "states made again": ("mixed", (1, 130, 1, 32, 32), "float32", {"policy": "recompute"}),
    "forward pass split": ("channels", (1, 130, 1, 128, 32), "float32", {"forward": "split"}),
    "backward pass one walk": ("mild", (1, 130, 1, 32, 32), "float32", {"backward": "fused"}),
    "backward pass one walk, exact": ("channels", (1, 130, 1, 32, 32), "float32", {"backward": "fused"}),
    "bf16 in and out": ("mild", (1, 70, 1, 64, 64), "bfloat16", {}),
    "fp16 in and out": ("mixed", (1, 70, 1, 64, 64), "float16", {}),
}
# The interpreter cuts digits off where a GPU rounds to bf16.
TOLERANCE = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.fixture(scope="module")
def reports():
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", __file__]
    finished = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_naive_in_value_and_gradient(reports, case):
    _, _, dtype, _ = CASES[case]
    errors = reports[case]
    assert set(errors) == {"o", "final_state", "dq", "dk", "dv", "dlog_decay", "d_initial_state"}
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


def test_no_state_is_needed_or_made_where_none_is_asked_for(reports):
    assert reports["stateless"].pop("o") <= 2e-5
    assert reports["stateless"] == {"final_state": None, "saved": None, "d_initial_state": None}


def test_tensors_need_not_be_contiguous(reports):
    assert reports["strided"] == [0.0] * 5


def test_a_sequence_cut_in_two_gives_the_same(reports):
    assert max(reports["cut in two"]) <= 2e-5


def test_later_tokens_do_not_move_earlier_outputs_of_an_exact_chunk(reports):
    assert reports["causal"]


def main():
    import torch
    import torch.nn.functional as F

    from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
    from kernels.decay_scan_naive import decay_scan_naive
    from kernels.triton_vector import VectorConfig, backward, default_config, forward

    torch.set_num_threads(1)

    def log_decays(name, shape, generator):
        normal, uniform = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        levels = torch.tensor([0.0, 1.0, 1e-45, 1e-8, 0.2, 0.999], dtype=torch.float64).log().float()
        mild = F.logsigmoid(normal + 3)
        return {
            "mild": mild,
            "fast": F.logsigmoid(2 * normal - 1),
            "mixed": levels[(6 * uniform).long()],
            "channels": torch.where(torch.arange(shape[-1]) % 4 == 0, -120 * uniform, mild),
            "zero": torch.full(shape, -torch.inf),
            "one": torch.zeros(shape),
            "alternating": torch.where(torch.arange(shape[1])[:, None, None] % 2 == 0, -torch.inf, torch.zeros(shape)),
            "denormal": torch.full(shape, 1e-45, dtype=torch.float64).log().float(),
        }[name]

    def inputs(gate, shape, dtype="float32"):
        batch, length, heads, k, v = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes):
            return torch.randn(sizes, generator=generator)

        rows = [normal(batch, length, heads, n).to(getattr(torch, dtype)) for n in (k, k, v, v)]
        states = [normal(batch, heads, k, v) for _ in range(2)]
        return *rows, log_decays(gate, (batch, length, heads, k), generator), *states

    def distance(found, wanted, floor=1e-6):
        assert found.shape == wanted.shape and found.isfinite().all()
        return float((found.double() - wanted).norm() / wanted.norm().clamp(min=floor))

    reports = {}
    for case, (gate, shape, dtype, fields) in CASES.items():
        q, k, v, do, log_decay, initial, d_final = inputs(gate, shape, dtype)
        config = VectorConfig(**fields) if fields else default_config(shape[3], shape[4], getattr(torch, dtype))
        scale = shape[3] ** -0.5
        o, final, saved = forward(q, k, v, log_decay, scale, initial, True, True, config)
        gradients = backward(q, k, v, log_decay, scale, initial, saved, do, d_final, config)
        leaves = [x.double().requires_grad_() for x in (q, k, v, log_decay, initial)]
        wanted_o, wanted_final = decay_scan_naive(*leaves, output_final_state=True)
        wanted_o = wanted_o * scale
        wanted = torch.autograd.grad((wanted_o * do.double()).sum() + (wanted_final * d_final.double()).sum(), leaves)
        names = ("o", "final_state", "dq", "dk", "dv", "dlog_decay", "d_initial_state")
        pairs = zip(names, (o, final, *gradients), (wanted_o.detach(), wanted_final.detach(), *wanted), strict=True)
        # dlog λ is a difference of such terms, and next to nothing where λ is
        floor = {"dlog_decay": 0.1 * float((q.double() * wanted[0]).norm())}
        reports[case] = {name: distance(x, y.nan_to_num(0.0), floor.get(name, 1e-6)) for name, x, y in pairs}

    shape, scale, config = (1, 40, 2, 16, 32), 0.25, VectorConfig()
    q, k, v, do, log_decay, initial, d_final = inputs("mixed", shape)
    o, final, saved = forward(q, k, v, log_decay, scale, None, False, False, config)
    gradients = backward(q, k, v, log_decay, scale, None, saved, do, None, config)
    wanted = scale * decay_scan_naive(q.double(), k.double(), v.double(), log_decay.double())[0]
    reports["stateless"] = {"final_state": final, "saved": saved, "d_initial_state": gradients[4], "o": distance(o, wanted)}

    def permuted(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    again = forward(*map(permuted, (q, k, v, log_decay)), scale, None, False, True, config)
    others = backward(*map(permuted, (q, k, v, log_decay)), scale, None, again[2], permuted(do), None, config)
    reports["strided"] = [float((x - y).abs().max()) for x, y in zip((o, *gradients[:4]), (again[0], *others[:4]), strict=True)]

    whole = forward(q, k, v, log_decay, scale, initial, True, False, config)
    early = forward(*(x[:, :17] for x in (q, k, v, log_decay)), scale, initial, True, False, config)
    late = forward(*(x[:, 17:] for x in (q, k, v, log_decay)), scale, early[1], True, False, config)
    both = torch.cat([early[0], late[0]], dim=1)
    reports["cut in two"] = [distance(both, whole[0].double()), distance(late[1], whole[1].double())]

    later = [torch.cat([x[:, :20], x[:, 20:].flip(1)], dim=1) for x in (q, k, v, log_decay)]
    moved = forward(*later, scale, initial, True, False, config)
    reports["causal"] = torch.equal(moved[0][:, :20], whole[0][:, :20]) and not torch.equal(moved[0], whole[0])
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
