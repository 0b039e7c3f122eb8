"""LightNet's decay on a GPU: log λ_t = -softplus(f_t - z_{t-1}), z_t = log(1 + Σ_{i<=t} e^{f_i}), as one kernel each way.

What is surprising:
- z is a sum over all earlier tokens, so a program walks along time with a block of channels; within a block of tokens the sum
  is a parallel scan over pairs (largest logit, sum relative to it), which no f overflows.
- The backward pass is a decay scan itself: with A the gradient of z, A_{t-1} = λ_t A_t + (1 - λ_t) dlog λ_t and
  df_t = (1 - λ_t)(A_t - dlog λ_t), in reverse. It needs log λ alone.
Source: decay_core/decays/lightnet.py is the definition; paper appendix A.2, LightNet (arXiv 2405.21022).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launching import cdiv, launch, on_device_of
from kernels.triton_gate import LN_2, LOG2_E, shared_key, softplus
from kernels.triton_toolchain import choose_ptxas

choose_ptxas()
ROWS, COLUMNS = 32, 64  # tokens of a step, channels of a program


@triton.jit
def _add_logits(most_a, sum_a, most_b, sum_b):
    most = tl.maximum(most_a, most_b)
    return most, sum_a * tl.exp2(most_a - most) + sum_b * tl.exp2(most_b - most)


@triton.jit
def _compose(decay_a, value_a, decay_b, value_b):
    return decay_a * decay_b, value_a * decay_b + value_b


@triton.jit(do_not_specialize=["tokens", "channels"])
def _forward_kernel(f, log_decay, tokens, channels, C: tl.constexpr, D: tl.constexpr):
    row = tl.arange(0, C)[:, None]
    column = tl.program_id(1) * D + tl.arange(0, D)[None, :]
    start = tl.program_id(0).to(tl.int64) * tokens * channels
    f += start
    log_decay += start
    carried_most = tl.zeros([1, D], tl.float32)  # the virtual first logit, 0
    carried_sum = tl.full([1, D], 1.0, tl.float32)
    for first in tl.range(0, tokens, C):
        here = (first + row < tokens) & (column < channels)
        own = tl.load(f + (first + row) * channels + column, mask=here, other=0.0).to(tl.float32) * LOG2_E
        # logits of the tokens before each; the first one's is in what is carried
        before = tl.load(f + (first + row - 1) * channels + column, mask=here & (row > 0), other=float("-inf"))
        before = before.to(tl.float32) * LOG2_E
        most = tl.where(row > 0, before, carried_most)
        total = tl.where(row > 0, tl.full([C, D], 1.0, tl.float32), carried_sum)
        most, total = tl.associative_scan((most, total), 0, _add_logits)
        step = softplus((own - most - tl.log2(total)) * LN_2)
        tl.store(log_decay + (first + row) * channels + column, -step, mask=here)
        # z after this step, from its last row
        last = row == C - 1
        largest = tl.maximum(most, own)
        total = total * tl.exp2(most - largest) + tl.exp2(own - largest)
        carried_most = tl.sum(tl.where(last, largest, 0.0), 0)[None, :]
        carried_sum = tl.sum(tl.where(last, total, 0.0), 0)[None, :]


@triton.jit(do_not_specialize=["tokens", "channels"])
def _backward_kernel(log_decay, d_log, df, tokens, channels, C: tl.constexpr, D: tl.constexpr):
    row = tl.arange(0, C)[:, None]
    column = tl.program_id(1) * D + tl.arange(0, D)[None, :]
    start = tl.program_id(0).to(tl.int64) * tokens * channels
    log_decay += start
    d_log += start
    df += start
    carried = tl.zeros([1, D], tl.float32)  # A after the last token of this step
    for n in tl.range(0, tl.cdiv(tokens, C)):
        # rows of a step lie in reverse
        t = tokens - 1 - n * C - row
        here = (t >= 0) & (column < channels)
        log2 = tl.load(log_decay + t * channels + column, mask=here, other=0.0) * LOG2_E
        gradient = tl.load(d_log + t * channels + column, mask=here, other=0.0).to(tl.float32)
        forgotten = shared_key(log2)
        decay, value = tl.associative_scan((tl.exp2(log2), forgotten * gradient), 0, _compose)
        after = decay * carried + value  # A_{t-1}
        # A_t is what the row before has as A_{t-1}: λ_t A_t = A_{t-1} - (1 - λ_t) dlog λ_t would divide by λ
        t = t + 1
        log2_next = tl.load(log_decay + t * channels + column, mask=(row > 0) & here, other=0.0) * LOG2_E
        next_gradient = tl.load(d_log + t * channels + column, mask=(row > 0) & here, other=0.0).to(tl.float32)
        decay, value = tl.associative_scan((tl.exp2(log2_next), shared_key(log2_next) * next_gradient), 0, _compose)
        at = decay * carried + value
        tl.store(df + (t - 1) * channels + column, (forgotten * (at - gradient)).to(df.dtype.element_ty), mask=here)
        carried = tl.sum(tl.where(row == C - 1, after, 0.0), 0)[None, :]


def running_decay_triton(f: Tensor) -> Tensor:
    """log λ in fp32, of f's shape (B, T, ...); differentiable in f. f: fp32, fp16 or bf16."""
    return _forward(f.contiguous())


def _grid(f: Tensor) -> tuple[tuple[int, int], int, int]:
    batch, tokens = f.shape[:2]
    channels = f[0, 0].numel() if f.numel() else 0
    return (batch, cdiv(channels, COLUMNS)), tokens, channels


@torch.library.custom_op("decay::running_decay", mutates_args=())
def _forward(f: Tensor) -> Tensor:
    log_decay = torch.empty(f.shape, dtype=torch.float32, device=f.device)
    if f.numel():
        grid, tokens, channels = _grid(f)
        arguments = dict(f=f, log_decay=log_decay, tokens=tokens, channels=channels, C=ROWS, D=COLUMNS)
        with on_device_of(f):
            launch(_forward_kernel, grid, arguments)
    return log_decay


@torch.library.custom_op("decay::running_decay_backward", mutates_args=())
def _backward(log_decay: Tensor, d_log: Tensor, dtype: torch.dtype) -> Tensor:
    df = torch.empty(log_decay.shape, dtype=dtype, device=log_decay.device)
    if df.numel():
        grid, tokens, channels = _grid(log_decay)
        tensors = dict(log_decay=log_decay, d_log=d_log.contiguous(), df=df)
        with on_device_of(df):
            launch(_backward_kernel, grid, dict(**tensors, tokens=tokens, channels=channels, C=ROWS, D=COLUMNS))
    return df


@_forward.register_fake
def _(f):
    return torch.empty(f.shape, dtype=torch.float32, device=f.device)


@_backward.register_fake
def _(log_decay, d_log, dtype):
    return torch.empty(log_decay.shape, dtype=dtype, device=log_decay.device)


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(output)
    ctx.dtype = inputs[0].dtype


def _differentiate(ctx, d_log):
    return _backward(ctx.saved_tensors[0], d_log, ctx.dtype)


_forward.register_autograd(_differentiate, setup_context=_remember)
