"""The Triton delta scans on a GPU against the definition in float64: outputs and gradients, by dtype, shape, decay and keys;
and what holds between calls: packed sequences, handed-over states, decoding, equal bits, torch's rules."""

from dataclasses import replace

import pytest
import torch

from decay_core import kernel_seam  # makes kernels/ importable
from kernels.decay_source import DecaySource
from kernels.delta_scan_chunked import delta_scan_chunked

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:`torch.jit")]  # inductor's own
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
both = pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
writes = pytest.mark.parametrize("write", [True, False], ids=["beta", "plain"])

# Relative norms. 16-bit inputs are given as they are to both: what is measured is the kernels' own rounding.
OUTPUT = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 2e-5}
GATE_GRADIENT = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 1e-4}
GATES = ["mild", "fast", "mixed", "one", "zero"]
LEVELS = [0.0, 1.0, 1e-45, 2.0**-150, 1e-8, 0.2, 0.999]
# λ = 1: what 500 tokens leave behind is never forgotten, and neither is its rounding.
UNFORGOTTEN = 1.5
# Pseudo-values of like keys are large and cancel in every output; rounding them to 16 bits is what is seen, (β = 1, 1.9).
ALIKE = {1.0: 0.03, 1.9: 0.2}
NAMES = ("dq", "dk", "dv", "dbeta", "dx", "dgain", "doffset", "dstate")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed + sum(shape)), device="cuda")


def decays(gate, shape):
    noise = normal(*shape, seed=1)
    levels = torch.tensor(LEVELS, dtype=torch.float64, device="cuda").log().float()
    some = normal(*shape[2:], seed=2).sigmoid()
    return {
        "none": None,
        "mild": DecaySource(x=torch.nn.functional.logsigmoid(noise + 3)),
        "fast": DecaySource(x=torch.nn.functional.logsigmoid(2 * noise - 1)),
        "mixed": DecaySource(x=levels[(noise.abs() * 1000).long() % len(LEVELS)]),
        "one": DecaySource(x=torch.zeros(shape, device="cuda")),
        "zero": DecaySource(x=torch.full(shape, -torch.inf, device="cuda")),
        "softplus": DecaySource(x=noise, kind="softplus", slope=-1.0, gain=some, offset=some - 3),
        "floor": DecaySource(x=noise, kind="floor", offset=0.9 * some),
    }[gate]


def inputs(vector, gate="mild", dtype=torch.bfloat16, shape=(2, 333, 3), k=64, v=64, keys="unit", beta=None, sequences=None):
    """[q, k, v, β, x, gain, offset, state] and the source."""
    tokens = torch.arange(shape[1], device="cuda")
    key = normal(*shape, k, seed=3)
    key = {"one": key[:, :1].expand_as(key), "two": key[:, tokens % 2]}.get(keys, key)
    key = torch.nn.functional.normalize(key, dim=-1) * (4 if keys == "four" else 1)
    key = key * (tokens % 3 > 0)[:, None, None] if keys == "zeros" else key
    beta = 2 * normal(*shape, seed=4).sigmoid() if beta is None else torch.full(shape, beta, device="cuda")
    source = decays(gate, (*shape, k) if vector else shape)
    parts = [None] * 3 if source is None else [source.x, source.gain, source.offset]
    state = normal(shape[0] if sequences is None else sequences, shape[2], k, v, seed=5)
    tensors = [x.to(dtype) for x in (normal(*shape, k, seed=6), key, normal(*shape, v, seed=7))]
    return [*tensors, beta, *parts, state], source


def outcome(scan, tensors, source, dtype=None, write=True, scale=0.5, bounds=None, exact=False, norm=False):
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    q, k, v, beta, x, gain, offset, state = leaves
    decay = None if source is None else replace(source, x=x, gain=gain, offset=offset)
    o, final = scan(q, k, v, beta, decay, write, state, True, scale, bounds, exact, norm)
    given = [normal(*o.shape, seed=8).to(tensors[2].dtype).to(o.dtype), normal(*final.shape, seed=9).to(final.dtype)]
    named = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    grads = torch.autograd.grad([o, final], list(named.values()), given, allow_unused=True)
    found = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
    return {"o": o.detach(), "state": final.detach(), **found}


def relative(found, wanted):
    assert found.shape == wanted.shape and found.isfinite().all()
    wanted = wanted.double().nan_to_num()  # the definition's own gradient at λ = 0 is 0 · inf
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-9))


def compare(given, slack=1.0, limit=None, **options):
    from kernels.delta_scan_triton import delta_scan_triton

    tensors, source = given
    dtype = tensors[0].dtype
    found = outcome(delta_scan_triton, tensors, source, **options)
    wanted = outcome(delta_scan_chunked, tensors, source, torch.float64, **options)
    assert set(found) == set(wanted)
    if source is not None and source.kind == "log":  # where λ is 0 in fp32 nothing is asked of its gradient
        alive = source.x > -100
        found["dx"], wanted["dx"] = found["dx"][alive], wanted["dx"][alive]
    errors = {name: relative(found[name], wanted[name]) for name in wanted}
    for name, error in errors.items():
        allowed = (GATE_GRADIENT if name in ("dx", "dgain", "doffset", "dbeta") else OUTPUT)[dtype]
        assert error <= (slack * allowed if limit is None else limit), errors
    return errors


@needs_gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", OUTPUT)
@both
def test_outputs_and_gradients_equal_the_definition(vector, dtype, gate):
    print(vector, dtype, gate, compare(inputs(vector, gate, dtype), UNFORGOTTEN if gate == "one" else 1.0))


@needs_gpu
@pytest.mark.parametrize("dtype", OUTPUT)
@writes
def test_without_decay(write, dtype):
    compare(inputs(False, "none", dtype), UNFORGOTTEN, write=write)


@needs_gpu
@pytest.mark.parametrize("gate", ["softplus", "floor"])
@both
def test_a_decay_given_as_what_makes_it(vector, gate):
    compare(inputs(vector, gate), 1.5, write=not vector)  # sums over all tokens, which largely cancel


@needs_gpu
@pytest.mark.parametrize("keys", ["unit", "zeros", "four"])
@writes
@both
def test_keys_are_normalized_in_the_kernels(vector, write, keys):
    for k in (64, 128):
        compare(inputs(vector, keys=keys, k=k), write=write, norm=True)


@needs_gpu
@pytest.mark.parametrize("beta", [1.0, 1.9])
@pytest.mark.parametrize("keys", ["one", "two"])
@both
def test_like_keys_stay_finite_and_as_right_as_16_bits_allow(vector, keys, beta):
    print(vector, keys, beta, compare(inputs(vector, "one", keys=keys, beta=beta), limit=ALIKE[beta]))
    compare(inputs(vector, "mild", keys=keys, beta=beta), limit=ALIKE[beta])
    compare(inputs(vector, "one", torch.float32, keys=keys, beta=beta), limit=1e-3)


@needs_gpu
# Vector decay not with β = 1.9: where some λ are 1 nothing forgets what expands, and the definition itself passes 1e38.
@pytest.mark.parametrize(
    "vector, gate, beta",
    [
        (False, "mixed", 1.9),
        *((vector, *case) for vector in (False, True) for case in (("mild", 0.1), ("fast", 1.0), ("mixed", 0.5))),
    ],
)
def test_long_keys_make_erasures_that_expand(vector, gate, beta):
    compare(inputs(vector, gate, keys="four", beta=beta), 2.0)  # what expands, expands errors


@needs_gpu
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 15, 1), (1, 64, 12), (3, 65, 33), (1, 2000, 2)])
@both
def test_any_length_and_head_count(vector, shape):
    compare(inputs(vector, shape=shape), 2.0 if shape[1] == 1 else 1.0)


@needs_gpu
@pytest.mark.parametrize("k, v", [(32, 32), (128, 64), (64, 128), (128, 128), (256, 64), (64, 256), (256, 256), (40, 24)])
@both
def test_widths_of_keys_and_values(vector, k, v):
    compare(inputs(vector, k=k, v=v, shape=(2, 140, 3)))


@needs_gpu
@both
def test_packed_sequences_are_those_by_themselves(vector):
    lengths = [0, 1, 0, 130, 64, 0, 70]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    compare(inputs(vector, "mixed", shape=(1, sum(lengths), 3), sequences=len(lengths)), bounds=bounds)


@needs_gpu
@both
def test_beta_zero_with_a_write_of_one_is_the_decay_scan(vector):
    from kernels.decay_scan_triton import decay_scan_triton
    from kernels.delta_scan_triton import delta_scan_triton

    (q, k, v, beta, _x, _gain, _offset, state), source = inputs(vector)
    found = delta_scan_triton(q, k, v, 0 * beta, source, False, state, True)
    wanted = decay_scan_triton(q, k, v, source, state, True)
    assert all(relative(a, b) <= OUTPUT[torch.bfloat16] for a, b in zip(found, wanted, strict=True))


@needs_gpu
@both
def test_lambda_one_is_the_plain_delta_rule(vector):
    from kernels.delta_scan_triton import delta_scan_triton

    (q, k, v, beta, _x, _gain, _offset, state), source = inputs(vector, "one")
    found, wanted = (delta_scan_triton(q, k, v, beta, decay, True, state, True) for decay in (source, None))
    assert all(relative(a, b) <= UNFORGOTTEN * OUTPUT[torch.bfloat16] for a, b in zip(found, wanted, strict=True))


@needs_gpu
@both
def test_a_state_can_be_handed_over_and_decoding_is_the_parallel_form(vector):
    from kernels.delta_scan_triton import delta_scan_triton

    (*tensors, _gain, _offset, state), _source = inputs(vector, shape=(2, 130, 3))
    whole, final = delta_scan_triton(*tensors, True, state, True)
    for t in (1, 63, 64, 100):
        first, middle = delta_scan_triton(*(x[:, :t] for x in tensors), True, state, True)
        second, end = delta_scan_triton(*(x[:, t:] for x in tensors), True, middle, True)
        assert relative(torch.cat([first, second], dim=1), whole) <= OUTPUT[torch.bfloat16]
        assert relative(end, final) <= OUTPUT[torch.bfloat16]
    outputs = []
    for t in range(130):
        o, state = delta_scan_triton(*(x[:, t : t + 1] for x in tensors), True, state, True)
        outputs.append(o)
    assert relative(torch.cat(outputs, dim=1), whole) <= OUTPUT[torch.bfloat16]
    assert relative(state, final) <= OUTPUT[torch.bfloat16]


@needs_gpu
@both
def test_exact_outputs_are_the_same_bits_whatever_follows(vector):
    from kernels.delta_scan_triton import delta_scan_triton

    (*tensors, _gain, _offset, state), _source = inputs(vector, "mixed", shape=(2, 200, 3))
    for t in (0, 20, 63, 130):
        later = [torch.cat([x[:, : t + 1], x[:, t + 1 :].flip(1)], dim=1) for x in tensors]
        before, after = (delta_scan_triton(*y, True, state, exact=True)[0] for y in (tensors, later))
        assert torch.equal(before[:, : t + 1], after[:, : t + 1]) and not torch.equal(before, after)


@needs_gpu
@both
def test_two_runs_give_equal_bits(vector):
    from kernels.delta_scan_triton import delta_scan_triton

    tensors, source = inputs(vector, "mixed", shape=(4, 1024, 8))
    runs = [outcome(delta_scan_triton, tensors, source) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@needs_gpu
@both
def test_operators_keep_torchs_rules_and_compile_into_one_graph(vector):
    from kernels import delta_scan_triton as module

    tensors, source = inputs(vector, "softplus", shape=(1, 70, 2))
    leaves = [x.detach().requires_grad_() for x in tensors]
    options = ("softplus", -1.0, 0.5, False, True, False, "")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._forward, (*leaves, None, *options, True, True), test_utils=tests)

    def loss(q, k, v, beta, x, gain, offset, state):
        decay = replace(source, x=x, gain=gain, offset=offset)
        o, end = module.delta_scan_triton(q, k, v, beta, decay, True, state, True)
        return o.float().square().sum() + end.square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    found, wanted = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    assert all(relative(a, b) <= 1e-2 for a, b in zip(found, wanted, strict=True))


@needs_gpu
@both
def test_recomputing_gives_the_same_bits(vector, monkeypatch):
    from kernels.delta_scan_triton import delta_scan_triton

    tensors, source = inputs(vector)
    saving = outcome(delta_scan_triton, tensors, source)
    monkeypatch.setenv("DECAY_KERNEL_POLICY", "recompute")
    again = outcome(delta_scan_triton, tensors, source)
    assert all(torch.equal(saving[name], again[name]) for name in saving)


@needs_gpu
@both
def test_the_kernels_are_chosen_where_they_are_asked_for_and_the_choice_is_explained(vector, monkeypatch):
    tensors, source = inputs(vector)
    said = kernel_seam.explain_delta_scan(tensors[0], tensors[2], source)
    assert said.startswith("delta scan: chunked") and "DECAY_KERNEL=triton" in said
    monkeypatch.setenv("DECAY_KERNEL", "triton")
    assert kernel_seam.explain_delta_scan(tensors[0], tensors[2], source) == "delta scan: triton (DECAY_KERNEL asks for it)"
