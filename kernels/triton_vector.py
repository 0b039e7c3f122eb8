"""Linear attention with one decay per key channel, as Triton kernels: forward and every gradient, exact for any λ in [0, 1].

    S_t = diag(λ_t) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

What is surprising:

- Time is cut into chunks. Only the state crosses from one chunk to the next, so the forward pass is one kernel that walks
  along the chunks, and the backward pass is a thin walk in reverse (the gradient of the state) and one kernel that takes
  all chunks at once, with the state before and the state gradient after each chunk at hand. Where there are few heads, a
  sequence is cut into segments: a first walk finds what each adds to the state and what it leaves of it, a short one over
  the segments the state from which each starts.
- Inside a block of tokens the decay between two of them is split as 2^(D_i) · 2^(-D_j), where D counts from the middle of
  the block's total decay. That fits the range of bf16 while no channel loses more than 2^-200 within a block. A chunk
  where some channel does is noted in a flag, and a second launch, whose programs return at once elsewhere, does it again with
  blocks of one token: above the blocks, halves are merged pairwise, the later half's rows carrying the decay since the
  middle and the earlier half's rows the decay up to the middle, so every factor is at most 1. No flag is read by the host.
- A block's middle looks ahead, so a later token can move an earlier output's last bits. With `exact` every chunk goes by
  blocks of one token, where nothing does.
- log λ is made where it is used, from what is loaded, and its gradient goes back the same way; so is the key where it is
  1 - λ. It is taken in base 2 and held at -150, which is λ = 0 in fp32; the gradient there is 0.
- The gradient of log λ_t is a sum over the pairs of tokens that t lies between. It is taken as a running sum of
  q·dq - k·dk inside one chunk only, in fp32 and from the very operands that the products saw, so that pairs on one side of
  t cancel to fp32 accuracy; what comes from outside the chunk is read off the two states.
- Products are of bf16 operands for bf16 inputs, tf32 for fp16 inputs (decayed operands need more range than fp16 has) and
  three tf32 products for fp32 inputs; sums are fp32. States between chunks are kept in bf16 for bf16 inputs, else fp32.

Source: the recurrence of the paper (arXiv 2509.05282), diagonal transition; decay_scan_naive.py is the definition.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decay_source import DecaySource
from kernels.triton_gate import KINDS, Gradients
from kernels.triton_vector_backward import gradients_kernel
from kernels.triton_vector_forward import carry_kernel, forward_kernel, outputs_kernel, states_kernel
from kernels.triton_vector_spans import Sequences, Spans

GROUP = 16  # chunks that one program of a launch for flagged chunks looks at
NARROWEST = 64  # columns of a tile: ptxas 12.8 and 13.0 miscompile many products of 32-wide tiles (triton#10486)
PARAMETERS = {"log": (), "softplus": ("gain", "offset"), "floor": ("offset",)}  # what a source's formula has
MOST_REGISTERS = 255  # ptxas, not told, takes 32 for some kernels that want more than there are
CARRIED = 256  # numbers of a state that one program carries along the segments


@dataclass(frozen=True, kw_only=True)
class VectorConfig:
    """How the kernels of one (K, V) are cut; every value changes time and rounding only.

    chunk: tokens between two kept states, and in a step of every kernel but the fused forward pass, which has its own. block:
    tokens within which decays are split around a middle; all three are powers of two from 16 on, chunk at most 128.
    policy: "save" keeps the forward pass's states for the backward pass, "recompute" makes them again.
    forward: "fused" is one walk along the chunks, "split" a walk that makes states and a kernel that takes all chunks at
    once.
    programs: where a walk has fewer, sequences are cut into segments.
    warps, stages, registers (most per thread), value_block (widest piece of V in one program): of the fused forward pass.
    walk_…: of the walks that make states. output_…: of the kernel that makes o from states. gradient_…: of the gradients, where
    a program goes through V in pieces and each piece of K is a launch of its own, that adds to dv.
    """

    chunk: int = 64
    block: int = 64
    policy: str = "save"
    forward: str = "fused"
    programs: int = 256
    forward_chunk: int = 64
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    value_block: int = 64
    walk_warps: int = 4
    walk_stages: int = 2
    walk_registers: int | None = None
    walk_key_block: int = 64
    walk_value_block: int = 64
    output_warps: int = 4
    output_registers: int | None = None
    output_value_block: int = 64
    gradient_warps: int = 4
    gradient_registers: int | None = None
    gradient_key_block: int = 64
    gradient_value_block: int = 64


def default_config(key_dim: int, value_dim: int, dtype: torch.dtype) -> VectorConfig:
    """What is right for these dims; the fastest is for a measurement to tell."""
    if dtype != torch.bfloat16:
        # tf32 products take twice the registers
        if key_dim <= 64:
            return VectorConfig(chunk=32, forward_chunk=16)
        return VectorConfig(chunk=32, forward_chunk=16, warps=8, stages=1, forward="fused" if key_dim <= 128 else "split")
    return candidates(key_dim, value_dim, dtype)[0]


def candidates(key_dim: int, value_dim: int, dtype: torch.dtype) -> list[VectorConfig]:
    """What may be the fastest with 16-bit tensors, the default first: few of these kernels spill registers."""
    if key_dim <= 64:
        return _candidates_for_a_narrow_key(value_dim)
    if key_dim <= 128:
        return _candidates_for_a_wide_key(value_dim)
    base = VectorConfig(forward="split", **_wide_pieces(value_dim, "walk", "output"))
    small = replace(base, chunk=32, walk_stages=3)
    return [
        base,
        replace(base, walk_stages=3),
        replace(base, forward="fused", forward_chunk=16, warps=8, stages=1),
        small,
        replace(small, gradient_registers=168),
        replace(small, gradient_key_block=128, gradient_warps=8),
    ]


def _candidates_for_a_narrow_key(value_dim: int) -> list[VectorConfig]:
    base = VectorConfig(forward_chunk=32, stages=3, **_wide_pieces(value_dim, "walk", "output"))
    small = replace(base, chunk=32, walk_stages=3)
    return [
        base,
        replace(base, stages=2),
        replace(base, stages=2, registers=168),
        replace(base, stages=2, registers=128),
        replace(base, forward_chunk=16),
        replace(base, walk_stages=3),
        replace(base, forward="split"),
        small,
        replace(small, stages=2, registers=168, gradient_registers=168),
    ]


def _candidates_for_a_wide_key(value_dim: int) -> list[VectorConfig]:
    base = VectorConfig(forward_chunk=32, warps=8, **_wide_pieces(value_dim, "walk", "output", "gradient"))
    whole = replace(base, value_block=128, programs=128)
    small = replace(base, chunk=32, registers=128, walk_stages=3, gradient_value_block=64)
    found = [
        base,
        replace(base, registers=128),
        replace(base, warps=4),
        replace(base, warps=4, forward_chunk=16),
        replace(base, forward="split"),
        small,
        replace(small, gradient_registers=168),
        replace(small, gradient_key_block=128, gradient_warps=8),
    ]
    if value_dim > 64:
        found[3:3] = [whole, replace(whole, registers=128, programs=256)]
    return found


def _wide_pieces(value_dim: int, *kernels: str) -> dict[str, Any]:
    """V in pieces of 128 for these kernels, where it is wider than 64."""
    return {f"{kernel}_value_block": 128 for kernel in kernels} if value_dim > 64 else {}


def forward(
    q_bthk: Tensor,
    k_bthk: Tensor | None,
    v_bthv: Tensor,
    decay: DecaySource,
    scale: float,
    initial_state_nhkv: Tensor | None,
    want_state: bool,
    want_saved: bool,
    config: VectorConfig,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns (o, final state or None, states before each chunk or None: what backward may be given).

    Without k the key is 1 - λ. States are (B, H, K, V), or (N, H, K, V) with the boundaries of N packed sequences.
    """
    call = _Call(q_bthk, k_bthk, v_bthv, decay, config, cu_seqlens)
    initial = _state(initial_state_nhkv)
    o = torch.empty(v_bthv.shape, dtype=v_bthv.dtype, device=v_bthv.device)
    keep = want_saved and config.policy == "save"
    with call.on_device:
        if exact or config.forward == "split":
            flags = None if exact else call.new_flags(call.walk_pieces[1])
            states, final = call.states(k_bthk, v_bthv, 1.0, initial, want_state, flags)
            call.outputs(scale, o, states, flags, exact=exact)
        else:
            states = call.new_states() if keep else None
            final = _fused(call, scale, o, initial, want_state, states)
    return o, final, states if keep else None


def backward(
    q_bthk: Tensor,
    k_bthk: Tensor | None,
    v_bthv: Tensor,
    decay: DecaySource,
    scale: float,
    initial_state_nhkv: Tensor | None,
    saved: Tensor | None,
    do_bthv: Tensor,
    d_final_state_nhkv: Tensor | None,
    config: VectorConfig,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> Gradients:
    """Returns the gradients in the inputs' dtypes, that of the initial state in fp32.

    The configuration's policy and chunk are those of the forward pass.
    """
    call = _Call(q_bthk, k_bthk, v_bthv, decay, config, cu_seqlens)
    want_initial = initial_state_nhkv is not None
    with call.on_device:
        states = saved
        if states is None:
            states, _ = call.states(k_bthk, v_bthv, 1.0, _state(initial_state_nhkv), False, None)
        flags = None if exact else call.new_flags(call.walk_pieces[1])
        d_final = _state(d_final_state_nhkv)
        dstates, d_initial = call.states(q_bthk, do_bthv, scale, d_final, want_initial, flags, reverse=True)
        return _gradients(call, scale, do_bthv, states, dstates, flags, exact)._replace(initial_state=d_initial)


def saved_like(
    q_bthk: Tensor, v_bthv: Tensor, config: VectorConfig, cu_seqlens: Tensor | None = None
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the states that `forward` keeps for the backward pass; (0,) where it keeps none."""
    if config.policy != "save":
        return (0,), q_bthk.dtype
    sequences = Sequences(rows=q_bthk.shape[0], tokens=q_bthk.shape[1], cu_seqlens=cu_seqlens)
    return (sequences.chunks(config.chunk), q_bthk.shape[2], v_bthv.shape[-1], q_bthk.shape[-1]), _state_dtype(q_bthk)


class _Call:
    """Sizes, tables and launches that the passes of one call share."""

    def __init__(
        self, q: Tensor, k: Tensor | None, v: Tensor, decay: DecaySource, config: VectorConfig, cu_seqlens: Tensor | None
    ) -> None:
        self.q, self.k, self.v, self.decay, self.config = q, k, v, decay, config
        rows, self.tokens, self.heads, self.key_dim = q.shape
        self.value_dim = v.shape[-1]
        self.sequences = Sequences(rows=rows, tokens=self.tokens, cu_seqlens=cu_seqlens)
        self.chunks = self.sequences.chunks(config.chunk)
        self.whole_k, whole_v = _padded(self.key_dim), _padded(self.value_dim)
        self.forward_v, self.output_v = min(config.value_block, whole_v), min(config.output_value_block, whole_v)
        self.walk_k, self.walk_v = min(config.walk_key_block, self.whole_k), min(config.walk_value_block, whole_v)
        self.gradient_k = min(config.gradient_key_block, self.whole_k)
        self.gradient_v = min(config.gradient_value_block, whole_v)
        self.walk_pieces = triton.cdiv(self.value_dim, self.walk_v), triton.cdiv(self.key_dim, self.walk_k)
        bf16 = q.dtype == torch.bfloat16
        # triton's interpreter multiplies bf16 tiles wrongly
        operand = tl.bfloat16 if bf16 and not _interpreted() else tl.float32
        precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        # what holds every digit of x
        whole = decay.x.dtype == torch.bfloat16 or (decay.x.dtype == torch.float16 and not bf16)
        self.sizes: dict[str, Any] = dict(K=self.key_dim, V=self.value_dim, LP=operand, IP=precision)
        self.source: dict[str, Any] = dict(
            x=decay.x, gain=_parameter(decay, "gain"), offset=_parameter(decay, "offset"), slope=float(decay.slope),
            KIND=KINDS[decay.kind], ONE_HALF=decay.kind == "log" and whole, **_strides("x", decay.x),
        )  # fmt: skip

    @property
    def on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.q.device) if self.q.is_cuda else nullcontext()

    @cached_property
    def table(self) -> Tensor | None:
        return self.sequences.chunk_table(self.config.chunk)

    def cut(self, chunk: int, *, exact: bool = False) -> dict[str, int]:
        """A chunk's logarithm, and its blocks'."""
        block = 1 if exact else min(self.config.block, chunk)
        return dict(C=chunk, LOGC=chunk.bit_length() - 1, BASE=block.bit_length() - 1)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def new_states(self) -> Tensor:
        return self.new(self.chunks, self.heads, self.value_dim, self.key_dim, dtype=_state_dtype(self.q))

    def new_flags(self, pieces: int, every: int = 1) -> Tensor:
        return self.new(pieces, self.chunks * every, self.heads, dtype=torch.int8)

    def states(
        self, a: Tensor | None, y: Tensor, scale: float, outside: Tensor | None, want_last: bool, flags: Tensor | None,
        *, reverse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The states before all chunks from (k, v), or the gradients after them from (q, do); and the last, if wanted."""
        pieces_v, pieces_k = self.walk_pieces
        spans = self.sequences.spans(self.heads * pieces_v * pieces_k, self.config.chunk, self.config.programs)
        states = self.new_states()
        first, last = self.span_starts(spans, a, y, scale, outside, want_last, reverse=reverse)
        self.walk(spans, a, y, scale, first, None if spans.cut else last, states, flags, None, reverse=reverse)
        return states, last

    def span_starts(
        self, spans: Spans, a: Tensor | None, y: Tensor, scale: float, outside: Tensor | None, want_last: bool,
        *, reverse: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """The state from which each span starts, and room for the sequences' last ones: filled here where spans are cut."""
        size = self.key_dim * self.value_dim
        last = self.new(self.sequences.count, self.heads, self.key_dim, self.value_dim) if want_last else None
        if not spans.cut:
            return outside, last
        added = self.new(spans.count, self.heads, self.key_dim, self.value_dim)
        totals = self.new(spans.count, self.heads, self.key_dim)
        self.walk(spans, a, y, scale, None, added, None, None, totals, reverse=reverse)
        carry_kernel[(self.sequences.count * self.heads, triton.cdiv(size, CARRIED))](
            added, totals, outside, last, spans.bounds, self.heads, spans.segments,
            K=self.key_dim, V=self.value_dim, BLOCK=CARRIED, REVERSE=reverse, num_warps=2,
        )  # fmt: skip
        return added, last

    def walk(
        self, spans: Spans, a: Tensor | None, y: Tensor, scale: float, first: Tensor | None, last: Tensor | None,
        states: Tensor | None, flags: Tensor | None, totals: Tensor | None, *, reverse: bool,
    ) -> None:  # fmt: skip
        config = self.config
        states_kernel[(spans.count * self.heads, *self.walk_pieces)](
            a=a, y=y, first_state=first, last_state=last, totals=totals, states=states, flags=flags, spans=spans.table,
            scale=float(scale), T=self.tokens, H=self.heads, segments=spans.segments, length=spans.length, chunks=self.chunks,
            **self.source, **_strides("a", a), **_strides("y", y),
            REVERSE=reverse, BK=self.walk_k, BV=self.walk_v, STAGES=config.walk_stages, **self.cut(config.chunk), **self.sizes,
            num_warps=config.walk_warps, num_stages=config.walk_stages, **_registers(config.walk_registers),
        )  # fmt: skip

    def outputs(
        self, scale: float, o: Tensor, states: Tensor | None, flags: Tensor | None, *, exact: bool, chunk: int | None = None
    ) -> None:
        """o from the states. Without them it holds their part, and only what is flagged is done."""
        config = self.config
        chunk = config.chunk if chunk is None else chunk
        every = config.chunk // chunk
        for again in (True,) if states is None else _launches(exact):
            steep = exact or again
            sizes = (NARROWEST, 4, MOST_REGISTERS) if steep else (self.output_v, config.output_warps, config.output_registers)
            block_v, warps, registers = sizes
            group = GROUP if again else 1
            outputs_kernel[(triton.cdiv(self.chunks * every, group) * self.heads, triton.cdiv(self.value_dim, block_v))](
                q=self.q, k=self.k, v=self.v, o=o, states=states, flags=flags, table=self.table, scale=float(scale),
                T=self.tokens, H=self.heads, chunks=self.chunks * every,
                **self.source, **_strides("q", self.q), **_strides("k", self.k), **_strides("v", self.v),
                AGAIN=again, PIECES=1 if flags is None else flags.shape[0], GROUP=group, EVERY=every, BK=NARROWEST, BV=block_v,
                **self.cut(chunk, exact=steep), **self.sizes, num_warps=warps, num_stages=1, **_registers(registers),
            )  # fmt: skip


def _fused(
    call: _Call, scale: float, o: Tensor, initial: Tensor | None, want_state: bool, states: Tensor | None
) -> Tensor | None:
    """The forward pass as one walk, then its flagged chunks again. Fills o and states; returns the final state if wanted."""
    config = call.config
    chunk = min(config.chunk, config.forward_chunk)
    every = config.chunk // chunk
    pieces = triton.cdiv(call.value_dim, call.forward_v)
    spans = call.sequences.spans(call.heads * pieces, config.chunk, config.programs)
    flags = call.new_flags(1, every)
    first, final = call.span_starts(spans, call.k, call.v, 1.0, initial, want_state, reverse=False)
    forward_kernel[(spans.count * call.heads, pieces)](
        q=call.q, k=call.k, v=call.v, o=o, initial=first, final=None if spans.cut else final, states=states, flags=flags,
        spans=spans.table, scale=float(scale), T=call.tokens, H=call.heads, segments=spans.segments, length=spans.length,
        **call.source, **_strides("q", call.q), **_strides("k", call.k), **_strides("v", call.v),
        EVERY=every, BK=call.whole_k, BV=call.forward_v, STAGES=config.stages, **call.cut(chunk), **call.sizes,
        num_warps=config.warps, num_stages=config.stages, **_registers(config.registers),
    )  # fmt: skip
    call.outputs(scale, o, None, flags, exact=False, chunk=chunk)
    return final


def _gradients(
    call: _Call, scale: float, do: Tensor, states: Tensor, dstates: Tensor, flags: Tensor | None, exact: bool
) -> Gradients:
    """All gradients but the initial state's."""
    q, k, v, decay, config = call.q, call.k, call.v, call.decay, call.config
    dq, dx = call.new(*q.shape, dtype=q.dtype), call.new(*q.shape, dtype=decay.x.dtype)
    dk = None if k is None else call.new(*k.shape, dtype=k.dtype)
    dv = call.new(*v.shape, dtype=v.dtype)
    # one row per chunk and head; a packed call has rows that no chunk fills
    used = [name for name in ("gain", "offset") if call.source[name] is not None]
    rows = dict.fromkeys(("gain", "offset")) | {name: call.new(call.chunks, call.heads, call.key_dim) for name in used}
    if call.table is not None:
        for name in used:
            rows[name].zero_()
    for again in _launches(exact):
        steep = exact or again
        sizes = (NARROWEST, NARROWEST, 4, MOST_REGISTERS)
        if not steep:
            sizes = (call.gradient_k, call.gradient_v, config.gradient_warps, config.gradient_registers)
        block_k, block_v, warps, registers = sizes
        group = GROUP if again else 1
        for first_key in range(0, call.key_dim, block_k):
            gradients_kernel[(triton.cdiv(call.chunks, group) * call.heads,)](
                q=q, k=k, v=v, do=do, dq=dq, dk=dk, dv=dv, dx=dx, dgain=rows["gain"], doffset=rows["offset"],
                states=states, dstates=dstates, flags=flags, table=call.table, scale=float(scale), T=call.tokens, H=call.heads,
                chunks=call.chunks, first_key=first_key,
                **call.source, **_strides("q", q), **_strides("k", k), **_strides("v", v), **_strides("do", do),
                AGAIN=again, PIECES=1 if flags is None else flags.shape[0], GROUP=group, BK=block_k, BV=block_v,
                **call.cut(config.chunk, exact=steep), **call.sizes, num_warps=warps, num_stages=1, **_registers(registers),
            )  # fmt: skip
    summed = {name: None if x is None else x.sum(dim=0).to(getattr(decay, name).dtype) for name, x in rows.items()}
    return Gradients(q=dq, k=dk, v=dv, x=dx, **summed, initial_state=None)


def _launches(exact: bool) -> tuple[bool, ...]:
    """Of a kernel that takes all chunks at once: whether each launch is the one for flagged chunks."""
    return (False,) if exact else (False, True)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _padded(dim: int) -> int:
    return max(NARROWEST, triton.next_power_of_2(dim))


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def _state(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.to(torch.float32).contiguous()


def _parameter(decay: DecaySource, name: str) -> Tensor | None:
    """A gain or offset in fp32; None where there is none or the formula has no use for it."""
    x = getattr(decay, name) if name in PARAMETERS[decay.kind] else None
    return None if x is None else x.to(torch.float32).contiguous()


def _registers(most: int | None) -> dict[str, int]:
    return {} if most is None else {"maxnreg": most}


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Of batch, time and head; an axis of one has none, so that no kernel is compiled anew for it."""
    if x is None:
        return {f"{name}_{axis}": 0 for axis in "bth"}
    return {f"{name}_{axis}": 0 if x.shape[i] == 1 else x.stride(i) for i, axis in enumerate("bth")}
