"""The Triton scans on a GPU against the definition in float64: outputs and gradients, by dtype, shape and kind of decay."""

import pytest
import torch

from decay_core import kernel_seam  # makes kernels/ importable

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Relative norms. 16-bit inputs are given as they are to both: what is measured is the kernels' own rounding.
OUTPUT = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 2e-5}
DECAY_GRADIENT = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 1e-4}
KINDS = ["mild", "fast", "wild", "one", "zero"]


def log_decays(kind, shape):
    noise = torch.randn(shape, device="cuda")
    mild = torch.nn.functional.logsigmoid(noise + 3)
    mixed = torch.where(torch.rand(shape, device="cuda") < 0.1, -torch.inf, 8 * noise.clamp(max=0))
    return {
        "mild": mild,
        "fast": torch.nn.functional.logsigmoid(2 * noise - 1),
        "wild": mixed,
        "one": torch.zeros(shape, device="cuda"),
        "zero": torch.full(shape, -torch.inf, device="cuda"),
    }[kind]


def inputs(vector, kind="mild", dtype=torch.bfloat16, shape=(2, 333, 3), k=64, v=64, state=False):
    torch.manual_seed(0)
    q, key = (torch.randn(*shape, k, device="cuda").to(dtype) for _ in range(2))
    values = torch.randn(*shape, v, device="cuda").to(dtype)
    initial = torch.randn(shape[0], shape[2], k, v, device="cuda") if state else None
    return [q, key, values, log_decays(kind, (*shape, k) if vector else shape), initial]


def gradients(scan, tensors, do, d_state, dtype=None):
    leaves = [None if x is None else x.to(dtype or x.dtype).detach().requires_grad_() for x in tensors]
    o, state = scan(*leaves, d_state is not None)
    targets = [(o, do)] + ([(state, d_state)] if d_state is not None else [])
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad([t for t, _ in targets], wanted, [g.to(t.dtype) for t, g in targets])
    return [o, *([state] if d_state is not None else []), *found]


def compare(tensors, dtype, state=False):
    from kernels.decay_scan_naive import decay_scan_naive
    from kernels.decay_scan_triton import decay_scan_triton

    do = torch.randn(*tensors[2].shape, device="cuda").to(dtype)
    d_state = torch.randn_like(tensors[4]) if state else None
    found = [x.detach() for x in gradients(decay_scan_triton, tensors, do, d_state)]
    expected = [x.detach() for x in gradients(decay_scan_naive, tensors, do, d_state, torch.float64)]
    names = ["o", *(["state"] if state else []), "dq", "dk", "dv", "dlog", *(["dstate"] if state else [])]
    errors = {}
    for name, a, b in zip(names, found, expected, strict=True):
        assert a.shape == b.shape and a.isfinite().all(), name
        b = torch.nan_to_num(b)  # the definition's own gradient at λ = 0 is 0 · inf
        if name == "dlog":
            alive = tensors[3] > -100
            a, b = a[alive], b[alive]
        scale = b.norm()
        errors[name] = float((a.double() - b).norm() / scale) if scale > 0 else float(a.double().norm())
    for name, error in errors.items():
        limit = (DECAY_GRADIENT if name == "dlog" else OUTPUT)[dtype]
        # one token: a single product in 16 bits, whose rounding no sum averages
        assert error <= limit * (2 if tensors[0].shape[1] == 1 else 1), errors
    return errors


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", OUTPUT)
@pytest.mark.parametrize("vector", [False, True])
def test_outputs_and_gradients_equal_the_definition(vector, dtype, kind):
    print(vector, dtype, kind, compare(inputs(vector, kind, dtype), dtype))


@needs_gpu
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 15, 1), (1, 64, 12), (3, 65, 33), (1, 2000, 2)])
@pytest.mark.parametrize("vector", [False, True])
def test_any_length_and_head_count(vector, shape):
    compare(inputs(vector, shape=shape), torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("k, v", [(32, 32), (128, 64), (64, 128), (128, 128), (256, 64), (64, 256), (40, 24)])
@pytest.mark.parametrize("vector", [False, True])
def test_widths_of_keys_and_values(vector, k, v):
    compare(inputs(vector, k=k, v=v), torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("vector", [False, True])
def test_states_come_in_and_go_out_with_gradients(vector):
    compare(inputs(vector, state=True), torch.bfloat16, state=True)


@needs_gpu
@pytest.mark.parametrize("vector", [False, True])
def test_two_runs_give_equal_bits(vector):
    from kernels.decay_scan_triton import decay_scan_triton

    tensors = inputs(vector, "wild", shape=(4, 1024, 8))
    do = torch.randn_like(tensors[2])
    runs = [gradients(decay_scan_triton, tensors, do, None) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_gpu
def test_the_kernels_are_chosen_for_16_bit_tensors_they_can_serve_and_the_choice_is_explained():
    q, _k, v, g, _ = inputs(False)
    assert kernel_seam.explain_decay_scan(q, v, g).startswith("decay scan: triton (our Triton kernels serve scalar decay, K=64")
    for other in (q.float(), q[..., :60]):
        assert kernel_seam.explain_decay_scan(other, v, g).startswith("decay scan: chunked")
    assert "K=60 is no multiple of 8" in kernel_seam.explain_decay_scan(q[..., :60], v, g)


@needs_gpu
def test_fused_gate_and_norm_equals_its_definition():
    from kernels.gated_norm_naive import gated_norm_naive
    from kernels.gated_norm_triton import gated_norm_triton

    torch.manual_seed(0)
    for width in (768, 1024, 2048):
        o, gate, dy = (torch.randn(5, 300, width, device="cuda").bfloat16() for _ in range(3))
        gain = torch.randn(width, device="cuda")
        leaves = [x.requires_grad_() for x in (o, gate, gain)]
        y = gated_norm_triton(*leaves, 1e-5)
        found = [y, *torch.autograd.grad(y, leaves, dy)]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        expected_y = gated_norm_naive(*wide, 1e-5)
        expected = [expected_y, *torch.autograd.grad(expected_y, wide, dy.double())]
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).norm() <= 3e-3 * b.norm()
