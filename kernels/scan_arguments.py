"""What every scan accepts: a call that does not fit is refused in one line, before anything is computed.

What is unusual: shapes, dtypes and devices are looked at always, values never, since that would make the host wait for the
device; with DECAY_DEBUG=1 in the environment values are looked at too.
Source: the signatures in decay_scan_naive.py, delta_scan_naive.py and dplr_scan_naive.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from kernels.decay_source import DecaySource

DEBUG = "DECAY_DEBUG"
KINDS = ("log", "softplus", "floor")
WIDTHS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# A learned λ may pass 1 (TNL-L as run). More than this, and a state grows beyond fp32, e^88, over 2048 tokens.
LARGEST_LOG_DECAY = 88 / 2048


def check_decay_scan(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    decay: Tensor | DecaySource,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Raises ValueError naming the argument, its shape and the remedy. Waits for no device unless DECAY_DEBUG=1."""
    x = decay.x if isinstance(decay, DecaySource) else decay
    named = {"q": q, "k": k, "v": v, "decay": x, "initial_state": initial_state}
    if isinstance(decay, DecaySource):
        _check_source(decay)
        named |= {"decay.gain": decay.gain, "decay.offset": decay.offset}
    _check_shapes(q, k, v, x)
    _check_all(named, decay, ("decay",), scale, cu_seqlens)


def check_delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | DecaySource | None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> None:
    """The same for the delta scans, whose β has one number per head and token, and whose decay may be None."""
    x = decay.x if isinstance(decay, DecaySource) else decay
    named = {"q": q, "k": k, "v": v, "beta": beta, "decay": x, "initial_state": initial_state}
    if isinstance(decay, DecaySource):
        _check_source(decay)
        named |= {"decay.gain": decay.gain, "decay.offset": decay.offset}
    _check_shapes(q, k, v, q[..., 0] if x is None else x)
    if beta.shape != q.shape[:3]:
        _refuse("beta", beta, f"is not {tuple(q.shape[:3])}", "give one number per head and token; .expand() a constant")
    _check_all(named, decay, ("beta", "decay"), scale, cu_seqlens)


def check_dplr_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | DecaySource | None,
    initial_state: Tensor | None = None,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> None:
    """The same for the general DPLR scans, whose a and b are as k, and whose decay, one λ per key channel, may be None."""
    x = decay.x if isinstance(decay, DecaySource) else decay
    named = {"q": q, "k": k, "v": v, "a": a, "b": b, "decay": x, "initial_state": initial_state}
    if isinstance(decay, DecaySource):
        _check_source(decay)
        named |= {"decay.gain": decay.gain, "decay.offset": decay.offset}
    _check_shapes(q, k, v, q if x is None else x)
    for name, tensor in (("a", a), ("b", b)):
        if tensor.shape != q.shape:
            _refuse(name, tensor, f"differs from q's {_shape(q)}", "give it as (B, T, H, K)")
    if x is not None and x.dim() != 4:
        _refuse("decay", x, f"is not {_shape(q)}, one λ per key channel", "give x[..., None].expand(q.shape)")
    _check_all(named, decay, ("decay",), scale, cu_seqlens)


def _check_all(
    named: Mapping[str, Tensor | None],
    decay: Tensor | DecaySource | None,
    widening: tuple[str, ...],
    scale: float,
    cu_seqlens: Tensor | None,
) -> None:
    """What does not depend on the recurrence. widening: what the arithmetic is as wide as, beside q."""
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    q = given["q"]
    _check_packing(q, cu_seqlens)
    _check_state(q, given["v"], named["initial_state"], cu_seqlens)
    _check_dtypes(given, widening)
    others = given if cu_seqlens is None else {**given, "cu_seqlens": cu_seqlens}
    for name, tensor in others.items():
        if tensor.device != q.device:
            _refuse(name, tensor, f"lies on {tensor.device} and q on {q.device}", f"move it with .to({str(q.device)!r})")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}: it must be a positive finite number; put a sign into q")
    if not torch.compiler.is_compiling() and os.environ.get(DEBUG) == "1":
        check_values(given, decay, cu_seqlens)


def check_values(given: dict[str, Tensor], decay: Tensor | DecaySource | None, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError for NaN, a λ too far above 1 and boundaries out of order. Waits for the device."""
    for name, tensor in given.items():
        if tensor.isnan().any():
            _refuse(name, tensor, "holds NaN", "look at what made it")
    log_decay = decay.log_decay() if isinstance(decay, DecaySource) else decay
    if log_decay is not None and log_decay.numel() and (largest := float(log_decay.detach().max())) > LARGEST_LOG_DECAY:
        what = f"gives a log λ of {largest:.3g}, above {LARGEST_LOG_DECAY:.3g}, so the state would overflow"
        _refuse("decay", given["decay"], what, "give the logarithm of a number between 0 and 1")
    if cu_seqlens is not None:
        bounds, length = cu_seqlens.tolist(), given["q"].shape[1]
        if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
            what = f"runs from {bounds[0]} to {bounds[-1]}"
            _refuse("cu_seqlens", cu_seqlens, what, f"it must rise from 0 to T={length}, never falling")


def _check_shapes(q: Tensor, k: Tensor | None, v: Tensor, x: Tensor) -> None:
    if q.dim() != 4:
        _refuse("q", q, "is not (B, T, H, K)", "give it four axes, one head as H=1")
    if k is None and x.dim() != 4:
        _refuse("decay", x, "is one λ per head, and without k the key is 1 - λ per channel", "give k, or a (B, T, H, K) decay")
    if k is not None and k.shape != q.shape:
        _refuse("k", k, f"differs from q's {_shape(q)}", "give both as (B, T, H, K)")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        _refuse("v", v, f"does not go with q's {_shape(q)}", "give it as (B, T, H, V) with q's B, T and H")
    if x.shape != q.shape[:3] and x.shape != q.shape:
        what = f"is neither {_shape(q[..., 0])}, one λ per head, nor {_shape(q)}, one per key channel"
        _refuse("decay", x, what, "give one of them; .expand() a constant")


def _check_source(source: DecaySource) -> None:
    if source.kind not in KINDS:
        raise ValueError(f"decay.kind is {source.kind!r}: it must be one of {', '.join(KINDS)}")
    if source.kind == "floor" and source.offset is None:
        _refuse("decay", source.x, "is a floor without its ℓ", "give ℓ as offset")
    if not -math.inf < source.slope < math.inf:  # math.isfinite would break a compiled graph
        raise ValueError(f"decay.slope is {source.slope}: it must be a finite number")
    for name, tensor in (("decay.gain", source.gain), ("decay.offset", source.offset)):
        if tensor is not None and tensor.shape != source.x.shape[2:]:
            what = f"differs from one token of decay.x, {tuple(source.x.shape[2:])}"
            _refuse(name, tensor, what, "give one number per head or per key channel")


def _check_packing(q: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        _refuse("cu_seqlens", cu_seqlens, "is not (N + 1,)", "give where the N sequences begin, and T")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        _refuse("cu_seqlens", cu_seqlens, f"is {cu_seqlens.dtype}", "make it int32 with .to(torch.int32)")
    if q.shape[0] != 1:
        _refuse("q", q, "has more than one row although cu_seqlens packs sequences into one", "join the rows, so that B=1")


def _check_state(q: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if state is None:
        return
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wanted = (sequences, q.shape[2], q.shape[3], v.shape[3])
    if tuple(state.shape) != wanted:
        _refuse("initial_state", state, f"is not {wanted}", "give one (H, K, V) per sequence")


def _check_dtypes(given: dict[str, Tensor], widening: tuple[str, ...]) -> None:
    for name, tensor in given.items():
        if tensor.dtype not in WIDTHS:
            _refuse(name, tensor, f"is {tensor.dtype}", "cast it to bfloat16, float16, float32 or float64")
    q, wide = given["q"], torch.promote_types(given["q"].dtype, torch.float32)
    for name in widening:
        wide = torch.promote_types(wide, given[name].dtype) if name in given else wide
    for name in ("k", "v", "a", "b", "initial_state"):
        tensor = given.get(name)
        if tensor is None:
            continue
        if {tensor.dtype, q.dtype} == {torch.float16, torch.bfloat16}:
            _refuse(name, tensor, f"is {tensor.dtype} beside q's {q.dtype}", "cast one to the other's dtype")
        if tensor.dtype == torch.float64 != wide:
            what = f"is float64 and would be computed with in {wide}"
            _refuse(name, tensor, what, "cast q to float64 as well, or this to float32")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _refuse(name: str, tensor: Tensor, what: str, remedy: str) -> None:
    raise ValueError(f"{name} of shape {_shape(tensor)} {what}; {remedy}")
