"""The Triton kernels of general DPLR and their torch operators: the definition's numbers and gradients, torch's rules kept.

They run in Triton's interpreter, which must be chosen before triton is imported: one process of its own (this file as a script)
computes everything and prints it, the tests read it. bf16 and compiling to a GPU are for test_triton_gpu_dplr.py.
"""

import json

import pytest
from interpreted import run_as_script

# Relative norms. fp16 tells the products of fp16 operands that invert a chunk's system from those that do not.
TOLERANCE = {"float32": 2e-5, "float16": 2e-3}
# Where all tokens are alike what is read is large and cancels in every output.
ALIKE_TOLERANCE = {"float32": 1e-4, "float16": 3e-2}

CASES = {
    "mild": {},
    "no decay": {"gate": "none"},
    "λ from 0 to 1, mixed": {"gate": "mixed"},
    "λ = 0": {"gate": "zero", "tokens": 10},
    "λ = 1": {"gate": "one"},
    "exact": {"exact": True},
    "a formula": {"gate": "softplus"},
    "a floor": {"gate": "floor"},
    "the delta rule": {"ab": "delta"},
    "a of zeros": {"ab": "a of zeros"},
    "one key, β = 1.9": {"ab": "one", "beta": 1.9, "gate": "one"},
    "two keys in turn, β = 1": {"ab": "two", "beta": 1.0, "gate": "one"},
    "a transition that expands": {"ab": "large"},
    "a token": {"tokens": 1, "batch": 2},
    "a chunk and a token": {"tokens": 17, "heads": 2},
    "wide": {"k": 128, "v": 128, "tokens": 17},
    "widest": {"k": 256, "v": 72, "tokens": 17},
    "multiples of 8": {"k": 40, "v": 24, "gate": "mixed"},
    "values in slices": {"v": 136},
    "chunks of 64": {"config": {"chunk": 64}, "tokens": 70},
    "packed": {"lengths": [1, 0, 17, 0, 16]},
    "packed, steep": {"lengths": [3, 0, 18], "gate": "mixed"},
    "made again": {"policy": "recompute"},
    "no states": {"states": False},
    "tiles made again": {"config": {"keep_tiles": False}, "gate": "mixed"},
    "fp16": {"dtype": "float16"},
    "fp16, one key, β = 1.9": {
        "dtype": "float16",
        "ab": "one",
        "beta": 1.9,
        "gate": "one",
        "config": {"chunk": 32},
        "tokens": 40,
    },
    "fp16, what does not fit fp16": {"dtype": "float16", "ab": "huge"},
}
DEFAULTS = {
    "gate": "mild", "ab": "free", "beta": 1.0, "batch": 1, "tokens": 20, "heads": 1, "k": 32, "v": 32, "dtype": "float32",
    "states": True, "lengths": None, "policy": "", "exact": False, "config": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return run_as_script(__file__)


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_definition_in_value_and_every_gradient(case, found):
    options = DEFAULTS | CASES[case]
    limit = (ALIKE_TOLERANCE if options["ab"] in ("one", "two") else TOLERANCE)[options["dtype"]]
    errors = found["errors"][case]
    assert {"o", "dq", "dk", "dv", "da", "db"} <= set(errors)
    # dlog λ is a sum of products that largely cancel
    assert not {name: e for name, e in errors.items() if not e <= limit * (5 if name == "dx" else 1)}


@pytest.mark.parametrize(
    "claim",
    [
        "operators keep torch's rules",
        "one graph serves every length",
        "gradients go to the inputs that need one alone",
        "recomputing saves the inputs alone",
        "no tokens and no batch give empty results and gradients",
        "a state can be handed over at any token",
        "the delta rule is a case of it",
        "λ = 1 is no decay",
        "memory layout does not matter",
        "two runs give equal bits",
        "exact outputs are the same bits whatever follows",
        "the seam takes it where it is asked for",
        "a width without a kernel runs in plain torch",
    ],
)
def test_the_triton_dplr_scan(claim, found):
    assert found["claims"].get(claim) is True, found["claims"].get(claim)


def main():
    import os
    from dataclasses import replace

    import torch
    import torch.nn.functional as F

    from decay_core import kernel_seam
    from kernels import dplr_scan_triton as module
    from kernels.decay_source import DecaySource
    from kernels.delta_scan_naive import delta_scan_naive
    from kernels.dplr_scan_naive import dplr_scan_naive
    from kernels.dplr_scan_triton import dplr_scan_triton

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
            "mixed": DecaySource(x=levels[(x.abs() * 9).long() % 6]),
            "zero": DecaySource(x=torch.full(shape, -torch.inf)),
            "one": DecaySource(x=torch.zeros(shape)),
            "softplus": DecaySource(x=x, kind="softplus", slope=-1.0, gain=some, offset=some - 3),
            "floor": DecaySource(x=x, kind="floor", offset=0.9 * some),
        }[gate]

    def made(**options):
        """[q, k, v, a, b, x, gain, offset, state], the source, the case."""
        case = DEFAULTS | options
        lengths, heads, k, v = (case[name] for name in ("lengths", "heads", "k", "v"))
        batch, tokens, count = case["batch"], case["tokens"], case["batch"]
        if lengths is not None:
            batch, tokens, count = 1, sum(lengths), len(lengths)
        keys, dtype = (batch, tokens, heads, k), getattr(torch, case["dtype"])
        source = source_of(case["gate"], keys)
        key, a, b = (F.normalize(numbers(*keys, seed=seed), dim=-1) for seed in (3, 4, 5))
        if case["ab"] in ("one", "two"):
            key = key[:, torch.arange(tokens) % (1 if case["ab"] == "one" else 2)].contiguous()
            a, b = -case["beta"] * key, key
        elif case["ab"] == "delta":
            a, b = -1.9 * key, key if source is None else key * source.log_decay().exp()
        a, b = {"large": (3 * a, b), "a of zeros": (0 * a, b)}.get(case["ab"], (a, b))
        if case["ab"] == "huge":  # b·a does not fit fp16; odd tokens write what even ones read, and read nothing
            odd = (torch.arange(tokens) % 2 > 0)[:, None, None]
            a, b = 500 * a * odd, 500 * b * ~odd
        tensors = [y.to(dtype) for y in (numbers(*keys), key, numbers(*keys[:3], v, seed=6), a, b)]
        parts = [None] * 3 if source is None else [source.x, source.gain, source.offset]
        state = numbers(count, heads, k, v, seed=7) if case["states"] else None
        return [*tensors, *parts, state], source, case

    names = ("dq", "dk", "dv", "da", "db", "dx", "dgain", "doffset", "dstate")

    def outcome(scan, tensors, source, case, wide=False):
        leaves = [None if x is None else x.to(torch.float64 if wide else x.dtype).detach().requires_grad_() for x in tensors]
        lengths = case["lengths"]
        bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        *given, x, gain, offset, state = leaves
        decay = None if source is None else replace(source, x=x, gain=gain, offset=offset)
        o, final = scan(*given, decay, state, True, 0.3, bounds, case["exact"])
        weights = [numbers(*y.shape, seed=8).to(y.dtype) for y in (o, final)]
        named = {name: leaf for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
        grads = torch.autograd.grad([o, final], list(named.values()), weights, allow_unused=True)
        grads = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
        return {"o": o.detach(), "state": final.detach(), **grads}

    def difference(a, b, size=None):
        b = b.double().nan_to_num()
        norm = float(b.norm()) if size is None else size
        assert a.isfinite().all()
        return float((a.double() - b).norm()) / (norm if norm > 1e-30 else 1.0)

    report = {"errors": {}, "claims": {}}
    for name, options in CASES.items():
        tensors, source, case = made(**options)
        if case["config"]:
            whole = launchers[module.GRANULARITY]
            config = replace(whole.default_config(case["k"], case["v"], tensors[0].dtype), **case["config"])
            module._LAUNCHERS[module.GRANULARITY] = whole._replace(default_config=lambda *_, config=config: config)
        os.environ["DECAY_KERNEL_POLICY"] = case["policy"]
        ours, wanted = outcome(dplr_scan_triton, tensors, source, case), outcome(dplr_scan_naive, tensors, source, case, True)
        os.environ["DECAY_KERNEL_POLICY"] = ""
        module._LAUNCHERS.update(launchers)
        assert set(ours) == set(wanted), (name, set(ours) ^ set(wanted))
        # Where λ is 0 its gradient is nothing beside what it is made of.
        size = {"dx": max(float(wanted["dx"].nan_to_num().norm()), 1e-3 * float(wanted["dq"].norm()))} if "dx" in wanted else {}
        report["errors"][name] = {kind: difference(ours[kind], wanted[kind], size.get(kind)) for kind in wanted}

    def close(a, b):
        return difference(a, b) <= TOLERANCE["float32"]

    def claims():
        (*given, x, gain, offset, state), source, _ = made(gate="softplus", tokens=34)
        leaves = [*given, x, gain, offset, state]

        def scan(given, state=state, **options):
            return dplr_scan_triton(*given[:5], replace(source, x=given[5]), state, True, **options)

        whole, final = scan([*given, x])
        yield "two runs give equal bits", all(torch.equal(a, b) for a, b in zip(scan([*given, x]), (whole, final), strict=True))

        leaves = [(y if y.dim() < 3 or y is state else y[:, :10]).detach().clone().requires_grad_() for y in leaves]
        options = ("softplus", -1.0, 0.3, False, "")
        torch.library.opcheck(module._forward, (*leaves, None, *options, True, True))
        bounds = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
        packed = (*leaves[:8], None, bounds, *options[:4], "recompute", False, False)
        torch.library.opcheck(module._forward, packed, test_utils=("test_faketensor",))
        with torch.no_grad():
            plain = [y.detach() for y in leaves]
            o, end, *saved = module._forward(*plain, None, *options, True, True)
            torch.library.opcheck(
                module._backward, (*plain, None, saved, o, end, *options), test_utils=("test_schema", "test_faketensor")
            )
        yield "operators keep torch's rules", True

        def loss(q, k, v, a, b, x, gain, offset, state):
            made_of = DecaySource(x=x, kind="softplus", slope=-1.0, gain=gain, offset=offset)
            o, end = dplr_scan_triton(q, k, v, a, b, made_of, state, True)
            return o.square().sum() + end.square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        equal = []
        for tokens in (20, 33):
            some = [y.requires_grad_() for y in made(gate="softplus", tokens=tokens)[0]]
            with torch._dynamo.config.patch(error_on_recompile=tokens != 20):
                pairs = zip(*(torch.autograd.grad(f(*some), some) for f in (loss, compiled)), strict=True)
            equal += [torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs]
        yield "one graph serves every length", all(equal)

        every = torch.autograd.grad(loss(*leaves), leaves)
        alone = []
        for index in (0, 3, 5, 8):  # q, a, x and the state
            some = [y.detach().requires_grad_(i == index) for i, y in enumerate(leaves)]
            loss(*some).backward()
            alone.append(torch.equal(some[index].grad, every[index]))
            alone.append(all(y.grad is None for y in some if y is not some[index]))
        yield "gradients go to the inputs that need one alone", all(alone)

        def saved_entries():
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda y: sizes.append((y.data_ptr(), y.numel())) or y, lambda y: y):
                loss(*leaves)
            squares = 10 * 32 + 32 * 32  # of the loss itself
            return sum({p: size for p, size in sizes if size}.values()) - squares - sum(y.numel() for y in leaves)

        saving = saved_entries()
        os.environ["DECAY_KERNEL_POLICY"] = "recompute"
        recomputing = saved_entries()
        os.environ["DECAY_KERNEL_POLICY"] = ""
        yield "recomputing saves the inputs alone", (saving > 0 and recomputing == 0) or [saving, recomputing]

        shapes = []
        for batch, tokens in ((0, 5), (2, 0), (0, 0)):
            empty = [y.requires_grad_() for y in made(gate="softplus", batch=batch, tokens=tokens)[0]]
            loss(*empty).backward()
            shapes += [y.grad.shape == y.shape and not y.grad[y.grad != 0].numel() for y in empty[:8]]
        yield "no tokens and no batch give empty results and gradients", all(shapes)

        handed = []
        for t in (1, 16):
            first, middle = scan([y[:, :t] for y in (*given, x)])
            second, end = scan([y[:, t:] for y in (*given, x)], middle)
            handed += [close(torch.cat([first, second], dim=1), whole), close(end, final)]
        yield "a state can be handed over at any token", all(handed)

        (q, k, v, a, b, x_mild, _, _, state_0), _, _ = made(ab="delta")
        found = dplr_scan_triton(q, k, v, a, b, x_mild, state_0, True)
        wanted = delta_scan_naive(q, k, v, torch.full(q.shape[:3], 1.9), x_mild, False, state_0, True)
        yield "the delta rule is a case of it", all(close(a, b) for a, b in zip(found, wanted, strict=True))
        found = dplr_scan_triton(*given, torch.zeros_like(x), state, True)
        yield (
            "λ = 1 is no decay",
            all(close(a, b) for a, b in zip(found, dplr_scan_triton(*given, None, state, True), strict=True)),
        )
        strange = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in (*given, x)]
        strange[0] = strange[0].repeat_interleave(2, dim=3)[..., ::2]
        yield "memory layout does not matter", torch.equal(scan(strange)[0], whole)

        (*mixed, x_mixed, _, _, _), _, _ = made(gate="mixed")
        changed = [torch.cat([y[:, :11], y[:, 11:].flip(1)], dim=1) for y in (*mixed, x_mixed)]
        outputs = [dplr_scan_triton(*y, exact=True)[0] for y in ((*mixed, x_mixed), changed)]
        yield (
            "exact outputs are the same bits whatever follows",
            (torch.equal(*(o[:, :11] for o in outputs)) and not torch.equal(*outputs)),
        )

        os.environ["DECAY_KERNEL"] = "triton"
        asked = kernel_seam.explain_dplr_scan(q, v, x_mild) == "DPLR scan: triton (DECAY_KERNEL asks for it)"
        same = torch.equal(kernel_seam.dplr_scan(q, k, v, a, b, x_mild)[0], dplr_scan_triton(q, k, v, a, b, x_mild)[0])
        yield "the seam takes it where it is asked for", asked and same
        narrow = [y[..., :12] for y in (q, k, v, a, b, x_mild)]
        line = kernel_seam.explain_dplr_scan(narrow[0], narrow[2], narrow[5])
        right = close(kernel_seam.dplr_scan(*narrow)[0], dplr_scan_naive(*narrow)[0])
        yield "a width without a kernel runs in plain torch", (right and "chunked" in line and "K=12" in line) or line

    report["claims"] = dict(claims())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
