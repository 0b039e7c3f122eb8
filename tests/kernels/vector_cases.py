"""One call of the vector-decay kernels, in Triton's interpreter, against the definition in float64: the errors of all results.

Test files that take it run themselves as scripts (interpreted.py). Memory is filled with NaN before a kernel writes to it.
The interpreter knows no bf16 arithmetic, no tf32 and no races; the GPU tests are elsewhere.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

DEFAULTS: dict[str, Any] = {
    "gate": "mild", "kind": "log", "slope": 1.0, "gain": True, "offset": True, "shared": False, "lengths": None,
    "batch": 1, "tokens": 70, "heads": 1, "k": 32, "v": 32, "dtype": "float32", "x_dtype": "float32", "states": True,
    "exact": False, "segment": 512, "strided": False, "config": {},
}  # fmt: skip
# Relative norm of the difference. The interpreter cuts digits off where a GPU rounds to bf16.
TOLERANCE = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}


def tolerance(case: dict[str, Any], result: str) -> float:
    case = DEFAULTS | case
    return max(TOLERANCE[case["dtype"]], TOLERANCE[case["x_dtype"]] if result == "dx" else 0.0)


class Call:
    """Tensors for one case, the kernels' results from them, and the definition's. Imports torch and triton late."""

    def __init__(self, case: dict[str, Any], seed: int = 0) -> None:
        from dataclasses import replace

        import torch

        from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
        from kernels import triton_vector_spans as spans
        from kernels.triton_vector import default_config

        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)  # what torch.empty gives is filled with NaN
        self.case = DEFAULTS | case
        spans.SEGMENT_TOKENS = self.case["segment"]
        self.generator = torch.Generator().manual_seed(seed)
        batch, heads, k, v = (self.case[name] for name in ("batch", "heads", "k", "v"))
        lengths = self.case["lengths"]
        tokens = self.case["tokens"] if lengths is None else sum(lengths)
        dtype = getattr(torch, self.case["dtype"])
        self.q, self.k, self.v, self.do = (self.normal(batch, tokens, heads, n).to(dtype) for n in (k, k, v, v))
        if self.case["shared"]:
            self.k = None
        self.decay = self._source((batch, tokens, heads, k))
        if self.case["strided"]:
            self.q, self.v, self.do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (self.q, self.v, self.do))
        sequences = batch if lengths is None else len(lengths)
        states = self.case["states"]
        self.initial, self.d_final = (self.normal(sequences, heads, k, v) if states else None for _ in range(2))
        self.cu_seqlens = None
        if lengths is not None:
            self.cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        # bf16's own, also where wider tensors tell more: 64 tokens to a chunk
        self.config = replace(default_config(k, v, torch.bfloat16), **self.case["config"])
        self.scale = k**-0.5

    def normal(self, *sizes: int) -> Any:
        import torch

        return torch.randn(sizes, generator=self.generator)

    def uniform(self, *sizes: int) -> Any:
        import torch

        return torch.rand(sizes, generator=self.generator)

    def _source(self, shape: tuple[int, ...]) -> Any:
        import torch

        from kernels.decay_source import DecaySource

        kind, heads, k = self.case["kind"], shape[2], shape[3]
        dtype = getattr(torch, self.case["x_dtype"])
        if kind == "log":
            return DecaySource(x=self._log_decays(shape).to(dtype))
        wild = self.case["gate"] == "wild"
        x = (self.normal(*shape) * (12 if wild else 3)).to(dtype)
        gain = self.uniform(heads, k) * (16 if wild else 2) if kind == "softplus" and self.case["gain"] else None
        offset = self.normal(heads, k) if kind == "softplus" else self.uniform(heads, k)
        return DecaySource(x=x, kind=kind, slope=self.case["slope"], gain=gain, offset=offset if self.case["offset"] else None)

    def _log_decays(self, shape: tuple[int, ...]) -> Any:
        import torch
        import torch.nn.functional as F

        normal, uniform = self.normal(*shape), self.uniform(*shape)
        levels = torch.tensor([0.0, 1e-45, 2.0**-150, 1e-8, 0.2, 0.999, 1.0], dtype=torch.float64).log().float()
        mild = F.logsigmoid(normal + 3)
        return {
            "mild": mild,
            "fast": F.logsigmoid(2 * normal - 1),
            "mixed": levels[(len(levels) * uniform).long()],
            "channels": torch.where(torch.arange(shape[-1]) % 4 == 0, -120 * uniform, mild),
            "one steep channel": torch.where(torch.arange(shape[-1]) == 5, -120 * uniform, mild),
            "zero": torch.full(shape, -torch.inf),
            "one": torch.zeros(shape),
            "alternating": torch.where(torch.arange(shape[1])[:, None, None] % 2 == 0, -torch.inf, torch.zeros(shape)),
            "denormal": torch.full(shape, 1e-45, dtype=torch.float64).log().float(),
        }[self.case["gate"]]

    def forward(self, **others: Any) -> tuple[Any, Any, Any]:
        from kernels.triton_vector import forward

        tensors = {"q_bthk": self.q, "k_bthk": self.k, "v_bthv": self.v, "decay": self.decay, "want_saved": True}
        tensors |= {"initial_state_nhkv": self.initial, "want_state": self.case["states"], "cu_seqlens": self.cu_seqlens}
        return forward(**{**tensors, "scale": self.scale, "config": self.config, "exact": self.case["exact"], **others})

    def backward(self, saved: Any) -> Any:
        from kernels.triton_vector import backward

        return backward(
            self.q, self.k, self.v, self.decay, self.scale, self.initial, saved, self.do, self.d_final, self.config,
            cu_seqlens=self.cu_seqlens, exact=self.case["exact"],
        )  # fmt: skip

    def definition(self) -> dict[str, Any]:
        """Results of decay_scan_naive in float64, sequence by sequence; where λ = 0 its gradient is 0 · inf, made 0."""
        import torch

        from kernels.decay_scan_naive import decay_scan_naive
        from kernels.decay_source import DecaySource

        def leaf(x: Any) -> Any:
            return None if x is None else x.double().requires_grad_()

        given = {"dq": self.q, "dk": self.k, "dv": self.v, "dx": self.decay.x, "dgain": self.decay.gain}
        given |= {"doffset": self.decay.offset, "dinitial_state": self.initial}
        leaves = {name: leaf(x) for name, x in given.items()}
        source = DecaySource(
            x=leaves["dx"], kind=self.decay.kind, slope=self.decay.slope, gain=leaves["dgain"], offset=leaves["doffset"]
        )
        k = source.shared_key() if self.k is None else leaves["dk"]
        rows = (leaves["dq"], k, leaves["dv"], source.log_decay())
        if self.cu_seqlens is None:
            outputs = [decay_scan_naive(*rows, leaves["dinitial_state"], output_final_state=True)]
        else:
            bounds = self.cu_seqlens.tolist()
            outputs = []
            for n, (a, b) in enumerate(pairwise(bounds)):
                state = None if self.initial is None else leaves["dinitial_state"][n : n + 1]
                outputs.append(decay_scan_naive(*(x[:, a:b] for x in rows), state, output_final_state=True))
        o = self.scale * torch.cat([o for o, _ in outputs], dim=1)
        final = torch.cat([state for _, state in outputs])
        total = (o * self.do.double()).sum()
        if self.d_final is not None:
            total = total + (final * self.d_final.double()).sum()
        asked = {name: x for name, x in leaves.items() if x is not None}
        gradients = torch.autograd.grad(total, list(asked.values()))
        results = dict(zip(asked, gradients, strict=True)) | {"o": o.detach()}
        if self.initial is not None:
            results["final_state"] = final.detach()
        return {name: x.nan_to_num(0.0) for name, x in results.items()}

    def errors(self) -> dict[str, float]:
        from kernels.triton_vector import saved_like

        o, final, saved = self.forward()
        if saved is not None:
            assert (saved.shape, saved.dtype) == saved_like(self.q, self.v, self.config, self.cu_seqlens)
        gradients = {f"d{name}": x for name, x in self.backward(saved)._asdict().items()}
        found = {"o": o, "final_state": final, **gradients}
        found = {name: x for name, x in found.items() if x is not None}
        wanted = self.definition()
        assert set(found) == set(wanted), (set(found), set(wanted))
        assert found["dx"].dtype == self.decay.x.dtype
        # dlog λ is a difference of such terms, and next to nothing where λ is
        floors = {"dx": 0.1 * float((self.q.double() * wanted["dq"]).norm())}
        return {name: distance(x, wanted[name], floors.get(name, 1e-6)) for name, x in found.items()}


def distance(found: Any, wanted: Any, floor: float = 1e-6) -> float:
    assert found.shape == wanted.shape and found.isfinite().all(), (found.shape, wanted.shape)
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=floor))
