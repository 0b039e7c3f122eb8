"""Linear attention with one decay per key channel, as Triton kernels: forward and every gradient, exact for any λ in [0, 1].

    S_t = diag(λ_t) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

What is surprising:

- Time is cut into chunks. Only the state crosses from one chunk to the next, so the forward pass is one walk along the
  chunks, and the backward pass is a walk in reverse (dv and the gradient of the state) and one kernel that takes all chunks at
  once, with the state before and the state gradient after each chunk at hand. Where there are few heads, a sequence is cut
  into segments: a first walk finds what each adds to the state and what it leaves of it, a short one over the segments the
  state from which each starts.
- Inside a chunk the decay between two tokens is split as 2^(D_i) · 2^(-D_j), where D counts from the middle of the chunk's
  total decay, and states are kept decayed to that middle. That fits the range of bf16 while no channel loses more than 2^-200
  within a chunk. A chunk where some channel does is noted in a flag, and a second launch, whose programs return at once
  elsewhere, does it again: halves are merged pairwise from single tokens up, the later half's rows carrying the decay since
  the middle and the earlier half's rows the decay up to the middle, so every factor is at most 1. No flag is read by the host.
- A chunk's middle looks ahead, so a later token can move an earlier output's last bits. With `exact` every chunk is merged
  from single tokens, where nothing does.
- log λ is made where it is used, from what is loaded, and its gradient goes back the same way; so is the key where it is
  1 - λ. It is taken in base 2 and held at -150, which is λ = 0 in fp32; the gradient there is 0.
- The gradient of log λ_t is a sum over the pairs of tokens that t lies between. Pairs with an end outside the chunk are summed
  as they are, from the two states. Pairs inside are a running sum of q·dq - k·dk, in fp32 and from the very operands that the
  products saw, so that those on one side of t cancel to fp32 accuracy; a flagged chunk sums only those that t lies between.
- Products are of bf16 operands for bf16 inputs, tf32 for fp16 inputs (decayed operands need more range than fp16 has) and
  three tf32 products for fp32 inputs; sums are fp32. States between chunks are kept in bf16 for bf16 inputs, else fp32.

Source: the recurrence of the paper (arXiv 2509.05282), diagonal transition; decay_scan_naive.py is the definition.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kernels.decay_source import PARAMETERS, DecaySource
from kernels.launching import INTERPRETED, NARROWEST, at_most, cdiv, launch, on_device_of, padded, strides, widened
from kernels.triton_gate import KINDS, Gradients
from kernels.triton_vector_gradients import gradients_kernel
from kernels.triton_vector_rows import rows_kernel
from kernels.triton_vector_spans import Sequences
from kernels.triton_vector_walk import carry_kernel, walk_kernel

GROUP = 16  # chunks that one program of a launch for flagged chunks looks at
CARRIED = 256  # numbers of a state that one program carries along the segments
# Decayed operands stay within 2^±RANGE of the given ones: that fits bf16 and tf32. Sums of log2 λ in fp32 are to be right to
# the digits that fp32 inputs keep.
RANGE, FINE_RANGE = 100.0, 24.0


@dataclass(frozen=True, kw_only=True)
class VectorConfig:
    """How the kernels of one (K, V) are cut; every value changes time and rounding only.

    chunk: tokens between two kept states and in a step of every kernel, a power of two from 16 to 128.
    policy: "save" keeps the forward pass's states for the backward pass, "recompute" makes them again.
    walk_…: of the walks; warps, stages, most registers per thread, and the widest tile of a state (key_block, value_block) and
    how many of them along K (1 or 2) in one program. A walk along pieces of K gives states only, and the rows are made by a
    kernel of their own, with rows_….
    gradient_…: of the gradients; there V is gone through in pieces.
    """

    chunk: int = 64
    policy: str = "save"
    walk_warps: int = 4
    walk_stages: int = 3
    walk_registers: int | None = None
    walk_key_block: int = 64
    walk_value_block: int = 64
    walk_tiles: int = 1
    rows_warps: int = 4
    rows_registers: int | None = None
    rows_value_block: int = 64
    gradient_warps: int = 4
    gradient_registers: int | None = None
    gradient_key_block: int = 64
    gradient_value_block: int = 64


@cache
def default_config(key_dim: int, value_dim: int, dtype: torch.dtype) -> VectorConfig:
    """Returns a configuration that is right for these dims; operands of 32 bits need smaller chunks to stay in registers."""
    chunk, stages = {torch.bfloat16: (64, 3), torch.float16: (32, 2), torch.float32: (16, 2)}[dtype]
    return VectorConfig(chunk=chunk, walk_stages=stages)


def candidates(key_dim: int, value_dim: int, dtype: torch.dtype) -> list[VectorConfig]:
    """What benchmarks/tune_kernels.py tries: configurations that compile with few spills for Hopper, the likeliest first."""
    if dtype != torch.bfloat16:
        return [VectorConfig(chunk=chunk, walk_stages=stages) for chunk in (32, 16) for stages in (2, 1)]
    wide = [VectorConfig(walk_value_block=128, rows_value_block=128, walk_stages=2)] if value_dim > 64 else []
    if key_dim <= 64:
        narrow = [VectorConfig(walk_stages=stages) for stages in (3, 2)]
        return [*narrow, VectorConfig(walk_registers=168), VectorConfig(gradient_registers=208), VectorConfig(chunk=32), *wide]
    pieces = [VectorConfig(), VectorConfig(chunk=32), VectorConfig(walk_registers=168)]
    if key_dim > 128:
        return [*wide, *pieces, VectorConfig(walk_stages=2)]
    whole = {"walk_key_block": 128}
    return [
        VectorConfig(walk_tiles=2, walk_stages=2),
        *wide,
        VectorConfig(walk_warps=8, walk_stages=2, **whole),
        VectorConfig(chunk=32, walk_tiles=2, walk_stages=2),
        VectorConfig(chunk=32, walk_warps=8, walk_stages=2, **whole),
        VectorConfig(chunk=32, walk_warps=8, walk_stages=2, gradient_key_block=128, gradient_warps=8, **whole),
        VectorConfig(chunk=32, walk_stages=2, **whole),
        *pieces,
    ]


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
    initial = widened(initial_state_nhkv)
    o = v_bthv.new_empty(v_bthv.shape)
    keep = want_saved and config.policy == "save"
    with call.on_device:
        walk = _Walk(call, v_bthv, scale, exact)
        states, final = walk.run(o, initial, want_state)
        walk.finish(o, states)
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
    dv = call.new(*v_bthv.shape, dtype=v_bthv.dtype)
    with call.on_device:
        states = saved
        if states is None:
            states, _ = _Walk(call, v_bthv, scale, exact).run(None, widened(initial_state_nhkv), False)
        walk = _Walk(call, do_bthv, scale, exact, reverse=True)
        dstates, d_initial = walk.run(dv, widened(d_final_state_nhkv), want_initial)
        walk.finish(dv, dstates)
        return _gradients(call, scale, do_bthv, states, dstates, walk.flags, exact, dv, d_initial)


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
        self.whole_k, whole_v = padded(self.key_dim), padded(self.value_dim)
        self.walk_k, self.walk_v = min(config.walk_key_block, self.whole_k), min(config.walk_value_block, whole_v)
        self.rows_v = min(config.rows_value_block, whole_v)
        self.gradient_k = min(config.gradient_key_block, self.whole_k)
        self.gradient_v = min(config.gradient_value_block, whole_v)
        bf16 = q.dtype == torch.bfloat16
        # triton's interpreter multiplies bf16 tiles wrongly
        operand = tl.bfloat16 if bf16 and not INTERPRETED else tl.float32
        precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        # what holds every digit of x
        whole = decay.x.dtype == torch.bfloat16 or (decay.x.dtype == torch.float16 and not bf16)
        self.sizes: dict[str, Any] = dict(K=self.key_dim, V=self.value_dim, C=config.chunk, LP=operand, IP=precision)
        self.log_chunk = config.chunk.bit_length() - 1
        self.fine = q.dtype == torch.float32
        self.range = FINE_RANGE if self.fine else RANGE
        self.source: dict[str, Any] = dict(
            x=decay.x, gain=_parameter(decay, "gain"), offset=_parameter(decay, "offset"), slope=float(decay.slope),
            KIND=KINDS[decay.kind], ONE_HALF=decay.kind == "log" and whole, **strides("x", decay.x),
        )  # fmt: skip

    @property
    def on_device(self) -> AbstractContextManager[object]:
        return on_device_of(self.q)

    @cached_property
    def table(self) -> Tensor | None:
        return self.sequences.chunk_table(self.config.chunk)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)


class _Walk:
    """The walk along all sequences of one pass: from (k, v) for o and the states, or in reverse from (q, do) for dv and the
    states' gradients."""

    def __init__(self, call: _Call, y: Tensor, scale: float, exact: bool, *, reverse: bool = False) -> None:
        self.call, self.y, self.scale, self.exact, self.reverse = call, y, float(scale), exact, reverse
        self.read, self.written = (call.k, call.q) if reverse else (call.q, call.k)
        self.pieces = cdiv(call.value_dim, call.walk_v), cdiv(call.key_dim, call.walk_k)
        self.tiles = min(call.config.walk_tiles, self.pieces[1])
        programs = self.pieces[0] * cdiv(self.pieces[1], self.tiles)
        self.spans = call.sequences.spans(call.heads * programs, call.config.chunk)
        self.flags = call.new(self.pieces[1], call.chunks, call.heads, dtype=torch.int8)
        self.makes_rows = self.pieces[1] == self.tiles and not exact

    def run(self, out: Tensor | None, outside: Tensor | None, want_last: bool) -> tuple[Tensor, Tensor | None]:
        """Fills `out`, where it is one walk that makes it; returns the states kept at all chunks and, if wanted, the last."""
        call, spans = self.call, self.spans
        last = call.new(call.sequences.count, call.heads, call.key_dim, call.value_dim) if want_last else None
        states = call.new(call.chunks, call.heads, call.value_dim, call.key_dim, dtype=_state_dtype(call.q))
        first = outside
        if spans.cut:
            first = call.new(spans.count, call.heads, call.key_dim, call.value_dim)
            totals = call.new(spans.count, call.heads, call.key_dim)
            self._launch(None, None, first, totals, None)
            carried = dict(
                added=first, totals=totals, outside=outside, last=last, bounds=spans.bounds, H=call.heads,
                segments=spans.segments, K=call.key_dim, V=call.value_dim, BLOCK=CARRIED, REVERSE=self.reverse,
            )  # fmt: skip
            pieces = cdiv(call.key_dim * call.value_dim, CARRIED)
            launch(carry_kernel, (call.sequences.count * call.heads, pieces), carried, num_warps=2)
        self._launch(out if self.makes_rows else None, first, None if spans.cut else last, None, states)
        return states, last

    def _launch(
        self, out: Tensor | None, first: Tensor | None, last: Tensor | None, totals: Tensor | None, states: Tensor | None
    ) -> None:
        call, config, spans = self.call, self.call.config, self.spans
        tiles = self.tiles if out is not None else 1
        arguments = dict(
            r=self.read, w=self.written, y=self.y, out=out, first_state=first, last_state=last, totals=totals, states=states,
            flags=None if states is None else self.flags, spans=spans.table, scale=self.scale, T=call.tokens, H=call.heads,
            segments=spans.segments, length=spans.length, chunks=call.chunks,
            **call.source, **strides("r", self.read), **strides("w", self.written), **strides("y", self.y),
            REVERSE=self.reverse, MIDDLE=not self.exact, RANGE=call.range, FINE=call.fine, TILES=tiles, BK=call.walk_k,
            BV=call.walk_v, STAGES=config.walk_stages, **call.sizes,
        )  # fmt: skip
        how = dict(num_warps=config.walk_warps, num_stages=config.walk_stages, **at_most(config.walk_registers))
        launch(walk_kernel, (spans.count * call.heads, self.pieces[0], cdiv(self.pieces[1], tiles)), arguments, **how)

    def finish(self, out: Tensor, states: Tensor) -> None:
        """What of `out` the walk has not made: all of it where K is in pieces, and flagged chunks."""
        call, config = self.call, self.call.config
        again = (True,) if self.makes_rows else _launches(self.exact)
        for flagged in again:
            group, block_v, warps, registers = 1, call.rows_v, config.rows_warps, config.rows_registers
            if flagged or self.exact:
                group, block_v, warps, registers = GROUP if flagged else 1, NARROWEST, 4, None
            arguments = dict(
                q=call.q, k=call.k, y=self.y, out=out, states=states, flags=None if self.exact else self.flags,
                table=call.table, scale=self.scale, T=call.tokens, H=call.heads, chunks=call.chunks,
                **call.source, **strides("q", call.q), **strides("k", call.k), **strides("y", self.y),
                AGAIN=flagged, EXACT=flagged or self.exact, REVERSE=self.reverse, PIECES=1 if self.exact else self.pieces[1],
                PIECE=call.walk_k, GROUP=group, BK=NARROWEST, BV=block_v, LOGC=call.log_chunk, **call.sizes,
            )  # fmt: skip
            grid = cdiv(call.chunks, group) * call.heads, cdiv(call.value_dim, block_v)
            how = dict(num_warps=warps, num_stages=1, **at_most(registers))
            launch(rows_kernel, grid, arguments, **how)


def _gradients(
    call: _Call, scale: float, do: Tensor, states: Tensor, dstates: Tensor, flags: Tensor, exact: bool, dv: Tensor,
    d_initial: Tensor | None,
) -> Gradients:  # fmt: skip
    """The gradients of q, k and the decay, put beside those of v and the initial state."""
    q, k, v, decay, config = call.q, call.k, call.v, call.decay, call.config
    dq, dx = call.new(*q.shape, dtype=q.dtype), call.new(*q.shape, dtype=decay.x.dtype)
    dk = None if k is None else call.new(*k.shape, dtype=k.dtype)
    # one row per chunk and head; a packed call has rows that no chunk fills
    used = [name for name in ("gain", "offset") if call.source[name] is not None]
    rows = dict.fromkeys(("gain", "offset")) | {name: call.new(call.chunks, call.heads, call.key_dim) for name in used}
    if call.table is not None:
        for name in used:
            rows[name].zero_()
    for again in _launches(exact):
        group, block_k, block_v, warps = 1, call.gradient_k, call.gradient_v, config.gradient_warps
        registers = config.gradient_registers
        if again or exact:
            group, block_k, block_v, warps, registers = GROUP if again else 1, NARROWEST, NARROWEST, 4, None
        arguments = dict(
            q=q, k=k, v=v, do=do, dq=dq, dk=dk, dx=dx, dgain=rows["gain"], doffset=rows["offset"], states=states,
            dstates=dstates, flags=None if exact else flags, table=call.table, scale=float(scale), T=call.tokens, H=call.heads,
            chunks=call.chunks,
            **call.source, **strides("q", q), **strides("k", k), **strides("v", v), **strides("do", do),
            AGAIN=again, EXACT=exact or again, PIECES=1 if exact else flags.shape[0], PIECE=call.walk_k, GROUP=group,
            BK=block_k, BV=block_v, LOGC=call.log_chunk, **call.sizes,
        )  # fmt: skip
        grid = cdiv(call.chunks, group) * call.heads, cdiv(call.key_dim, block_k)
        how = dict(num_warps=warps, num_stages=1, **at_most(registers))
        launch(gradients_kernel, grid, arguments, **how)
    summed = {name: None if x is None else x.sum(dim=0).to(getattr(decay, name).dtype) for name, x in rows.items()}
    return Gradients(q=dq, k=dk, v=dv, x=dx, **summed, initial_state=d_initial)


def _launches(exact: bool) -> tuple[bool, ...]:
    """Of a kernel that takes all chunks at once: whether each launch is the one for flagged chunks."""
    return (False,) if exact else (False, True)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def _parameter(decay: DecaySource, name: str) -> Tensor | None:
    """A gain or offset in fp32; None where there is none or the formula has no use for it."""
    x = getattr(decay, name) if name in PARAMETERS[decay.kind] else None
    return widened(x)
