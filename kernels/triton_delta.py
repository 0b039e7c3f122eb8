"""Linear attention with the delta rule and one decay per head and token, or none, as Triton kernels: four launches for forward
and backward.

    S_t = λ_t (I − β_t k_t k_tᵀ) S_{t-1} + w_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t        w = β or 1

What is unusual:
- What a chunk's tokens do to each other does not depend on the state: `solve` inverts the triangular systems of all chunks at
  once (a second launch those few that fp16 has no range for), a walk forwards carries the state, a walk in reverse its
  gradient, and `gradients` does all chunks at once again.
- λ is made from what it is a function of by `solve` alone, which leaves running sums for the others.
- The backward pass is given the solved systems, the state at each chunk's start and the error of each recall; with the policy
  `recompute` it makes them again.
- A state is walked in slices of V, whose columns do not meet. A sequence is walked by as many programs as it has heads and
  slices, so that few heads leave a device idle: a segment acts on the state that it starts from as a K × K matrix.
- fp32 inputs are multiplied as three tf32 products. No atomics: two runs give equal bits.
Source: delta_scan_naive.py is the definition; the chunked form is that of DeltaNet (arXiv 2406.06484).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernels.decay_source import PARAMETERS, DecaySource
from kernels.launching import INTERPRETED, at_most, cdiv, launch, next_power_of_2, on_device_of, padded, strides, widened
from kernels.triton_delta_gradients import gradients_kernel
from kernels.triton_delta_solve import planes, solve_kernel, solve_rest_kernel
from kernels.triton_delta_walk import forward_kernel, reverse_kernel
from kernels.triton_gate import KINDS
from kernels.triton_scalar import slot_count
from kernels.triton_scalar_gate import gate_kernel

PROGRAMS = 1024  # enough to fill a device several times
REST = 64  # chunks that a program of solve_rest_kernel looks at
_TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """How the kernels of one (K, V) are cut; every value changes time and rounding only.

    chunk: tokens of a step of every kernel, a power of two. policy: "save" keeps what the backward pass wants, "recompute"
    makes it again. solve_…, forward_…, reverse_…, gradient_…: of the four kernels; warps, stages, most registers per thread,
    the widest slice of V in a program of a walk, the widest slices of K and V that a program of the gradients holds, and the
    most chunks that it does one after the other, so that stages may load ahead.
    """

    chunk: int = 64
    policy: str = "save"
    solve_warps: int = 4
    solve_registers: int | None = 128
    forward_warps: int = 4
    forward_stages: int = 2
    forward_registers: int | None = None
    forward_value_block: int = 64
    reverse_warps: int = 4
    reverse_stages: int = 2
    reverse_registers: int | None = None
    reverse_value_block: int = 64
    gradient_warps: int = 4
    gradient_stages: int = 1
    gradient_chunks: int = 1
    gradient_registers: int | None = None
    gradient_key_block: int = 64
    gradient_value_block: int = 128


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    inverse: Tensor
    gates: Tensor
    states: Tensor
    errors: Tensor


class DeltaGradients(NamedTuple):
    """What the backward launcher returns, each in its input's shape and dtype; None for what was not given."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    x: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    initial_state: Tensor | None


@cache
def default_config(key_dim: int, value_dim: int, dtype: torch.dtype) -> DeltaConfig:
    """Returns a configuration that is right for these dims, and by what it compiles to a fast one."""
    return candidates(key_dim, value_dim, dtype)[0]


def candidates(key_dim: int, value_dim: int, dtype: torch.dtype) -> list[DeltaConfig]:
    """Returns configurations worth timing for these dims, the default first."""
    if dtype == torch.float32:
        return [DeltaConfig(chunk=32, forward_stages=1, reverse_stages=1)]
    shallow = DeltaConfig(forward_stages=1, reverse_stages=1)
    if padded(key_dim) == 64 and padded(value_dim) == 64:
        deep = DeltaConfig(solve_registers=168, forward_stages=3, reverse_stages=3, gradient_stages=2, gradient_chunks=4)
        others = [replace(deep, solve_registers=n) for n in (128, None)]
        return [deep, *others, replace(deep, forward_stages=2), replace(deep, gradient_stages=1)]
    found = [DeltaConfig(), DeltaConfig(solve_registers=168), DeltaConfig(solve_registers=None)]
    narrow = DeltaConfig(forward_value_block=32, reverse_value_block=32)
    return [*found, narrow, shallow, *([DeltaConfig(gradient_value_block=64)] if padded(value_dim) > 64 else [])]


def forward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    beta_bth: Tensor,
    source: DecaySource | None,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool,
    want_saved: bool,
    beta_on_write: bool,
    normalize_key: bool,
    config: DeltaConfig,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Saved | None]:
    """Returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V) fp32 or None, what backward wants back or None).

    source: x (B, T, H), any strides. The last axis of q, k and v is contiguous. K, V <= 256. cu_seqlens: (N + 1,), int32 or
    int64, where N sequences packed into B = 1 begin and end, not looked at here; states are then (N, H, K, V).
    """
    call = _Call(q_bthk, k_bthk, v_bthv, beta_bth, source, scale, beta_on_write, normalize_key, config, cu_seqlens)
    keep = want_saved and config.policy == "save"
    o = v_bthv.new_empty(v_bthv.shape)
    final = call.outside_states() if want_state else None
    saved = call.solved(keep)
    call.walk_forwards(o, widened(initial_state), final, saved)
    return o, final, saved if keep else None


def backward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    beta_bth: Tensor,
    source: DecaySource | None,
    scale: float,
    initial_state: Tensor | None,
    saved: Saved | None,
    do_bthv: Tensor,
    d_final_state: Tensor | None,
    beta_on_write: bool,
    normalize_key: bool,
    config: DeltaConfig,
    cu_seqlens: Tensor | None = None,
) -> DeltaGradients:
    """Returns the gradients in the inputs' dtypes, that of the initial state in fp32; without `saved` it is made again."""
    call = _Call(q_bthk, k_bthk, v_bthv, beta_bth, source, scale, beta_on_write, normalize_key, config, cu_seqlens)
    if saved is None:
        saved = call.solved(True)
        call.walk_forwards(None, widened(initial_state), None, saved)
    d_initial = None if initial_state is None else call.outside_states()
    dr, d_states = torch.empty_like(saved.errors), torch.empty_like(saved.states)
    call.walk_in_reverse(do_bthv, widened(d_final_state), dr, d_initial, d_states, saved)
    return call.gradients(do_bthv, dr, d_states, d_initial, saved)


def inverse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of M: fp16 has more digits than bf16."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def saved_like(
    q_bthk: Tensor, v_bthv: Tensor, normalize_key: bool, config: DeltaConfig, cu_seqlens: Tensor | None = None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `forward` keeps for the backward pass, in Saved's order; (0,) where it keeps nothing."""
    if config.policy != "save":
        return [((0,), q_bthk.dtype)] * 4
    batch, tokens, heads, key_dim = q_bthk.shape
    chunk = config.chunk
    slots = slot_count(batch, tokens, None if cu_seqlens is None else cu_seqlens.shape[0] - 1, chunk)
    return [
        ((slots, heads, chunk, chunk), inverse_dtype(q_bthk.dtype)),
        ((slots, heads, planes(normalize_key), chunk), torch.float32),
        ((slots, heads, key_dim, v_bthv.shape[-1]), q_bthk.dtype),
        (tuple(v_bthv.shape), q_bthk.dtype),
    ]


class _Call:
    """One call: its tensors and sizes, and the launches that its passes share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        source: DecaySource | None,
        scale: float,
        beta_on_write: bool,
        normalize_key: bool,
        config: DeltaConfig,
        cu: Tensor | None,
    ) -> None:
        if not scale > 0:
            raise ValueError(f"scale={scale}: it must be positive, since its logarithm is added to those of the decays")
        self.q, self.k, self.v, self.beta, self.source, self.config, self.cu = q, k, v, beta, source, config, cu
        self.batch, self.tokens, self.heads, self.key_dim = q.shape
        self.value_dim = v.shape[-1]
        self.sequences = self.batch if cu is None else cu.shape[0] - 1
        self.slots = slot_count(self.batch, self.tokens, None if cu is None else self.sequences, config.chunk)
        self.whole_k, self.whole_v = padded(self.key_dim), padded(self.value_dim)
        single = q.dtype == torch.float32
        operand = tl.float32 if INTERPRETED and q.dtype == torch.bfloat16 else _TRITON_DTYPE[q.dtype]
        self.numbers: dict[str, Any] = {"LP": operand, "PRECISION": "tf32x3" if single else "tf32", "SPLIT": single}
        self.modes = {"NORM": normalize_key, "WRITE": beta_on_write}
        self.numbers["PLANES"] = self.planes = planes(normalize_key)
        self.log2_scale = math.log2(scale)

    @property
    def on_device(self) -> AbstractContextManager[object]:
        return on_device_of(self.q)

    def new(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(sizes, dtype=dtype)

    def outside_states(self) -> Tensor:
        return self.new(self.sequences, self.heads, self.key_dim, self.value_dim)

    def parameters(self) -> dict[str, Tensor | None]:
        """The gain and the offset that the source's formula uses, in fp32."""
        if self.source is None:
            return {"gain": None, "offset": None}
        used = PARAMETERS[self.source.kind]
        given = {"gain": self.source.gain, "offset": self.source.offset}
        return {name: widened(x) if name in used else None for name, x in given.items()}

    def solved(self, keep: bool) -> Saved:
        """The chunks' systems and gates; with `keep`, room for what the walk leaves."""
        chunk, dtype = self.config.chunk, self.q.dtype
        inverse = self.new(self.slots, self.heads, chunk, chunk, dtype=inverse_dtype(dtype))
        gates = self.new(self.slots, self.heads, self.planes, chunk)
        states = self.new(self.slots if keep else 0, self.heads, self.key_dim, self.value_dim, dtype=dtype)
        errors = self.new(*self.v.shape[: 4 if keep else 0], dtype=dtype)
        x = None if self.source is None else self.source.x
        steps = strides("x", x) | strides("beta", self.beta)
        arguments = dict(
            k=self.k, x=x, beta=self.beta, **self.parameters(), cu=self.cu, inverse=inverse, gates=gates,
            slope=1.0 if self.source is None else float(self.source.slope), tokens=self.tokens, heads=self.heads,
            sequences=self.sequences, search_steps=self.sequences.bit_length(), **self.rows(k=self.k), **steps,
            K=self.key_dim, BLOCK_K=min(128, self.whole_k), CHUNK=chunk, LEVELS=chunk.bit_length() - 1,
            KIND=0 if self.source is None else KINDS[self.source.kind], NORM=self.modes["NORM"], **self.numbers,
        )  # fmt: skip
        places = self.slots * self.heads
        unfit = None if self.numbers["LP"] == tl.float32 else self.new(places, dtype=torch.int32)
        with self.on_device:
            how = {"num_warps": self.config.solve_warps, **at_most(self.config.solve_registers)}
            launch(solve_kernel, (places,), arguments | {"unfit": unfit}, **how)
            if unfit is not None:
                arguments |= {"unfit": unfit, "places": places, "COUNT": REST}
                launch(solve_rest_kernel, (cdiv(places, REST),), arguments, num_warps=self.config.solve_warps)
        return Saved(inverse, gates, states, errors)

    def walk_forwards(self, o: Tensor | None, initial: Tensor | None, final: Tensor | None, saved: Saved) -> None:
        block, stages, keep = self.config.forward_value_block, self.config.forward_stages, bool(saved.states.numel())
        inputs = {"k": self.k, "v": self.v, "q": self.q}
        arguments = dict(
            **inputs, inverse=saved.inverse, gates=saved.gates, cu=self.cu, initial=initial, o=o, final=final,
            states=saved.states if keep else None, errors=saved.errors if keep else None,
            **self.walk_sizes(block), **self.rows(**inputs), WRITE=self.modes["WRITE"], STAGES=stages,
        )  # fmt: skip
        self.walk(forward_kernel, block, arguments, self.config.forward_warps, stages, self.config.forward_registers)

    def walk_in_reverse(
        self, do: Tensor, d_final: Tensor | None, dr: Tensor, d_initial: Tensor | None, d_states: Tensor, saved: Saved
    ) -> None:
        block, stages = self.config.reverse_value_block, self.config.reverse_stages
        inputs = {"q": self.q, "k": self.k, "d": do}
        arguments = dict(
            **inputs, inverse=saved.inverse, gates=saved.gates, cu=self.cu, d_final=d_final, dr=dr, d_initial=d_initial,
            d_states=d_states, **self.walk_sizes(block), **self.rows(**inputs), STAGES=stages,
        )  # fmt: skip
        self.walk(reverse_kernel, block, arguments, self.config.reverse_warps, stages, self.config.reverse_registers)

    def walk_sizes(self, value_block: int) -> dict[str, Any]:
        return dict(
            log2_scale=self.log2_scale, tokens=self.tokens, batches=self.batch, heads=self.heads,
            segments=1 if self.cu is None else self.sequences, length=self.tokens,
            K=self.key_dim, V=self.value_dim, BLOCK_K=self.whole_k, BLOCK_V=min(value_block, self.whole_v),
            CHUNK=self.config.chunk, NORM=self.modes["NORM"], EACH=self.cu is not None, **self.numbers,
        )  # fmt: skip

    def walk(self, kernel: Any, block: int, arguments: dict[str, Any], warps: int, stages: int, registers: int | None) -> None:
        programs = self.sequences * self.heads * cdiv(self.value_dim, min(block, self.whole_v))
        with self.on_device:
            launch(kernel, (programs,), arguments, num_warps=warps, num_stages=stages, **at_most(registers))

    def gradients(self, do: Tensor, dr: Tensor, d_states: Tensor, d_initial: Tensor | None, saved: Saved) -> DeltaGradients:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (self.q, self.k, self.v))
        d_beta = self.new(*self.q.shape[:3])
        block_k = min(self.config.gradient_key_block, self.whole_k)
        slices = 1 if self.modes["NORM"] else cdiv(self.key_dim, block_k)
        stages = self.config.gradient_stages
        most = self.config.gradient_chunks if stages > 1 else 1
        count = max(1, min(most, self.slots * self.heads * slices // PROGRAMS))
        d_log = None if self.source is None else self.new(slices, *self.q.shape[:3])
        inputs = {"q": self.q, "k": self.k, "v": self.v, "d": do}
        arguments = dict(
            **inputs, gates=saved.gates, errors=saved.errors, dr=dr, starts=saved.states, ends=d_states, cu=self.cu, dq=dq,
            dk=dk, dv=dv, d_beta=d_beta, d_log=d_log, log2_scale=self.log2_scale, tokens=self.tokens, batches=self.batch,
            heads=self.heads, slots=self.slots, count=count,
            sequences=self.sequences, search_steps=self.sequences.bit_length(), **self.rows(**inputs),
            K=self.key_dim, V=self.value_dim, BLOCK_K=block_k, BLOCK_V=min(self.config.gradient_value_block, self.whole_v),
            APART=not self.modes["NORM"], STAGES=stages,
            CHUNK=self.config.chunk, **self.numbers, **self.modes,
        )  # fmt: skip
        with self.on_device:
            how = {"num_warps": self.config.gradient_warps, "num_stages": stages, **at_most(self.config.gradient_registers)}
            launch(gradients_kernel, (cdiv(self.slots, count) * self.heads * slices,), arguments, **how)
        return DeltaGradients(dq, dk, dv, d_beta.to(self.beta.dtype), **self.gate_gradients(d_log), initial_state=d_initial)

    def gate_gradients(self, d_log: Tensor | None) -> dict[str, Tensor | None]:
        """Those of x, gain and offset from that of log λ."""
        if self.source is None or d_log is None:
            return {"x": None, "gain": None, "offset": None}
        x = self.source.x
        if self.source.kind == "log" and x.dtype == d_log.dtype and d_log.shape[0] == 1:
            return {"x": d_log[0], "gain": None, "offset": None}
        rows, block_rows, block_heads = self.batch * self.tokens, 64, min(16, next_power_of_2(self.heads))
        grid = (cdiv(rows, block_rows), cdiv(self.heads, block_heads))
        dx, parameters = torch.empty(x.shape, dtype=x.dtype, device=x.device), self.parameters()
        sums = {f"d_{name}": None if y is None else self.new(grid[0], self.heads) for name, y in parameters.items()}
        arguments = dict(
            d_log=d_log, x=x, **parameters, dx=dx, **sums, slope=float(self.source.slope), slices=d_log.shape[0], rows=rows,
            tokens=self.tokens, heads=self.heads, **strides("x", x), ROWS=block_rows, HEADS=block_heads,
            KIND=KINDS[self.source.kind],
        )  # fmt: skip
        with self.on_device:
            launch(gate_kernel, grid, arguments)
        given = {"gain": self.source.gain, "offset": self.source.offset}
        summed = {name: sums[f"d_{name}"] for name in given}
        return {"x": dx, **{name: None if y is None else y.sum(dim=0).to(given[name].dtype) for name, y in summed.items()}}

    def rows(self, **tensors: Tensor) -> dict[str, int]:
        """Strides in units of 16 bytes where all allow it, so that the compiler knows that rows are aligned."""
        unit = 16 // self.q.dtype.itemsize
        align = unit if all(stride % unit == 0 for y in tensors.values() for stride in y.stride()[:3]) else 1
        found = {name: stride // align for key, y in tensors.items() for name, stride in strides(key, y).items()}
        return found | {"ALIGN": align}
