"""A call of the decay scan that does not fit is refused in one line that names the argument, its shape and the remedy."""

import pytest
import torch

from decay_core import kernel_seam  # makes kernels/ importable
from kernels.decay_scan_chunked import decay_scan_chunked
from kernels.decay_scan_naive import decay_scan_naive
from kernels.decay_source import DecaySource

B, T, H, K, V = 1, 6, 2, 4, 8
ones = torch.ones
SCANS = [decay_scan_naive, decay_scan_chunked, kernel_seam.decay_scan]


def fitting(**changes):
    """The arguments of a good call, with some of them changed."""
    vector = {"q": ones(B, T, H, K), "k": ones(B, T, H, K), "v": ones(B, T, H, V), "decay": -ones(B, T, H, K)}
    arguments = vector | changes
    named = ("q", "k", "v", "decay", "initial_state")
    return [arguments.pop(name, None) for name in named], arguments


def source(kind="softplus", **fields):
    return DecaySource(x=torch.ones(B, T, H, K), kind=kind, **fields)


REFUSED = {
    "q of three axes": ({"q": ones(T, H, K)}, "q of shape (6, 2, 4) is not (B, T, H, K); give it four axes"),
    "k of another length": ({"k": ones(B, 5, H, K)}, "k of shape (1, 5, 2, 4) differs from q's (1, 6, 2, 4); give both"),
    "k of one head": ({"k": ones(B, T, 1, K)}, "k of shape (1, 6, 1, 4) differs"),
    "v of other heads": ({"v": ones(B, T, 3, V)}, "v of shape (1, 6, 3, 8) does not go with q's"),
    "v of three axes": ({"v": ones(B, T, V)}, "v of shape (1, 6, 8) does not go with q's"),
    "a decay per pair": ({"decay": ones(B, T, H, 2)}, "decay of shape (1, 6, 2, 2) is neither (1, 6, 2), one λ per head, nor"),
    "a decay of the heads alone": ({"decay": ones(H)}, "decay of shape (2,) is neither"),
    "a shared key of one λ a head": ({"k": None, "decay": ones(B, T, H)}, "decay of shape (1, 6, 2) is one λ per head"),
    "a state of another width": ({"initial_state": ones(B, H, V, K)}, "initial_state of shape (1, 2, 8, 4) is not (1, 2, 4"),
    "a state for each of two sequences": (
        {"initial_state": ones(B, H, K, V), "cu_seqlens": torch.tensor([0, 2, 6])},
        "initial_state of shape (1, 2, 4, 8) is not (2, 2, 4, 8)",
    ),
    "no scale": ({"scale": 0.0}, "scale is 0.0: it must be a positive finite number"),
    "an infinite scale": ({"scale": float("inf")}, "scale is inf"),
    "whole numbers": ({"v": ones(B, T, H, V, dtype=torch.int64)}, "v of shape (1, 6, 2, 8) is torch.int64; cast it"),
    "two kinds of half": (
        {"q": ones(B, T, H, K).half(), "k": ones(B, T, H, K).bfloat16()},
        "k of shape (1, 6, 2, 4) is torch.bfloat16 beside q's torch.float16; cast one",
    ),
    "a wider value": ({"v": ones(B, T, H, V).double()}, "v of shape (1, 6, 2, 8) is float64 and would be computed with in"),
    "another device": ({"k": ones(B, T, H, K, device="meta")}, "k of shape (1, 6, 2, 4) lies on meta and q on cpu; move it"),
    "packed rows": (
        {name: ones(2, *x.shape[1:]) for name, x in zip("qkv", fitting()[0], strict=False)}
        | {"decay": ones(2, T, H), "cu_seqlens": torch.tensor([0, 6])},
        "q of shape (2, 6, 2, 4) has more than one row",
    ),
    "float boundaries": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens of shape (2,) is torch.float32; make it int32"),
    "boundaries in two axes": ({"cu_seqlens": torch.tensor([[0, 6]])}, "cu_seqlens of shape (1, 2) is not (N + 1,)"),
    "an unknown formula": ({"decay": source("sigmoid")}, "decay.kind is 'sigmoid': it must be one of log, softplus, floor"),
    "a floor without one": ({"decay": source("floor")}, "decay of shape (1, 6, 2, 4) is a floor without its ℓ"),
    "a gain per head": ({"decay": source(gain=ones(H))}, "decay.gain of shape (2,) differs from one token of decay.x, (2, 4)"),
    "an offset per token": ({"decay": source(offset=ones(T, H, K))}, "decay.offset of shape (6, 2, 4) differs"),
    "a slope that is none": ({"decay": source(slope=float("nan"))}, "decay.slope is nan"),
}


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(case, scan):
    changes, said = REFUSED[case]
    arguments, options = fitting(**changes)
    with pytest.raises(ValueError) as refusal:
        scan(*arguments, **options)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


VALUES = {
    "NaN": ({"v": torch.full((B, T, H, V), torch.nan)}, "v of shape (1, 6, 2, 8) holds NaN"),
    "NaN in a gain": ({"decay": source(gain=torch.full((H, K), torch.nan))}, "decay.gain of shape (2, 4) holds NaN"),
    "λ far above 1": ({"decay": torch.full((B, T, H), 0.1)}, "gives a log λ of 0.1, above 0.043"),
    "λ, not its logarithm": ({"decay": torch.full((B, T, H, K), 0.9)}, "give the logarithm of a number between 0 and 1"),
    "boundaries that fall": ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "it must rise from 0 to T=6"),
    "boundaries that end early": ({"cu_seqlens": torch.tensor([0, 4])}, "runs from 0 to 4; it must rise from 0 to T=6"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_are_looked_at_in_debug_mode_alone(case, monkeypatch):
    changes, said = VALUES[case]
    arguments, options = fitting(**changes)
    if "cu_seqlens" not in changes:  # plain torch itself cannot cut a sequence that way
        decay_scan_chunked(*arguments, **options)
    monkeypatch.setenv("DECAY_DEBUG", "1")
    with pytest.raises(ValueError) as refusal:
        decay_scan_chunked(*arguments, **options)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_learned_decay_slightly_above_one_is_let_pass(monkeypatch):
    monkeypatch.setenv("DECAY_DEBUG", "1")
    arguments, _ = fitting(decay=torch.full((B, T, H), 0.03))
    assert decay_scan_chunked(*arguments)[0].isfinite().all()


def test_checks_need_no_values_and_break_no_graph():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels.scan_arguments import check_decay_scan

    with FakeTensorMode():
        arguments, _ = fitting()
        check_decay_scan(*arguments, cu_seqlens=torch.zeros(3, dtype=torch.int32))

    def scan(q, k, v, decay):
        check_decay_scan(q, k, v, decay, None)
        return q + k

    arguments, _ = fitting()
    compiled = torch.compile(scan, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(*arguments[:4]), arguments[0] + arguments[1])
