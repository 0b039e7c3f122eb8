"""The output gate and the norm after it as one kernel forward and one backward: each number is read once and written once.

    y = s x ⊙ gain,  x = o ⊙ σ(gate),  s = √d / √(Σ x² + ε)
    dx = s dy ⊙ gain - x s³/d Σ(dy ⊙ gain ⊙ x),  do = dx ⊙ σ,  dgate = dx ⊙ o ⊙ σ(1 - σ),  dgain = Σ_rows dy s ⊙ x

What is unusual: nothing but the inputs is kept for the backward pass, s is computed again. Every program walks over rows of its
own and keeps a partial sum of dgain, which are then added in a fixed order: no atomics, equal bits from run to run.
Source: gated_norm_naive.py is the definition.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compile_ahead import compile_ahead
from kernels.launching import launch, next_power_of_2, on_device_of

ROWS_OF_PROGRAMS = 1056  # programs of the backward pass: eight for each of an H100's 132 multiprocessors
WIDEST = 16384  # channels of a row that one program holds
_seen: set[tuple[object, ...]] = set()  # calls whose kernels have been compiled


@triton.jit
def _row(o, gate, offsets, inside):
    x_o = tl.load(o + offsets, mask=inside, other=0.0).to(tl.float32)
    x_gate = tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
    return x_o, 1.0 / (1.0 + tl.exp(-x_gate))


@triton.jit
def _forward_kernel(o, gate, gain, y, width, eps, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    offsets = tl.program_id(0).to(tl.int64) * width + channel
    value, opening = _row(o, gate, offsets, inside)
    x = value * opening
    s = tl.sqrt(width / (tl.sum(x * x, 0) + eps))
    weight = tl.load(gain + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + offsets, (x * s * weight).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(o, gate, gain, dy, do, dgate, dgain, rows, width, eps, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    weight = tl.load(gain + channel, mask=inside, other=0.0).to(tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offsets = tl.cast(row, tl.int64) * width + channel
        value, opening = _row(o, gate, offsets, inside)
        x = value * opening
        s = tl.sqrt(width / (tl.sum(x * x, 0) + eps))
        grad = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        summed += grad * s * x
        grad = grad * weight
        dx = s * grad - x * (s * s * s / width * tl.sum(grad * x, 0))
        tl.store(do + offsets, (dx * opening).to(do.dtype.element_ty), mask=inside)
        tl.store(dgate + offsets, (dx * value * opening * (1.0 - opening)).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dgain + tl.program_id(0) * width + channel, summed, mask=inside)


@torch.library.custom_op("decay::gated_norm", mutates_args=())
def _forward(o: Tensor, gate: Tensor, gain: Tensor, eps: float) -> Tensor:
    o, gate = o.contiguous(), gate.contiguous()
    if not o.numel():
        return torch.empty_like(o, dtype=gate.dtype)
    first = o.device, o.dtype, gate.dtype, gain.dtype, o.shape[-1]
    if first not in _seen:
        _seen.add(first)
        _compile_both(o, gate, gain, eps)
    with on_device_of(o):
        return _launch_forward(o, gate, gain, eps)


@torch.library.custom_op("decay::gated_norm_backward", mutates_args=())
def _backward(o: Tensor, gate: Tensor, gain: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    o, gate, dy = o.contiguous(), gate.contiguous(), dy.contiguous()
    with on_device_of(o):
        do, dgate, dgain = _launch_backward(o, gate, gain, dy, eps)
    return do, dgate, dgain.sum(dim=0).to(gain.dtype)


def _compile_both(o: Tensor, gate: Tensor, gain: Tensor, eps: float) -> None:
    """Both kernels side by side, for the width at hand."""
    one, other, gains = (torch.empty_like(x, device="meta") for x in (o, gate, gain))

    def call() -> None:
        _launch_backward(one, other, gains, _launch_forward(one, other, gains, eps), eps)

    with on_device_of(o):
        compile_ahead(call)


def _launch_forward(o: Tensor, gate: Tensor, gain: Tensor, eps: float) -> Tensor:
    width, y = o.shape[-1], torch.empty_like(o, dtype=gate.dtype)
    arguments = dict(o=o, gate=gate, gain=gain, y=y, width=width, eps=eps, BLOCK=next_power_of_2(width))
    launch(_forward_kernel, (o.numel() // width,), arguments, num_warps=_warps(width))
    return y


def _launch_backward(o: Tensor, gate: Tensor, gain: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """dgain in one row for each program."""
    width = o.shape[-1]
    rows = o.numel() // width
    programs = min(rows, ROWS_OF_PROGRAMS)
    do, dgate = torch.empty_like(o), torch.empty_like(gate)
    dgain = torch.empty(programs, width, device=o.device, dtype=torch.float32)
    if rows:
        arguments = dict(
            o=o, gate=gate, gain=gain, dy=dy, do=do, dgate=dgate, dgain=dgain, rows=rows, width=width, eps=eps,
            BLOCK=next_power_of_2(width),
        )  # fmt: skip
        launch(_backward_kernel, (programs,), arguments, num_warps=_warps(width))
    return do, dgate, dgain


@_forward.register_fake
def _(o: Tensor, gate: Tensor, gain: Tensor, eps: float) -> Tensor:
    return torch.empty(o.shape, device=o.device, dtype=gate.dtype)


@_backward.register_fake
def _(o: Tensor, gate: Tensor, gain: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    empty = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (o, gate, gain))
    do, dgate, dgain = empty
    return do, dgate, dgain


def _remember(ctx, inputs, output) -> None:
    o, gate, gain, ctx.eps = inputs
    ctx.save_for_backward(o, gate, gain)


def _differentiate(ctx, dy):
    return (*_backward(*ctx.saved_tensors, dy, ctx.eps), None)


_forward.register_autograd(_differentiate, setup_context=_remember)


def _warps(width: int) -> int:
    return min(max(next_power_of_2(width) // 256, 1), 16)


def gated_norm_triton(o_btd: Tensor, gate_btd: Tensor, gain_d: Tensor, eps: float) -> Tensor:
    """o, gate (..., d) of any two dtypes, gain (d) to y (..., d) in the gate's dtype. d up to WIDEST."""
    y: Tensor = _forward(o_btd, gate_btd, gain_d, eps)
    return y
