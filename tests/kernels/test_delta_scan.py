"""The delta scan is the product of explicit matrices, and the chunked one is the naive one: same numbers, same gradients,
for every decay from 0 to 1, every β from 0 to 2, both writes and every shape."""

from itertools import pairwise

import pytest
import torch

from decay_core import kernel_seam  # makes kernels/ importable
from kernels import delta_scan_chunked as chunked_file
from kernels.decay_scan_naive import decay_scan_naive
from kernels.decay_source import DecaySource
from kernels.delta_scan_chunked import CHUNK, delta_scan_chunked
from kernels.delta_scan_naive import delta_scan_naive
from kernels.select_kernel import select_delta_scan

LENGTHS = [0, 1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
KINDS = ["none", "scalar", "vector"]
DECAYS = ["fast", "zero", "one", "mixed", "denormal", "above one"]
SCANS = [delta_scan_naive, delta_scan_chunked]
# Relative to the largest entry. fp32: sums of up to 131 terms, on a triangular system of up to 64 equations.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
# With all keys alike the triangle's entries are all β: its condition number grows with β and the square of the chunk.
COLLINEAR_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
both_writes = pytest.mark.parametrize("beta_on_write", [True, False], ids=["beta", "plain"])


def log_decays(name, shape, generator):
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    mild = torch.nn.functional.logsigmoid(3 * torch.randn(shape, generator=generator, dtype=torch.float64))
    levels = torch.tensor([0.0, 1.0, 1e-45, 1e-8, 0.2, 0.999], dtype=torch.float64).log()
    return {
        "mild": mild,
        "fast": -60 * uniform,
        "zero": torch.full(shape, -torch.inf, dtype=torch.float64),
        "one": torch.zeros(shape, dtype=torch.float64),
        "mixed": levels[(6 * uniform).long()],
        "denormal": torch.full(shape, 1e-45, dtype=torch.float64).log(),
        "above one": torch.full(shape, 0.002, dtype=torch.float64),
    }[name]


def inputs(kind, decay="mild", batch=2, length=70, heads=2, k=4, v=5, dtype=torch.float64, seed=0):
    """q, k of norm 1, v, β in (0, 2), the decay's logarithm or None, an initial state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (batch, length, heads)
    gate = None if kind == "none" else log_decays(decay, (*tokens, k) if kind == "vector" else tokens, generator)
    keys = torch.nn.functional.normalize(normal(*tokens, k), dim=-1)
    values = normal(*tokens, v)
    tensors = [normal(*tokens, k), keys, values, 2 * normal(*tokens).sigmoid(), gate, normal(batch, heads, k, v)]
    return [x if x is None else x.to(dtype) for x in tensors]


def run(scan, tensors, beta_on_write=True, start=None):
    return scan(*tensors[:5], beta_on_write, start, output_final_state=True)


def leaves_of(tensors, dtype=torch.float64):
    return [x if x is None else x.to(dtype, copy=True).requires_grad_() for x in tensors]


def assert_close(found, wanted, dtype=torch.float64, tolerance=TOLERANCE):
    assert found.shape == wanted.shape and found.dtype == dtype and found.isfinite().all()
    if wanted.numel():
        scale = max(1.0, wanted.abs().max().item())
        assert (found.double() - wanted.double()).abs().max().item() <= tolerance[dtype] * scale


def assert_scans_agree(tensors, beta_on_write, dtype, tolerance=TOLERANCE):
    """Outputs, final state and all gradients of the chunked scan in `dtype` are the naive scan's in float64."""
    weight = torch.linspace(-1, 1, tensors[2].numel(), dtype=torch.float64).reshape(tensors[2].shape)
    results = []
    for scan, cast in ((delta_scan_naive, torch.float64), (delta_scan_chunked, dtype)):
        *leaves, start = leaves_of(tensors, cast)
        o, state = run(scan, leaves, beta_on_write, start)
        ((o * weight.to(cast)).sum() + state.sum()).backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (*leaves, start) if x is not None]
        results.append([o.detach(), state.detach(), *grads])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert_close(found, wanted, dtype, tolerance)


def dense_recurrence(q, k, v, beta, log_decay, start, beta_on_write):
    """Explicit K × K matrices, one after another, for one sequence and one head."""
    state, outputs, identity = start, [], torch.eye(q.shape[1], dtype=torch.float64)
    for t in range(q.shape[0]):
        decay = identity if log_decay is None else log_decay[t].exp() * identity
        erasure = identity - beta[t] * torch.outer(k[t], k[t])
        write = beta[t] if beta_on_write else 1.0
        state = erasure @ decay @ state + write * torch.outer(k[t], v[t])
        outputs.append(state.T @ q[t])
    return torch.stack(outputs), state


@both_writes
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", KINDS)
def test_scan_equals_the_product_of_explicit_matrices(kind, scan, beta_on_write):
    *tensors, start = inputs(kind, length=CHUNK + 6)
    o, state = run(scan, tensors, beta_on_write, start)
    for b in range(2):
        for h in range(2):
            one = [x if x is None else x[b, :, h] for x in tensors]
            wanted_o, wanted_state = dense_recurrence(*one, start[b, h], beta_on_write)
            assert_close(o[b, :, h], wanted_o)
            assert_close(state[b, h], wanted_state)


@pytest.mark.parametrize("scan", SCANS)
def test_beta_one_replaces_what_is_stored_under_a_key(scan):
    k = torch.eye(2)[[0, 1, 0]].reshape(1, 3, 1, 2)
    v = torch.tensor([5.0, 7.0, 11.0]).reshape(1, 3, 1, 1)
    _, state = scan(k, k, v, torch.ones(1, 3, 1), output_final_state=True)
    assert state.flatten().tolist() == [11.0, 7.0]


@both_writes
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_equals_naive_in_value_and_gradient(kind, length, dtype, beta_on_write):
    assert_scans_agree(inputs(kind, length=length), beta_on_write, dtype)


@both_writes
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_chunked_equals_naive_for_every_decay_from_zero_to_slightly_above_one(kind, decay, dtype, beta_on_write):
    assert_scans_agree(inputs(kind, decay, length=CHUNK + 9), beta_on_write, dtype)


@both_writes
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("beta", [1.9, 2.0])
@pytest.mark.parametrize("keys", ["one key", "one key and its opposite", "two keys", "nearly one key"])
@pytest.mark.parametrize("kind", KINDS)
def test_repeated_and_collinear_keys_are_solved(kind, keys, beta, dtype, beta_on_write):
    tensors = inputs(kind, "one", length=CHUNK + 9)
    q, k = tensors[0], tensors[1]
    sign = torch.tensor([1.0, -1.0]).repeat(k.shape[1])[: k.shape[1], None, None]
    first = k[:, :1].expand_as(k)
    tensors[1] = {
        "one key": first,
        "one key and its opposite": first * sign,
        "two keys": torch.where(sign > 0, first, k[:, 1:2]),
        "nearly one key": torch.nn.functional.normalize(first + 1e-3 * q, dim=-1),
    }[keys].contiguous()
    tensors[3] = torch.full_like(tensors[3], beta)
    assert_scans_agree(tensors, beta_on_write, dtype, COLLINEAR_TOLERANCE)


@both_writes
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_chunked_scan_equal_finite_differences(monkeypatch, kind, beta_on_write):
    monkeypatch.setattr(chunked_file, "CHUNK", 4)
    leaves = leaves_of(inputs(kind, batch=1, length=6, heads=1, k=2, v=3))

    def scan(*floats):
        *tensors, start = floats if kind != "none" else (*floats[:4], None, floats[4])
        return run(delta_scan_chunked, tensors, beta_on_write, start)

    assert torch.autograd.gradcheck(scan, [x for x in leaves if x is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_naive_scan_equal_finite_differences(kind):
    leaves = leaves_of(inputs(kind, batch=1, length=4, heads=1, k=2, v=3)[:5])
    floats = [x for x in leaves if x is not None]
    assert torch.autograd.gradcheck(lambda *x: delta_scan_naive(*x, output_final_state=True), floats)


@both_writes
@pytest.mark.parametrize("t", [0, 1, 20, CHUNK, CHUNK + 5])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_lambda_zero_is_exact(kind, t, beta_on_write):
    *tensors, start = inputs(kind)
    tensors[4][:, t] = -torch.inf
    huge = list(tensors)
    huge[2] = tensors[2].clone()
    huge[2][:, :t] = 1e100  # nothing of it may pass token t
    clean_o, clean_state = run(delta_scan_chunked, tensors, beta_on_write, start)
    o, state = run(delta_scan_chunked, huge, beta_on_write, 1e100 * start)
    assert torch.equal(o[:, t:], clean_o[:, t:]) and torch.equal(state, clean_state)
    q, k, v, beta, _ = (x[:, t] for x in tensors)
    write = beta[..., None] if beta_on_write else 1.0
    assert_close(o[:, t], (q * k).sum(-1, keepdim=True) * write * v)


@pytest.mark.parametrize("scan", SCANS)
def test_lambda_one_is_no_decay(scan):
    none = inputs("none")
    scalar, vector = ([*none[:4], inputs(kind, "one")[4]] for kind in ("scalar", "vector"))
    wanted = run(scan, none)
    assert all(torch.equal(a, b) for a, b in zip(run(scan, scalar), wanted, strict=True))
    for found, w in zip(run(scan, vector), wanted, strict=True):
        assert_close(found, w)


@pytest.mark.parametrize("scan", SCANS)
def test_one_lambda_per_head_is_the_same_lambda_in_every_channel(scan):
    scalar = inputs("scalar")
    vector = [*scalar[:4], scalar[4][..., None].expand(-1, -1, -1, 4)]
    for found, wanted in zip(run(scan, vector), run(scan, scalar), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", KINDS)
def test_beta_zero_with_the_plain_write_is_the_decay_scan(kind, scan):
    q, k, v, beta, log_decay, start = inputs(kind)
    o, state = scan(q, k, v, 0 * beta, log_decay, False, start, output_final_state=True)
    decay = torch.zeros_like(beta) if log_decay is None else log_decay
    wanted_o, wanted_state = decay_scan_naive(q, k, v, decay, start, output_final_state=True)
    assert_close(o, wanted_o)
    assert_close(state, wanted_state)


@both_writes
@pytest.mark.parametrize("t", [0, 1, 17, CHUNK, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_state_can_be_handed_over_at_any_token(kind, t, beta_on_write):
    *tensors, start = inputs(kind)
    early, late = ([x if x is None else x[:, part] for x in tensors] for part in (slice(t), slice(t, None)))
    whole, final = run(delta_scan_chunked, tensors, beta_on_write, start)
    first, middle = run(delta_scan_chunked, early, beta_on_write, start)
    second, end = run(delta_scan_chunked, late, beta_on_write, middle)
    assert_close(torch.cat([first, second], dim=1), whole)
    assert_close(end, final)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("t", [0, 1, 31, CHUNK - 1, CHUNK, CHUNK + 20])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_up_to_t_are_the_same_bits_whatever_follows(kind, t, dtype):
    *tensors, start = inputs(kind, "mixed", length=CHUNK + 30, k=16, v=16, dtype=dtype)
    *others, _ = inputs(kind, "mild", length=CHUNK + 30, k=16, v=16, dtype=dtype, seed=1)
    pairs = zip(tensors, others, strict=True)
    changed = [x if x is None else torch.cat([x[:, : t + 1], y[:, t + 1 :]], dim=1) for x, y in pairs]
    before, after = (run(delta_scan_chunked, x, start=start)[0] for x in (tensors, changed))
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_shifting_the_chunk_boundaries_changes_nothing(kind):
    *tensors, _ = inputs(kind)
    shifted = [x if x is None else torch.cat([torch.zeros_like(x[:, :13]), x], dim=1) for x in tensors]
    assert_close(run(delta_scan_chunked, shifted)[0][:, 13:], run(delta_scan_chunked, tensors)[0])


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("length", [0, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_gives_empty_results_and_gradients(kind, length, scan):
    *leaves, start = leaves_of(inputs(kind, batch=0, length=length))
    o, state = run(scan, leaves, True, start)
    assert o.shape == (0, length, 2, 5) and state.shape == (0, 2, 4, 5)
    (o.sum() + state.sum()).backward()


@both_writes
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", KINDS)
def test_scale_multiplies_outputs_and_not_the_state(kind, scan, beta_on_write):
    *tensors, start = inputs(kind)
    o, state = run(scan, tensors, beta_on_write, start)
    scaled, same = scan(*tensors, beta_on_write, start, True, 0.25)
    assert torch.equal(scaled, 0.25 * o) and torch.equal(same, state)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_those_by_themselves(kind, scan):
    *tensors, _ = inputs(kind, batch=1, length=90)
    lengths = [1, 0, 70, 19]
    starts = torch.randn(4, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    o, states = scan(*tensors, True, starts, True, cu_seqlens=bounds)
    for n, (a, b) in enumerate(pairwise(bounds.tolist())):
        part = [x if x is None else x[:, a:b] for x in tensors]
        wanted, state = run(scan, part, True, starts[n : n + 1])
        assert torch.equal(o[:, a:b], wanted) and torch.equal(states[n : n + 1], state)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_a_decay_may_be_given_as_what_makes_it(kind, scan):
    *tensors, start = inputs(kind)
    source = DecaySource(x=tensors[4], kind="softplus", slope=-0.5)
    wanted = run(scan, [*tensors[:4], source.log_decay()], start=start)
    assert all(torch.equal(a, b) for a, b in zip(run(scan, [*tensors[:4], source], start=start), wanted, strict=True))


@pytest.mark.parametrize("scan", SCANS)
def test_keys_are_normalized_where_that_is_asked_for(scan):
    *tensors, _ = inputs("scalar")
    tensors[1] = 4 * tensors[1]
    tensors[1][:, 3] = 0
    by_hand = [tensors[0], tensors[1] / (tensors[1].square().sum(-1, keepdim=True) + 1e-5).sqrt(), *tensors[2:]]
    assert torch.equal(scan(*tensors, normalize_key=True)[0], scan(*by_hand)[0])


REFUSED = {
    "a β per channel": ({"beta": torch.ones(1, 6, 2, 4)}, r"beta of shape \(1, 6, 2, 4\) is not \(1, 6, 2\); give one number"),
    "a β of the heads alone": ({"beta": torch.ones(2)}, r"beta of shape \(2,\) is not \(1, 6, 2\)"),
    "a whole β": ({"beta": torch.ones(1, 6, 2, dtype=torch.int64)}, "beta of shape .* is torch.int64; cast it"),
    "k of one head": ({"k": torch.ones(1, 6, 1, 4)}, r"k of shape \(1, 6, 1, 4\) differs from q's"),
    "a decay per pair": ({"decay": torch.ones(1, 6, 2, 2)}, "decay of shape .* is neither"),
    "a state of another width": ({"initial_state_bhkv": torch.ones(1, 2, 8, 4)}, "initial_state of shape .* is not"),
    "no scale": ({"scale": 0.0}, "scale is 0.0: it must be a positive finite number"),
    "float boundaries": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens of shape .* is torch.float32"),
}


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("change", REFUSED)
def test_a_call_that_does_not_fit_is_refused_in_one_line(change, scan):
    changed, message = REFUSED[change]
    arguments = {"q": torch.ones(1, 6, 2, 4), "k": torch.ones(1, 6, 2, 4), "v": torch.ones(1, 6, 2, 8)}
    arguments |= {"beta": torch.ones(1, 6, 2), "decay": -torch.ones(1, 6, 2), **changed}
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "beta", "decay")]
    with pytest.raises(ValueError, match=message) as refusal:
        scan(*tensors, **arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("scan", SCANS)
def test_final_state_is_given_only_when_asked_for(scan):
    assert all(scan(*inputs("none", length=length)[:4])[1] is None for length in (0, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_of_the_inputs_does_not_matter(kind):
    *tensors, _ = inputs(kind)
    strange = [x if x is None else x.repeat_interleave(2, dim=1)[:, ::2] for x in tensors]
    assert not any(x.is_contiguous() for x in strange if x is not None)
    assert torch.equal(run(delta_scan_chunked, strange)[0], run(delta_scan_chunked, tensors)[0])


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_inputs_are_computed_in_fp32(kind, scan):
    *tensors, _ = inputs(kind, dtype=torch.float32)
    tensors[:4] = [x.bfloat16() for x in tensors[:4]]
    o, state = run(scan, tensors)
    assert o.dtype == state.dtype == torch.float32
    assert torch.equal(o, run(scan, [x if x is None else x.float() for x in tensors])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_same_inputs_give_the_same_bits(kind):
    results = []
    for _ in range(2):
        leaves = leaves_of(inputs(kind, dtype=torch.float32)[:5], torch.float32)
        o, _ = run(delta_scan_chunked, leaves)
        results.append([o, *torch.autograd.grad(o.square().sum(), [x for x in leaves if x is not None])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both_writes
@pytest.mark.parametrize("kind", KINDS)
def test_seam_ignores_autocast_and_passes_everything_on(kind, beta_on_write):
    *tensors, start = inputs(kind, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(kernel_seam.delta_scan, tensors, beta_on_write, start)
    wanted = run(delta_scan_chunked, tensors, beta_on_write, start)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_environment_variable_chooses_the_scan_and_a_wrong_one_is_refused(monkeypatch):
    q, k, v, beta, log_decay, _ = inputs("vector")
    assert select_delta_scan(q, v, log_decay).name == "chunked"
    assert "delta scan: chunked" in kernel_seam.explain_delta_scan(q, v, log_decay)
    assert "vector decay, K=4, V=5" in kernel_seam.explain_delta_scan(q, v, log_decay)
    assert "no decay, K=4, V=5" in kernel_seam.explain_delta_scan(q, v)
    monkeypatch.setenv("DECAY_KERNEL", "naive")
    assert select_delta_scan(q, v, log_decay).scan is delta_scan_naive
    monkeypatch.setenv("DECAY_KERNEL", "magic")
    with pytest.raises(ValueError, match="DECAY_KERNEL=magic: unknown delta scan; set it to one of naive, chunked"):
        kernel_seam.delta_scan(q, k, v, beta, log_decay)
