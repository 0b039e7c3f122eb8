"""The Triton scans as torch operators: the definition's numbers and gradients for every source, and torch's rules kept.

They run in Triton's interpreter, which must be chosen before triton is imported: one process of its own (this file as a script)
computes everything and prints it, the tests read it. bf16 and compiling to a GPU are for test_triton_gpu.py.
"""

import json
import os

import pytest
from interpreted import run_as_script

GRANULARITIES = ["scalar", "vector"]
FORMULAS = ["log", "simple", "mamba2", "gla", "hgrn2"]
DECAYS = ["mild", "zero", "one", "mixed"]
TOLERANCE = 2e-5  # relative norm, fp32


def cases():
    """Name -> (granularity, formula or decay, options of the case)."""
    table = {}
    for granularity in GRANULARITIES:
        table |= {f"{granularity}, {formula}": (granularity, formula, {}) for formula in FORMULAS}
        table |= {f"{granularity}, λ {decay}": (granularity, decay, {}) for decay in DECAYS[1:]}
        options = {
            "states": {"state": True},
            "packed": {"lengths": [1, 0, 17, 2, 0, 13], "state": True},
            "recomputed": {"policy": "recompute"},
            "packed, recomputed": {"lengths": [1, 0, 17, 2, 0, 13], "policy": "recompute"},
            "a token": {"length": 1, "state": True},
            "K 40, V 24": {"k": 40, "v": 24},
        }
        table |= {f"{granularity}, {name}": (granularity, "gentle", option) for name, option in options.items()}
    table |= {f"shared key, {formula}": ("vector", formula, {"shared": True}) for formula in ("log", "hgrn2", "mixed")}
    table |= {f"exact, {name}": ("vector", name, {"exact": True}) for name in ("mamba2", "mixed")}
    table["exact, packed, shared key"] = ("vector", "hgrn2", {"exact": True, "lengths": [1, 0, 17, 12], "shared": True})
    return table


@pytest.fixture(scope="module")
def found():
    return run_as_script(__file__)


@pytest.mark.parametrize("case", cases())
def test_operators_are_the_definition_in_value_and_every_gradient(case, found):
    errors = found["errors"][case]
    assert {"o", "dq", "dv", "dx"} <= set(errors)
    # dlog λ is a sum of products that largely cancel
    late = {name: error for name, error in errors.items() if not error <= TOLERANCE * (2 if name == "dx" else 1)}
    assert not late


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "claim",
    [
        "operators keep torch's rules",
        "one graph serves every length",
        "gradients go to the inputs that need one alone",
        "without gradients nothing is saved",
        "recomputing saves the inputs alone",
        "recomputing gives the same",
        "a second backward pass gives the same bits",
        "no tokens and no batch give empty results and gradients",
        "a state can be handed over at any token",
        "decoding is the parallel form",
        "outputs are the same bits whatever follows",
        "shifting the chunk boundaries changes nothing",
        "the scan is linear in v",
        "memory layout does not matter",
        "two runs give equal bits",
        "a call done from its list gives the same bits",
    ],
)
def test_the_triton_scan(claim, granularity, found):
    assert found["claims"][granularity].get(claim) is True, found["claims"][granularity].get(claim)


@pytest.mark.parametrize(
    "claim",
    [
        "the seam takes it where it is asked for and fuses",
        "a width without a kernel runs in plain torch and says so once",
        "a dtype without a kernel is refused",
        "an unknown policy is refused",
        "autocast changes nothing",
        "one token without gradients is the kernel for one",
        "the configuration and its origin are told",
    ],
)
def test_choice(claim, found):
    assert found["choice"].get(claim) is True, found["choice"].get(claim)


def main():
    import logging

    import torch
    import torch.nn.functional as F

    from decay_core import kernel_seam
    from kernels import decay_scan_triton as module
    from kernels import replay
    from kernels.decay_scan_naive import decay_scan_naive
    from kernels.decay_scan_triton import decay_scan_triton
    from kernels.decay_source import DecaySource

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    names = ("dq", "dk", "dv", "dx", "dgain", "doffset", "dstate")

    def numbers(*shape, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))

    def decay_of(formula, shape):
        """[x, gain, offset] of a formula, or log λ of a kind of decay."""
        x, parameters = 2 * numbers(*shape, seed=1), shape[2:]
        some = torch.rand(parameters, generator=torch.Generator().manual_seed(2)) + 0.05
        levels = torch.tensor([0.0, 1.0, 1e-45, 1e-8, 0.2, 0.999], dtype=torch.float64).log().float()
        return {
            "log": [F.logsigmoid(x + 1), None, None],
            "simple": [x, None, -4 * some],
            "mamba2": [x, 8 * some, some - 2],
            "gentle": [x, some, some - 4],  # no chunk of it is so steep that it is done twice
            "gla": [x, None, None],
            "hgrn2": [x, None, 0.9 * some.clamp(max=1)],
            "mild": [F.logsigmoid(x + 1), None, None],
            "zero": [torch.full(shape, -torch.inf), None, None],
            "one": [torch.zeros(shape), None, None],
            "mixed": [levels[(numbers(*shape, seed=3).abs() * 9).long() % 6], None, None],
        }[formula]

    def source(formula, x, gain, offset):
        softplus = ("simple", "mamba2", "gentle", "gla")
        kind = "softplus" if formula in softplus else "floor" if formula == "hgrn2" else "log"
        slope = {"simple": -1.0, "gla": -1 / 16}.get(formula, 1.0)
        return DecaySource(x=x, kind=kind, slope=slope, gain=gain, offset=offset)

    def tensors_of(granularity, formula, *, batch=1, length=37, heads=2, k=16, v=16, lengths=None, state=False, shared=False):
        batch, length, sequences = (batch, length, batch) if lengths is None else (1, sum(lengths), len(lengths))
        rows = (batch, length, heads)
        decay = decay_of(formula, (*rows, k) if granularity == "vector" else rows)
        key = None if shared else numbers(*rows, k, seed=4)
        initial = numbers(sequences, heads, k, v, seed=5) if state else None
        return [numbers(*rows, k), key, numbers(*rows, v, seed=6), *decay, initial]

    def outcome(scan, formula, tensors, wide=False, lengths=None, exact=False):
        leaves = [None if x is None else x.to(torch.float64 if wide else x.dtype).detach().requires_grad_() for x in tensors]
        bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        q, k, v, *decay, initial = leaves
        o, state = scan(q, k, v, source(formula, *decay), initial, True, 0.3, bounds, exact)
        weights = [numbers(*y.shape, seed=7).to(y.dtype) for y in (o, state)]
        given = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad([o, state], given, weights, allow_unused=True)
        there = [name for name, leaf in zip(names, leaves, strict=True) if leaf is not None]
        return {"o": o.detach(), "state": state.detach(), **{n: g for n, g in zip(there, grads, strict=True) if g is not None}}

    def difference(a, b, size=None):
        b = b.double().nan_to_num()
        norm = float(b.norm()) if size is None else size
        return float((a.double() - b).norm()) / (norm if norm > 1e-30 else 1.0)

    report = {"errors": {}, "claims": {}, "choice": {}}
    for case, (granularity, formula, options) in cases().items():
        options = dict(options)
        policy, exact = options.pop("policy", ""), options.pop("exact", False)
        tensors, lengths = tensors_of(granularity, formula, **options), options.get("lengths")
        os.environ["DECAY_KERNEL_POLICY"] = policy
        ours = outcome(decay_scan_triton, formula, tensors, lengths=lengths, exact=exact)
        wanted = outcome(decay_scan_naive, formula, tensors, True, lengths)
        assert set(ours) == set(wanted), (case, set(ours) ^ set(wanted))
        # Where λ is 0 its gradient is nothing beside what it is made of.
        size = {"dx": max(float(wanted["dx"].nan_to_num().norm()), 1e-3 * float(wanted["dq"].norm()))}
        report["errors"][case] = {name: difference(ours[name], wanted[name], size.get(name)) for name in wanted}
    os.environ["DECAY_KERNEL_POLICY"] = ""

    def scan(*arguments, **options):
        return decay_scan_triton(*arguments, **options)

    def close(a, b):
        return difference(a, b) <= TOLERANCE

    def saved_entries(call):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append((x.data_ptr(), x.numel())) or x, lambda x: x):
            call()
        return sum({pointer: size for pointer, size in sizes if size}.values())

    def claims(granularity):
        vector = granularity == "vector"
        one = {"heads": 1, "state": True}
        q, k, v, x, gain, offset, state = tensors_of(granularity, "gentle", length=70, **one)
        decay = source("gentle", x, gain, offset)
        whole, final = scan(q, k, v, decay, state, True)
        yield "two runs give equal bits", torch.equal(whole, scan(q, k, v, decay, state, True)[0])

        leaves = [y.requires_grad_() for y in tensors_of(granularity, "gentle", length=20, **one)]
        formula = ("softplus", 1.0, 0.3, False, "")
        bounds = torch.tensor([0, 3, 3, 20], dtype=torch.int32)
        torch.library.opcheck(module._forward, (*leaves, None, *formula, True, True))
        # Nothing saved: of packed sequences some room for states is never filled, and opcheck would compare it.
        packed = (*leaves[:4], None, None, None, bounds, *formula[:4], "recompute", False, False)
        torch.library.opcheck(module._forward, packed)
        with torch.no_grad():
            plain = [y.detach() for y in leaves]
            o, end, saved = module._forward(*plain, None, *formula, True, True)
            torch.library.opcheck(module._backward, (*plain, None, saved, o, end, *formula))
            if vector:
                plain[1] = None
                torch.library.opcheck(module._backward, (*plain, None, saved, o, None, *formula))
        yield "operators keep torch's rules", True

        def loss(q, k, v, x, gain, offset, state):
            o, end = decay_scan_triton(q, k, v, source("gentle", x, gain, offset), state, True)
            return o.square().sum() + end.square().sum()

        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        equal = []
        for length in (40, 70, 33):
            given = [y.requires_grad_() for y in tensors_of(granularity, "gentle", length=length, **one)]
            with torch._dynamo.config.patch(error_on_recompile=length != 40):
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

        with torch.no_grad():
            yield "without gradients nothing is saved", saved_entries(lambda: loss(*leaves)) == 0
        squares = 20 * 16 + 16 * 16  # of the loss itself
        inputs = sum(y.numel() for y in leaves)
        saving = saved_entries(lambda: loss(*leaves)) - squares - inputs
        os.environ["DECAY_KERNEL_POLICY"] = "recompute"
        recomputing = saved_entries(lambda: loss(*leaves)) - squares - inputs
        again = torch.autograd.grad(loss(*leaves), leaves)
        os.environ["DECAY_KERNEL_POLICY"] = ""
        yield "recomputing saves the inputs alone", (saving > 0 and recomputing == 0) or [saving, recomputing]
        yield "recomputing gives the same", all(close(a, b) for a, b in zip(again, every, strict=True))

        wide = tensors_of(granularity, "mild", length=64, k=32, v=32, state=True)  # where a scalar dq fits the states' place
        given = [y.requires_grad_() for y in wide if y is not None]
        o, end = scan(given[0], given[1], given[2], given[3], given[4], True)
        passes = [torch.autograd.grad([o, end], given, [o, end], retain_graph=True) for _ in range(2)]
        kept = o.grad_fn.saved_tensors[-1].data_ptr()
        same = [torch.equal(a, b) for a, b in zip(*passes, strict=True)]
        same += [(passes[0][0].data_ptr() == kept) == (not vector), passes[1][0].data_ptr() != kept]
        o, end = scan(given[0], given[1], given[2], given[3], given[4], True)
        for _ in range(4):  # each is added where the first one lies
            torch.autograd.backward([o, end], [o.detach(), end.detach()], retain_graph=True)
        same += [close(y.grad, 4 * first) for y, first in zip(given, passes[0], strict=True)]
        yield "a second backward pass gives the same bits", all(same) or same

        shapes = []
        for batch, length in ((0, 5), (2, 0), (0, 0)):
            empty = [y.requires_grad_() for y in tensors_of(granularity, "gentle", batch=batch, length=length, **one)]
            loss(*empty).backward()
            o, end = decay_scan_triton(*empty[:3], source("gentle", *empty[3:6]), empty[6], True)
            shapes.append(o.shape == (batch, length, 1, 16) and end.shape == (batch, 1, 16, 16))
            shapes += [y.grad.shape == y.shape and not y.grad[y.grad != 0].numel() for y in empty[:6]]
        yield "no tokens and no batch give empty results and gradients", all(shapes)

        handed = []
        for t in (1, 17, 64, 69):
            parts = [(q[:, a:b], k[:, a:b], v[:, a:b], source("gentle", x[:, a:b], gain, offset)) for a, b in ((0, t), (t, 70))]
            first, middle = scan(*parts[0], state, True)
            second, end = scan(*parts[1], middle, True)
            handed += [close(torch.cat([first, second], dim=1), whole), close(end, final)]
        yield "a state can be handed over at any token", all(handed)

        outputs, current = [], state
        with torch.no_grad():
            for t in range(20):
                step = (y[:, t : t + 1] for y in (q, k, v, x))
                *step, x_t = step
                o, current = scan(*step, source("gentle", x_t, gain, offset), current, True)
                outputs.append(o)
            early = [y[:, :20] for y in (q, k, v)]
            o, end = scan(*early, source("gentle", x[:, :20], gain, offset), state, True)
        yield "decoding is the parallel form", close(torch.cat(outputs, dim=1), o) and close(current, end)

        same = []
        mixed = tensors_of(granularity, "mixed", length=70, heads=1)[3]
        options = {"exact": True} if vector else {}
        for t in (0, 20, 63, 64):
            later = [torch.cat([y[:, : t + 1], y[:, t + 1 :].flip(1)], dim=1) for y in (q, k, v, mixed)]
            before, after = (scan(*arguments, state, **options)[0] for arguments in ((q, k, v, mixed), later))
            same.append(torch.equal(before[:, : t + 1], after[:, : t + 1]) and not torch.equal(before, after))
        yield "outputs are the same bits whatever follows", all(same)

        shifted = []
        for p in (1, 13, 40):
            nothing = [torch.cat([torch.zeros_like(y[:, :1]).expand(-1, p, *y.shape[2:]), y], dim=1) for y in (q, k, v, mixed)]
            shifted.append(close(scan(*nothing)[0][:, p:], scan(q, k, v, mixed)[0]))
        yield "shifting the chunk boundaries changes nothing", all(shifted)
        other = v.flip(1)
        sums = 2 * scan(q, k, v, mixed)[0] - 3 * scan(q, k, other, mixed)[0]
        yield "the scan is linear in v", close(scan(q, k, 2 * v - 3 * other, mixed)[0], sums)
        strange = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in (q, k, v, x)]
        strange[0] = strange[0].repeat_interleave(2, dim=3)[..., ::2]
        strange_source = source("gentle", strange.pop(), gain, offset)
        yield "memory layout does not matter", torch.equal(scan(*strange, strange_source, state)[0], whole)

        lists = [
            ("mamba2", {"lengths": [1, 0, 17, 2], "state": True}),
            ("hgrn2", {"shared": vector, "length": 20}),
            ("mixed", {}),
        ]
        same = []
        for formula, options in lists:
            given, lengths = tensors_of(granularity, formula, **options), options.get("lengths")
            replay._lists.clear()
            others = [y if y is None or i in (4, 5) else y.roll(1, dims=1) for i, y in enumerate(given)]
            once, _, again = (outcome(decay_scan_triton, formula, y, lengths=lengths) for y in (given, others, given))
            same.append(sum(isinstance(x, replay._List) for x in replay._lists.values()) == 2)
            same += [torch.equal(once[name], again[name]) for name in once]
        yield "a call done from its list gives the same bits", all(same) or same

    for granularity in GRANULARITIES:
        report["claims"][granularity] = dict(claims(granularity))

    def refused(words, call):
        try:
            call()
        except ValueError as error:
            return words in str(error) or str(error)
        return False

    choice = report["choice"]
    q, k, v, x, *_ = tensors_of("vector", "mild", length=20)
    os.environ["DECAY_KERNEL"] = "triton"
    asked = kernel_seam.explain_decay_scan(q, v, x) == "decay scan: triton (DECAY_KERNEL asks for it)"
    fused = kernel_seam.fuses(q, v)
    o, _ = kernel_seam.decay_scan(q, k, v, x)
    same = torch.equal(o, decay_scan_triton(q, k, v, x)[0])
    choice["the seam takes it where it is asked for and fuses"] = asked and fused and same
    with torch.autocast("cpu", torch.bfloat16):
        choice["autocast changes nothing"] = torch.equal(kernel_seam.decay_scan(q, k, v, x)[0], o)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("kernels.select_kernel").addHandler(handler)
    narrow = [y[..., :12] for y in (q, k, v, x)]
    results = [kernel_seam.decay_scan(*narrow)[0] for _ in range(2)]
    told = said == ["K=12 is no multiple of 8 up to 256; the scan in plain torch runs instead"]
    explained = "chunked" in (line := kernel_seam.explain_decay_scan(narrow[0], narrow[2], narrow[3])) and "K=12" in line
    right = close(results[0], decay_scan_naive(*narrow)[0])
    formed = not kernel_seam.fuses(narrow[0], narrow[2])
    fell_back = told and explained and right and formed
    choice["a width without a kernel runs in plain torch and says so once"] = fell_back or [said, line]
    words = "have no torch.float64; take decay_scan_chunked"
    doubles = [y.double() for y in (q, k, v, x)]
    choice["a dtype without a kernel is refused"] = refused(words, lambda: decay_scan_triton(*doubles))
    fields, origin = kernel_seam.explain_configuration(q, v, x)
    told = origin == "default" and "policy save" in fields and "chunk " in fields
    os.environ["DECAY_KERNEL_POLICY"] = "recompute"
    _, origin = kernel_seam.explain_configuration(q, v, x)
    choice["the configuration and its origin are told"] = told and origin == "default, DECAY_KERNEL_POLICY=recompute"
    os.environ["DECAY_KERNEL_POLICY"] = "keep"
    words = "DECAY_KERNEL_POLICY=keep: unknown policy; set it to one of save, recompute or unset it"
    choice["an unknown policy is refused"] = refused(words, lambda: decay_scan_triton(q, k, v, x))
    os.environ["DECAY_KERNEL_POLICY"] = ""
    steps, step = [], module.decay_step_triton
    module.decay_step_triton = lambda *arguments: steps.append(1) or step(*arguments)
    one = [y[:, :1] for y in (q, k, v, x)]
    decay_scan_triton(*one, None, True)
    stepped = len(steps)
    decay_scan_triton(*one)
    decay_scan_triton(*(y.clone().requires_grad_() for y in one), None, True)
    choice["one token without gradients is the kernel for one"] = (stepped, len(steps)) == (1, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
