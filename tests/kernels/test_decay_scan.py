"""The chunked scan is the naive scan: same numbers, same gradients, for every decay from 0 to 1 and every shape."""

import pytest
import torch

from decay_core import kernel_seam  # makes kernels/ importable
from kernels.decay_scan_chunked import CHUNK, decay_scan_chunked
from kernels.decay_scan_naive import decay_scan_naive
from kernels.decay_source import DecaySource
from kernels.select_kernel import select_decay_scan

LENGTHS = [0, 1, 2, 15, 16, 17, CHUNK, CHUNK + 1, 63, 64, 65, 127]
KINDS = ["vector", "scalar"]
SCANS = [decay_scan_naive, decay_scan_chunked]
DECAYS = ["mild", "fast", "zero", "one", "mixed", "denormal", "above one"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}  # relative to the largest entry; fp32 sums of up to 127 terms


def log_decays(name, shape, generator):
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    mild = torch.nn.functional.logsigmoid(3 * torch.randn(shape, generator=generator, dtype=torch.float64))
    levels = torch.tensor([0.0, 1.0, 1e-45, 2.0**-150, 1e-8, 0.2, 0.8, 0.999], dtype=torch.float64).log()
    return {
        "mild": mild,
        "fast": -60 * uniform,
        "zero": torch.full(shape, -torch.inf, dtype=torch.float64),
        "one": torch.zeros(shape, dtype=torch.float64),
        "mixed": levels[(8 * uniform).long()],
        "denormal": torch.full(shape, 1e-45, dtype=torch.float64).log(),
        "above one": torch.full(shape, 0.002, dtype=torch.float64),
    }[name]


def inputs(kind, decay="mild", batch=2, length=40, heads=3, k=4, v=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    gate = (batch, length, heads, k) if kind == "vector" else (batch, length, heads)
    q_k_v = (normal(batch, length, heads, k), normal(batch, length, heads, k), normal(batch, length, heads, v))
    return *q_k_v, log_decays(decay, gate, generator).to(dtype), normal(batch, heads, k, v)


def assert_close(found, wanted, dtype):
    assert found.shape == wanted.shape and found.dtype == dtype and found.isfinite().all()
    if wanted.numel():
        scale = max(1.0, wanted.abs().max().item())
        assert (found.double() - wanted.double()).abs().max().item() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_equals_naive_in_value_and_gradient(kind, decay, length, dtype):
    tensors = inputs(kind, decay, length=length, dtype=dtype)
    weight = torch.linspace(-1, 1, tensors[2].numel(), dtype=dtype).reshape(tensors[2].shape)
    results = []
    for scan, cast in ((decay_scan_naive, torch.float64), (decay_scan_chunked, dtype)):
        leaves = [x.to(cast, copy=True).requires_grad_() for x in tensors]
        o, state = scan(*leaves, output_final_state=True)
        ((o * weight).sum() + state.sum()).backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        results.append([o.detach(), state.detach(), *grads])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert_close(found, wanted, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_chunked_scan_equal_finite_differences(kind):
    leaves = [x.requires_grad_() for x in inputs(kind, batch=1, length=CHUNK + 3, heads=1, k=2, v=3)]
    assert torch.autograd.gradcheck(lambda *x: decay_scan_chunked(*x, output_final_state=True), leaves, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_naive_scan_equal_finite_differences(kind):
    leaves = [x.requires_grad_() for x in inputs(kind, batch=1, length=4, heads=1, k=2, v=3)]
    assert torch.autograd.gradcheck(lambda *x: decay_scan_naive(*x, output_final_state=True), leaves)


@pytest.mark.parametrize("t", [0, 1, 20, 32, 69])
@pytest.mark.parametrize("kind", KINDS)
def test_lambda_zero_is_exact(kind, t):
    q, k, v, log_decay, start = inputs(kind, length=70)
    log_decay[:, t] = -torch.inf
    huge = [x.clone() for x in (k, v)]
    for x in huge:
        x[:, :t] = 1e100  # nothing of it may pass token t
    clean = decay_scan_chunked(q, k, v, log_decay, start, output_final_state=True)
    o, state = decay_scan_chunked(q, *huge, log_decay, 1e100 * start, output_final_state=True)
    assert torch.equal(o[:, t:], clean[0][:, t:]) and torch.equal(state, clean[1])
    assert_close(o[:, t], (q * k).sum(-1, keepdim=True)[:, t] * v[:, t], torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_one_is_plain_linear_attention(kind):
    q, k, v, log_decay, _ = inputs(kind, "one", length=70)
    o, _ = decay_scan_chunked(q, k, v, log_decay)
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    assert_close(o, torch.einsum("bhts,bshv->bthv", scores, v), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_forgotten_over_8192_tokens(kind):
    *tensors, _ = inputs(kind, "one", batch=1, length=8192, heads=1)
    leaves = [[x.to(dtype).requires_grad_() for x in tensors] for dtype in TOLERANCE]
    wide, narrow = ([o := decay_scan_chunked(*x)[0], *torch.autograd.grad(o.square().mean(), x)] for x in leaves)
    for a, b in zip(narrow, wide, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_goes_to_the_one_input_that_needs_it(kind):
    tensors = inputs(kind, length=40)
    leaves = [x.clone().requires_grad_() for x in tensors]
    every = torch.autograd.grad(decay_scan_chunked(*leaves)[0].square().sum(), leaves)
    for index, wanted in enumerate(every):
        one = [x.clone().requires_grad_(i == index) for i, x in enumerate(tensors)]
        decay_scan_chunked(*one)[0].square().sum().backward()
        assert torch.equal(one[index].grad, wanted) and sum(x.grad is not None for x in one) == 1


@pytest.mark.parametrize("t", [0, 1, 31, 32, 45, 69])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_up_to_t_are_the_same_bits_whatever_follows(kind, t):
    q, k, v, log_decay, start = inputs(kind, "mixed", length=70, dtype=torch.float32)
    changed = [x.clone() for x in (q, k, v, log_decay)]
    for x in changed:
        x[:, t + 1 :] = -3.5
    before, after = decay_scan_chunked(q, k, v, log_decay, start)[0], decay_scan_chunked(*changed, start)[0]
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])


@pytest.mark.parametrize("t", [0, 1, 17, 32, 50, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_state_can_be_handed_over_at_any_token(kind, t):
    *tensors, start = inputs(kind, length=70)
    whole, final = decay_scan_chunked(*tensors, start, output_final_state=True)
    first, middle = decay_scan_chunked(*(x[:, :t] for x in tensors), start, output_final_state=True)
    second, end = decay_scan_chunked(*(x[:, t:] for x in tensors), middle, output_final_state=True)
    assert_close(torch.cat([first, second], dim=1), whole, torch.float64)
    assert_close(end, final, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_shifting_the_chunk_boundaries_changes_nothing(kind):
    *tensors, _ = inputs(kind, length=50)
    shifted = [torch.cat([torch.zeros_like(x[:, :13]), x], dim=1) for x in tensors]  # k = 0 and λ = 1 do nothing
    assert_close(decay_scan_chunked(*shifted)[0][:, 13:], decay_scan_chunked(*tensors)[0], torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_scan_is_linear_in_v(kind):
    q, k, v, log_decay, _ = inputs(kind, length=50)
    other = torch.flip(v, [1])
    separate = 2 * decay_scan_chunked(q, k, v, log_decay)[0] - 3 * decay_scan_chunked(q, k, other, log_decay)[0]
    assert_close(decay_scan_chunked(q, k, 2 * v - 3 * other, log_decay)[0], separate, torch.float64)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("length", [0, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_gives_empty_results_and_gradients(kind, length, scan):
    leaves = [x.requires_grad_() for x in inputs(kind, batch=0, length=length)]
    o, state = scan(*leaves, output_final_state=True)
    assert o.shape == (0, length, 3, 5) and state.shape == (0, 3, 4, 5)
    (o.sum() + state.sum()).backward()
    assert all(x.grad.shape == x.shape for x in leaves)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_gives_no_output_the_state_and_gradients(kind, scan):
    leaves = [x.requires_grad_() for x in inputs(kind, length=0)]
    o, state = scan(*leaves, output_final_state=True)
    assert o.shape == (2, 0, 3, 5) and torch.equal(state, leaves[4])
    o.sum().backward()
    state.sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_of_the_inputs_does_not_matter(kind):
    tensors = inputs(kind, length=40)
    strange = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:4]]
    strange[3] = strange[3].repeat_interleave(2, dim=1)[:, ::2]
    assert not any(x.is_contiguous() for x in strange)
    assert torch.equal(decay_scan_chunked(*strange)[0], decay_scan_chunked(*tensors[:4])[0])


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_give_what_each_gives_alone_with_gradients(kind, scan):
    lengths = [1, 0, 33, 2, 0, 5]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    *tensors, _ = inputs(kind, "mixed", batch=1, length=41)
    start = inputs(kind, batch=6)[4]
    leaves = [x.requires_grad_() for x in (*tensors, start)]
    o, state = scan(*leaves, output_final_state=True, cu_seqlens=bounds)
    found = [o, state, *torch.autograd.grad(o.square().sum() + state.square().sum(), leaves)]
    parts = zip(*(x.split(lengths, dim=1) for x in leaves[:4]), start.split(1), strict=True)
    outputs, states = zip(*(scan(*part, output_final_state=True) for part in parts), strict=True)
    o, state = torch.cat(outputs, dim=1), torch.cat(states)
    wanted = [o, state, *torch.autograd.grad(o.square().sum() + state.square().sum(), leaves)]
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, torch.float64)
    assert torch.equal(state[1], start[1])  # of a sequence of no tokens


@pytest.mark.parametrize("scan", SCANS)
def test_no_packed_sequence_at_all_is_an_empty_result(scan):
    *tensors, _ = inputs("scalar", batch=1, length=0)
    o, state = scan(*tensors, output_final_state=True, cu_seqlens=torch.tensor([0]))
    assert o.shape == (1, 0, 3, 5) and state.shape == (0, 3, 4, 5)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", KINDS)
def test_scale_multiplies_the_outputs_and_not_the_state(kind, scan):
    *tensors, start = inputs(kind)
    plain, state = scan(*tensors, start, True)
    scaled, same = scan(*tensors, start, True, scale=0.3)
    assert_close(scaled, 0.3 * plain, torch.float64)
    assert torch.equal(state, same)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("decay", ["mild", "zero", "one"])
def test_without_a_key_the_key_is_what_the_decay_leaves(decay, scan):
    q, _, v, log_decay, start = inputs("vector", decay)
    assert_close(scan(q, None, v, log_decay, start)[0], scan(q, 1 - log_decay.exp(), v, log_decay, start)[0], torch.float64)


def sources(kind):
    """Every formula, with gains, offsets and slopes, in float64."""
    x, shape = 3 * inputs(kind)[3], (3, 4) if kind == "vector" else (3,)
    some = torch.linspace(0.1, 0.9, 3 * 4 if kind == "vector" else 3, dtype=torch.float64).reshape(shape)
    return {
        "log": DecaySource(x=x),
        "simple": DecaySource(x=x, kind="softplus", slope=-1.0, offset=-5 * some),
        "mamba2": DecaySource(x=x, kind="softplus", gain=16 * some, offset=some),
        "gla": DecaySource(x=x, kind="softplus", slope=-1 / 16),
        "hgrn2": DecaySource(x=x, kind="floor", offset=some),
    }


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("name", sources("scalar"))
@pytest.mark.parametrize("kind", KINDS)
def test_what_makes_a_decay_is_taken_as_the_decay(kind, name, scan):
    q, k, v, _, start = inputs(kind)
    source = sources(kind)[name]
    assert torch.equal(scan(q, k, v, source, start)[0], scan(q, k, v, source.log_decay(), start)[0])
    if kind == "vector":
        shared = scan(q, source.shared_key(), v, source.log_decay(), start)[0]
        assert torch.equal(scan(q, None, v, source, start)[0], shared)


@pytest.mark.parametrize("scan", SCANS)
def test_half_precision_inputs_are_computed_in_fp32(scan):
    *tensors, _ = inputs("vector", dtype=torch.float32)
    rounded = [x.bfloat16() for x in tensors[:3]]
    o, state = scan(*rounded, tensors[3], output_final_state=True)
    assert o.dtype == state.dtype == torch.float32
    assert torch.equal(o, scan(*(x.float() for x in rounded), tensors[3])[0])


def test_seam_ignores_autocast():
    *tensors, _ = inputs("vector", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = kernel_seam.decay_scan(*tensors)
    assert torch.equal(o, decay_scan_chunked(*tensors)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_same_inputs_give_the_same_bits(kind):
    results = []
    for _ in range(2):
        leaves = [x.requires_grad_() for x in inputs(kind, dtype=torch.float32)]
        o, _ = decay_scan_chunked(*leaves)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_environment_variable_chooses_the_scan_and_a_wrong_one_is_refused(monkeypatch):
    *tensors, _ = inputs("vector")
    q, _, v, log_decay = tensors
    assert select_decay_scan(q, v, log_decay).name == "chunked"
    assert "vector decay, K=4, V=5" in str(select_decay_scan(q, v, log_decay))
    monkeypatch.setenv("DECAY_KERNEL", "naive")
    assert select_decay_scan(q, v, log_decay).scan is decay_scan_naive
    monkeypatch.setenv("DECAY_KERNEL", "triton")
    with pytest.raises(ValueError, match=r"DECAY_KERNEL=triton: .*; unset it"):  # neither a GPU nor the interpreter
        kernel_seam.decay_scan(*tensors)
    monkeypatch.setenv("DECAY_KERNEL", "magic")
    with pytest.raises(ValueError, match="DECAY_KERNEL=magic: unknown decay scan; set it to one of naive, chunked"):
        kernel_seam.decay_scan(*tensors)
