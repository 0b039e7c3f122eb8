"""The Triton scans on a GPU where scans go wrong: decays from 0 to 1 in one tensor, short and long texts, cuts anywhere."""

import pytest
import torch
from gpu_cases import OUTPUT, both, call, compare, levels, needs_gpu, normal, outcome, relative

from kernels.decay_source import DecaySource

pytestmark = [pytest.mark.gpu, needs_gpu]
BF16 = torch.bfloat16
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 1000]


def scan(*arguments, **options):
    from kernels.decay_scan_triton import decay_scan_triton

    return decay_scan_triton(*arguments, **options)


def gates(vector, shape, k=64):
    return (*shape, k) if vector else shape


@both
@pytest.mark.parametrize("dtype", OUTPUT, ids=str)
def test_decays_of_all_sizes_mixed_by_channel_and_token(vector, dtype):
    shape = (2, 333, 3)
    compare(call(vector, levels(*gates(vector, shape)), shape, dtype=dtype, state=True), dtype)


@both
@pytest.mark.parametrize("t", [0, 31, 32, 63, 64, 127, 128, 199])
def test_one_token_that_forgets_everything(vector, t):
    log_decay = -0.01 * normal(*gates(vector, (1, 200, 2)), seed=3).abs()
    log_decay[:, t] = -torch.inf
    given = call(vector, log_decay, (1, 200, 2), state=True)
    compare(given)
    before = (torch.arange(200, device="cuda") < t)[:, None, None]
    huge = [torch.where(before, 1e3, x.float()).to(BF16) for x in (given.k, given.v)]
    clean = scan(given.q, given.k, given.v, log_decay, given.state)[0]
    o = scan(given.q, *huge, log_decay, 1e6 * given.state)[0]
    assert relative(o[:, t:], clean[:, t:]) <= OUTPUT[BF16]  # nothing of before passes it


@both
def test_forgetting_everything_every_other_token(vector):
    log_decay = torch.zeros(gates(vector, (1, 200, 2)), device="cuda")
    log_decay[:, ::2] = -torch.inf
    compare(call(vector, log_decay, (1, 200, 2), state=True))


@both
def test_nothing_forgotten_over_8192_tokens(vector):
    shape = (1, 8192, 2)
    compare(call(vector, torch.zeros(gates(vector, shape), device="cuda"), shape))


def test_a_learned_decay_slightly_above_one():
    shape = (1, 2048, 2)
    compare(call(False, torch.full(shape, 0.002, device="cuda"), shape))


@both
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_with_states(vector, length):
    shape = (2, length, 3)
    # one or two tokens: products in 16 bits whose rounding no sum averages
    compare(call(vector, levels(*gates(vector, shape)), shape, state=True), slack=2 if length <= 2 else 1)


@both
@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0), (0, 0)])
def test_nothing_in_is_nothing_out_with_gradients(vector, batch, length):
    found = outcome(scan, call(vector, "mamba2", (batch, length, 3), state=True))
    assert found["o"].shape == (batch, length, 3, 64) and found["state"].shape == (batch, 3, 64, 64)
    assert found["o"].dtype == BF16 and all(found[name].isfinite().all() for name in ("dq", "dk", "dv", "dx", "dstate"))


@both
@pytest.mark.parametrize("k, v", [(32, 64), (128, 256), (8, 8)])
def test_keys_and_values_of_different_widths(vector, k, v):
    compare(call(vector, levels(*gates(vector, (2, 100, 3), k)), (2, 100, 3), k=k, v=v, state=True))


@both
@pytest.mark.parametrize("lengths", [[1, 0, 130, 2, 0, 64, 65, 1], [0, 0, 7], [600], [1] * 40], ids=str)
def test_packed_sequences_are_the_sequences_alone(vector, lengths):
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    for decay in ("mamba2", levels(*gates(vector, (1, total, 3)))):
        packed = call(vector, decay, (1, total, 3), state=True, sequences=len(lengths))
        compare(packed, slack=2 if max(lengths) <= 2 else 1, cu_seqlens=bounds)


def test_packed_sequences_without_a_key():
    bounds = torch.tensor([0, 1, 1, 200, 333], device="cuda", dtype=torch.int32)
    compare(call(True, "hgrn2", (1, 333, 3), shared=True, state=True, sequences=4), cu_seqlens=bounds)


@both
@pytest.mark.parametrize("t", [1, 17, 64, 100, 128, 299])
def test_a_state_can_be_handed_over_at_any_token(vector, t):
    given = call(vector, levels(*gates(vector, (2, 300, 3))), (2, 300, 3), state=True)
    x = given.source.x
    whole, final = scan(given.q, given.k, given.v, x, given.state, True)
    first, middle = scan(given.q[:, :t], given.k[:, :t], given.v[:, :t], x[:, :t], given.state, True)
    second, end = scan(given.q[:, t:], given.k[:, t:], given.v[:, t:], x[:, t:], middle, True)
    assert relative(torch.cat([first, second], dim=1), whole) <= OUTPUT[BF16] and relative(end, final) <= OUTPUT[BF16]


@both
@pytest.mark.parametrize("decay", ["mamba2", "levels"])
@pytest.mark.parametrize("t", [0, 20, 63, 64, 200])
def test_outputs_up_to_t_are_the_same_bits_whatever_follows(vector, decay, t):
    shape = (2, 300, 3)
    given = call(vector, levels(*gates(vector, shape)) if decay == "levels" else decay, shape, state=True)
    later = [torch.cat([x[:, : t + 1], x[:, t + 1 :].flip(1)], dim=1) for x in (given.q, given.k, given.v, given.source.x)]
    source = DecaySource(
        x=later[3], kind=given.source.kind, slope=given.source.slope, gain=given.source.gain, offset=given.source.offset
    )
    before = scan(given.q, given.k, given.v, given.source, given.state, exact=True)[0]
    after = scan(*later[:3], source, given.state, exact=True)[0]
    assert torch.equal(before[:, : t + 1], after[:, : t + 1]) and not torch.equal(before, after)
    usual = scan(given.q, given.k, given.v, given.source, given.state)[0]
    assert relative(usual, before) <= OUTPUT[BF16]


@pytest.mark.parametrize("decay", ["mamba2", "levels"])
def test_exact_scans_have_the_definitions_gradients(decay):
    shape = (2, 200, 3)
    compare(call(True, levels(*shape, 64) if decay == "levels" else decay, shape, state=True), exact=True)


@both
@pytest.mark.parametrize("p", [1, 13, 40, 100])
def test_shifting_the_chunk_boundaries_changes_nothing(vector, p):
    given = call(vector, levels(*gates(vector, (1, 200, 2))), (1, 200, 2))
    tensors = (given.q, given.k, given.v, given.source.x)
    nothing = [torch.cat([torch.zeros_like(x[:, :1]).expand(-1, p, *x.shape[2:]), x], dim=1) for x in tensors]
    assert relative(scan(*nothing)[0][:, p:], scan(*tensors)[0]) <= OUTPUT[BF16]


@both
def test_the_scan_is_linear_in_v(vector):
    given = call(vector, levels(*gates(vector, (1, 200, 2))), (1, 200, 2), dtype=torch.float32)
    q, k, v, x = given.q, given.k, given.v, given.source.x
    other = v.flip(1)
    sums = 2 * scan(q, k, v, x)[0] - 3 * scan(q, k, other, x)[0]
    assert relative(scan(q, k, 2 * v - 3 * other, x)[0], sums) <= OUTPUT[torch.float32]


@both
def test_offsets_beyond_32_bits(vector):
    """B·T·H·K > 2^31: the last rows of the batch come out as they do alone."""
    batch, shape, alone = 257, (8192, 16), 16
    entries = batch * shape[0] * shape[1] * 64
    assert entries > 2**31
    needed = entries * 2 * (14 if vector else 11)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    q, k, v, do = (torch.randn(batch, *shape, 64, device="cuda", dtype=BF16) for _ in range(4))
    x = torch.randn(batch, *shape, *([64] if vector else []), device="cuda", dtype=BF16)

    def last(*tensors):
        *leaves, do = tensors
        leaves = [y.detach().requires_grad_() for y in leaves]
        o = scan(*leaves[:3], DecaySource(x=leaves[3], kind="softplus", slope=-1.0))[0]
        return [y[-alone:].clone() for y in (o.detach(), *torch.autograd.grad(o, leaves, do))]

    found = last(q, k, v, x, do)
    few = [y[-alone:].clone() for y in (q, k, v, x, do)]
    del q, k, v, x, do
    for a, b in zip(found, last(*few), strict=True):
        assert relative(a, b) <= OUTPUT[BF16]
