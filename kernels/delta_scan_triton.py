"""The delta scan on a GPU, as torch operators: what autograd, torch.compile and CUDA graphs see of the Triton kernels.

What is unusual: as in decay_scan_triton.py the operators are opaque to a compiler, outside of which the same functions go
through an autograd function and, from a shape's third call on, are done from a list; what the backward pass wants back is
four outputs of the forward operator, empty where no gradient is wanted and with DECAY_KERNEL_POLICY=recompute; configurations
come from tuned.py's table, else from the launchers; and one token without gradients is a kernel of its own
(delta_step_triton.py).
Source: delta_scan_naive.py is the definition; the kernels are in triton_delta.py and triton_delta_vector.py.
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
from kernels.delta_scan_chunked import delta_scan_chunked
from kernels.delta_step_triton import delta_step_triton
from kernels.launching import on_device_of
from kernels.replay import like, replayed
from kernels.scan_arguments import check_delta_scan
from kernels.triton_delta import DeltaConfig, DeltaGradients, Saved
from kernels.triton_delta import backward as scalar_backward
from kernels.triton_delta import default_config as scalar_config
from kernels.triton_delta import forward as scalar_forward
from kernels.triton_delta import saved_like as scalar_saved_like
from kernels.triton_delta_vector import DeltaVectorConfig
from kernels.triton_delta_vector import backward as vector_backward
from kernels.triton_delta_vector import default_config as vector_config
from kernels.triton_delta_vector import forward as vector_forward
from kernels.triton_delta_vector import saved_like as vector_saved_like


def delta_scan_triton(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    beta_bth: Tensor,
    decay: Tensor | DecaySource | None = None,
    beta_on_write: bool = True,
    initial_state_bhkv: Tensor | None = None,
    output_final_state: bool = False,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
    normalize_key: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V) in fp32 or None).

    The arguments are those of delta_scan_naive. q: fp32, fp16 or bf16, in which k and v are taken too; K and V multiples of 8
    up to 256. Any B >= 0 and T >= 0. Differentiable in every tensor, states and the source's gain and offset included.
    ValueError for arguments that do not fit.
    """
    check_delta_scan(q_bthk, k_bthk, v_bthv, beta_bth, decay, initial_state_bhkv, scale, cu_seqlens)
    if (reason := absence(q_bthk.device) or refusal(q_bthk, v_bthv)) is not None:
        raise ValueError(f"{reason}; take delta_scan_chunked")
    arguments = (q_bthk, k_bthk, v_bthv, beta_bth, decay, beta_on_write, initial_state_bhkv)
    if 0 in q_bthk.shape[:3]:
        o, state = delta_scan_chunked(*arguments, output_final_state, scale, cu_seqlens, exact, normalize_key)
        return o.to(v_bthv.dtype), state
    source = decay if isinstance(decay, DecaySource) or decay is None else DecaySource(x=decay)
    made_of = (None, None, None) if source is None else (source.x, source.gain, source.offset)
    tensors = (q_bthk, k_bthk, v_bthv, beta_bth, *made_of, initial_state_bhkv)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if q_bthk.shape[1] == 1 and cu_seqlens is None and output_final_state and not keep:
        return delta_step_triton(*arguments, scale, normalize_key)
    q, k, v = (_side_by_side(x.to(q_bthk.dtype)) for x in (q_bthk, k_bthk, v_bthv))
    x = None if source is None else source.x
    beta, x = (y.float() if y is not None and y.dtype == torch.float64 else y for y in (beta_bth, x))
    x = _side_by_side(x) if x is not None and x.dim() == 4 else x
    used = () if source is None else PARAMETERS[source.kind]
    parameters = (made_of[1] if "gain" in used else None, made_of[2] if "offset" in used else None)
    gain, offset, initial = (None if y is None else y.float().contiguous() for y in (*parameters, initial_state_bhkv))
    cu = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    formula = ("log", 1.0) if source is None else (source.kind, float(source.slope))
    asked = policy()
    options = (*formula, float(scale), exact, beta_on_write, normalize_key, asked)
    way = _forward if _traced(q) else _Eager.apply if keep else _scan
    o, state, *_ = way(q, k, v, beta, x, gain, offset, initial, cu, *options, output_final_state, keep and asked != "recompute")
    return o.to(v_bthv.dtype), state if output_final_state else None


def granularity_of(x: Tensor | None) -> str:
    """What the table of configurations calls a delta scan with this decay; none is a scalar one."""
    return "delta_vector" if x is not None and x.dim() == 4 else "delta_scalar"


def config_class(granularity: str) -> type:
    """What the configurations of a kind of delta scan are instances of."""
    return _LAUNCHERS[granularity].config


def chosen_config(
    architecture: str, granularity: str, key_dim: int, value_dim: int, dtype: torch.dtype, asked: str
) -> tuple[Any, str]:
    """(the configuration, where it comes from), for a policy that is asked for or "". The table is for bf16 tensors alone."""
    return choose(_LAUNCHERS[granularity], architecture, granularity, key_dim, value_dim, dtype, asked)


class _Launchers(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., DeltaGradients]
    saved_like: Callable[..., Any]
    default_config: Callable[..., Any]
    config: type


_compiled: set[tuple[Any, ...]] = set()  # calls whose kernels have been compiled
_LAUNCHERS = {
    "delta_scalar": _Launchers(scalar_forward, scalar_backward, scalar_saved_like, scalar_config, DeltaConfig),
    "delta_vector": _Launchers(vector_forward, vector_backward, vector_saved_like, vector_config, DeltaVectorConfig),
}


def _prepared(q: Tensor, v: Tensor, x: Tensor | None, asked: str) -> tuple[_Launchers, Any]:
    """The launchers for this decay and their configuration, under the policy that the call was made with."""
    granularity = granularity_of(x)
    widths = int(q.shape[-1]), int(v.shape[-1])  # kernels are compiled for one width: never symbols
    config, _ = chosen_config(architecture_of(q.device), granularity, *widths, q.dtype, asked)
    return _LAUNCHERS[granularity], config


class _Formula(NamedTuple):
    """What a call is made with beside its tensors."""

    kind: str
    slope: float
    scale: float
    exact: bool
    beta_on_write: bool
    normalize_key: bool

    def source(self, x: Tensor | None, gain: Tensor | None, offset: Tensor | None) -> DecaySource | None:
        made = {"x": x, "gain": gain, "offset": offset, "kind": self.kind, "slope": self.slope}
        return None if x is None else DecaySource(**made)  # type: ignore[arg-type]

    def exactness(self, x: Tensor | None) -> dict[str, bool]:
        """The kernels of a scalar decay are exact anyway."""
        return {"exact": self.exact} if granularity_of(x) == "delta_vector" else {}


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    x: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    slope: float,
    scale: float,
    exact: bool,
    beta_on_write: bool,
    normalize_key: bool,
    policy: str,
    want_state: bool,
    want_saved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launchers, config = _prepared(q, v, x, policy)
    formula = _Formula(kind, slope, scale, exact, beta_on_write, normalize_key)
    function = partial(_run, launchers, config, formula, want_state, want_saved)
    tensors = (q, k, v, beta, x, gain, offset, initial_state, cu_seqlens)
    with on_device_of(q):
        found = replayed(function, tensors, ("delta forward", config, *formula, want_state, want_saved))
    o, *others = (q.new_empty(0) if y is None else y for y in found)
    return o, *others


def _run(launchers, config, formula, want_state, want_saved, *tensors):
    """What _scan returns, None for what is not wanted. Both passes are compiled at their first call."""
    q, k, v, beta, x, gain, offset, initial_state, cu_seqlens = tensors
    kernels = (q.device, q.dtype, q.shape[3], v.shape[3], beta.dtype, None if x is None else (x.dtype, x.dim()), config)
    kernels += (
        formula.kind,
        formula.exact,
        formula.beta_on_write,
        formula.normalize_key,
        gain is None,
        offset is None,
        initial_state is None,
        cu_seqlens is None,
        want_state,
        want_saved,
    )
    if not q.is_meta and kernels not in _compiled:
        _compiled.add(kernels)
        compile_ahead(partial(_run_both, launchers, config, formula, want_state, want_saved, *map(like, tensors)))
    given = (q, k, v, beta, formula.source(x, gain, offset), formula.scale, initial_state, want_state, want_saved)
    given = (*given, formula.beta_on_write, formula.normalize_key, config, cu_seqlens)
    o, state, saved = launchers.forward(*given, **formula.exactness(x))
    return o, state, *([None] * 4 if saved is None else saved)


def _run_both(launchers, config, formula, want_state, want_saved, *tensors):
    """The backward pass too, if something is kept for it, with a gradient that lies as v does."""
    _, _, *saved = _run(launchers, config, formula, want_state, want_saved, *tensors)
    if want_saved:
        _run_backward(launchers, config, formula, *tensors, *saved, torch.empty_like(tensors[2]), None)


_forward = torch.library.custom_op("decay::delta_scan", _scan, mutates_args=())


def _scan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    x: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    inverse: Tensor,
    gates: Tensor,
    states: Tensor,
    errors: Tensor,
    do: Tensor,
    d_state: Tensor | None,
    kind: str,
    slope: float,
    scale: float,
    exact: bool,
    beta_on_write: bool,
    normalize_key: bool,
    policy: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launchers, config = _prepared(q, v, x, policy)
    formula = _Formula(kind, slope, scale, exact, beta_on_write, normalize_key)
    saved = [inverse, gates, states, errors] if states.numel() else [None] * 4
    tensors = (q, k, v, beta, x, gain, offset, initial_state, cu_seqlens, *saved, do, d_state)
    function = partial(_run_backward, launchers, config, formula)
    with on_device_of(q):
        found = replayed(function, tensors, ("delta backward", config, *formula))
    dq, *others = (q.new_empty(0) if y is None else y for y in found)
    return dq, *others


def _run_backward(launchers, config, formula, *tensors) -> DeltaGradients:
    q, k, v, beta, x, gain, offset, initial_state, cu_seqlens, inverse, gates, states, errors, do, d_state = tensors
    saved = None if states is None else Saved(inverse, gates, states, errors)
    d_state = None if d_state is None else d_state.float().contiguous()
    given = (q, k, v, beta, formula.source(x, gain, offset), formula.scale, initial_state, saved, _side_by_side(do), d_state)
    given = (*given, formula.beta_on_write, formula.normalize_key, config, cu_seqlens)
    found: DeltaGradients = launchers.backward(*given, **formula.exactness(x))
    return found


_backward = torch.library.custom_op("decay::delta_scan_backward", _scan_backward, mutates_args=())


@_forward.register_fake
def _(q, k, v, beta, x, gain, offset, initial, cu, kind, slope, scale, exact, write, norm, policy, want_state, want_saved):
    launchers, config = _prepared(q, v, x, policy)
    sequences = q.shape[0] if cu is None else cu.shape[0] - 1
    o = torch.empty(v.shape, device=q.device, dtype=v.dtype)
    state = (sequences, q.shape[2], q.shape[3], v.shape[3]) if want_state else (0,)
    state = torch.empty(state, device=q.device, dtype=torch.float32 if want_state else q.dtype)
    kept = launchers.saved_like(q, v, norm, config, cu) if want_saved else [((0,), q.dtype)] * 4
    return o, state, *(torch.empty(shape, device=q.device, dtype=dtype) for shape, dtype in kept)


@_backward.register_fake
def _(q, k, v, beta, x, gain, offset, initial, *others):
    inputs = (q, k, v, beta, x, gain, offset, initial)
    return tuple(q.new_empty(0) if y is None else torch.empty(y.shape, device=y.device, dtype=y.dtype) for y in inputs)


def _remember(ctx, inputs, output) -> None:
    tensors, (*ctx.options, ctx.want_state, _) = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)  # of what is kept they would be as large as it is


def _differentiate(ctx, do, d_state, *_, backward=_backward):
    tensors = ctx.saved_tensors
    do = torch.zeros_like(tensors[2]) if do is None else do
    found = backward(*tensors, do, d_state if ctx.want_state else None, *ctx.options)
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
