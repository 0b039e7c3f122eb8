"""The decay scan on a GPU, as torch operators: what autograd, torch.compile and CUDA graphs see of the Triton kernels.

What is unusual:
- The operators are opaque, so torch.compile neither looks into the launches nor breaks its graph at them. Outside of it the
  same functions go through an autograd function, whose way to the launch is several times shorter than an operator's.
- What the backward pass wants back (states at the chunks' starts) is an output of the forward operator: empty where no gradient
  is wanted, and with DECAY_KERNEL_POLICY=recompute, which saves memory: the backward operator makes the states again.
- Configurations come from a table of measured ones (tuned.py), else from the launchers.
- One token without gradients is a kernel of its own (decay_step_triton.py).
Source: decay_scan_naive.py is the definition; the kernels are in triton_scalar.py and triton_vector.py.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.compile_ahead import compile_ahead
from kernels.decay_scan_chunked import decay_scan_chunked
from kernels.decay_source import PARAMETERS, DecaySource
from kernels.decay_step_triton import decay_step_triton
from kernels.launching import INTERPRETED, on_device_of
from kernels.replay import like, replayed
from kernels.scan_arguments import check_decay_scan
from kernels.triton_gate import Gradients
from kernels.triton_scalar import Config as ScalarConfig
from kernels.triton_scalar import backward as scalar_backward
from kernels.triton_scalar import default_config as scalar_config
from kernels.triton_scalar import forward as scalar_forward
from kernels.triton_scalar import saved_like as scalar_saved_like
from kernels.triton_toolchain import choose_ptxas
from kernels.triton_vector import VectorConfig
from kernels.triton_vector import backward as vector_backward
from kernels.triton_vector import default_config as vector_config
from kernels.triton_vector import forward as vector_forward
from kernels.triton_vector import saved_like as vector_saved_like
from kernels.tuned import tuned_config

choose_ptxas()  # before the first kernel is compiled
LARGEST_DIM, DIM_STEP = 256, 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POLICY = "DECAY_KERNEL_POLICY"
POLICIES = ("save", "recompute")
_compiled: set[tuple[Any, ...]] = set()  # calls whose kernels have been compiled


def decay_scan_triton(
    q_bthk: Tensor,
    k_bthk: Tensor | None,
    v_bthv: Tensor,
    decay: Tensor | DecaySource,
    initial_state_bhkv: Tensor | None = None,
    output_final_state: bool = False,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V) in fp32 or None).

    The arguments are those of decay_scan_naive. q: fp32, fp16 or bf16, in which k and v are taken too; K and V multiples of 8
    up to 256. exact: outputs up to t are the same bits whatever follows, which costs time where there is one λ per key channel.
    Any B >= 0 and T >= 0. Differentiable in every tensor, states and the source's gain and offset included. ValueError for
    arguments that do not fit.
    """
    check_decay_scan(q_bthk, k_bthk, v_bthv, decay, initial_state_bhkv, scale, cu_seqlens)
    if (reason := absence(q_bthk.device) or refusal(q_bthk, v_bthv)) is not None:
        raise ValueError(f"{reason}; take decay_scan_chunked")
    arguments = (q_bthk, k_bthk, v_bthv, decay, initial_state_bhkv)
    if 0 in q_bthk.shape[:3]:
        o, state = decay_scan_chunked(*arguments, output_final_state, scale, cu_seqlens)
        return o.to(v_bthv.dtype), state
    source = decay if isinstance(decay, DecaySource) else DecaySource(x=decay)
    tensors = (q_bthk, k_bthk, v_bthv, source.x, source.gain, source.offset, initial_state_bhkv)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if q_bthk.shape[1] == 1 and cu_seqlens is None and output_final_state and not keep:
        return decay_step_triton(*arguments, scale)
    q, k, v = (None if x is None else _side_by_side(x.to(q_bthk.dtype)) for x in (q_bthk, k_bthk, v_bthv))
    x = source.x.float() if source.x.dtype == torch.float64 else source.x
    used = PARAMETERS[source.kind]
    parameters = (source.gain if "gain" in used else None, source.offset if "offset" in used else None)
    gain, offset, initial = (None if y is None else y.float().contiguous() for y in (*parameters, initial_state_bhkv))
    cu = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    formula, asked = (source.kind, float(source.slope), float(scale), exact), policy()
    x = _side_by_side(x) if source.vector else x
    wants = (output_final_state, keep and asked != "recompute")
    way = _forward if _traced(q) else _Eager.apply if keep else _scan
    o, state, _ = way(q, k, v, x, gain, offset, initial, cu, *formula, asked, *wants)
    return o.to(v_bthv.dtype), state if output_final_state else None


def absence(device: torch.device) -> str | None:
    """Why no kernel can run on this device; None where they can."""
    return None if device.type == "cuda" or INTERPRETED else f"the Triton kernels need a GPU, not {device.type}"


def refusal(q_bthk: Tensor, v_bthv: Tensor) -> str | None:
    """Why the kernels cannot serve these tensors; None when they can."""
    if q_bthk.dtype not in DTYPES:
        return f"the Triton kernels have no {q_bthk.dtype}"
    for name, dim in (("K", q_bthk.shape[-1]), ("V", v_bthv.shape[-1])):
        if dim % DIM_STEP or not 0 < dim <= LARGEST_DIM:
            return f"{name}={dim} is no multiple of {DIM_STEP} up to {LARGEST_DIM}"
    return None


def policy() -> str:
    """What DECAY_KERNEL_POLICY says; empty where it says nothing. ValueError for another word."""
    asked = os.environ.get(POLICY, "")
    if asked and asked not in POLICIES:
        raise ValueError(f"{POLICY}={asked}: unknown policy; set it to one of {', '.join(POLICIES)} or unset it")
    return asked


def config_class(granularity: str) -> type:
    """What the configurations of a kind of decay are instances of."""
    return _LAUNCHERS[granularity].config


def chosen_config(
    architecture: str, granularity: str, key_dim: int, value_dim: int, dtype: torch.dtype, asked: str
) -> tuple[Any, str]:
    """(the configuration, where it comes from), for a policy that is asked for or "".

    The table is measured with bf16 tensors and is for them alone: products of wider ones take other registers.
    """
    return choose(_LAUNCHERS[granularity], architecture, granularity, key_dim, value_dim, dtype, asked)


def choose(
    launchers: Any, architecture: str, granularity: str, key_dim: int, value_dim: int, dtype: torch.dtype, asked: str
) -> tuple[Any, str]:
    """`chosen_config` for launchers with a `config` class and a `default_config`, which saves."""
    measured = None
    if dtype == torch.bfloat16:
        measured = tuned_config(architecture, granularity, key_dim, value_dim, launchers.config)
    default = launchers.default_config(key_dim, value_dim, dtype)
    config, origin = (default, "default") if measured is None else (measured, "tuned.json")
    if asked == "save" and config.policy == "recompute":
        return default, f"default, since {POLICY}={asked}"
    return config, f"{origin}, {POLICY}={asked}" if asked else origin


@cache
def architecture_of(device: torch.device) -> str:
    """Such as sm_90; "cpu" where there is no GPU, as in Triton's interpreter."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Launchers(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Gradients]
    saved_like: Callable[..., Any]
    default_config: Callable[..., Any]
    config: type


_LAUNCHERS = {
    "scalar": _Launchers(scalar_forward, scalar_backward, scalar_saved_like, scalar_config, ScalarConfig),
    "vector": _Launchers(vector_forward, vector_backward, vector_saved_like, vector_config, VectorConfig),
}


def _prepared(q: Tensor, v: Tensor, x: Tensor, policy: str) -> tuple[_Launchers, Any]:
    """The launchers for this decay and their configuration, under the policy that the call was made with."""
    granularity = "vector" if x.dim() == 4 else "scalar"
    widths = int(q.shape[-1]), int(v.shape[-1])  # kernels are compiled for one width: never symbols
    config, _ = chosen_config(architecture_of(q.device), granularity, *widths, q.dtype, policy)
    return _LAUNCHERS[granularity], config


def _exactness(source: DecaySource, exact: bool) -> dict[str, bool]:
    """The kernels of a scalar decay are exact anyway."""
    return {"exact": exact} if source.vector else {}


def _traced(q: Tensor) -> bool:
    """Whether somebody looks at operators rather than at what they compute."""
    plain = type(q) in (Tensor, torch.nn.Parameter)
    return torch.compiler.is_compiling() or not plain or torch._C._are_functorch_transforms_active()


def _scan(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    x: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    launchers, config = _prepared(q, v, x, policy)
    formula = _Formula(kind, slope, scale, exact)
    function = partial(_run, launchers, config, formula, want_state, want_saved)
    tensors = (q, k, v, x, gain, offset, initial_state, cu_seqlens)
    with on_device_of(q):
        o, state, saved = replayed(function, tensors, ("forward", config, *formula, want_state, want_saved))
    return o, q.new_empty(0) if state is None else state, q.new_empty(0) if saved is None else saved


class _Formula(NamedTuple):
    kind: str
    slope: float
    scale: float
    exact: bool

    def source(self, x: Tensor, gain: Tensor | None, offset: Tensor | None) -> DecaySource:
        return DecaySource(x=x, kind=self.kind, slope=self.slope, gain=gain, offset=offset)  # type: ignore[arg-type]


def _run(launchers, config, formula, want_state, want_saved, q, k, v, x, gain, offset, initial_state, cu_seqlens):
    """(o, final state or None, what the backward pass wants back or None). Both passes are compiled at their first call."""
    kernels = (q.device, q.dtype, q.shape[3], v.shape[3], x.dtype, x.dim(), k is None, gain is None, offset is None)
    kernels += (initial_state is None, cu_seqlens is None, config, formula.kind, formula.exact, want_state, want_saved)
    if not q.is_meta and kernels not in _compiled:
        _compiled.add(kernels)
        function = partial(_run_both, launchers, config, formula, want_state, want_saved)
        compile_ahead(partial(function, *map(like, (q, k, v, x, gain, offset, initial_state, cu_seqlens))))
    source = formula.source(x, gain, offset)
    given = (q, k, v, source, formula.scale, initial_state, want_state, want_saved, config)
    return launchers.forward(*given, cu_seqlens, **_exactness(source, formula.exact))


def _run_both(launchers, config, formula, want_state, want_saved, *tensors):
    """The backward pass too, if something is kept for it, as the autograd function below runs it, with a gradient that lies
    as v does."""
    _, _, saved = _run(launchers, config, formula, want_state, want_saved, *tensors)
    if want_saved:
        _run_backward(launchers, config, formula, True, *tensors, saved, torch.empty_like(tensors[2]), None)


_forward = torch.library.custom_op("decay::decay_scan", _scan, mutates_args=())


def _scan_backward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    x: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    do: Tensor,
    d_state: Tensor | None,
    kind: str,
    slope: float,
    scale: float,
    exact: bool,
    policy: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    formula = _Formula(kind, slope, scale, exact)
    tensors = (q, k, v, x, gain, offset, initial_state, cu_seqlens, saved if saved.numel() else None, do, d_state)
    return _gradients(tensors, formula, policy, False)


def _gradients(
    tensors: Sequence[Tensor | None], formula: _Formula, policy: str, give_saved: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Those of the seven inputs, empty where there is none. give_saved: dq may be written over what was kept."""
    q, _, v, x = tensors[:4]
    assert q is not None and v is not None and x is not None
    launchers, config = _prepared(q, v, x, policy)
    function = partial(_run_backward, launchers, config, formula, give_saved)
    with on_device_of(q):
        found = replayed(function, tensors, ("backward", config, *formula, give_saved))
    dq, *others = (q.new_empty(0) if y is None else y for y in found)
    return dq, *others


def _run_backward(
    launchers, config, formula, give_saved, q, k, v, x, gain, offset, initial_state, cu_seqlens, saved, do, d_state
) -> Gradients:  # fmt: skip
    source = formula.source(x, gain, offset)
    d_state = None if d_state is None else d_state.float().contiguous()
    given = (q, k, v, source, formula.scale, initial_state)
    if saved is None and config.policy != "recompute" and not source.vector:  # the vector launcher makes them itself
        saved = launchers.forward(*given, False, True, config, cu_seqlens)[2]
    how = _exactness(source, formula.exact)
    if not source.vector:
        how["give_saved"] = give_saved
    found: Gradients = launchers.backward(*given, saved, _side_by_side(do), d_state, config, cu_seqlens, **how)
    return found


_backward = torch.library.custom_op("decay::decay_scan_backward", _scan_backward, mutates_args=())


@_forward.register_fake
def _(q, k, v, x, gain, offset, initial, cu, kind, slope, scale, exact, policy, want_state, want_saved):
    launchers, config = _prepared(q, v, x, policy)
    sequences = q.shape[0] if cu is None else cu.shape[0] - 1
    o = torch.empty(v.shape, device=q.device, dtype=v.dtype)
    state = (sequences, q.shape[2], q.shape[3], v.shape[3]) if want_state else (0,)
    state = torch.empty(state, device=q.device, dtype=torch.float32 if want_state else q.dtype)
    shape, dtype = launchers.saved_like(q, v, config, cu) if want_saved else ((0,), q.dtype)
    return o, state, torch.empty(shape, device=q.device, dtype=dtype)


@_backward.register_fake
def _(q, k, v, x, gain, offset, initial, cu, saved, do, d_state, kind, slope, scale, exact, policy):
    inputs = (q, k, v, x, gain, offset, initial)
    return tuple(q.new_empty(0) if y is None else torch.empty(y.shape, device=y.device, dtype=y.dtype) for y in inputs)


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.kind, ctx.slope, ctx.scale, ctx.exact, ctx.policy, ctx.want_state, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # of the kept states it would be as large as they are


def _differentiate(ctx, do, d_state, _):
    tensors, formula = ctx.saved_tensors, (ctx.kind, ctx.slope, ctx.scale, ctx.exact)
    do = torch.zeros_like(tensors[2]) if do is None else do
    return wanted_gradients(ctx, tensors, _backward(*tensors, do, d_state if ctx.want_state else None, *formula, ctx.policy))


def wanted_gradients(ctx, tensors, found):
    """Of the gradients found for the tensors those that autograd asks for, None for its other arguments."""
    # An empty tensor stands for None where an input has entries.
    needed = zip(ctx.needs_input_grad, tensors, found, strict=False)
    grads = [y if need and y.shape == x.shape else None for need, x, y in needed]
    return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


_forward.register_autograd(_differentiate, setup_context=_remember)


class _Eager(torch.autograd.Function):
    """The same outside of a compiler, except that the kept states' memory is given away: where dq has taken it, a second
    backward pass through the same graph makes the states again."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _scan(*inputs)
        _remember(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        ctx.overwritten = False
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_state, _):
        *tensors, saved = ctx.saved_tensors
        # Its data, which has a version of its own: a gradient that lies there may be added to before the next pass.
        there = saved.data if saved.numel() and not ctx.overwritten else None
        do = torch.zeros_like(tensors[2]) if do is None else do
        formula = _Formula(ctx.kind, ctx.slope, ctx.scale, ctx.exact)
        found = _gradients((*tensors, there, do, d_state if ctx.want_state else None), formula, ctx.policy, True)
        ctx.overwritten |= there is not None and found[0].data_ptr() == there.data_ptr()
        return wanted_gradients(ctx, tensors, found)
