"""Linear attention with the delta rule and one decay per key channel, as Triton kernels: exact for any λ in [0, 1].

    S_t = (I − β_t k_t k_tᵀ) diag(λ_t) S_{t-1} + w_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t        w = β or 1

What is unusual:
- What a chunk's tokens do to each other and to the state is made for all chunks at once: `prepare` leaves queries, erasers and
  writers between their factors of the decay, scores, and the inverted system. The walks only multiply tiles; `gradients` does
  all chunks at once again.
- The backward pass is given the states and the recalls' errors; what `prepare` makes is made again, since it takes more memory
  than the inputs do. With the policy `recompute` nothing is kept.
- A chunk where some channel decays too steeply to be counted from its middle is flagged, and a second launch, whose programs
  return at once elsewhere, does it again pair by pair of halves. No flag is read by the host.
- With `exact` no later token moves an earlier output's bits.
- Products are of bf16 operands for bf16 inputs, tf32 for fp16 inputs (decayed operands need more range than fp16 has) and
  three tf32 products for fp32 inputs. No atomics: two runs give equal bits.
Source: delta_scan_naive.py is the definition; triton_delta.py is the same for one decay per head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernels.decay_source import DecaySource
from kernels.launching import INTERPRETED, at_most, cdiv, launch, on_device_of, padded, strides, widened
from kernels.triton_delta import DeltaGradients, Saved, inverse_dtype
from kernels.triton_delta_vector_gradients import vector_gradients_kernel
from kernels.triton_delta_vector_prepare import PLANES, prepare_kernel
from kernels.triton_delta_vector_walk import vector_forward_kernel, vector_reverse_kernel
from kernels.triton_gate import KINDS
from kernels.triton_scalar import slot_count
from kernels.triton_vector import FINE_RANGE, GROUP, RANGE, _parameter


@dataclass(frozen=True, kw_only=True)
class DeltaVectorConfig:
    """How the kernels of one (K, V) are cut; every value changes time and rounding only. The fields are DeltaConfig's."""

    chunk: int = 64
    policy: str = "save"
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
    gradient_warps: int = 4
    gradient_registers: int | None = None
    gradient_key_block: int = 64


@cache
def default_config(key_dim: int, value_dim: int, dtype: torch.dtype) -> DeltaVectorConfig:
    """Returns a configuration that is right for these dims."""
    return candidates(key_dim, value_dim, dtype)[0]


def candidates(key_dim: int, value_dim: int, dtype: torch.dtype) -> list[DeltaVectorConfig]:
    """Returns configurations worth timing for these dims, the default first."""
    if dtype != torch.bfloat16:
        return [DeltaVectorConfig(chunk=32, forward_stages=1, reverse_stages=1)]
    if padded(key_dim) == 256:  # two stages do not fit
        return [DeltaVectorConfig(forward_stages=1, reverse_stages=1)]
    return [
        DeltaVectorConfig(),
        DeltaVectorConfig(chunk=32),
        DeltaVectorConfig(gradient_warps=8),
        DeltaVectorConfig(prepare_registers=168),
        DeltaVectorConfig(forward_stages=1, reverse_stages=1),
    ]


class _Prepared(NamedTuple):
    """What `prepare` leaves; gates are β and 1 / |k|, totals log2 of decays for the walks, flags say where it is steep."""

    inverse: Tensor
    scores: Tensor
    queries: Tensor
    erasers: Tensor
    writers: Tensor
    totals: Tensor
    gates: Tensor
    flags: Tensor | None

    def tiles(self) -> dict[str, Tensor]:
        """What the walks read."""
        return {name: x for name, x in self._asdict().items() if name != "flags"}


def forward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    beta_bth: Tensor,
    source: DecaySource,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool,
    want_saved: bool,
    beta_on_write: bool,
    normalize_key: bool,
    config: DeltaVectorConfig,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None, Saved | None]:
    """As triton_delta.py's, for a source whose x is (B, T, H, K)."""
    call = _Call(q_bthk, k_bthk, v_bthv, beta_bth, source, scale, beta_on_write, normalize_key, config, cu_seqlens, exact)
    keep = want_saved and config.policy == "save"
    o = v_bthv.new_empty(v_bthv.shape)
    final = call.outside_states() if want_state else None
    states, errors = call.walk_forwards(call.prepared(), o, widened(initial_state), final, keep)
    return o, final, Saved(call.q.new_empty(0), call.q.new_empty(0), states, errors) if keep else None


def backward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    beta_bth: Tensor,
    source: DecaySource,
    scale: float,
    initial_state: Tensor | None,
    saved: Saved | None,
    do_bthv: Tensor,
    d_final_state: Tensor | None,
    beta_on_write: bool,
    normalize_key: bool,
    config: DeltaVectorConfig,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> DeltaGradients:
    """As triton_delta.py's."""
    call = _Call(q_bthk, k_bthk, v_bthv, beta_bth, source, scale, beta_on_write, normalize_key, config, cu_seqlens, exact)
    prepared = call.prepared()
    if saved is None:
        states, errors = call.walk_forwards(prepared, None, widened(initial_state), None, True)
    else:
        _, _, states, errors = saved
    d_initial = None if initial_state is None else call.outside_states()
    dr, d_states = torch.empty_like(errors), torch.empty_like(states)
    call.walk_in_reverse(prepared, do_bthv, widened(d_final_state), dr, d_initial, d_states)
    return call.gradients(prepared, do_bthv, dr, errors, states, d_states, d_initial)


def saved_like(
    q_bthk: Tensor, v_bthv: Tensor, normalize_key: bool, config: DeltaVectorConfig, cu_seqlens: Tensor | None = None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `forward` keeps for the backward pass, in Saved's order; (0,) where it keeps nothing."""
    nothing: tuple[tuple[int, ...], torch.dtype] = ((0,), q_bthk.dtype)
    if config.policy != "save":
        return [nothing] * 4
    batch, tokens, heads, key_dim = q_bthk.shape
    slots = slot_count(batch, tokens, None if cu_seqlens is None else cu_seqlens.shape[0] - 1, config.chunk)
    kept = _kept_dtype(q_bthk)
    return [nothing, nothing, ((slots, heads, key_dim, v_bthv.shape[-1]), kept), (tuple(v_bthv.shape), kept)]


def _kept_dtype(q: Tensor) -> torch.dtype:
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def all_chunks(call: Any, kernel: Any, arguments: dict[str, Any], warps: int, registers: int | None, slices: int = 1) -> None:
    """A launch for all chunks of a call and, but for `exact`, one for those that were flagged as steep."""
    for again in (False,) if call.exact else (False, True):
        group = GROUP if again else 1
        exactly = {"EXACT": call.exact or again, "AGAIN": again, "GROUP": group, "slots": call.slots}
        # The exact kernels have more in registers than there are: with 8 warps they spill less and compile sooner.
        how = {"num_warps": 8} if exactly["EXACT"] else {"num_warps": warps, **at_most(registers)}
        with call.on_device:
            programs = cdiv(call.slots, group) * call.heads * (1 if exactly["EXACT"] else slices)
            launch(kernel, (programs,), arguments | exactly, num_stages=1, **how)


class _Call:
    """One call: its tensors and sizes, and the launches that its passes share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        source: DecaySource,
        scale: float,
        beta_on_write: bool,
        normalize_key: bool,
        config: DeltaVectorConfig,
        cu: Tensor | None,
        exact: bool,
    ) -> None:
        self.q, self.k, self.v, self.beta, self.source, self.config, self.cu = q, k, v, beta, source, config, cu
        self.batch, self.tokens, self.heads, self.key_dim = q.shape
        self.value_dim, self.scale = v.shape[-1], float(scale)
        self.sequences = self.batch if cu is None else cu.shape[0] - 1
        self.slots = slot_count(self.batch, self.tokens, None if cu is None else self.sequences, config.chunk)
        self.whole_k, self.whole_v = padded(self.key_dim), padded(self.value_dim)
        self.kept = _kept_dtype(q)
        bf16 = q.dtype == torch.bfloat16
        operand = tl.bfloat16 if bf16 and not INTERPRETED else tl.float32
        self.numbers = {"LP": operand, "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32", "CHUNK": config.chunk}
        # what holds every digit of x
        whole = source.x.dtype == torch.bfloat16 or (source.x.dtype == torch.float16 and not bf16)
        self.parts: dict[str, Any] = dict(
            x=source.x, gain=_parameter(source, "gain"), offset=_parameter(source, "offset"), slope=float(source.slope),
            scale=self.scale, tokens=self.tokens, heads=self.heads, sequences=self.sequences,
            search_steps=self.sequences.bit_length(), cu=cu, **strides("q", q), **strides("k", k), **strides("x", source.x),
            K=self.key_dim, LEVELS=config.chunk.bit_length() - 1, KIND=KINDS[source.kind],
            ONE_HALF=source.kind == "log" and whole, NORM=normalize_key, **self.numbers,
        )  # fmt: skip
        self.range = FINE_RANGE if q.dtype == torch.float32 else RANGE
        self.write, self.exact = beta_on_write, exact

    @property
    def on_device(self) -> AbstractContextManager[object]:
        return on_device_of(self.q)

    def new(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(sizes, dtype=dtype)

    def outside_states(self) -> Tensor:
        return self.new(self.sequences, self.heads, self.key_dim, self.value_dim)

    def prepared(self) -> _Prepared:
        config, sizes = self.config, (self.slots, self.heads)
        kept = (inverse_dtype(self.q.dtype), self.kept)
        squares = (self.new(*sizes, config.chunk, config.chunk, dtype=dtype) for dtype in kept)
        tiles = (self.new(*sizes, config.chunk, self.key_dim, dtype=self.kept) for _ in range(3))
        # No program of a packed call looks at a place that no chunk fills.
        empty = torch.empty if self.cu is None else torch.zeros
        flags = None if self.exact else empty(sizes, device=self.q.device, dtype=torch.int8)
        found = _Prepared(
            *squares, *tiles, self.new(*sizes, 2, self.key_dim), self.new(*sizes, PLANES.value, config.chunk), flags
        )
        arguments = dict(
            q=self.q, k=self.k, beta=self.beta, **found._asdict(), **strides("beta", self.beta), **self.parts,
            BLOCK_K=min(config.prepare_key_block, self.whole_k), RANGE=self.range,
        )  # fmt: skip
        all_chunks(self, prepare_kernel, arguments, config.prepare_warps, config.prepare_registers)
        return found

    def walk_forwards(
        self, prepared: _Prepared, o: Tensor | None, initial: Tensor | None, final: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the states before each chunk and the recalls' errors, empty unless `keep`."""
        config = self.config
        states = self.new(self.slots if keep else 0, self.heads, self.key_dim, self.value_dim, dtype=self.kept)
        errors = self.new(*self.v.shape[: 4 if keep else 0], dtype=self.kept)
        outputs = {"o": o, "final": final, "states": states if keep else None, "errors": errors if keep else None}
        arguments = dict(
            **prepared.tiles(), v=self.v, initial=initial, **outputs, **strides("v", self.v),
            **self.walk_sizes(config.forward_value_block), WRITE=self.write, STAGES=config.forward_stages,
        )  # fmt: skip
        how = (config.forward_warps, config.forward_stages, config.forward_registers)
        self.walk(vector_forward_kernel, arguments, *how)
        return states, errors

    def walk_in_reverse(
        self,
        prepared: _Prepared,
        do: Tensor,
        d_final: Tensor | None,
        dr: Tensor,
        d_initial: Tensor | None,
        d_states: Tensor,
    ) -> None:
        config = self.config
        arguments = dict(
            **prepared.tiles(), d=do, d_final=d_final, dr=dr, d_initial=d_initial, d_states=d_states, **strides("d", do),
            **self.walk_sizes(config.reverse_value_block), STAGES=config.reverse_stages,
        )  # fmt: skip
        how = (config.reverse_warps, config.reverse_stages, config.reverse_registers)
        self.walk(vector_reverse_kernel, arguments, *how)

    def walk_sizes(self, value_block: int) -> dict[str, Any]:
        return dict(
            cu=self.cu, tokens=self.tokens, batches=self.batch, heads=self.heads,
            segments=1 if self.cu is None else self.sequences, length=self.tokens, K=self.key_dim, V=self.value_dim,
            BLOCK_K=self.whole_k, BLOCK_V=min(value_block, self.whole_v), EACH=self.cu is not None, **self.numbers,
        )  # fmt: skip

    def walk(self, kernel: Any, arguments: dict[str, Any], warps: int, stages: int, registers: int | None) -> None:
        programs = self.sequences * self.heads * cdiv(self.value_dim, arguments["BLOCK_V"])
        with self.on_device:
            launch(kernel, (programs,), arguments, num_warps=warps, num_stages=stages, **at_most(registers))

    def gradients(
        self,
        prepared: _Prepared,
        do: Tensor,
        dr: Tensor,
        errors: Tensor,
        states: Tensor,
        d_states: Tensor,
        d_initial: Tensor | None,
    ) -> DeltaGradients:
        x = self.source.x
        dq, dk, dv, dx = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (self.q, self.k, self.v, x))
        d_beta = self.new(*self.q.shape[:3])
        # One row per chunk and head; a packed call has rows that no chunk fills.
        empty = torch.empty if self.cu is None else torch.zeros
        sizes = (self.slots, self.heads, self.key_dim)
        rows = {name: None if self.parts[name] is None else empty(sizes, device=x.device) for name in _PARTS}
        arguments = dict(
            q=self.q, k=self.k, v=self.v, d=do, queries=prepared.queries, erasers=prepared.erasers,
            writers=prepared.writers, gates=prepared.gates, flags=prepared.flags, errors=errors, dr=dr, starts=states,
            ends=d_states, dq=dq,
            dk=dk, dv=dv, d_beta=d_beta, dx=dx, d_gain=rows["gain"], d_offset=rows["offset"], **strides("v", self.v),
            **strides("d", do), **self.parts, V=self.value_dim, BLOCK_K=min(self.config.gradient_key_block, self.whole_k),
            BLOCK_V=self.whole_v, WRITE=self.write,
        )  # fmt: skip
        slices = 1 if self.parts["NORM"] else cdiv(self.key_dim, arguments["BLOCK_K"])
        how = (self.config.gradient_warps, self.config.gradient_registers, slices)
        all_chunks(self, vector_gradients_kernel, arguments, *how)
        given = {name: getattr(self.source, name) for name in _PARTS}
        summed = {name: None if y is None else y.sum(dim=0).to(given[name].dtype) for name, y in rows.items()}
        return DeltaGradients(dq, dk, dv, d_beta.to(self.beta.dtype), dx, **summed, initial_state=d_initial)


_PARTS = ("gain", "offset")
