"""Inputs of the GPU tests and their comparison with the definition in float64."""

import dataclasses

import pytest
import torch

from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
from kernels.decay_scan_chunked import decay_scan_chunked
from kernels.decay_source import DecaySource

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
both = pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])

# Relative norms. 16-bit inputs are given as they are to both: what is measured is the kernels' own rounding.
OUTPUT = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 2e-5}
DECAY_GRADIENT = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 1e-4}
OF_THE_DECAY = ("dx", "dgain", "doffset")
LEVELS = [0.0, 1e-45, 2.0**-150, 1e-8, 0.2, 0.8, 0.999, 1.0]
FORMULAS = ["log", "simple", "mamba2", "gla", "hgrn2"]


@dataclasses.dataclass
class Call:
    """The arguments of one scan: q, k (None: 1 - λ), v, what makes the decay, and the initial state or None."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor
    source: DecaySource
    state: torch.Tensor | None = None

    def leaves(self, dtype=None):
        """{name: tensor that a gradient is asked of}, in their own dtype or in another."""
        named = {"q": self.q, "k": self.k, "v": self.v, "x": self.source.x, "gain": self.source.gain}
        named |= {"offset": self.source.offset, "state": self.state}
        given = {name: x for name, x in named.items() if x is not None}
        return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in given.items()}

    def run(self, scan, leaves, want_state=True, **options):
        """(o, state) of a scan over such leaves."""
        x, gain, offset = (leaves.get(name) for name in ("x", "gain", "offset"))
        source = dataclasses.replace(self.source, x=x, gain=gain, offset=offset)
        return scan(leaves["q"], leaves.get("k"), leaves["v"], source, leaves.get("state"), want_state, **options)


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def levels(*shape, seed=1):
    """log λ, each of LEVELS by chance."""
    chosen = torch.tensor(LEVELS, dtype=torch.float64, device="cuda").log().float()
    return chosen[(normal(*shape, seed=seed).abs() * 1000).long() % len(LEVELS)]


def call(vector, decay="log", shape=(2, 333, 3), k=64, v=64, dtype=torch.bfloat16, state=False, shared=False, sequences=None):
    """decay: a formula of FORMULAS, or log λ itself."""
    source = decay if isinstance(decay, DecaySource) else DecaySource(x=decay) if torch.is_tensor(decay) else None
    source = made(decay, (*shape, k) if vector else shape, dtype) if source is None else source
    initial = normal(shape[0] if sequences is None else sequences, shape[2], k, v, seed=5) if state else None
    key = None if shared else normal(*shape, k, seed=3, dtype=dtype)
    return Call(normal(*shape, k, seed=2, dtype=dtype), key, normal(*shape, v, seed=4, dtype=dtype), source, initial)


def made(formula, shape, dtype):
    """What makes a decay as a model has it: the activation in the model's dtype, parameters in fp32."""
    x = 2 * normal(*shape, seed=6)
    some = normal(*shape[2:], seed=7).sigmoid()
    if formula == "log":
        return DecaySource(x=torch.nn.functional.logsigmoid(x + 3))
    kinds = {
        "simple": DecaySource(x=x.to(dtype), kind="softplus", slope=-1.0, offset=-4 * some),
        "mamba2": DecaySource(x=x.to(dtype), kind="softplus", gain=1 + 15 * some, offset=-4 * some),
        "gla": DecaySource(x=x.to(dtype), kind="softplus", slope=-1 / 16),
        "hgrn2": DecaySource(x=x.to(dtype), kind="floor", offset=0.95 * some),
    }
    return kinds[formula]


def outcome(scan, call, dtype=None, **options):
    """{"o", "state", "dq", ...}: what a scan gives for a fixed do and dstate."""
    leaves = call.leaves(dtype)
    o, state = call.run(scan, leaves, **options)
    given = [normal(*o.shape, seed=8).to(call.v.dtype).to(o.dtype), normal(*state.shape, seed=9).to(state.dtype)]
    grads = torch.autograd.grad([o, state], list(leaves.values()), given, allow_unused=True)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {"o": o.detach(), "state": state.detach(), **named}


def relative(found, wanted):
    found, wanted = found.detach(), wanted.detach()
    assert found.shape == wanted.shape and found.isfinite().all()
    wanted = wanted.double().nan_to_num()  # the definition's own gradient at λ = 0 is 0 · inf
    # where next to nothing is left of a number, fp32 has nothing left
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-12))


def compare(call, dtype=torch.bfloat16, slack=1.0, **options):
    """Asserts that outputs and gradients are the definition's, within the dtype's limits; returns the errors."""
    from kernels.decay_scan_triton import decay_scan_triton

    found, wanted = outcome(decay_scan_triton, call, **options), outcome(decay_scan_chunked, call, torch.float64, **options)
    assert set(found) == set(wanted)
    if call.source.kind == "log":  # where λ is 0 in fp32 nothing is asked of its gradient
        alive = call.source.x > -100
        found["dx"], wanted["dx"] = found["dx"][alive], wanted["dx"][alive]
    errors = {name: relative(found[name], wanted[name]) for name in wanted}
    for name, error in errors.items():
        limit = (DECAY_GRADIENT if name in OF_THE_DECAY else OUTPUT)[dtype]
        assert error <= slack * limit, errors
    return errors
