"""What is compiled ahead of a first call is what that call and its backward pass then launch.

No kernel of ours runs here: launches are listed, those for tensors that hold nothing beside those for the call's own.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
from kernels import decay_scan_triton as operators
from kernels import delta_scan_triton as delta_operators
from kernels.compile_ahead import compile_ahead
from kernels.launching import collecting, launch
from kernels.triton_scalar import default_config as scalar_config

CASES = {
    "scalar": {},
    "scalar, fp32": {"dtype": torch.float32},
    "scalar, wide": {"k": 128, "v": 128},
    "scalar, a formula": {"kind": "softplus", "parameters": True},
    "scalar, one long sequence": {"shape": (1, 4096, 2)},
    "scalar, recomputed": {"policy": "recompute"},
    "vector": {"vector": True},
    "vector, wide": {"vector": True, "k": 128, "v": 128},
    "vector, widest": {"vector": True, "k": 256, "v": 64},
    "vector, exact": {"vector": True, "exact": True},
    "vector, shared key": {"vector": True, "kind": "floor", "parameters": True, "shared": True},
    "vector, packed": {"vector": True, "shape": (1, 300, 2), "cu": [0, 100, 101, 300]},
    "vector, one long sequence": {"vector": True, "shape": (1, 4096, 2)},
    "vector, one long packed sequence": {"vector": True, "shape": (1, 4096, 2), "cu": [0, 4000, 4096]},
    "without a gradient": {"vector": True, "saved": False},
    "with states": {"vector": True, "states": True},
}


def described(planned):
    """All of a launch that a kernel is compiled for: tensors by their dtype."""
    return [
        (
            launch.kernel.__name__,
            launch.grid,
            {name: x.dtype if isinstance(x, torch.Tensor) else x for name, x in launch.arguments.items()},
            launch.options,
        )
        for launch in planned
    ]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_kernels_of_a_call_and_its_backward_pass_are_known_before_it(case, monkeypatch):
    (batch, tokens, heads), k, v = case.get("shape", (2, 70, 3)), case.get("k", 64), case.get("v", 64)
    dtype = case.get("dtype", torch.bfloat16)
    query, key, value = (torch.randn(batch, tokens, heads, dim, dtype=dtype) for dim in (k, k, v))
    x = torch.randn(batch, tokens, heads, *((k,) if case.get("vector") else ()))
    shape = (heads, k) if case.get("vector") else (heads,)
    gain, offset = (torch.rand(shape) if case.get("parameters") else None for _ in range(2))
    states = torch.zeros(batch, heads, k, v) if case.get("states") else None
    cu = torch.tensor(case["cu"], dtype=torch.int32) if "cu" in case else None
    given = query, None if case.get("shared") else key, value, x, gain, offset, states, cu
    formula = case.get("kind", "log"), 1.0, 1.0, case.get("exact", False), case.get("policy", "")
    saved = case.get("saved", True) and case.get("policy") != "recompute"
    ahead = []

    def listed(call):
        with collecting() as planned:
            call()
        ahead.extend(planned)

    monkeypatch.setattr(operators, "compile_ahead", listed)
    monkeypatch.setattr(operators, "_compiled", set())
    for _ in range(2):  # of a second call everything is known
        with collecting() as launched:
            o, _, kept = operators._scan(*given, *formula, states is not None, saved)
            if saved:
                rest = kept, torch.empty_like(o), None
                operators._gradients((*given, *rest), operators._Formula(*formula[:4]), formula[4], True)
    assert described(ahead) == described(launched) and len(launched) >= 1 + saved
    assert all(x.is_meta for launch in ahead for x in launch.arguments.values() if isinstance(x, torch.Tensor))


DELTA = {
    "no decay": {"dims": 0},
    "scalar": {},
    "scalar, wide, normalized keys": {"width": 128, "norm": True},
    "vector": {"dims": 4},
    "vector, packed": {"dims": 4, "cu": [0, 100, 101, 300]},
    "vector, exact": {"dims": 4, "exact": True},
    "evaluation": {"saved": False},
}


@pytest.mark.parametrize("case", DELTA.values(), ids=DELTA)
def test_the_delta_rules_kernels_are_known_before_a_call(case, monkeypatch):
    width, saved = case.get("width", 64), case.get("saved", True)
    batch, tokens = (1, 300) if "cu" in case else (2, 70)
    query, key, value = (torch.randn(batch, tokens, 3, width, dtype=torch.bfloat16) for _ in range(3))
    beta = torch.rand(batch, tokens, 3)
    x = {0: None, 3: -beta, 4: -query.square()}[case.get("dims", 3)]
    cu = torch.tensor(case["cu"], dtype=torch.int32) if "cu" in case else None
    given = query, key, value, beta, x, None, None, None, cu
    formula = "log", 1.0, 1.0, case.get("exact", False), True, case.get("norm", False), ""
    ahead = []

    def listed(call):
        with collecting() as planned:
            call()
        ahead.extend(planned)

    monkeypatch.setattr(delta_operators, "compile_ahead", listed)
    monkeypatch.setattr(delta_operators, "_compiled", set())
    for _ in range(2):  # of a second call everything is known
        with collecting() as launched:
            o, _, *kept = delta_operators._scan(*given, *formula, False, saved)
            if saved:
                delta_operators._scan_backward(*given, *kept, torch.empty_like(o), None, *formula)
    assert described(ahead) == described(launched) and len(launched) >= 2 + 2 * saved


def test_lengths_and_batches_do_not_compile_anew(monkeypatch):
    monkeypatch.setattr(operators, "_compiled", set())
    calls = []
    monkeypatch.setattr(operators, "compile_ahead", calls.append)
    for batch, tokens in ((1, 70), (2, 70), (2, 71), (3, 500)):
        with collecting():
            q = torch.randn(batch, tokens, 2, 64, dtype=torch.bfloat16)
            operators._scan(q, q, q, q, None, None, None, None, "log", 1.0, 1.0, False, "", False, True)
    assert len(calls) == 1


def test_each_configuration_has_its_own_list(monkeypatch):
    """The backward pass too, whose tensors are the same for both."""
    q = torch.randn(2, 70, 2, 64, dtype=torch.bfloat16)
    x = torch.randn(2, 70, 2)
    default = scalar_config(64, 64, torch.bfloat16)
    configs = [replace(default, backward=replace(default.backward, warps=warps)) for warps in (4, 8)]
    monkeypatch.setattr(operators, "compile_ahead", lambda call: None)
    for config in configs * 3:
        monkeypatch.setattr(operators, "chosen_config", lambda *_, config=config: (config, "the test"))
        with collecting() as launched:
            o, _, kept = operators._scan(q, q, q, x, *[None] * 4, "log", 1.0, 1.0, False, "", False, True)
            operators._scan_backward(q, q, q, x, *[None] * 4, kept, o, None, "log", 1.0, 1.0, False, "")
        assert [launch.options["num_warps"] for launch in launched] == [default.forward.warps, config.backward.warps]


class Kernel:
    """Stands for a Triton kernel: remembers what it is to be compiled for; `run` is where one is loaded."""

    arg_names = ("x", "y", "count", "WIDTH")

    def __init__(self, fails=False):
        self.warm, self.loaded, self.fails = [], 0, fails

    def warmup(self, *arguments, grid, **options):
        self.warm.append((arguments, grid, options))
        if self.fails:
            raise RuntimeError("out of registers")
        return self

    @property
    def run(self):
        self.loaded += 1


def ahead(*kernels):
    x = torch.empty(3, device="meta", dtype=torch.bfloat16)

    def call():
        for kernel in kernels:
            launch(kernel, (5,), {"WIDTH": 64, "y": None, "x": x, "count": 3}, num_warps=4)

    compile_ahead(call)


def test_kernels_are_compiled_for_what_they_are_launched_with_and_loaded():
    kernels = [Kernel(), Kernel()]
    ahead(*kernels)
    for kernel in kernels:
        assert kernel.warm == [((torch.bfloat16, None, 3, 64), (5,), {"num_warps": 4})] and kernel.loaded == 1


def test_one_kernel_is_left_to_its_launch():
    kernel = Kernel()
    ahead(kernel)
    assert not kernel.warm and not kernel.loaded


def test_what_fails_ahead_is_left_to_its_launch_and_spoils_nothing():
    for _ in range(2):
        ahead(Kernel(), Kernel(fails=True))
    good = Kernel()
    ahead(good, Kernel())
    assert good.loaded == 1


def test_inside_of_a_callers_own_mode_nothing_is_compiled_ahead():
    triton = pytest.importorskip("triton")
    kernel = Kernel()
    with ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool):
        ahead(kernel, Kernel())
    assert not kernel.warm
    ahead(kernel, Kernel())
    assert kernel.loaded == 1
