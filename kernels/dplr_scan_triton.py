"""The general DPLR scan on a GPU, as torch operators: what autograd, torch.compile and CUDA graphs see of the Triton kernels.

What is unusual: as in decay_scan_triton.py the operators are opaque to a compiler, outside of which the same functions go
through an autograd function and, from a shape's third call on, are done from a list; what the backward pass wants back are
outputs of the forward operator, empty where no gradient is wanted and with DECAY_KERNEL_POLICY=recompute; configurations come
from tuned.py's table, else from the launchers.
Source: dplr_scan_naive.py is the definition; the kernels are in triton_dplr.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.compile_ahead import compile_ahead
from kernels.decay_scan_triton import (
    _side_by_side,
    _traced,
    absence,
    architecture_of,
    choose,
    policy,
    refusal,
    wanted_gradients,
)
from kernels.decay_source import PARAMETERS, DecaySource
from kernels.dplr_scan_chunked import dplr_scan_chunked
from kernels.launching import on_device_of
from kernels.replay import like, replayed
from kernels.scan_arguments import check_dplr_scan
from kernels.triton_dplr import DplrConfig, DplrGradients, Prepared, Saved, backward, default_config, forward, saved_like

GRANULARITY = "delta_general"  # what the table of configurations calls it
_KEPT = 2 + len(Prepared._fields)  # tensors that the backward pass is given
_compiled: set[tuple[Any, ...]] = set()


def dplr_scan_triton(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    a_bthk: Tensor,
    b_bthk: Tensor,
    decay: Tensor | DecaySource | None = None,
    initial_state_bhkv: Tensor | None = None,
    output_final_state: bool = False,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V) in fp32 or None).

    The arguments are those of dplr_scan_naive. q: fp32, fp16 or bf16, in which the others are taken too; K and V multiples of 8
    up to 256. Any B >= 0 and T >= 0. Differentiable in every tensor, states and the source's gain and offset included.
    ValueError for arguments that do not fit.
    """
    check_dplr_scan(q_bthk, k_bthk, v_bthv, a_bthk, b_bthk, decay, initial_state_bhkv, scale, cu_seqlens)
    if (reason := absence(q_bthk.device) or refusal(q_bthk, v_bthv)) is not None:
        raise ValueError(f"{reason}; take dplr_scan_chunked")
    given = (q_bthk, k_bthk, v_bthv, a_bthk, b_bthk)
    if 0 in q_bthk.shape[:3]:
        o, state = dplr_scan_chunked(*given, decay, initial_state_bhkv, output_final_state, scale, cu_seqlens, exact)
        return o.to(v_bthv.dtype), state
    source = decay if isinstance(decay, DecaySource) or decay is None else DecaySource(x=decay)
    made_of = (None, None, None) if source is None else (source.x, source.gain, source.offset)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*given, *made_of, initial_state_bhkv))
    tensors = [_side_by_side(x.to(q_bthk.dtype)) for x in given]
    x = None if source is None else source.x
    x = None if x is None else _side_by_side(x.float() if x.dtype == torch.float64 else x)
    used = () if source is None else PARAMETERS[source.kind]
    parameters = (made_of[1] if "gain" in used else None, made_of[2] if "offset" in used else None)
    gain, offset, initial = (None if y is None else y.float().contiguous() for y in (*parameters, initial_state_bhkv))
    cu = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    formula = ("log", 1.0) if source is None else (source.kind, float(source.slope))
    asked = policy()
    options = (*formula, float(scale), exact, asked, output_final_state, keep and asked != "recompute")
    way = _forward if _traced(q_bthk) else _Eager.apply if keep else _scan
    o, state, *_ = way(*tensors, x, gain, offset, initial, cu, *options)
    return o.to(v_bthv.dtype), state if output_final_state else None


def config_class(granularity: str = GRANULARITY) -> type:
    """What the configurations are instances of."""
    return _LAUNCHERS[granularity].config


def chosen_config(
    architecture: str, granularity: str, key_dim: int, value_dim: int, dtype: torch.dtype, asked: str
) -> tuple[Any, str]:
    """(the configuration, where it comes from), for a policy that is asked for or "". The table is for bf16 tensors alone."""
    return choose(_LAUNCHERS[granularity], architecture, granularity, key_dim, value_dim, dtype, asked)


class _Launchers(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., DplrGradients]
    saved_like: Callable[..., Any]
    default_config: Callable[..., Any]
    config: type


_LAUNCHERS = {GRANULARITY: _Launchers(forward, backward, saved_like, default_config, DplrConfig)}


class _Formula(NamedTuple):
    kind: str
    slope: float
    scale: float
    exact: bool

    def source(self, x: Tensor | None, gain: Tensor | None, offset: Tensor | None) -> DecaySource | None:
        made = {"x": x, "kind": self.kind, "slope": self.slope, "gain": gain, "offset": offset}
        return None if x is None else DecaySource(**made)  # type: ignore[arg-type]


def _config(q: Tensor, v: Tensor, asked: str) -> Any:
    """The configuration under the policy that the call was made with."""
    widths = int(q.shape[-1]), int(v.shape[-1])  # kernels are compiled for one width: never symbols
    return chosen_config(architecture_of(q.device), GRANULARITY, *widths, q.dtype, asked)[0]


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    x: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    slope: float,
    scale: float,
    exact: bool,
    policy: str,
    want_state: bool,
    want_saved: bool,
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    """(o, final state, states, reads, what prepared the chunks), empty where it is not wanted."""
    config, formula = _config(q, v, policy), _Formula(kind, slope, scale, exact)
    function = partial(_run, config, formula, want_state, want_saved)
    tensors = (q, k, v, a, b, x, gain, offset, initial_state, cu_seqlens)
    with on_device_of(q):
        found = replayed(function, tensors, (GRANULARITY, "forward", config, *formula, want_state, want_saved))
    o, *others = (q.new_empty(0) if y is None else y for y in found)
    return o, *others


def _run(
    config: Any, formula: _Formula, want_state: bool, want_saved: bool, *tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What _scan returns, None for what is not wanted. Both passes are compiled at their first call."""
    q, k, v, a, b, x, gain, offset, initial_state, cu_seqlens = tensors
    assert q is not None and v is not None
    there = tuple(y is None for y in tensors)
    kernels = (q.device, q.dtype, q.shape[3], v.shape[3], None if x is None else x.dtype, there, config)
    kernels += (formula.kind, formula.exact, want_state, want_saved)
    if not q.is_meta and kernels not in _compiled:
        _compiled.add(kernels)
        compile_ahead(partial(_run_both, config, formula, want_state, want_saved, *map(like, tensors)))
    given = (q, k, v, a, b, formula.source(x, gain, offset), formula.scale, initial_state, want_state, want_saved, config)
    o, state, saved = _LAUNCHERS[GRANULARITY].forward(*given, cu_seqlens, formula.exact)
    if saved is None:
        return o, state, *[None] * _KEPT
    return o, state, saved.states, saved.reads, *(saved.prepared or [None] * len(Prepared._fields))


def _run_both(config: Any, formula: _Formula, want_state: bool, want_saved: bool, *tensors: Tensor | None) -> None:
    """The backward pass too, if something is kept for it, with a gradient that lies as v does."""
    _, _, *saved = _run(config, formula, want_state, want_saved, *tensors)
    if want_saved:
        _run_backward(config, formula, *tensors, *saved, torch.empty_like(tensors[2]), None)  # type: ignore[arg-type]


_forward = torch.library.custom_op("decay::dplr_scan", _scan, mutates_args=())


def _scan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    x: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    do: Tensor,
    d_state: Tensor | None,
    kind: str,
    slope: float,
    scale: float,
    exact: bool,
    policy: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    config, formula = _config(q, v, policy), _Formula(kind, slope, scale, exact)
    kept = [y if y.numel() else None for y in saved]
    tensors = (q, k, v, a, b, x, gain, offset, initial_state, cu_seqlens, *kept, do, d_state)
    with on_device_of(q):
        found = replayed(partial(_run_backward, config, formula), tensors, (GRANULARITY, "backward", config, *formula))
    dq, *others = (q.new_empty(0) if y is None else y for y in found)
    return dq, *others


def _run_backward(config: Any, formula: _Formula, *tensors: Tensor | None) -> DplrGradients:
    q, k, v, a, b, x, gain, offset, initial_state, cu_seqlens, states, reads, *prepared, do, d_state = tensors
    assert do is not None
    tiles = None if prepared[0] is None else Prepared(*prepared)  # type: ignore[arg-type]
    saved = None if states is None or reads is None else Saved(states, reads, tiles)
    d_state = None if d_state is None else d_state.float().contiguous()
    given = (q, k, v, a, b, formula.source(x, gain, offset), formula.scale, initial_state, saved, _side_by_side(do), d_state)
    return _LAUNCHERS[GRANULARITY].backward(*given, config, cu_seqlens, formula.exact)


_backward = torch.library.custom_op("decay::dplr_scan_backward", _scan_backward, mutates_args=())


@_forward.register_fake
def _(q, k, v, a, b, x, gain, offset, initial, cu, kind, slope, scale, exact, policy, want_state, want_saved):
    config = _config(q, v, policy)
    sequences = q.shape[0] if cu is None else cu.shape[0] - 1
    o = torch.empty(v.shape, device=q.device, dtype=v.dtype)
    state = (sequences, q.shape[2], q.shape[3], v.shape[3]) if want_state else (0,)
    state = torch.empty(state, device=q.device, dtype=torch.float32 if want_state else q.dtype)
    kept = _LAUNCHERS[GRANULARITY].saved_like(q, v, config, cu, exact) if want_saved else [((0,), q.dtype)] * _KEPT
    return o, state, *(torch.empty(shape, device=q.device, dtype=dtype) for shape, dtype in kept)


@_backward.register_fake
def _(q, k, v, a, b, x, gain, offset, initial, *others):
    inputs = (q, k, v, a, b, x, gain, offset, initial)
    return tuple(q.new_empty(0) if y is None else torch.empty(y.shape, device=y.device, dtype=y.dtype) for y in inputs)


def _remember(ctx, inputs, output) -> None:
    tensors, (*ctx.options, ctx.want_state, _) = inputs[:10], inputs[10:]
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)  # of what is kept they would be as large as it is


def _differentiate(ctx, do, d_state, *_, backward=_backward):
    tensors = ctx.saved_tensors
    do = torch.zeros_like(tensors[2]) if do is None else do
    found = backward(*tensors[:10], list(tensors[10:]), do, d_state if ctx.want_state else None, *ctx.options)
    return wanted_gradients(ctx, tensors, found)


_forward.register_autograd(_differentiate, setup_context=_remember)


class _Eager(torch.autograd.Function):
    """The same outside of a compiler."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _scan(*inputs)
        _remember(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[2:])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_state, *_):
        return _differentiate(ctx, do, d_state, backward=_scan_backward)
