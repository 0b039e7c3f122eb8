"""The Triton kernels of general DPLR on a GPU against the definition in float64: outputs and gradients, by dtype, shape, decay
and likeness of tokens; and what holds between calls: packed sequences, handed-over states, equal bits, torch's rules."""

from dataclasses import replace

import pytest
import torch
from gpu_cases import needs_gpu, normal, relative
from torch.nn.functional import logsigmoid, normalize

from decay_core import kernel_seam
from kernels.decay_source import DecaySource
from kernels.dplr_scan_chunked import dplr_scan_chunked

pytestmark = pytest.mark.gpu

# Relative norms. 16-bit inputs are given as they are to both: what is measured is the kernels' own rounding.
OUTPUT = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 2e-5}
GATE_GRADIENT = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 1e-4}
GATES = ["none", "mild", "fast", "mixed", "one", "zero"]
LEVELS = [0.0, 1.0, 1e-45, 2.0**-150, 1e-8, 0.2, 0.999]
# λ = 1: what 333 tokens leave behind is never forgotten, and neither is its rounding.
UNFORGOTTEN = 1.5
# What is read where tokens are alike is large and cancels in every output; rounding it to 16 bits is what is seen.
ALIKE = {1.0: 0.06, 1.9: 0.2}
NAMES = ("dq", "dk", "dv", "da", "db", "dx", "dgain", "doffset", "dstate")


def decays(gate, shape):
    noise = normal(*shape, seed=1)
    levels = torch.tensor(LEVELS, dtype=torch.float64, device="cuda").log().float()
    some = normal(*shape[2:], seed=2).sigmoid()
    return {
        "none": None,
        "mild": DecaySource(x=logsigmoid(noise + 3)),
        "fast": DecaySource(x=logsigmoid(2 * noise - 1)),
        "mixed": DecaySource(x=levels[(noise.abs() * 1000).long() % len(LEVELS)]),
        "one": DecaySource(x=torch.zeros(shape, device="cuda")),
        "zero": DecaySource(x=torch.full(shape, -torch.inf, device="cuda")),
        "softplus": DecaySource(x=noise, kind="softplus", slope=-1.0, gain=some, offset=some - 3),
        "floor": DecaySource(x=noise, kind="floor", offset=0.9 * some),
    }[gate]


def inputs(gate="mild", dtype=torch.bfloat16, shape=(2, 333, 3), k=64, v=64, ab="free", beta=1.0, sequences=None):
    """[q, k, v, a, b, x, gain, offset, state] and the source."""
    tokens = torch.arange(shape[1], device="cuda")
    source = decays(gate, (*shape, k))
    key, a, b = (normalize(normal(*shape, k, seed=seed), dim=-1) for seed in (3, 4, 5))
    if ab in ("one", "two"):
        key = key[:, tokens % (1 if ab == "one" else 2)].contiguous()
        a, b = -beta * key, key
    elif ab == "delta":
        a, b = -beta * key, key if source is None else key * source.log_decay().exp()
    elif ab == "wide":  # b·a between tokens does not fit fp16, though nothing grows: who writes does not read
        odd = (tokens % 2 > 0)[:, None, None]
        a, b = 500 * a * odd, 500 * b * ~odd
    parts = [None] * 3 if source is None else [source.x, source.gain, source.offset]
    state = normal(shape[0] if sequences is None else sequences, shape[2], k, v, seed=6)
    tensors = [y.to(dtype) for y in (normal(*shape, k, seed=7), key, normal(*shape, v, seed=8), a, b)]
    return [*tensors, *parts, state], source


def outcome(scan, tensors, source, dtype=None, **options):
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    *given, x, gain, offset, state = leaves
    decay = None if source is None else replace(source, x=x, gain=gain, offset=offset)
    o, final = scan(*given, decay, state, True, 0.5, **options)
    wanted = [normal(*o.shape, seed=9).to(tensors[2].dtype).to(o.dtype), normal(*final.shape, seed=10).to(final.dtype)]
    named = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    grads = torch.autograd.grad([o, final], list(named.values()), wanted, allow_unused=True)
    found = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
    return {"o": o.detach(), "state": final.detach(), **found}


def compare(given, slack=1.0, limit=None, **options):
    from kernels.dplr_scan_triton import dplr_scan_triton

    tensors, source = given
    found = outcome(dplr_scan_triton, tensors, source, **options)
    wanted = outcome(dplr_scan_chunked, tensors, source, torch.float64, **options)
    assert set(found) == set(wanted)
    if source is not None and source.kind == "log":  # where λ is 0 in fp32 nothing is asked of its gradient
        alive = source.x > -100
        found["dx"], wanted["dx"] = found["dx"][alive], wanted["dx"][alive]
    errors = {name: relative(found[name], wanted[name]) for name in wanted}
    for name, error in errors.items():
        allowed = (GATE_GRADIENT if name in ("dx", "dgain", "doffset") else OUTPUT)[tensors[0].dtype]
        assert error <= (slack * allowed if limit is None else limit), errors
    return errors


def unforgotten(gate):
    return UNFORGOTTEN if gate in ("one", "none") else 1.0


@needs_gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", OUTPUT)
def test_outputs_and_gradients_equal_the_definition(dtype, gate):
    # Without a decay a and b must erase, or the state grows and grows.
    given = inputs(gate, dtype, ab="delta" if gate in ("one", "none", "mixed") else "free", beta=1.2)
    print(dtype, gate, compare(given, unforgotten(gate)))


@needs_gpu
@pytest.mark.parametrize("gate", ["softplus", "floor"])
def test_a_decay_given_as_what_makes_it(gate):
    compare(inputs(gate))


@needs_gpu
@pytest.mark.parametrize("beta", [1.0, 1.9])
@pytest.mark.parametrize("ab", ["one", "two"])
def test_like_tokens_stay_finite_and_as_right_as_16_bits_allow(ab, beta):
    print(ab, beta, compare(inputs("one", ab=ab, beta=beta), limit=ALIKE[beta]))
    compare(inputs("mild", ab=ab, beta=beta), limit=ALIKE[beta])
    compare(inputs("one", torch.float32, ab=ab, beta=beta), limit=1e-3)


@needs_gpu
@pytest.mark.parametrize("dtype", OUTPUT)
def test_a_and_b_whose_products_do_not_fit_16_bits(dtype):
    compare(inputs(dtype=dtype, ab="wide"))


@needs_gpu
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 15, 1), (1, 64, 12), (3, 65, 33), (1, 2000, 2)])
def test_any_length_and_head_count(shape):
    compare(inputs(shape=shape), 2.0 if shape[1] == 1 else 1.0)


@needs_gpu
@pytest.mark.parametrize("gate", ["mild", "mixed"])
@pytest.mark.parametrize(
    "k, v", [(32, 32), (128, 64), (64, 128), (128, 128), (256, 64), (64, 256), (256, 256), (40, 24)], ids=str
)
def test_widths_of_keys_and_values(k, v, gate):
    compare(inputs(gate, k=k, v=v, shape=(2, 140, 3), ab="delta"))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wide_heads_of_other_dtypes(dtype):
    compare(inputs("mixed", dtype, k=128, v=128, shape=(1, 140, 2), ab="delta"))


@needs_gpu
def test_packed_sequences_are_those_by_themselves():
    lengths = [1, 0, 130, 64, 0, 70]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    shape = (1, sum(lengths), 3)
    for gate in ("mild", "mixed"):
        compare(inputs(gate, shape=shape, sequences=len(lengths), ab="delta"), cu_seqlens=bounds)


@needs_gpu
def test_without_a_it_is_the_decay_scan():
    from kernels.decay_scan_triton import decay_scan_triton
    from kernels.dplr_scan_triton import dplr_scan_triton

    (q, k, v, a, b, _x, _gain, _offset, state), source = inputs()
    found = dplr_scan_triton(q, k, v, 0 * a, b, source, state, True)
    wanted = decay_scan_triton(q, k, v, source, state, True)
    assert all(relative(x, y) <= OUTPUT[torch.bfloat16] for x, y in zip(found, wanted, strict=True))


@needs_gpu
def test_the_delta_rule_is_a_case_of_it():
    from kernels.delta_scan_triton import delta_scan_triton
    from kernels.dplr_scan_triton import dplr_scan_triton

    (q, k, v, a, b, _x, _gain, _offset, state), source = inputs(dtype=torch.float32, ab="delta", beta=1.5)
    beta = torch.full(q.shape[:3], 1.5, device="cuda")
    found = dplr_scan_triton(q, k, v, a, b, source, state, True)
    wanted = delta_scan_triton(q, k, v, beta, source, False, state, True)
    assert all(relative(x, y) <= 1e-4 for x, y in zip(found, wanted, strict=True))


@needs_gpu
def test_a_state_can_be_handed_over():
    from kernels.dplr_scan_triton import dplr_scan_triton

    (*tensors, _gain, _offset, state), _source = inputs(shape=(2, 130, 3))
    whole, final = dplr_scan_triton(*tensors, state, True)
    for t in (1, 63, 64, 100):
        first, middle = dplr_scan_triton(*(x[:, :t] for x in tensors), state, True)
        second, end = dplr_scan_triton(*(x[:, t:] for x in tensors), middle, True)
        assert relative(torch.cat([first, second], dim=1), whole) <= OUTPUT[torch.bfloat16]
        assert relative(end, final) <= OUTPUT[torch.bfloat16]


@needs_gpu
def test_exact_outputs_are_the_same_bits_whatever_follows():
    from kernels.dplr_scan_triton import dplr_scan_triton

    (*tensors, _gain, _offset, state), _source = inputs("mixed", shape=(2, 200, 3), ab="delta")
    for t in (0, 20, 63, 130):
        later = [torch.cat([x[:, : t + 1], x[:, t + 1 :].flip(1)], dim=1) for x in tensors]
        before, after = (dplr_scan_triton(*y, state, exact=True)[0] for y in (tensors, later))
        assert torch.equal(before[:, : t + 1], after[:, : t + 1]) and not torch.equal(before, after)


@needs_gpu
@pytest.mark.parametrize("gate", ["mild", "mixed"])
def test_two_runs_give_equal_bits(gate):
    from kernels.dplr_scan_triton import dplr_scan_triton

    tensors, source = inputs(gate, shape=(4, 1024, 8), ab="delta")
    runs = [outcome(dplr_scan_triton, tensors, source) for _ in range(4)]  # the later ones from a list
    assert all(torch.equal(runs[0][name], run[name]) for run in runs[1:] for name in run)


@needs_gpu
@pytest.mark.parametrize("gate", ["none", "softplus"])
def test_operators_keep_torchs_rules_and_compile_into_one_graph(gate):
    from kernels import dplr_scan_triton as module

    tensors, source = inputs(gate, shape=(1, 70, 2), ab="delta")
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    kind = ("log", 1.0) if source is None else ("softplus", -1.0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._forward, (*leaves, None, *kind, 0.5, False, "", True, True), test_utils=tests)

    def loss(q, k, v, a, b, x, gain, offset, state):
        decay = None if source is None else replace(source, x=x, gain=gain, offset=offset)
        o, end = module.dplr_scan_triton(q, k, v, a, b, decay, state, True)
        return o.float().square().sum() + end.square().sum()

    compiled, wanted_of = torch.compile(loss, fullgraph=True), [x for x in leaves if x is not None]
    found, wanted = (torch.autograd.grad(f(*leaves), wanted_of) for f in (compiled, loss))
    assert all(relative(a, b) <= 1e-2 for a, b in zip(found, wanted, strict=True))


@needs_gpu
def test_recomputing_gives_the_same_bits(monkeypatch):
    from kernels.dplr_scan_triton import dplr_scan_triton

    tensors, source = inputs("mixed", ab="delta")
    saving = outcome(dplr_scan_triton, tensors, source)
    monkeypatch.setenv("DECAY_KERNEL_POLICY", "recompute")
    again = outcome(dplr_scan_triton, tensors, source)
    assert all(torch.equal(saving[name], again[name]) for name in saving)


@needs_gpu
def test_the_kernels_are_chosen_where_they_are_asked_for_and_the_choice_is_explained(monkeypatch):
    tensors, source = inputs()
    said = kernel_seam.explain_dplr_scan(tensors[0], tensors[2], source)
    assert said.startswith("DPLR scan: chunked") and "DECAY_KERNEL=triton" in said
    monkeypatch.setenv("DECAY_KERNEL", "triton")
    assert kernel_seam.explain_dplr_scan(tensors[0], tensors[2], source) == "DPLR scan: triton (DECAY_KERNEL asks for it)"
