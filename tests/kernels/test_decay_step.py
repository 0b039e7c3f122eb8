"""The kernel that decodes one token gives the definition's output and state, in Triton's interpreter on a CPU.

Whether kernels are interpreted is settled when triton is imported, so one process of its own runs all cases (this file as a
script) and prints what it found; the tests read it.
"""

import json

import pytest
from interpreted import run_as_script

KINDS = ["log", "softplus", "softplus with gain and offset", "floor"]
SHAPES = {"64": (64, 64), "wide keys": (256, 32), "wide values": (32, 256), "multiples of 8": (40, 24)}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def found():
    return run_as_script(__file__)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["scalar", "vector", "shared key"])
def test_a_step_is_the_definition_for_every_formula(kind, granularity, found):
    assert max(found["formulas"][f"{kind}, {granularity}"]) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_the_definition_for_every_width(shape, found):
    assert max(found["shapes"][shape]) <= TOLERANCE


@pytest.mark.parametrize("decay", ["0", "1", "mixed"])
def test_decays_of_nothing_and_of_one_are_exact(decay, found):
    assert max(found["decays"][decay]) <= TOLERANCE


@pytest.mark.parametrize(
    "claim",
    [
        "the state is updated in place",
        "a given state is filled and the old one kept",
        "without a state it starts from zeros",
        "a chain of steps is the scan",
        "memory layout does not matter",
        "half precision gives o in its dtype",
        "no batch",
        "no head",
        "two tokens are refused",
        "a state of another dtype is refused",
        "the operator keeps torch's rules",
        "it compiles whole",
    ],
)
def test_a_step(claim, found):
    assert found["claims"].get(claim) is True


def main():
    import torch

    from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
    from kernels.decay_scan_naive import decay_scan_naive
    from kernels.decay_source import DecaySource
    from kernels.decay_step_triton import _step, decay_step_triton

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def inputs(k=32, v=32, batch=2, heads=3, vector=True, length=1):
        rows = (batch, length, heads)
        tensors = [torch.randn(*rows, size) for size in (k, k, v)]
        return *tensors, -torch.rand(*rows, k) if vector else -torch.rand(rows), torch.randn(batch, heads, k, v)

    def made(kind, x):
        some = torch.rand(x.shape[2:]) + 0.05
        return {
            "log": DecaySource(x=x),
            "softplus": DecaySource(x=4 * x, kind="softplus", slope=-1.0),
            "softplus with gain and offset": DecaySource(x=4 * x, kind="softplus", gain=16 * some, offset=-some),
            "floor": DecaySource(x=4 * x, kind="floor", offset=0.9 * some),
        }[kind]

    def wide(source):
        parts = {name: None if y is None else y.double() for name, y in (("gain", source.gain), ("offset", source.offset))}
        return DecaySource(x=source.x.double(), kind=source.kind, slope=source.slope, **parts)

    def errors(tensors, **options):
        q, k, v, decay, state = tensors
        source = decay if isinstance(decay, DecaySource) else DecaySource(x=decay)
        found = decay_step_triton(q, k, v, source, state, 0.3, **options)
        key = None if k is None else k.double()
        wanted = decay_scan_naive(q.double(), key, v.double(), wide(source), state.double(), True, 0.3)
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]

    report = {"formulas": {}, "shapes": {}, "decays": {}, "claims": {}}
    for kind in KINDS:
        for granularity in ("scalar", "vector", "shared key"):
            q, k, v, x, state = inputs(vector=granularity != "scalar")
            key = None if granularity == "shared key" else k
            report["formulas"][f"{kind}, {granularity}"] = errors((q, key, v, made(kind, x), state))
    report["shapes"] = {name: errors(inputs(*shape)) for name, shape in SHAPES.items()}
    q, k, v, x, state = inputs()
    levels = {"0": torch.full_like(x, -torch.inf), "1": torch.zeros_like(x)}
    levels["mixed"] = torch.tensor([0.0, 1.0, 1e-45, 1e-8]).log()[torch.randint(4, x.shape)]
    report["decays"] = {name: errors((q, k, v, level, state)) for name, level in levels.items()}

    claims = report["claims"]
    o, after = decay_step_triton(q, k, v, x, state)
    kept, own, other = state.clone(), state.clone(), torch.full_like(state, torch.nan)
    in_place = decay_step_triton(q, k, v, x, own, 1.0, own)
    claims["the state is updated in place"] = in_place[1] is own and torch.equal(own, after) and torch.equal(in_place[0], o)
    filled = decay_step_triton(q, k, v, x, state, 1.0, other)
    claims["a given state is filled and the old one kept"] = torch.equal(filled[1], after) and torch.equal(state, kept)
    other.fill_(torch.nan)
    fresh = [decay_step_triton(q, k, v, x, None, 1.0, y) for y in (None, other)]
    zero = decay_step_triton(q, k, v, x, torch.zeros_like(state))
    claims["without a state it starts from zeros"] = all(torch.equal(y[1], zero[1]) for y in fresh)
    many = inputs(length=5)
    wanted, end = decay_scan_naive(*many, output_final_state=True)
    current, outputs = many[4], []
    for t in range(5):
        step, current = decay_step_triton(*(y[:, t : t + 1] for y in many[:4]), current)
        outputs.append(step)
    close = torch.allclose(torch.cat(outputs, 1), wanted, atol=1e-5) and torch.allclose(current, end, atol=1e-5)
    claims["a chain of steps is the scan"] = close
    strange = [y.transpose(2, 3).contiguous().transpose(2, 3) for y in (q, k, v, x, state)]
    claims["memory layout does not matter"] = torch.equal(decay_step_triton(*strange)[0], o)
    half = decay_step_triton(*(y.half() for y in (q, k, v)), x, state)
    claims["half precision gives o in its dtype"] = half[0].dtype == torch.half and half[1].dtype == torch.float32
    empty = decay_step_triton(*inputs(batch=0))
    claims["no batch"] = empty[0].shape == (0, 1, 3, 32) and empty[1].shape == (0, 3, 32, 32)
    claims["no head"] = decay_step_triton(*inputs(heads=0))[0].shape == (2, 1, 0, 32)

    def refused(words, *arguments):
        try:
            decay_step_triton(*arguments)
        except ValueError as error:
            return words in str(error)
        return False

    claims["two tokens are refused"] = refused("has 2 tokens, a step has one", *inputs(length=2))
    claims["a state of another dtype is refused"] = refused("is no contiguous float32", q, k, v, x, state, 1.0, state.double())
    arguments = (q, k, v, x, None, None, state, torch.empty_like(state), "log", 1.0, 1.0)
    torch.library.opcheck(_step, arguments)
    torch.library.opcheck(_step, (q, None, v, x, None, None, None, state.clone(), "log", 1.0, 1.0))
    claims["the operator keeps torch's rules"] = True
    compiled = torch.compile(decay_step_triton, fullgraph=True, backend="aot_eager")
    claims["it compiles whole"] = torch.equal(compiled(q, k, v, x, state)[1], after)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
