"""The Triton kernels of the delta rule and their torch operators: the definition's numbers and gradients, torch's rules kept.

They run in Triton's interpreter, which must be chosen before triton is imported: one process of its own (this file as a script)
computes everything and prints it, the tests read it. bf16 and compiling to a GPU are for test_triton_gpu_delta.py.
"""

import json

import pytest
from interpreted import run_as_script

GRANULARITIES = ["scalar", "vector"]
# Relative norms. fp16 tells the products of fp16 operands that invert a chunk's system from those that do not.
TOLERANCE = {"float32": 2e-5, "float16": 2e-3}
# With all keys alike and β near 2 pseudo-values are large and cancel in every output.
COLLINEAR_TOLERANCE = {"float32": 1e-4, "float16": 3e-2}

CASES = {
    "mild": {},
    "no decay": {"gate": "none"},
    "write of 1": {"write": False},
    "λ from 0 to 1, mixed": {"gate": "mixed"},
    "λ = 0": {"gate": "zero"},
    "λ = 1": {"gate": "one"},
    "β = 0, write of 1": {"beta": 0.0, "write": False},
    "β = 0": {"beta": 0.0},
    "β = 2": {"beta": 2.0},
    "formula": {"gate": "softplus"},
    "floor": {"gate": "floor"},
    "normalized keys": {"norm": True},
    "normalized keys, zeros among them": {"norm": True, "keys": "zeros", "write": False},
    "normalized keys in slices": {"norm": True, "k": 128, "v": 128, "tokens": 40, "config": {"gradient_key_block": 64}},
    "zero keys": {"keys": "zeros"},
    "one key, β = 1": {"keys": "one", "beta": 1.0, "gate": "one"},
    "one key, β = 1.9": {"keys": "one", "beta": 1.9, "gate": "one"},
    "two keys in turn, β = 1.9": {"keys": "two", "beta": 1.9, "gate": "one"},
    "|k| = 4, an expanding erasure": {"keys": "four", "gate": "fast", "beta": 0.5},
    "a token": {"tokens": 1, "batch": 2},
    "15 tokens": {"tokens": 15},
    "a chunk": {"tokens": 32},
    "a token more": {"tokens": 33, "heads": 3},
    "wide": {"k": 128, "v": 128, "tokens": 40},
    "widest": {"k": 256, "v": 72, "tokens": 20},
    "multiples of 8": {"k": 40, "v": 24},
    "values in slices": {"v": 136, "tokens": 40},
    "chunks of 64": {"config": {"chunk": 64}, "tokens": 100},
    "packed": {"lengths": [1, 0, 40, 33, 0, 16]},
    "made again": {"policy": "recompute"},
    "packed, made again": {"policy": "recompute", "lengths": [1, 0, 40, 13]},
    "no states": {"states": False},
    "packed, the first empty": {"lengths": [0, 17, 0, 5]},
    "large keys, some of them masked": {"keys": "thirty", "beta": "masked"},
    "fp16, large keys, some of them masked": {"keys": "thirty", "beta": "masked", "dtype": "float16"},
    "fp16": {"dtype": "float16"},
    "fp16, one key, β = 1.9": {"dtype": "float16", "keys": "one", "beta": 1.9, "gate": "one"},
    "fp16, an expanding erasure": {"dtype": "float16", "keys": "four", "gate": "fast", "beta": 0.5},
}
DEFAULTS = {
    "gate": "mild", "write": True, "norm": False, "keys": "unit", "beta": None, "batch": 1, "tokens": 50, "heads": 1, "k": 32,
    "v": 32, "dtype": "float32", "states": True, "lengths": None, "policy": "", "config": {},
}  # fmt: skip
VECTOR_ONLY: dict[str, dict] = {}
NOT_VECTOR = ("no decay",)


def cases(granularity):
    if granularity == "scalar":
        return CASES
    return {name: case for name, case in CASES.items() if name not in NOT_VECTOR} | VECTOR_ONLY


ALL = [(granularity, case) for granularity in GRANULARITIES for case in cases(granularity)]


@pytest.fixture(scope="module")
def found():
    return run_as_script(__file__)


@pytest.mark.parametrize("granularity, case", ALL)
def test_kernels_are_the_definition_in_value_and_every_gradient(granularity, case, found):
    options = DEFAULTS | cases(granularity)[case]
    limit = (COLLINEAR_TOLERANCE if options["keys"] in ("one", "two") else TOLERANCE)[options["dtype"]]
    errors = found["errors"][f"{granularity} {case}"]
    assert {"o", "dq", "dk", "dv", "dbeta"} <= set(errors)
    # dlog λ is a sum of products that largely cancel
    assert not {name: e for name, e in errors.items() if not e <= limit * (5 if name == "dx" else 1)}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "claim",
    [
        "operators keep torch's rules",
        "one graph serves every length",
        "gradients go to the inputs that need one alone",
        "recomputing saves the inputs alone",
        "no tokens and no batch give empty results and gradients",
        "a state can be handed over at any token",
        "decoding is the parallel form",
        "β = 0 with a write of 1 is the decay scan",
        "λ = 1 is the plain delta rule",
        "a call done from its list gives the same bits",
        "memory layout does not matter",
        "two runs give equal bits",
    ],
)
def test_the_triton_delta_scan(claim, granularity, found):
    assert found["claims"][granularity].get(claim) is True, found["claims"][granularity].get(claim)


@pytest.mark.parametrize(
    "claim",
    ["the seam takes it where it is asked for", "a width without a kernel runs in plain torch", "the configuration is told"],
)
def test_choice(claim, found):
    assert found["choice"].get(claim) is True, found["choice"].get(claim)


def main():
    import os
    from dataclasses import replace

    import torch
    import torch.nn.functional as F

    from decay_core import kernel_seam
    from kernels import delta_scan_triton as module
    from kernels import replay
    from kernels.decay_scan_naive import decay_scan_naive
    from kernels.decay_source import DecaySource
    from kernels.delta_scan_naive import delta_scan_naive
    from kernels.delta_scan_triton import delta_scan_triton

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    launchers = dict(module._LAUNCHERS)

    def numbers(*shape, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))

    def source_of(gate, shape):
        x = numbers(*shape, seed=1)
        levels = torch.tensor([0.0, 1.0, 1e-45, 1e-8, 0.2, 0.999], dtype=torch.float64).log().float()
        some = numbers(*shape[2:], seed=2).sigmoid()
        return {
            "none": None,
            "mild": DecaySource(x=F.logsigmoid(x + 3)),
            "fast": DecaySource(x=F.logsigmoid(2 * x - 2)),
            "mixed": DecaySource(x=levels[(x.abs() * 9).long() % 6]),
            "zero": DecaySource(x=torch.full(shape, -torch.inf)),
            "one": DecaySource(x=torch.zeros(shape)),
            "softplus": DecaySource(x=x, kind="softplus", slope=-1.0, gain=some, offset=some - 3),
            "floor": DecaySource(x=x, kind="floor", offset=0.9 * some),
        }[gate]

    def keys_of(kind, shape):
        k = numbers(*shape, seed=3)
        k = {"one": k[:, :1].expand_as(k), "thirty": k[:, :1].expand_as(k), "two": k[:, torch.arange(shape[1]) % 2]}.get(
            kind, k
        )
        k = F.normalize(k, dim=-1) * {"four": 4, "thirty": 30}.get(kind, 1)
        return k * (torch.arange(shape[1]) % 3 > 0)[:, None, None] if kind == "zeros" else k.contiguous()

    def made(granularity, **options):
        """[q, k, v, β, x, gain, offset, state], the source, the options."""
        case = DEFAULTS | options
        lengths, heads, k, v = (case[name] for name in ("lengths", "heads", "k", "v"))
        batch, tokens, count = case["batch"], case["tokens"], case["batch"]
        if lengths is not None:
            batch, tokens, count = 1, sum(lengths), len(lengths)
        rows, dtype = (batch, tokens, heads), getattr(torch, case["dtype"])
        source = source_of(case["gate"], (*rows, k) if granularity == "vector" else rows)
        beta = 2 * numbers(*rows, seed=4).sigmoid()
        if case["beta"] == "masked":  # two of three tokens; what is left of β is small as |k|² is large
            beta = beta / 900 * (torch.arange(rows[1]) % 3 == 0)[:, None]
        elif case["beta"] is not None:
            beta = torch.full(rows, case["beta"])
        tensors = [y.to(dtype) for y in (numbers(*rows, k), keys_of(case["keys"], (*rows, k)), numbers(*rows, v, seed=5))]
        parts = [None] * 3 if source is None else [source.x, source.gain, source.offset]
        state = numbers(count, heads, k, v, seed=6) if case["states"] else None
        return [*tensors, beta, *parts, state], source, case

    names = ("dq", "dk", "dv", "dbeta", "dx", "dgain", "doffset", "dstate")

    def outcome(scan, tensors, source, case, wide=False):
        leaves = [None if x is None else x.to(torch.float64 if wide else x.dtype).detach().requires_grad_() for x in tensors]
        lengths = case["lengths"]
        bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        q, k, v, beta, x, gain, offset, state = leaves
        decay = None if source is None else replace(source, x=x, gain=gain, offset=offset)
        options = (case["write"], state, True, 0.3, bounds, False, case["norm"])
        o, final = scan(q, k, v, beta, decay, *options)
        weights = [numbers(*y.shape, seed=7).to(y.dtype) for y in (o, final)]
        given = {name: leaf for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
        grads = torch.autograd.grad([o, final], list(given.values()), weights, allow_unused=True)
        grads = {name: grad for name, grad in zip(given, grads, strict=True) if grad is not None}
        return {"o": o.detach(), "state": final.detach(), **grads}

    def difference(a, b, size=None):
        b = b.double().nan_to_num()
        norm = float(b.norm()) if size is None else size
        assert a.isfinite().all()
        return float((a.double() - b).norm()) / (norm if norm > 1e-30 else 1.0)

    report = {"errors": {}, "claims": {}, "choice": {}}
    for granularity, name in ALL:
        tensors, source, case = made(granularity, **cases(granularity)[name])
        key = f"delta_{granularity}"
        if case["config"]:
            whole = launchers[key]
            config = replace(whole.default_config(case["k"], case["v"], tensors[0].dtype), **case["config"])
            module._LAUNCHERS[key] = whole._replace(default_config=lambda *_, config=config: config)
        os.environ["DECAY_KERNEL_POLICY"] = case["policy"]
        ours, wanted = outcome(delta_scan_triton, tensors, source, case), outcome(delta_scan_naive, tensors, source, case, True)
        os.environ["DECAY_KERNEL_POLICY"], module._LAUNCHERS[key] = "", launchers[key]
        assert set(ours) == set(wanted), (name, set(ours) ^ set(wanted))
        # Where λ is 0 its gradient is nothing beside what it is made of.
        size = {"dx": max(float(wanted["dx"].nan_to_num().norm()), 1e-3 * float(wanted["dq"].norm()))} if "dx" in wanted else {}
        errors = {kind: difference(ours[kind], wanted[kind], size.get(kind)) for kind in wanted}
        report["errors"][f"{granularity} {name}"] = errors

    def close(a, b, times=1):
        return difference(a, b) <= times * TOLERANCE["float32"]

    def claims(granularity):
        (q, k, v, beta, x, gain, offset, state), source, _ = made(granularity, gate="softplus", tokens=70)

        def decay(x):
            return replace(source, x=x)

        whole, final = delta_scan_triton(q, k, v, beta, decay(x), True, state, True)
        again = delta_scan_triton(q, k, v, beta, decay(x), True, state, True)
        yield "two runs give equal bits", all(torch.equal(a, b) for a, b in zip(again, (whole, final), strict=True))

        few = [y if y.dim() < 3 or y is state else y[:, :20] for y in (q, k, v, beta, x, gain, offset, state)]
        leaves = [y.detach().clone().requires_grad_() for y in few]
        options = ("softplus", -1.0, 0.3, False, True, False, "")
        torch.library.opcheck(module._forward, (*leaves, None, *options, True, True))
        bounds = torch.tensor([0, 3, 3, 20], dtype=torch.int32)
        torch.library.opcheck(module._forward, (*leaves[:7], None, bounds, *options[:6], "recompute", False, False))
        with torch.no_grad():
            plain = [y.detach() for y in leaves]
            o, end, *saved = module._forward(*plain, None, *options, True, True)
            torch.library.opcheck(module._backward, (*plain, None, *saved, o, end, *options))
        yield "operators keep torch's rules", True

        def loss(q, k, v, beta, x, gain, offset, state):
            made_of = DecaySource(x=x, kind="softplus", slope=-1.0, gain=gain, offset=offset)
            o, end = delta_scan_triton(q, k, v, beta, made_of, True, state, True)
            return o.square().sum() + end.square().sum()

        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        equal = []
        for tokens in (40, 70, 33):
            given = [y.requires_grad_() for y in made(granularity, gate="softplus", tokens=tokens)[0]]
            with torch._dynamo.config.patch(error_on_recompile=tokens != 40):
                pairs = zip(*(torch.autograd.grad(f(*given), given) for f in (loss, compiled)), strict=True)
            equal += [torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs]
        yield "one graph serves every length", all(equal)

        every = torch.autograd.grad(loss(*leaves), leaves)
        alone = []
        for index in range(len(leaves)):
            some = [y.detach().requires_grad_(i == index) for i, y in enumerate(leaves)]
            loss(*some).backward()
            alone.append(torch.equal(some[index].grad, every[index]))
            alone.append(all(y.grad is None for y in some if y is not some[index]))
        yield "gradients go to the inputs that need one alone", all(alone)

        def saved_entries():
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda y: sizes.append((y.data_ptr(), y.numel())) or y, lambda y: y):
                loss(*leaves)
            squares = 20 * 32 + 32 * 32  # of the loss itself
            return sum({p: size for p, size in sizes if size}.values()) - squares - sum(y.numel() for y in leaves)

        saving = saved_entries()
        os.environ["DECAY_KERNEL_POLICY"] = "recompute"
        recomputing = saved_entries()
        os.environ["DECAY_KERNEL_POLICY"] = ""
        yield "recomputing saves the inputs alone", (saving > 0 and recomputing == 0) or [saving, recomputing]

        shapes = []
        for batch, tokens in ((0, 5), (2, 0), (0, 0)):
            empty = [y.requires_grad_() for y in made(granularity, gate="softplus", batch=batch, tokens=tokens)[0]]
            loss(*empty).backward()
            shapes += [y.grad.shape == y.shape and not y.grad[y.grad != 0].numel() for y in empty[:7]]
        yield "no tokens and no batch give empty results and gradients", all(shapes)

        handed = []
        for t in (1, 17, 64, 69):
            early, late = ([y[:, part] for y in (q, k, v, beta, x)] for part in (slice(t), slice(t, None)))
            first, middle = delta_scan_triton(*early[:4], decay(early[4]), True, state, True)
            second, end = delta_scan_triton(*late[:4], decay(late[4]), True, middle, True)
            handed += [close(torch.cat([first, second], dim=1), whole), close(end, final)]
        yield "a state can be handed over at any token", all(handed)

        same = []
        for write, norm in ((True, False), (False, True)):
            outputs, current = [], state
            for t in range(20):
                step = [y[:, t : t + 1] for y in (q, k, v, beta, x)]
                o, current = delta_scan_triton(*step[:4], decay(step[4]), write, current, True, 0.5, normalize_key=norm)
                outputs.append(o)
            head = [y[:, :20] for y in (q, k, v, beta, x)]
            o, end = delta_scan_triton(*head[:4], decay(head[4]), write, state, True, 0.5, normalize_key=norm)
            same += [close(torch.cat(outputs, dim=1), o), close(current, end)]
        yield "decoding is the parallel form", all(same)

        found = delta_scan_triton(q, k, v, 0 * beta, decay(x), False, state, True)
        wanted = decay_scan_naive(q, k, v, decay(x), state, True)
        yield "β = 0 with a write of 1 is the decay scan", all(close(a, b) for a, b in zip(found, wanted, strict=True))
        found = delta_scan_triton(q, k, v, beta, torch.zeros_like(x), True, state, True)
        wanted = delta_scan_triton(q, k, v, beta, None, True, state, True)
        yield "λ = 1 is the plain delta rule", all(close(a, b) for a, b in zip(found, wanted, strict=True))
        same = []
        for changes in ({"lengths": [1, 0, 17, 2]}, {"write": False, "norm": True, "tokens": 20}):
            tensors, of, case = made(granularity, gate="softplus", **changes)
            replay._lists.clear()
            others = [y if y is None or i in (5, 6) else y.roll(1, dims=1) for i, y in enumerate(tensors)]
            once, _, again = (outcome(delta_scan_triton, given, of, case) for given in (tensors, others, tensors))
            same.append(sum(isinstance(x, replay._List) for x in replay._lists.values()) == 2)
            same += [torch.equal(once[name], again[name]) for name in once]
        yield "a call done from its list gives the same bits", all(same) or same

        strange = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in (q, k, v, beta, x)]
        strange[0] = strange[0].repeat_interleave(2, dim=3)[..., ::2]
        o, _ = delta_scan_triton(*strange[:4], decay(strange[4]), True, state)
        yield "memory layout does not matter", torch.equal(o, whole)

    for granularity in GRANULARITIES:
        report["claims"][granularity] = dict(claims(granularity))

    choice = report["choice"]
    (q, k, v, beta, x, *_), _, _ = made("scalar", tokens=20)
    os.environ["DECAY_KERNEL"] = "triton"
    asked = kernel_seam.explain_delta_scan(q, v, x) == "delta scan: triton (DECAY_KERNEL asks for it)"
    same = torch.equal(kernel_seam.delta_scan(q, k, v, beta, x)[0], delta_scan_triton(q, k, v, beta, x)[0])
    choice["the seam takes it where it is asked for"] = asked and same
    narrow = [y[..., :12] for y in (q, k, v)]
    line = kernel_seam.explain_delta_scan(narrow[0], narrow[2], x)
    right = close(kernel_seam.delta_scan(*narrow, beta, x)[0], delta_scan_naive(*narrow, beta, x)[0])
    choice["a width without a kernel runs in plain torch"] = (right and "chunked" in line and "K=12" in line) or line
    fields, origin = kernel_seam.explain_delta_configuration(q, v, x)
    choice["the configuration is told"] = origin == "default" and "policy save" in fields and "chunk " in fields
    print(json.dumps(report))


if __name__ == "__main__":
    main()
