"""What is compiled ahead of a first call is what that call and its backward pass then launch.

No kernel runs here: launches are listed, those for tensors that hold nothing beside those for the call's own.
"""

import pytest
import torch

from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
from kernels import decay_scan_triton as operators
from kernels.launching import collecting

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
                operators._scan_backward(*given, kept, torch.empty_like(o), None, *formula)
    assert described(ahead) == described(launched) and len(launched) >= 1 + saved
    assert all(x.is_meta for launch in ahead for x in launch.arguments.values() if isinstance(x, torch.Tensor))
