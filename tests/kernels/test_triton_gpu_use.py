"""The Triton scans on a GPU as a model uses them: fused decays, subsets of gradients, compiled models, CUDA graphs."""

import pytest
import torch
from gpu_cases import FORMULAS, OUTPUT, both, call, compare, made, needs_gpu, normal, outcome, relative

from decay_core import kernel_seam
from decay_core.decay import DecayPlace
from decay_core.design import DesignPoint
from decay_core.mixer import TokenMixer
from kernels.decay_source import DecaySource

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.filterwarnings("ignore:`torch.jit"),  # inductor's own, as is the profiler's
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events"),
]
BF16 = torch.bfloat16
advised = pytest.mark.filterwarnings("default")  # the compiler and the profiler advise by warnings


def scan(*arguments, **options):
    from kernels.decay_scan_triton import decay_scan_triton

    return decay_scan_triton(*arguments, **options)


# Each pair has kernels of its own to be compiled: a formula in bf16, and each dtype with the richest formula.
@both
@pytest.mark.parametrize(
    "formula, dtype", [*((name, BF16) for name in FORMULAS), ("mamba2", torch.float16), ("mamba2", torch.float32)], ids=str
)
def test_decays_made_in_the_kernel_have_the_definitions_gradients_down_to_their_parameters(vector, formula, dtype):
    compare(call(vector, formula, dtype=dtype, state=True), dtype)


@pytest.mark.parametrize("formula", ["log", "mamba2", "hgrn2"])
def test_the_key_that_is_what_the_decay_leaves(formula):
    compare(call(True, formula, shared=True, state=True))


@both
def test_recomputing_gives_the_same_and_keeps_less(vector, monkeypatch):
    def kept():
        sizes = {}
        given = call(vector, "mamba2", (2, 1000, 4))
        leaves = given.leaves()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
            given.run(scan, leaves)
        return sum(sizes.values())

    saving = kept()
    monkeypatch.setenv("DECAY_KERNEL_POLICY", "recompute")
    assert kept() < 0.9 * saving
    compare(call(vector, "mamba2", state=True))
    compare(call(vector, "mamba2", (1, 333, 3), state=True, sequences=2), cu_seqlens=torch.tensor([0, 100, 333]).cuda())


@both
def test_gradients_go_to_the_inputs_that_need_one_alone(vector):
    given = call(vector, "mamba2", (1, 100, 2), state=True)
    every = outcome(scan, given)
    for name in given.leaves():
        leaves = {other: x.detach().requires_grad_(other == name) for other, x in given.leaves().items()}
        o, state = given.run(scan, leaves)
        do, dstate = normal(*o.shape, seed=8).to(o.dtype), normal(*state.shape, seed=9)
        torch.autograd.backward([o, state], [do, dstate])
        assert torch.equal(leaves[name].grad, every[f"d{name}"])
        assert all(x.grad is None for other, x in leaves.items() if other != name)


@both
def test_two_runs_give_equal_bits_also_packed_and_from_a_source(vector):
    bounds = torch.tensor([0, 1, 700, 1024], device="cuda", dtype=torch.int32)
    given = call(vector, "mamba2", (1, 1024, 8), state=True, sequences=3)
    first, second = (outcome(scan, given, cu_seqlens=bounds) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@both
def test_expanded_transposed_and_packed_inputs_give_the_bits_of_contiguous_ones(vector):
    given = call(vector, "mamba2", (2, 200, 3))
    o = scan(given.q, given.k, given.v, given.source)[0]
    view = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (given.q, given.k, given.v, given.source.x)]
    sliced = torch.cat([given.q, given.k, given.v], dim=-1).split(64, dim=-1)
    wide = [torch.stack([x, x], dim=-1).flatten(-2)[..., ::2] for x in (given.q, given.k, given.v, given.source.x)]
    for q, k, v, x in (view, [*sliced, given.source.x], wide):
        fields = {"kind": "softplus", "gain": given.source.gain, "offset": given.source.offset}
        assert torch.equal(scan(q, k, v, DecaySource(x=x, **fields))[0], o)
    one = given.source.log_decay()[:1, :1]
    expanded = one.expand(2, 200, *one.shape[2:])
    assert torch.equal(scan(given.q, given.k, given.v, expanded)[0], scan(given.q, given.k, given.v, expanded.contiguous())[0])


@both
def test_operators_keep_torchs_rules(vector):
    from kernels import decay_scan_triton as module

    given = call(vector, "mamba2", (2, 100, 3), state=True)
    leaves = given.leaves()
    tensors = [leaves[name] for name in ("q", "k", "v", "x", "gain", "offset", "state")]
    formula = ("softplus", 1.0, 0.5, False, "")
    torch.library.opcheck(module._forward, (*tensors, None, *formula, True, True))
    bounds = torch.tensor([0, 30, 100], device="cuda", dtype=torch.int32)
    packed = [x.detach()[:1].contiguous().requires_grad_() for x in tensors[:4]]
    # Nothing saved: of packed sequences some room for states is never filled, and opcheck would compare it.
    options = (*formula[:4], "recompute")
    torch.library.opcheck(module._forward, (*packed, None, None, None, bounds, *options, False, False))
    plain = [x.detach() for x in tensors]
    o, state, saved = module._forward(*plain, None, *formula, True, True)
    torch.library.opcheck(module._backward, (*plain, None, saved, o, state, *formula))
    if vector:
        plain[1] = None
        torch.library.opcheck(module._backward, (*plain, None, saved, o, None, *formula))


@advised
@both
def test_one_graph_serves_every_length(vector):
    def loss(q, k, v, x, gain, offset):
        o, end = scan(q, k, v, DecaySource(x=x, kind="softplus", gain=gain, offset=offset), None, True)
        return o.float().square().sum() + end.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for length in (130, 65, 1000):
        given = list(call(vector, "mamba2", (2, length, 3)).leaves().values())
        with torch._dynamo.config.patch(error_on_recompile=length != 130):
            found, wanted = (torch.autograd.grad(f(*given), given) for f in (compiled, loss))
        assert all(relative(a, b) <= OUTPUT[BF16] for a, b in zip(found, wanted, strict=True))


POINTS = [
    DesignPoint(decay="mamba2"),
    DesignPoint(decay="mamba2", granularity="scalar"),
    DesignPoint(decay="hgrn2", share=True),
    DesignPoint(decay="tnl", granularity="scalar"),
    DesignPoint(decay="simple_decay", p=0.99, granularity="scalar", position="rope"),
    DesignPoint(decay="lightnet"),
]


@advised
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_whole_mixer_compiles_without_a_break_and_gives_what_it_gives(point):
    from decay_core.model import ModelConfig, build_model
    from decay_core.sizes import get_size

    torch._dynamo.reset()
    model = build_model(ModelConfig(point=point, size=get_size("micro"), vocab_size=300), seed=1).cuda()
    compiled = torch.compile(model, fullgraph=True)
    tokens = torch.arange(2 * 200, device="cuda").reshape(2, 200) * 7 % 300
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        with torch.autocast("cuda", BF16):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat(grads)))
    (loss, grads), (other, others) = results
    # the compiler fuses what eager rounds to bf16 in between
    assert abs(float(loss - other)) <= 5e-3 * float(loss) and relative(others, grads) <= 5e-2


@advised
def test_a_mixers_scan_is_the_kernels():
    place = DecayPlace(point=DesignPoint(decay="mamba2"), layer=0, layers=2, heads=4, head_dim=64)
    mixer = TokenMixer(place, 1.0).cuda()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.02)
    x = normal(2, 100, 256)
    with torch.autocast("cuda", BF16), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        mixer(x)
    names = {event.key for event in seen.key_averages()}
    assert any(ours in name for name in names for ours in ("forward_kernel", "rows_kernel")), names


@both
def test_decoding_is_the_parallel_form_and_one_cuda_graph_holds_a_step(vector):
    from kernels.decay_step_triton import decay_step_triton

    given = call(vector, "mamba2", (2, 40, 3), state=True)
    source = given.source

    def at(t):
        return [x[:, t : t + 1].clone() for x in (given.q, given.k, given.v, source.x)]

    q, k, v, x = at(0)
    state = given.state.clone()
    one = DecaySource(x=x, kind="softplus", gain=source.gain, offset=source.offset)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decay_step_triton(q, k, v, one, state, 1.0, state)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = decay_step_triton(q, k, v, one, state, 1.0, state)
    state.copy_(given.state)
    outputs = []
    for t in range(40):
        for kept, new in zip((q, k, v, x), at(t), strict=True):
            kept.copy_(new)
        graph.replay()
        outputs.append(o.clone())
    whole, end = scan(given.q, given.k, given.v, source, given.state, True)
    assert relative(torch.cat(outputs, dim=1), whole) <= OUTPUT[BF16] and relative(state, end) <= OUTPUT[BF16]
    by_scan, current = [], given.state
    with torch.no_grad():
        for t in range(40):
            *tokens, x_t = at(t)
            step = DecaySource(x=x_t, kind="softplus", gain=source.gain, offset=source.offset)
            o_t, current = scan(*tokens, step, current, True)
            by_scan.append(o_t)
    assert torch.equal(torch.cat(by_scan, dim=1), torch.cat(outputs, dim=1)) and torch.equal(current, state)


@both
def test_a_cuda_graph_holds_the_whole_scan(vector):
    given = call(vector, "mamba2", (2, 300, 3), state=True)
    arguments = (given.q, given.k, given.v, given.source, given.state, True)
    wanted = scan(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = scan(*arguments)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@both
def test_autocast_leaves_decays_wide(vector):
    given = call(vector, "mamba2", (2, 100, 3))
    plain = kernel_seam.decay_scan(given.q, given.k, given.v, given.source)[0]
    with torch.autocast("cuda", BF16):
        cast = kernel_seam.decay_scan(given.q, given.k, given.v, given.source)[0]
    assert torch.equal(plain, cast) and plain.dtype == BF16


@both
def test_the_seam_fuses_for_16_bits_and_takes_the_kernels_for_fp32_where_asked(vector, monkeypatch):
    given = call(vector, "mamba2", (2, 100, 3))
    assert kernel_seam.fuses(given.q, given.v) and not kernel_seam.fuses(given.q.float(), given.v)
    wide = call(vector, "mamba2", (2, 100, 3), dtype=torch.float32)
    assert "asks for them" in kernel_seam.explain_decay_scan(wide.q, wide.v, wide.source)
    by_default = kernel_seam.decay_scan(wide.q, wide.k, wide.v, wide.source)[0]
    monkeypatch.setenv("DECAY_KERNEL", "triton")
    assert "triton" in kernel_seam.explain_decay_scan(wide.q, wide.v, wide.source)
    by_kernels = kernel_seam.decay_scan(wide.q, wide.k, wide.v, wide.source)[0]
    assert 0 < relative(by_kernels, by_default) <= OUTPUT[torch.float32]


def test_a_source_is_what_its_log_decay_is():
    source = made("mamba2", (2, 100, 3, 64), torch.float32)
    given = call(True, source, (2, 100, 3))
    formed = scan(given.q, given.k, given.v, source.log_decay())[0]
    assert relative(scan(given.q, given.k, given.v, source)[0], formed) <= OUTPUT[BF16]
