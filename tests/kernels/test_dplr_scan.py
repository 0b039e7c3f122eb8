"""The general DPLR scan is the product of explicit matrices, the chunked one is the naive one, and the delta rule is a case of
it: same numbers, same gradients, for every decay from 0 to 1 and every shape."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import normalize

from decay_core import kernel_seam
from kernels import dplr_scan_chunked as chunked_file
from kernels.decay_scan_naive import decay_scan_naive
from kernels.decay_source import DecaySource
from kernels.delta_scan_chunked import CHUNK
from kernels.delta_scan_naive import delta_scan_naive
from kernels.dplr_scan_chunked import dplr_scan_chunked
from kernels.dplr_scan_naive import dplr_scan_naive
from kernels.select_kernel import select_dplr_scan

LENGTHS = [0, 1, 2, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
DECAYS = ["none", "mild", "fast", "zero", "one", "mixed", "denormal"]
SCANS = [dplr_scan_naive, dplr_scan_chunked]
# Relative to the largest entry. fp32: sums of up to 131 terms, on a triangular system of up to 64 equations.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}


def inputs(decay="mild", batch=2, length=70, heads=2, k=4, v=5, dtype=torch.float64, seed=0):
    """q, k, v, a, b, the decay's logarithm or None, an initial state; |a| |b| < 1, so that nothing grows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    keys = (batch, length, heads, k)
    levels = torch.tensor([0.0, 1.0, 1e-45, 1e-8, 0.2, 0.999], dtype=torch.float64).log()
    noise = normal(*keys)
    log_decay = {
        "none": None,
        "mild": torch.nn.functional.logsigmoid(3 * noise),
        "fast": -40 * noise.abs(),
        "zero": torch.full(keys, -torch.inf, dtype=torch.float64),
        "one": torch.zeros(keys, dtype=torch.float64),
        "mixed": levels[(noise.abs() * 1000).long() % 6],
        "denormal": torch.full(keys, 1e-45, dtype=torch.float64).log(),
    }[decay]
    # With λ = 1 an erasure must lie along what is read, or states grow from token to token.
    b = normalize(normal(*keys), dim=-1)
    a = -1.2 * b if decay in ("none", "one", "mixed") else 0.5 * normalize(normal(*keys), dim=-1)
    tensors = [normal(*keys), normal(*keys), normal(*keys[:3], v), a, b, log_decay, normal(batch, heads, k, v)]
    return [x if x is None else x.to(dtype) for x in tensors]


def run(scan, tensors, start=None):
    return scan(*tensors[:6], start, output_final_state=True)


def leaves_of(tensors, dtype=torch.float64):
    return [x if x is None else x.to(dtype, copy=True).requires_grad_() for x in tensors]


def assert_close(found, wanted, dtype=torch.float64):
    assert found.shape == wanted.shape and found.dtype == dtype and found.isfinite().all()
    if wanted.numel():
        scale = max(1.0, wanted.abs().max().item())
        assert (found.double() - wanted.double()).abs().max().item() <= TOLERANCE[dtype] * scale


def assert_scans_agree(tensors, dtype):
    """Outputs, final state and all gradients of the chunked scan in `dtype` are the naive scan's in float64."""
    weight = torch.linspace(-1, 1, tensors[2].numel(), dtype=torch.float64).reshape(tensors[2].shape)
    results = []
    for scan, cast in ((dplr_scan_naive, torch.float64), (dplr_scan_chunked, dtype)):
        *leaves, start = leaves_of(tensors, cast)
        o, state = run(scan, leaves, start)
        ((o * weight.to(cast)).sum() + state.sum()).backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (*leaves, start) if x is not None]
        results.append([o.detach(), state.detach(), *(grad.nan_to_num() for grad in grads)])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert_close(found, wanted, dtype)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("decay", ["none", "mild"])
def test_scan_equals_the_product_of_explicit_matrices(decay, scan):
    *tensors, start = inputs(decay, length=CHUNK + 6)
    o, state = run(scan, tensors, start)
    for n in range(2):
        for h in range(2):
            q, k, v, a, b, log_decay = (x if x is None else x[n, :, h] for x in tensors)
            expected = start[n, h]
            for t in range(q.shape[0]):
                diagonal = torch.ones(4, dtype=torch.float64) if log_decay is None else log_decay[t].exp()
                expected = (diagonal.diag() + torch.outer(a[t], b[t])) @ expected + torch.outer(k[t], v[t])
                assert_close(o[n, t, h], expected.T @ q[t])
            assert_close(state[n, h], expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_naive_in_value_and_gradient(length, dtype):
    assert_scans_agree(inputs(length=length), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_chunked_equals_naive_for_every_decay_from_zero_to_one(decay, dtype):
    assert_scans_agree(inputs(decay, length=CHUNK + 9), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("beta", [1.0, 1.9])
def test_tokens_that_are_alike_are_solved(beta, dtype):
    tensors = inputs("one", length=CHUNK + 9)
    tensors[4] = tensors[4][:, :1].expand_as(tensors[4]).contiguous()
    tensors[3] = -beta * tensors[4]
    assert_scans_agree(tensors, dtype)


def test_gradients_of_the_chunked_scan_equal_finite_differences(monkeypatch):
    monkeypatch.setattr(chunked_file, "CHUNK", 4)
    leaves = leaves_of(inputs(batch=1, length=6, heads=1, k=2, v=3))
    assert torch.autograd.gradcheck(lambda *x: run(dplr_scan_chunked, x[:6], x[6]), leaves)


def test_gradients_of_the_naive_scan_equal_finite_differences():
    leaves = leaves_of(inputs(batch=1, length=4, heads=1, k=2, v=3))
    assert torch.autograd.gradcheck(lambda *x: run(dplr_scan_naive, x[:6], x[6]), leaves)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("beta_on_write", [True, False], ids=["beta", "plain"])
def test_the_delta_rule_is_the_case_of_a_that_erases_what_b_reads(scan, beta_on_write):
    q, k, v, *_, log_decay, start = inputs()
    k = normalize(k, dim=-1)
    beta = 2 * torch.rand(q.shape[:3], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    o, state = scan(
        q, k, beta[..., None] * v if beta_on_write else v, -beta[..., None] * k, log_decay.exp() * k, log_decay, start, True
    )
    wanted, end = delta_scan_naive(q, k, v, beta, log_decay, beta_on_write, start, True)
    assert_close(o, wanted)
    assert_close(state, end)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("zero", [3, 4], ids=["a", "b"])
def test_without_a_or_b_it_is_the_decay_scan(zero, scan):
    *tensors, start = inputs()
    tensors[zero] = 0 * tensors[zero]
    wanted = decay_scan_naive(*tensors[:3], tensors[5], start, output_final_state=True)
    for found, w in zip(run(scan, tensors, start), wanted, strict=True):
        assert_close(found, w)


@pytest.mark.parametrize("t", [0, 1, 20, CHUNK, CHUNK + 5])
def test_lambda_zero_is_exact(t):
    *tensors, start = inputs()
    tensors[5][:, t] = -torch.inf
    tensors[4][:, t] = 0  # what b reads comes from before
    huge = list(tensors)
    huge[2] = tensors[2].clone()
    huge[2][:, :t] = 1e100  # nothing of it may pass token t
    clean_o, clean_state = run(dplr_scan_chunked, tensors, start)
    o, state = run(dplr_scan_chunked, huge, 1e100 * start)
    assert torch.equal(o[:, t:], clean_o[:, t:]) and torch.equal(state, clean_state)


@pytest.mark.parametrize("scan", SCANS)
def test_lambda_one_is_no_decay(scan):
    *tensors, start = inputs("none")
    ones = [*tensors[:5], torch.zeros_like(tensors[0])]
    assert all(torch.equal(a, b) for a, b in zip(run(scan, ones, start), run(scan, tensors, start), strict=True))


@pytest.mark.parametrize("t", [0, 1, 17, CHUNK, 70])
def test_state_can_be_handed_over_at_any_token(t):
    *tensors, start = inputs()
    whole, final = run(dplr_scan_chunked, tensors, start)
    first, middle = run(dplr_scan_chunked, [x[:, :t] for x in tensors], start)
    second, end = run(dplr_scan_chunked, [x[:, t:] for x in tensors], middle)
    assert_close(torch.cat([first, second], dim=1), whole)
    assert_close(end, final)


@pytest.mark.parametrize("t", [0, 31, CHUNK - 1, CHUNK, CHUNK + 20])
def test_outputs_up_to_t_are_the_same_bits_whatever_follows(t):
    tensors, others = (inputs("mixed", length=CHUNK + 30, k=16, v=16, dtype=torch.float32, seed=seed) for seed in (0, 1))
    changed = [torch.cat([x[:, : t + 1], y[:, t + 1 :]], dim=1) for x, y in zip(tensors[:6], others[:6], strict=True)]
    before, after = (run(dplr_scan_chunked, x)[0] for x in (tensors, changed))
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("length", [0, 40])
def test_empty_batch_gives_empty_results_and_gradients(length, scan):
    *leaves, start = leaves_of(inputs(batch=0, length=length))
    o, state = run(scan, leaves, start)
    assert o.shape == (0, length, 2, 5) and state.shape == (0, 2, 4, 5)
    (o.sum() + state.sum()).backward()
    assert all(x.grad is not None for x in leaves)


@pytest.mark.parametrize("scan", SCANS)
def test_scale_multiplies_outputs_and_not_the_state(scan):
    *tensors, start = inputs()
    o, state = run(scan, tensors, start)
    scaled, same = scan(*tensors, start, True, 0.25)
    assert torch.equal(scaled, 0.25 * o) and torch.equal(same, state)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("decay", ["none", "mild"])
def test_packed_sequences_are_those_by_themselves(decay, scan):
    *tensors, _ = inputs(decay, batch=1, length=90)
    lengths = [1, 0, 70, 19]
    starts = torch.randn(4, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    o, states = scan(*tensors, starts, True, cu_seqlens=bounds)
    for n, (first, end) in enumerate(pairwise(bounds.tolist())):
        part = [x if x is None else x[:, first:end] for x in tensors]
        wanted, state = run(scan, part, starts[n : n + 1])
        assert torch.equal(o[:, first:end], wanted) and torch.equal(states[n : n + 1], state)


@pytest.mark.parametrize("scan", SCANS)
def test_a_decay_may_be_given_as_what_makes_it(scan):
    *tensors, start = inputs()
    source = DecaySource(x=tensors[5], kind="softplus", slope=-0.5)
    wanted = run(scan, [*tensors[:5], source.log_decay()], start)
    assert all(torch.equal(a, b) for a, b in zip(run(scan, [*tensors[:5], source], start), wanted, strict=True))


REFUSED = {
    "an a of one head": ({"a": torch.ones(1, 6, 1, 4)}, r"a of shape \(1, 6, 1, 4\) differs from q's"),
    "a b as wide as v": ({"b": torch.ones(1, 6, 2, 8)}, r"b of shape \(1, 6, 2, 8\) differs from q's"),
    "a whole a": ({"a": torch.ones(1, 6, 2, 4, dtype=torch.int64)}, "a of shape .* is torch.int64; cast it"),
    "a wide b": ({"b": torch.ones(1, 6, 2, 4).double()}, "b of shape .* is float64 and would be computed with in"),
    "one λ per head": (
        {"decay": -torch.ones(1, 6, 2)},
        r"decay of shape \(1, 6, 2\) is not \(1, 6, 2, 4\), one λ per key channel",
    ),
    "a decay per pair": ({"decay": torch.ones(1, 6, 2, 2)}, "decay of shape .* is neither"),
    "a state of another width": ({"initial_state_bhkv": torch.ones(1, 2, 8, 4)}, "initial_state of shape .* is not"),
    "no scale": ({"scale": 0.0}, "scale is 0.0: it must be a positive finite number"),
    "float boundaries": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens of shape .* is torch.float32"),
}


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("change", REFUSED)
def test_a_call_that_does_not_fit_is_refused_in_one_line(change, scan):
    changed, message = REFUSED[change]
    arguments = {name: torch.ones(1, 6, 2, 8 if name == "v" else 4) for name in "qkvab"}
    arguments |= {"decay": -torch.ones(1, 6, 2, 4), **changed}
    tensors = [arguments.pop(name) for name in (*"qkvab", "decay")]
    with pytest.raises(ValueError, match=message) as refusal:
        scan(*tensors, **arguments)
    assert "\n" not in str(refusal.value)


def test_the_seam_chooses_and_says_why(monkeypatch):
    *tensors, start = inputs(dtype=torch.float32)
    q, v, decay = tensors[0], tensors[2], tensors[5]
    line = kernel_seam.explain_dplr_scan(q, v, decay)
    assert line == f"DPLR scan: chunked (plain torch in chunks of {CHUNK} serves vector decay, K=4, V=5, torch.float32 on cpu)"
    for found, wanted in zip(kernel_seam.dplr_scan(*tensors, start, True), run(dplr_scan_chunked, tensors, start), strict=True):
        assert torch.equal(found, wanted)
    monkeypatch.setenv("DECAY_KERNEL", "naive")
    assert select_dplr_scan(q, v, decay).scan is dplr_scan_naive
