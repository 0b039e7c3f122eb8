"""The decay scan on a GPU, as torch operators: what autograd, torch.compile and CUDA graphs see of the Triton kernels.

What is unusual: the operators are opaque, so torch.compile neither looks into the launches nor breaks its graph at them. What
the backward pass wants back (states at the chunks' starts) is an output of the forward operator, empty where no gradient is
wanted.
Source: decay_scan_naive.py is the definition; the kernels are in triton_scalar.py and triton_vector.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.triton_scalar import backward as scalar_backward
from kernels.triton_scalar import default_config as scalar_config
from kernels.triton_scalar import forward as scalar_forward
from kernels.triton_scalar import saved_like as scalar_saved_like
from kernels.triton_toolchain import choose_ptxas
from kernels.triton_vector import backward as vector_backward
from kernels.triton_vector import default_config as vector_config
from kernels.triton_vector import forward as vector_forward
from kernels.triton_vector import saved_like as vector_saved_like

choose_ptxas()  # before the first kernel is compiled
LARGEST_DIM, DIM_STEP = 256, 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decay_scan_triton(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    log_decay: Tensor,
    initial_state_bhkv: Tensor | None = None,
    output_final_state: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V) in fp32 or None).

    q: fp32, fp16 or bf16, in which k and v are taken too; K and V multiples of 8 up to 256. log_decay: natural log of λ,
    (B, T, H) or (B, T, H, K), read as fp32; -inf is λ = 0. Any B >= 0 and T >= 0. Differentiable in every tensor, states
    included.
    """
    batch, length, heads, key_dim = q_bthk.shape
    if 0 in (batch, length, heads):
        state = initial_state_bhkv
        if state is None:
            state = q_bthk.new_zeros(batch, heads, key_dim, v_bthv.shape[-1])
        return torch.zeros_like(v_bthv), state.float() if output_final_state else None
    tensors = (q_bthk, k_bthk, v_bthv, log_decay, initial_state_bhkv)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    q, k, v = (x.to(q_bthk.dtype) for x in (q_bthk, k_bthk, v_bthv))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    o, state, *_ = _forward(q, k, v, _wide(log_decay), initial_state_bhkv, scale, output_final_state, keep)
    return o, state if output_final_state else None


def refusal(q_bthk: Tensor, v_bthv: Tensor) -> str | None:
    """Why the kernels cannot serve these tensors; None when they can."""
    if q_bthk.dtype not in DTYPES:
        return f"the Triton kernels have no {q_bthk.dtype}"
    for name, dim in (("K", q_bthk.shape[-1]), ("V", v_bthv.shape[-1])):
        if dim % DIM_STEP or dim > LARGEST_DIM:
            return f"{name}={dim} is no multiple of {DIM_STEP} up to {LARGEST_DIM}"
    return None


def _wide(log_decay: Tensor) -> Tensor:
    """fp32; a vector decay's channels lie side by side. A scalar decay may be an expanded view."""
    log_decay = log_decay.float()
    return log_decay.contiguous() if log_decay.dim() == 4 and log_decay.stride(-1) != 1 else log_decay


class _Kernels(NamedTuple):
    """The launchers of one granularity."""

    forward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]
    default_config: Callable[..., Any]
    saved_like: Callable[..., tuple[tuple[int, ...], torch.dtype]]


_SCALAR = _Kernels(scalar_forward, scalar_backward, scalar_config, scalar_saved_like)
_VECTOR = _Kernels(vector_forward, vector_backward, vector_config, vector_saved_like)


def _kernels(log_decay: Tensor) -> _Kernels:
    return _VECTOR if log_decay.dim() == 4 else _SCALAR


def _config(q: Tensor, v: Tensor, log_decay: Tensor) -> Any:
    return _kernels(log_decay).default_config(q.shape[-1], v.shape[-1], q.dtype)


@torch.library.custom_op("decay::decay_scan", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    scale: float,
    want_state: bool,
    want_saved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    config = _config(q, v, log_decay)
    initial = None if initial_state is None else initial_state.float().contiguous()
    launch = _kernels(log_decay).forward
    o, *others = launch(q, k, v, log_decay, scale, initial, want_state, want_saved, config)
    state, saved = (q.new_empty(0) if x is None else x for x in others)
    return o, state, saved


@torch.library.custom_op("decay::decay_scan_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    saved: Tensor,
    do: Tensor,
    d_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    config = _config(q, v, log_decay)
    initial = None if initial_state is None else initial_state.float().contiguous()
    kept = saved if saved.numel() else None
    do = do if do.stride(-1) == 1 else do.contiguous()
    d_state = None if d_state is None else d_state.float().contiguous()
    *grads, d_initial = _kernels(log_decay).backward(q, k, v, log_decay, scale, initial, kept, do, d_state, config)
    return *grads, q.new_empty(0) if d_initial is None else d_initial


@_forward.register_fake
def _(q, k, v, log_decay, initial_state, scale, want_state, want_saved):
    batch, length, heads, key_dim = q.shape
    state = (batch, heads, key_dim, v.shape[-1]) if want_state else (0,)
    state = torch.empty(state, device=q.device, dtype=torch.float32 if want_state else q.dtype)
    o = torch.empty((batch, length, heads, v.shape[-1]), device=q.device, dtype=v.dtype)
    nothing = (0,), q.dtype
    shape, dtype = _kernels(log_decay).saved_like(q, v, _config(q, v, log_decay)) if want_saved else nothing
    return o, state, torch.empty(shape, device=q.device, dtype=dtype)


@_backward.register_fake
def _(q, k, v, log_decay, initial_state, saved, do, d_state, scale):
    grads = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v, log_decay)]
    shape = (0,) if initial_state is None else initial_state.shape
    return *grads, torch.empty(shape, device=q.device, dtype=q.dtype if initial_state is None else torch.float32)


def _remember(ctx, inputs, output) -> None:
    q, k, v, log_decay, initial_state, ctx.scale, ctx.want_state, _ = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial_state, output[2])


def _differentiate(ctx, do, d_state, *_):
    *inputs, initial_state, saved = ctx.saved_tensors
    d_state = d_state if ctx.want_state else None
    dq, dk, dv, dg, d_initial = _backward(*inputs, initial_state, saved, do, d_state, ctx.scale)
    d_initial = None if initial_state is None else d_initial.to(initial_state.dtype)
    return dq, dk, dv, dg, d_initial, None, None, None


_forward.register_autograd(_differentiate, setup_context=_remember)
