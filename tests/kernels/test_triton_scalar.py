"""The Triton kernels for scalar decay equal the definition, outputs and all gradients, in Triton's interpreter on a CPU.

Whether kernels are interpreted is settled when triton is imported, so one process of its own runs all cases (this file as
a script) and prints their errors; the tests read them. Memory is filled with NaN before a kernel writes to it.
"""

import json
import math
from itertools import pairwise

import pytest
import torch
from interpreted import run_as_script

GRADIENTS = ["dq", "dk", "dv", "dx", "dgain", "doffset", "dinitial_state"]
# Relative norm of the difference. The interpreter cuts bf16 off when it stores, hence more than rounding's 2^-9.
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 6e-3}
POLICIES = ["states", "recompute", "split"]
GATES = ["mild", "small", "zero", "one", "mixed", "fast", "denormal", "tiny", "above one"]
BASE = {"batch": 1, "tokens": 37, "heads": 1, "k": 32, "v": 32, "chunk": 16, "block": 64, "gate": "mild", "dtype": "float32"}
SOURCES = {
    "sigmoid": {"kind": "softplus", "slope": -1.0},
    "mamba": {"kind": "softplus", "gain": True, "offset": True},
    "mamba without offset": {"kind": "softplus", "gain": True},
    "gla": {"kind": "softplus", "slope": -1.0, "offset": True, "gain": True},
    "hgrn": {"kind": "floor", "offset": True},
    "steep hgrn": {"kind": "floor", "slope": 3.0, "offset": True},
}
LENGTHS = [0, 1, 17, 64, 65, 0, 2]
SPLIT = {"policy": "split", "k": 128, "v": 128, "tokens": 40}
DIMS = ((128, 128), (128, 64), (64, 128), (32, 32), (72, 40))


def cases():
    """Name -> a case. fp32 inputs take the path of `states` under `recompute`, so that is tried with fp16."""
    table = {f"gate {gate}": {"gate": gate} for gate in GATES}
    table |= {f"{tokens} tokens": {"tokens": tokens} for tokens in (1, 2, 15, 16, 17)}
    table["strided inputs"] = {"strided": True, "batch": 2, "heads": 2}
    segments = {"tokens": 300, "chunk": 64, "segment": 64}
    table["segments"] = {**segments, "heads": 2}
    table["heads of their own constant decay"] = {"gate": "constant per head", "heads": 3}
    table["packed"] = {"lengths": LENGTHS, "chunk": 32}
    table["packed, no states passed"] = {"lengths": [3, 33, 1], "states": False}
    table["mamba"] = {**SOURCES["mamba"], "heads": 2, "batch": 2, "tokens": 20}
    slices = {f"K {k} V {v}": {"k": k, "v": v, "tokens": 20} for k, v in ((64, 32), (40, 24), (128, 64), (8, 16))}
    slices["K 256 V 128 in slices of 128"] = {"k": 256, "v": 128, "tokens": 20, "block": 128}
    slices["K 72 V 40 in slices of 32"] = {"k": 72, "v": 40, "tokens": 20, "block": 32}
    slices["no states passed"] = {"states": False}
    slices["segments, mixed decays, slices, no states"] = {**segments, "gate": "mixed", "states": False, "block": 16}
    slices["hgrn, slices"] = {**SOURCES["hgrn"], "tokens": 20, "k": 72, "v": 24}
    found = {f"{name}, states": {**case, "policy": "states"} for name, case in (table | slices).items()}
    found |= {f"{name}, split": {**case, "policy": "split"} for name, case in table.items()}
    found |= {f"source {name}": {**case, "policy": "states", "heads": 2} for name, case in SOURCES.items()}
    found["source mamba, many heads"] = {**found["source mamba"], "heads": 18, "tokens": 5}
    found["source gla, many tokens"] = {**found["source gla"], "heads": 1, "tokens": 140, "chunk": 64}
    found["source bfloat16 x"] = {**SOURCES["mamba"], "x_dtype": "bfloat16", "policy": "split", "heads": 2}
    found["source bfloat16 log λ"] = {"x_dtype": "bfloat16", "policy": "states", "gate": "mild"}
    found["source float16 x"] = {**SOURCES["hgrn"], "x_dtype": "float16", "policy": "states", "heads": 2}
    found |= {f"split K {k} V {v}": {**SPLIT, "k": k, "v": v} for k, v in DIMS}
    for dv in ("walk", "chunk"):
        pairs = {**SPLIT, "dv": dv, "every": 2, "v": 64}
        found[f"split, a state for two chunks, dv in the {dv}"] = {**pairs, "tokens": 69}
        found[f"split, a state for two chunks, packed, dv in the {dv}"] = {**pairs, "lengths": LENGTHS, "walk_chunk": 32}
        found[f"split, segments, dv in the {dv}"] = {**pairs, **segments, "k": 64, "gate": "mixed", "states": False}
        found[f"split, two chunks, dv in the {dv}, float16"] = {**pairs, "dtype": "float16", "gate": "one"}
    found["split, K in slices for the walk that makes dv"] = {**SPLIT, "dv": "walk", "v": 32}
    found["split, K and V in slices for walks"] = {**SPLIT, "walk_block": 64, "v": 128}
    # 16-bit: dlog λ is 0 for λ = 1e-8; fp16 has no 1e-10, as dinitial_state is
    for name in ("gate tiny", "gate fast", "2 tokens", "15 tokens", "16 tokens", "strided inputs"):
        del table[name]
    table["more chunks than between checkpoints"] = {"tokens": 150}
    table["packed, with checkpoints"] = {"lengths": [130, 0, 128, 3]}
    table["K 128 V 64"] = slices["K 128 V 64"]
    table["hgrn, slices"] = slices["hgrn, slices"]
    half = {"dtype": "float16"}
    found |= {f"{name}, recompute": {**half, **case, "policy": "recompute"} for name, case in table.items()}
    for gate in ("mild", "small", "zero", "mixed"):
        found |= {f"gate {gate}, float16, {policy}": {**half, "gate": gate, "policy": policy} for policy in ("states", "split")}
    found |= {f"bfloat16, {policy}": {"dtype": "bfloat16", "policy": policy} for policy in POLICIES}
    found["float32, recompute"] = {"policy": "recompute"}
    place = {"policy": "states", "chunk": 32, "block": 32, "give": True, "gate": "mixed"}
    found["dq in the states' place"] = {**place, "tokens": 96, "heads": 3, "batch": 2}
    found["dq in the states' place, segments"] = {**place, "tokens": 256, "segment": 64, "heads": 2}
    for name, case in {"a short chunk": {"tokens": 90}, "V unlike K": {"v": 16}, "packed": {"lengths": [32, 64]}}.items():
        found[f"states given away, no room for dq: {name}"] = {**place, "tokens": 64, "no_room": True, **case}
    return {name: {**BASE, **case} for name, case in found.items()}


@pytest.fixture(scope="module")
def errors():
    return run_as_script(__file__)


@pytest.mark.parametrize("name", cases())
def test_kernels_equal_the_definition_in_value_and_gradient(name, errors):
    case = cases()[name]
    found = errors[name]
    absent = {f"d{part}" for part in ("gain", "offset") if not case.get(part)}
    absent |= set() if case.get("states", True) else {"dinitial_state"}
    assert set(found) == {"o", "final_state", *GRADIENTS} - absent
    for output, error in found.items():
        # The decay's gradient is a sum of many products of rounded numbers that largely cancel. A NaN is not <= anything.
        cancels = output in ("dx", "dgain", "doffset")
        dtype = case.get("x_dtype", case["dtype"]) if output == "dx" else case["dtype"]
        assert error <= TOLERANCE[dtype] * (1.6 if cancels else 1), output


@pytest.mark.parametrize("policy", POLICIES)
def test_two_runs_give_equal_bits(policy, errors):
    assert errors["equal bits"][policy] is True


@pytest.mark.parametrize("refusal", ["scale", "no saved states", "another chunk", "split V", "states of another walk", "span"])
def test_what_does_not_fit_is_refused(refusal, errors):
    assert errors["refused"][refusal] is True


@pytest.mark.parametrize("value_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("key_dim", [32, 64, 128, 256])
def test_each_class_has_several_configurations_and_its_default_is_one_of_them(key_dim, value_dim):
    from kernels.triton_scalar import candidates, default_config

    for dtype, fewest in ((torch.bfloat16, 4), (torch.float16, 4), (torch.float32, 1)):
        found = candidates(key_dim, value_dim, dtype)
        assert found[0] == default_config(key_dim, value_dim, dtype) and len(set(found)) == len(found) >= fewest
        assert all(config.backward.block_v >= value_dim for config in found if config.policy == "split")


def test_gradients_have_the_dtypes_of_what_they_are_gradients_of(errors):
    assert errors["dtypes"] == ["float16", "float16", "float16", "bfloat16", "float64", "float32", "float32"]


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
    """What a scan is given: q, k, v, x, gain, offset, initial state, do, dfinal state."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    batch, tokens, heads, k, v = (case[axis] for axis in ("batch", "tokens", "heads", "k", "v"))
    lengths = case.get("lengths")
    tokens, sequences = (tokens, batch) if lengths is None else (sum(lengths), len(lengths))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    if case.get("strided"):
        packed = normal(batch, heads, tokens, 3 * k).to(dtype).transpose(1, 2)
        q, key, value = packed.split(k, dim=-1)
        x = log_decays(case["gate"], (heads, tokens, batch), generator).permute(2, 1, 0)
    else:
        q, key, value = (normal(batch, tokens, heads, dim).to(dtype) for dim in (k, k, v))
        x = log_decays(case["gate"], (batch, tokens, heads), generator)
    gain = offset = None
    if case.get("kind", "log") != "log":
        x = 3 * normal(batch, tokens, heads)
        gain = 4 * torch.rand(heads, generator=generator) if case.get("gain") else None
        offset = torch.rand(heads, generator=generator) if case.get("offset") else None
    x = x.to(getattr(torch, case.get("x_dtype", "float32")))
    states = [normal(sequences, heads, k, v) if case.get("states", True) else None for _ in range(2)]
    return q, key, value, x, gain, offset, states[0], normal(batch, tokens, heads, v).to(dtype), states[1]


def source_of(case, x, gain, offset):
    from kernels.decay_source import DecaySource

    return DecaySource(x=x, kind=case.get("kind", "log"), slope=case.get("slope", 1.0), gain=gain, offset=offset)


def defined(case, q, k, v, x, gain, offset, initial, do, d_final, scale):
    """The outputs and gradients that the definition and autograd give in float64, None where an input is. For gain and offset
    the gradient's terms, one for each token."""
    from kernels.decay_scan_naive import decay_scan_naive

    given = [q, k, v, x, *(None if y is None else y.expand(x.shape) for y in (gain, offset)), initial]
    leaves = [None if y is None else y.double().detach().requires_grad_() for y in given]
    log_decay = source_of(case, *leaves[3:6]).log_decay()
    lengths = case.get("lengths")
    if lengths is None:
        o, final = decay_scan_naive(leaves[0] * scale, *leaves[1:3], log_decay, leaves[6], output_final_state=True)
    else:
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        parts = []
        for n, (start, end) in enumerate(pairwise(ends)):
            tensors = [y[:, start:end] for y in (leaves[0] * scale, *leaves[1:3], log_decay)]
            first = None if initial is None else leaves[6][n : n + 1]
            parts.append(decay_scan_naive(*tensors, first, output_final_state=True))
        o, final = torch.cat([o for o, _ in parts], dim=1), torch.cat([state for _, state in parts])
    loss = (o * do.double()).sum() + (0 if d_final is None else (final * d_final.double()).sum())
    wanted = [y for y in leaves if y is not None]
    found = iter(torch.autograd.grad(loss, wanted))
    return [o.detach(), final.detach(), *(None if y is None else next(found) for y in leaves)]


def kernel(case, tensors, scale, config):
    from kernels.triton_scalar import backward, forward

    q, k, v, x, gain, offset, initial, do, d_final = tensors
    source = source_of(case, x, gain, offset)
    lengths = case.get("lengths")
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    o, final, saved = forward(q, k, v, source, scale, initial, True, True, config, bounds)
    found = backward(q, k, v, source, scale, initial, saved, do, d_final, config, bounds, case.get("give", False))
    assert (saved is not None and found.q.data_ptr() == saved.data_ptr()) == (
        case.get("give", False) and not case.get("no_room", False)
    )
    return [o, final, *found]


def configured(case):
    from kernels.triton_scalar import Config, Launch

    chunk, block = case["chunk"], case["block"]
    launch = Launch(chunk=chunk, warps=4, stages=1, block_k=block, block_v=block)
    if case["policy"] != "split":
        return Config(policy=case["policy"], forward=launch, backward=launch)
    wide = case.get("walk_block", 128 if case.get("dv") == "walk" else 64)
    walk = Launch(chunk=case.get("walk_chunk", chunk), warps=4, stages=1, block_k=wide, block_v=64)
    parallel = Launch(chunk=chunk, warps=4, stages=1, block_k=64, block_v=256)
    span = case.get("every", 1) * chunk
    return Config(policy="split", forward=launch, backward=parallel, walk=walk, span=span, dv=case.get("dv", "chunk"))


def difference(found, wanted):
    """Relative to the result, or where the terms of a sum over tokens are given, to the sizes of those."""
    size = wanted.norm().item()
    if found.shape != wanted.shape:
        size, wanted = wanted.abs().sum(dim=(0, 1)).norm().item(), wanted.sum(dim=(0, 1))
    apart = (found.double() - wanted).norm().item()
    return apart / size if size > 1e-30 else apart


def measured(case):
    from kernels import triton_scalar

    triton_scalar.SEGMENT_TOKENS = case.get("segment", 512)
    tensors, scale = made(case), 0.3
    found = zip(kernel(case, tensors, scale, configured(case)), defined(case, *tensors, scale), strict=True)
    named = zip(["o", "final_state", *GRADIENTS], found, strict=True)
    return {name: difference(a, b) for name, (a, b) in named if a is not None}


def refused(case, scale=0.3, config=None, **changes):
    from kernels.triton_scalar import backward, forward

    q, k, v, x, gain, offset, initial, do, d_final = made(case)
    source = source_of(case, x, gain, offset)
    try:
        saved = forward(q, k, v, source, scale, initial, True, True, configured(case))[2]
        saved = changes.get("saved", saved)
        backward(q, k, v, source, scale, initial, saved, do, d_final, config() if config else configured(case))
    except ValueError:
        return True
    return False


def main():
    from dataclasses import replace

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    found = {name: measured(case) for name, case in cases().items()}
    found["equal bits"] = {}
    for policy in POLICIES:
        case = {**BASE, **SOURCES["mamba"], "policy": policy, "k": 72, "block": 32}
        runs = [kernel(case, made(case), 0.3, configured(case)) for _ in range(2)]
        found["equal bits"][policy] = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    case = {**BASE, "policy": "states"}
    split = {**BASE, "policy": "split", "v": 128}
    launch, narrow = configured(split).forward, replace(configured(split).backward, block_v=64)
    found["refused"] = {
        "scale": refused(case, scale=0.0),
        "no saved states": refused(case, saved=None),
        "another chunk": refused(case, config=lambda: configured({**case, "chunk": 32})),
        "split V": refused(split, config=lambda: replace(configured(split), backward=narrow)),
        "states of another walk": refused(case, config=lambda: replace(configured(case), backward=replace(launch, chunk=32))),
        "span": refused(split, config=lambda: replace(configured(split), span=64)),
    }
    case = {**BASE, **SOURCES["mamba"], "dtype": "float16", "x_dtype": "bfloat16", "policy": "states"}
    tensors = made(case)
    tensors = (*tensors[:4], tensors[4].double(), *tensors[5:])
    found["dtypes"] = [str(y.dtype).removeprefix("torch.") for y in kernel(case, tensors, 0.3, configured(case))[2:]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
