"""Linear attention whose state is transformed by a diagonal and a matrix of rank one (general DPLR), as Triton kernels.

    S_t = (diag(λ_t) + a_t b_tᵀ) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

What is unusual:
- `prepare` makes of each chunk one linear map, of state and values to outputs and state, for all chunks at once; the walks
  multiply its tiles; `pairs` and `gradients` do all chunks at once again. One walk is the other's adjoint.
- The backward pass is given the states, what b has read of them, and, if the configuration says `keep_tiles`, what `prepare`
  makes, which is more than the inputs are; else that is made again. With the policy `recompute` nothing is kept.
- A chunk where some channel decays too steeply to be counted from its middle is flagged, and a second launch, whose programs
  return at once elsewhere, does it again pair by pair of halves. No flag is read by the host.
- With `exact` no later token moves an earlier output's bits.
- Products are of bf16 operands for bf16 inputs, tf32 for fp16 inputs (decayed operands need more range than fp16 has) and
  three tf32 products for fp32 inputs. No atomics: two runs give equal bits.
Source: dplr_scan_naive.py is the definition; triton_delta_vector.py is the case a = −β k, b = λ ⊙ k.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernels.decay_source import DecaySource
from kernels.launching import INTERPRETED, at_most, cdiv, launch, on_device_of, padded, strides, widened
from kernels.triton_delta_vector import all_chunks
from kernels.triton_dplr_gradients import gradients_kernel, pairs_kernel
from kernels.triton_dplr_prepare import prepare_kernel
from kernels.triton_dplr_walk import forward_kernel, reverse_kernel
from kernels.triton_gate import KINDS
from kernels.triton_scalar import slot_count
from kernels.triton_vector import FINE_RANGE, RANGE, _parameter

_PARTS = ("gain", "offset")


@dataclass(frozen=True, kw_only=True)
class DplrConfig:
    """How the kernels of one (K, V) are cut; every value changes time and rounding only.

    chunk: tokens of a step of every kernel, a power of two. policy: "save" keeps what the backward pass wants, "recompute"
    makes it again. keep_tiles: whether what `prepare` makes is kept too, for each token and head some 6 K + 4 chunk numbers:
    at the peak of one operator that is no more memory, between many it is. prepare_…, forward_…, reverse_…, pairs_…,
    gradient_…: of the five kernels; warps, stages, most registers per thread, the widest slice of K that a program of `prepare`
    or of the gradients holds at a time, and of V that one of the others does.
    """

    chunk: int = 64
    policy: str = "save"
    keep_tiles: bool = True
    prepare_warps: int = 4
    prepare_registers: int | None = None
    prepare_key_block: int = 64
    forward_warps: int = 4
    forward_stages: int = 2
    forward_registers: int | None = None
    forward_value_block: int = 64
    reverse_warps: int = 4
    reverse_stages: int = 2
    reverse_registers: int | None = None
    reverse_value_block: int = 64
    pairs_warps: int = 4
    pairs_registers: int | None = None
    pairs_value_block: int = 128
    gradient_warps: int = 4
    gradient_registers: int | None = None
    gradient_key_block: int = 64


class DplrGradients(NamedTuple):
    """What the backward launcher returns, each in its input's shape and dtype; None for what was not given."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    x: Tensor | None
    gain: Tensor | None
    offset: Tensor | None
    initial_state: Tensor | None


@cache
def default_config(key_dim: int, value_dim: int, dtype: torch.dtype) -> DplrConfig:
    """Returns a configuration that is right for these dims."""
    return candidates(key_dim, value_dim, dtype)[0]


def candidates(key_dim: int, value_dim: int, dtype: torch.dtype) -> list[DplrConfig]:
    """Returns configurations worth timing for these dims, the default first."""
    if dtype != torch.bfloat16:
        return [DplrConfig(chunk=16, forward_stages=1, reverse_stages=1, pairs_value_block=64, gradient_warps=8)]
    shallow = DplrConfig(forward_stages=1, reverse_stages=1)
    if padded(key_dim) > 128:  # two chunks' tiles do not fit a processor's shared memory
        return [shallow, replace(shallow, gradient_warps=8)]
    return [
        DplrConfig(),
        shallow,
        DplrConfig(chunk=32),
        DplrConfig(chunk=32, prepare_registers=128),
        DplrConfig(chunk=32, prepare_registers=128, pairs_registers=128, gradient_registers=168),
        DplrConfig(gradient_warps=8),
        DplrConfig(prepare_warps=8),
        *([DplrConfig(forward_stages=3, reverse_stages=3)] if padded(key_dim) == 64 else []),
    ]


class Prepared(NamedTuple):
    """What `prepare` leaves, by prepare_kernel's names; flags say where it is steep."""

    queries: Tensor
    readers: Tensor
    writers_a: Tensor
    writers_k: Tensor
    state_reads: Tensor
    state_outputs: Tensor
    value_reads: Tensor
    value_outputs: Tensor
    scores: Tensor
    inverse: Tensor
    totals: Tensor
    flags: Tensor | None

    def some(self, *names: str) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in names}


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass: the states before each chunk, what b read, and perhaps the tiles."""

    states: Tensor
    reads: Tensor
    prepared: Prepared | None = None


_WALKED = ("state_reads", "value_reads", "state_outputs", "value_outputs", "writers_a", "writers_k", "totals")
_OF_GRADIENTS = ("queries", "readers", "writers_a", "writers_k", "flags")


def forward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    a_bthk: Tensor,
    b_bthk: Tensor,
    source: DecaySource | None,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool,
    want_saved: bool,
    config: DplrConfig,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None, Saved | None]:
    """Returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V) fp32 or None, what backward wants back or None).

    source: x (B, T, H, K). The last axis of q, k, v, a, b and x is contiguous. K, V <= 256. cu_seqlens: (N + 1,), int32 or
    int64, where N sequences packed into B = 1 begin and end, not looked at here; states are then (N, H, K, V).
    """
    call = _Call(q_bthk, k_bthk, v_bthv, a_bthk, b_bthk, source, scale, config, cu_seqlens, exact)
    o = v_bthv.new_empty(v_bthv.shape)
    final = call.outside_states() if want_state else None
    saved, prepared = call.kept(want_saved and config.policy == "save"), call.prepared()
    call.walk_forwards(prepared, o, widened(initial_state), final, saved)
    if saved is not None and config.keep_tiles:
        saved = saved._replace(prepared=prepared)
    return o, final, saved


def backward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    a_bthk: Tensor,
    b_bthk: Tensor,
    source: DecaySource | None,
    scale: float,
    initial_state: Tensor | None,
    saved: Saved | None,
    do_bthv: Tensor,
    d_final_state: Tensor | None,
    config: DplrConfig,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> DplrGradients:
    """Returns the gradients in the inputs' dtypes, that of the initial state in fp32; without `saved` it is made again."""
    call = _Call(q_bthk, k_bthk, v_bthv, a_bthk, b_bthk, source, scale, config, cu_seqlens, exact)
    prepared = call.prepared() if saved is None or saved.prepared is None else saved.prepared
    if saved is None:
        saved = call.kept(True)
        call.walk_forwards(prepared, None, widened(initial_state), None, saved)
    assert saved is not None
    d_initial = None if initial_state is None else call.outside_states()
    dv = torch.empty(v_bthv.shape, dtype=v_bthv.dtype, device=v_bthv.device)
    d_saved = Saved(torch.empty_like(saved.states), torch.empty_like(saved.reads))
    call.walk_in_reverse(prepared, do_bthv, widened(d_final_state), dv, d_initial, d_saved)
    return call.gradients(prepared, do_bthv, dv, saved, d_saved, d_initial)


def saved_like(
    q_bthk: Tensor, v_bthv: Tensor, config: DplrConfig, cu_seqlens: Tensor | None = None, exact: bool = False
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `forward` keeps for the backward pass: Saved's states and reads, then Prepared's fields; (0,)
    where it keeps nothing."""
    nothing: tuple[tuple[int, ...], torch.dtype] = ((0,), q_bthk.dtype)
    if config.policy != "save":
        return [nothing] * (2 + len(Prepared._fields))
    batch, tokens, heads, key_dim = q_bthk.shape
    slots = slot_count(batch, tokens, None if cu_seqlens is None else cu_seqlens.shape[0] - 1, config.chunk)
    kept = _kept_dtype(q_bthk)
    found = [((slots, heads, key_dim, v_bthv.shape[-1]), kept), (tuple(v_bthv.shape), kept)]
    if not config.keep_tiles:
        return found + [nothing] * len(Prepared._fields)
    return found + [nothing if x is None else x for x in _prepared_like(slots, heads, key_dim, config.chunk, kept, exact)]


def _prepared_like(
    slots: int, heads: int, key_dim: int, chunk: int, dtype: torch.dtype, exact: bool
) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
    """Shapes and dtypes of Prepared's fields."""
    tiles = [((slots, heads, chunk, key_dim), dtype)] * 6 + [((slots, heads, chunk, chunk), dtype)] * 4
    return [*tiles, ((slots, heads, 2, key_dim), torch.float32), None if exact else ((slots, heads), torch.int8)]


def _kept_dtype(q: Tensor) -> torch.dtype:
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


class _Call:
    """One call: its tensors and sizes, and the launches that its passes share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        source: DecaySource | None,
        scale: float,
        config: DplrConfig,
        cu: Tensor | None,
        exact: bool,
    ) -> None:
        self.q, self.k, self.v, self.a, self.b, self.source = q, k, v, a, b, source
        self.config, self.cu, self.exact = config, cu, exact
        self.batch, self.tokens, self.heads, self.key_dim = q.shape
        self.value_dim = v.shape[-1]
        self.sequences = self.batch if cu is None else cu.shape[0] - 1
        self.slots = slot_count(self.batch, self.tokens, None if cu is None else self.sequences, config.chunk)
        self.whole_k, self.whole_v = padded(self.key_dim), padded(self.value_dim)
        self.kept_dtype = _kept_dtype(q)
        bf16 = q.dtype == torch.bfloat16
        operand = tl.bfloat16 if bf16 and not INTERPRETED else tl.float32
        self.numbers = {"LP": operand, "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32", "CHUNK": config.chunk}
        # no decay is a log λ of 0: one row of it, read again and again
        self.x = q.new_zeros(1, 1, 1, self.key_dim).expand(q.shape) if source is None else source.x
        # what holds every digit of x
        whole = self.x.dtype == torch.bfloat16 or (self.x.dtype == torch.float16 and not bf16)
        kind = "log" if source is None else source.kind
        self.parts: dict[str, Any] = dict(
            q=q, k=k, a=a, b=b, x=self.x, slope=1.0 if source is None else float(source.slope), scale=float(scale),
            **{name: None if source is None else _parameter(source, name) for name in _PARTS},
            tokens=self.tokens, heads=self.heads, sequences=self.sequences, search_steps=self.sequences.bit_length(), cu=cu,
            **strides("q", q), **strides("k", k), **strides("a", a), **strides("b", b), **strides("x", self.x),
            K=self.key_dim, LEVELS=config.chunk.bit_length() - 1, KIND=KINDS[kind], ONE_HALF=kind == "log" and whole,
            **self.numbers,
        )  # fmt: skip

    @property
    def on_device(self) -> AbstractContextManager[object]:
        return on_device_of(self.q)

    def new(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(sizes, dtype=dtype)

    def outside_states(self) -> Tensor:
        return self.new(self.sequences, self.heads, self.key_dim, self.value_dim)

    def kept(self, keep: bool) -> Saved | None:
        """Room for what the walk leaves."""
        if not keep:
            return None
        states = self.new(self.slots, self.heads, self.key_dim, self.value_dim, dtype=self.kept_dtype)
        return Saved(states, self.new(*self.v.shape, dtype=self.kept_dtype))

    def prepared(self) -> Prepared:
        config = self.config
        *tiles, flags = _prepared_like(self.slots, self.heads, self.key_dim, config.chunk, self.kept_dtype, self.exact)
        # A packed call has places that no chunk fills: their flags are not to be set.
        empty = torch.empty if self.cu is None else torch.zeros
        flags = None if flags is None else empty(flags[0], device=self.q.device, dtype=flags[1])
        found = Prepared(*(self.new(*shape, dtype=dtype) for shape, dtype in tiles), flags)
        arguments = dict(
            **self.parts, **found._asdict(), BLOCK_K=min(config.prepare_key_block, self.whole_k),
            RANGE=FINE_RANGE if self.q.dtype == torch.float32 else RANGE, HALF=self.q.dtype != torch.float32,
        )  # fmt: skip
        all_chunks(self, prepare_kernel, arguments, config.prepare_warps, config.prepare_registers)
        return found

    def walk_forwards(
        self, prepared: Prepared, o: Tensor | None, initial: Tensor | None, final: Tensor | None, saved: Saved | None
    ) -> None:
        config = self.config
        kept = {"states": None if saved is None else saved.states, "reads": None if saved is None else saved.reads}
        arguments = dict(
            **prepared.some(*_WALKED), v=self.v, initial=initial, o=o, final=final, **kept, **strides("v", self.v),
            **self.walk_sizes(config.forward_value_block), STAGES=config.forward_stages,
        )  # fmt: skip
        self.walk(forward_kernel, arguments, config.forward_warps, config.forward_stages, config.forward_registers)

    def walk_in_reverse(
        self, prepared: Prepared, do: Tensor, d_final: Tensor | None, dv: Tensor, d_initial: Tensor | None, d_saved: Saved
    ) -> None:
        config = self.config
        arguments = dict(
            **prepared.some(*_WALKED), d=do, d_final=d_final, dv=dv, d_reads=d_saved.reads, d_initial=d_initial,
            d_states=d_saved.states, **strides("d", do), **self.walk_sizes(config.reverse_value_block),
            STAGES=config.reverse_stages,
        )  # fmt: skip
        self.walk(reverse_kernel, arguments, config.reverse_warps, config.reverse_stages, config.reverse_registers)

    def walk_sizes(self, value_block: int) -> dict[str, Any]:
        return dict(
            cu=self.cu, tokens=self.tokens, heads=self.heads, segments=1 if self.cu is None else self.sequences,
            K=self.key_dim, V=self.value_dim, BLOCK_K=self.whole_k, BLOCK_V=min(value_block, self.whole_v), **self.numbers,
        )  # fmt: skip

    def walk(self, kernel: Any, arguments: dict[str, Any], warps: int, stages: int, registers: int | None) -> None:
        programs = self.sequences * self.heads * cdiv(self.value_dim, arguments["BLOCK_V"])
        with self.on_device:
            launch(kernel, (programs,), arguments, num_warps=warps, num_stages=stages, **at_most(registers))

    def pairs(self, prepared: Prepared, do: Tensor, saved: Saved, d_saved: Saved) -> dict[str, Tensor]:
        """The gradients of pairs of tokens; d_saved.reads are those of what is read, and then of what made it."""
        chunk, config = self.config.chunk, self.config
        sizes = (self.slots, self.heads, chunk, chunk)
        found = {name: self.new(*sizes, dtype=self.kept_dtype) for name in ("read_a", "read_k", "solve_a", "solve_k")}
        arguments = dict(
            v=self.v, d=do, reads=saved.reads, d_reads=d_saved.reads, **prepared.some("scores", "inverse"), cu=self.cu, **found,
            tokens=self.tokens, heads=self.heads, sequences=self.sequences, search_steps=self.sequences.bit_length(),
            **strides("v", self.v), **strides("d", do), V=self.value_dim, BLOCK_V=min(config.pairs_value_block, self.whole_v),
            **self.numbers,
        )  # fmt: skip
        how = {"num_warps": config.pairs_warps, "num_stages": 1, **at_most(config.pairs_registers)}
        with self.on_device:
            launch(pairs_kernel, (self.slots * self.heads,), arguments, **how)
        return found

    def gradients(
        self, prepared: Prepared, do: Tensor, dv: Tensor, saved: Saved, d_saved: Saved, d_initial: Tensor | None
    ) -> DplrGradients:
        given = (self.q, self.k, self.a, self.b)
        dq, dk, da, db = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in given)
        dx = None if self.source is None else torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        # One row per chunk and head; a packed call has rows that no chunk fills.
        empty = torch.empty if self.cu is None else torch.zeros
        sizes = (self.slots, self.heads, self.key_dim)
        rows = {name: None if self.parts[name] is None else empty(sizes, device=self.q.device) for name in _PARTS}
        pairs = self.pairs(prepared, do, saved, d_saved)
        arguments = dict(
            **self.parts, **prepared.some(*_OF_GRADIENTS), **pairs, v=self.v, d=do, reads=saved.reads, d_reads=d_saved.reads,
            starts=saved.states, ends=d_saved.states, dq=dq, dk=dk, da=da, db=db, dx=dx, d_gain=rows["gain"],
            d_offset=rows["offset"], **strides("v", self.v), **strides("d", do), V=self.value_dim,
            BLOCK_K=min(self.config.gradient_key_block, self.whole_k), BLOCK_V=self.whole_v,
        )  # fmt: skip
        slices = cdiv(self.key_dim, arguments["BLOCK_K"])
        all_chunks(self, gradients_kernel, arguments, self.config.gradient_warps, self.config.gradient_registers, slices)
        summed = {name: None if y is None else y.sum(dim=0).to(getattr(self.source, name).dtype) for name, y in rows.items()}
        return DplrGradients(dq, dk, dv, da, db, dx, **summed, initial_state=d_initial)
