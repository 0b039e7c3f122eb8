"""Linear attention with one decay per head and token, as Triton kernels: programs walk along a sequence, chunk by chunk, and
keep the state on the chip.

    S_t = λ_t S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

What is unusual:
- λ is made in the kernels from what it is a function of (decay_source.py), and log λ is never in memory. Its gradient is, in
  fp32, and one small kernel takes that back through the formula.
- Three backward passes. `states`: the forward pass keeps the state at each chunk's start and one walk in reverse gives all
  gradients; a caller who gives the kept states away gets dq in their place. `recompute`: nothing is kept, a walk forwards
  gives dq and one in reverse dk and dv. `split`, for states that are too large for one program: a walk in reverse keeps the
  state's gradient dS as well, and then all chunks are done at once.
- dlog λ_t is the sum over the pairs of tokens j < t <= i, split into pairs inside the chunk, pairs with one end in it, and
  pairs around it, ⟨S, dS⟩. Nothing is summed along the whole sequence, so the error does not grow with T. Pairs inside
  are summed as q·dq - k·dk, where i = j cancels; for fp32 inputs pair by pair without i = j, which tells small λ from
  rounding. `recompute` has S and dS in different kernels: it sums from one chunk to the next and starts afresh from a
  stored state every CHECKPOINT chunks.
- Outputs are linear in slices of K and in slices of V. Where a state is too large for one program, each program takes a
  slice; what several programs have a share in is written per slice in fp32 and summed in a fixed order. No atomics: two
  runs give equal bits.
- A sequence with few heads is cut into segments: a first walk finds what each segment adds to the state, a short walk
  over the segments gives each its initial state. Packed sequences are not cut further.
- fp32 inputs are multiplied as three tf32 products (tf32x3).
- A transposed tile that was computed is never the left operand of tl.dot: Triton 3.4 to 3.7.0 miscompile that on Hopper
  (flash-linear-attention#640). Transposes come from loaded tiles or from a second product.
- Triton's interpreter multiplies bf16 wrongly: there, bf16 tiles are made fp32 first.
Source: decay_scan_naive.py is the definition; the chunked form is that of Mamba-2 (arXiv 2405.21060) and GLA (2312.06635).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kernels.decay_source import PARAMETERS, DecaySource
from kernels.launching import INTERPRETED, at_most, axes, cdiv, next_power_of_2, on_device_of, padded, widened
from kernels.launching import launch as launch_kernel
from kernels.triton_gate import KINDS, Gradients
from kernels.triton_scalar_chunks import chunk_kernel
from kernels.triton_scalar_configs import SEGMENT_STEP, Config, Launch, candidates, default_config
from kernels.triton_scalar_gate import gate_kernel
from kernels.triton_scalar_recompute import dkv_kernel, dq_kernel
from kernels.triton_scalar_reverse import reverse_kernel
from kernels.triton_scalar_walk import carry_kernel, walk_kernel

CHECKPOINT = 8
SEGMENT_TOKENS = 512  # fewest in a segment
__all__ = ["Config", "Launch", "backward", "candidates", "default_config", "forward", "saved_like"]


def forward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    source: DecaySource,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool,
    want_saved: bool,
    config: Config,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V) fp32 or None, what backward wants back or None).

    source: x (B, T, H), any strides. The last axis of q, k and v is contiguous. K, V <= 256. cu_seqlens: (N + 1,), int32 or
    int64, where N sequences packed into B = 1 begin and end, not looked at here; states are then (N, H, K, V).
    """
    scan = _Scan.of(q_bthk, v_bthv, source, scale, cu_seqlens)
    launch = config.forward
    starts = scan.states_at_segments(launch, k_bthk, v_bthv, widened(initial_state), reverse=False)
    o = scan.partial(v_bthv, scan.slices(launch)[0])
    final = scan.states() if want_state else None
    saved = scan.kept(config) if want_saved and config.policy != "recompute" else None
    inputs = {"q": q_bthk, "k": k_bthk, "v": v_bthv}
    scan.walk(launch, inputs, initial=starts, o=o, final=final, saved=saved, every=config.kept_every // launch.chunk)
    return _summed(o, v_bthv), final, saved


def backward(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    source: DecaySource,
    scale: float,
    initial_state: Tensor | None,
    saved: Tensor | None,
    do_bthv: Tensor,
    d_final_state: Tensor | None,
    config: Config,
    cu_seqlens: Tensor | None = None,
    give_saved: bool = False,
) -> Gradients:
    """Returns the gradients in the inputs' dtypes, that of the initial state in fp32.

    give_saved: `saved` is needed no more; where `dq_fits` says so, dq is written over it, which saves memory of q's size.
    The configuration's policy and its tokens between kept states are those of the forward pass. A gain or an offset that the
    source's formula does not use has no gradient.
    """
    if config.policy == "recompute" and q_bthk.dtype == torch.float32:
        # What is summed from chunk to chunk rounds relative to its largest term, which fp32 inputs do not put up with.
        config = Config(policy="states", forward=config.backward, backward=config.backward)
        given = (q_bthk, k_bthk, v_bthv, source, scale, initial_state)
        saved = forward(*given, False, True, config, cu_seqlens)[2]
    scan = _Scan.of(q_bthk, v_bthv, source, scale, cu_seqlens)
    if config.policy != "recompute" and (saved is None or saved.shape != scan.kept_shape(config)):
        raise ValueError(f"policy `{config.policy}`: the forward pass saved no states, or saved them for another chunk")
    inputs = {"q": q_bthk, "k": k_bthk, "v": v_bthv, "d": do_bthv}
    initial_state, d_final_state = widened(initial_state), widened(d_final_state)
    if give_saved and saved is not None and dq_fits(q_bthk, v_bthv, config, cu_seqlens):
        return _by_reverse_walk(scan, inputs, initial_state, saved, d_final_state, config, saved.view(q_bthk.shape))
    return _POLICIES[config.policy](scan, inputs, initial_state, saved, d_final_state, config)


def dq_fits(q_bthk: Tensor, v_bthv: Tensor, config: Config, cu_seqlens: Tensor | None = None) -> bool:
    """Whether `backward` can write dq over the states: each has as many rows as its chunk tokens, and all chunks are full."""
    widths = (config.kept_every, q_bthk.shape[3], v_bthv.shape[3], config.backward.block_k, config.backward.block_v)
    whole = cu_seqlens is None and q_bthk.shape[1] % config.kept_every == 0
    return config.policy == "states" and whole and len(set(widths)) == 1


def saved_like(
    q_bthk: Tensor, v_bthv: Tensor, config: Config, cu_seqlens: Tensor | None = None
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the states that `forward` keeps for the backward pass; (0,) where it keeps none."""
    if config.policy == "recompute":
        return (0,), q_bthk.dtype
    batch, tokens, heads, key_dim = q_bthk.shape
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (slot_count(batch, tokens, packed, config.kept_every), key_dim, heads, v_bthv.shape[-1]), q_bthk.dtype


def _by_reverse_walk(
    scan: _Scan,
    inputs: dict[str, Tensor],
    initial: Tensor | None,
    saved: Tensor | None,
    d_final: Tensor | None,
    config: Config,
    dq: Tensor | None = None,
) -> Gradients:
    launch = config.backward
    ends = scan.states_at_segments(launch, inputs["q"], inputs["d"], d_final, reverse=True)
    outputs = scan.outputs(inputs, launch, initial, dq)
    scan.run(reverse_kernel, launch, inputs, saved=saved, d_final=ends, **outputs)
    return scan.gradients(inputs, **outputs)


def _by_two_walks(
    scan: _Scan, inputs: dict[str, Tensor], initial: Tensor | None, saved: Tensor | None, d_final: Tensor | None, config: Config
) -> Gradients:
    early, late = config.dq or config.backward, config.backward
    if (early.chunk, scan.slices(early), early.programs) != (late.chunk, scan.slices(late), late.programs):
        raise ValueError("policy `recompute`: the two walks of the backward pass differ in chunk, slices or programs")
    starts = scan.states_at_segments(early, inputs["k"], inputs["v"], initial, reverse=False)
    ends = scan.states_at_segments(late, inputs["q"], inputs["d"], d_final, reverse=True)
    outputs = scan.outputs(inputs, late, initial)
    between = {"checkpoints": scan.new(*scan.checkpoints(late), dtype=torch.float32), "EVERY": CHECKPOINT}
    scan.run(dq_kernel, early, inputs, initial=starts, dq=outputs["dq"], d_log=outputs["d_log"], **between)
    later = {name: x for name, x in outputs.items() if name != "dq"}
    scan.run(dkv_kernel, late, inputs, d_final=ends, **later, **between)
    return scan.gradients(inputs, **outputs)


def _by_chunks(
    scan: _Scan, inputs: dict[str, Tensor], initial: Tensor | None, saved: Tensor | None, d_final: Tensor | None, config: Config
) -> Gradients:
    walk, launch = config.walk or config.forward, config.backward
    if scan.slices(launch)[1] > 1:
        raise ValueError("policy `split`: a program holds all of V")
    ends = scan.states_at_segments(walk, inputs["q"], inputs["d"], d_final, reverse=True)
    outputs = scan.outputs(inputs, replace(launch, block_k=padded(scan.shape[3])), initial)
    in_walk = config.dv == "walk"
    if in_walk:
        outputs["dv"] = scan.partial(inputs["v"], scan.slices(walk)[0])
    d_states = scan.kept(config)
    roles = {"q": inputs["k"], "k": inputs["q"], "v": inputs["d"]}
    made = {"o": outputs["dv"] if in_walk else None, "final": outputs["d_initial"], "saved": d_states}
    scan.walk(walk, roles, initial=ends, **made, every=config.kept_every // walk.chunk, reverse=True)
    every = config.kept_every // launch.chunk
    counts = {"EVERY": every, "chunks": every * scan.slots(config.kept_every), "search_steps": scan.sequences.bit_length()}
    others = {name: outputs[name] for name in ("dq", "dk", "d_log")} | {"dv": None if in_walk else outputs["dv"]}
    scan.run(chunk_kernel, launch, inputs, starts=saved, ends=d_states, **others, **counts)
    return scan.gradients(inputs, **outputs)


_POLICIES = {"states": _by_reverse_walk, "recompute": _by_two_walks, "split": _by_chunks}
_TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _summed(parts: Tensor, like: Tensor) -> Tensor:
    return parts if parts.dim() == like.dim() else parts.sum(dim=0).to(like.dtype)


def slot_count(batch: int, tokens: int, packed: int | None, span: int) -> int:
    """States kept for each head. `packed` sequences start at slots as triton_scalar_tiles.py says, with gaps."""
    return batch * cdiv(tokens, span) if packed is None else tokens // span + packed


@cache
def _blocks(key_dim: int, value_dim: int, block_k: int, block_v: int) -> tuple[int, int]:
    return min(block_k, padded(key_dim)), min(block_v, padded(value_dim))


@cache
def _slices(key_dim: int, value_dim: int, block_k: int, block_v: int) -> tuple[int, int]:
    block_k, block_v = _blocks(key_dim, value_dim, block_k, block_v)
    return cdiv(key_dim, block_k), cdiv(value_dim, block_v)


@lru_cache(maxsize=1024)
def _cut(tokens: int, programs: int, wanted: int) -> tuple[int, int]:
    """Segments of a sequence, so that `programs` that walk along whole ones become as many as are wanted."""
    pieces = max(1, min(math.ceil(wanted / programs), tokens // SEGMENT_TOKENS))
    length = SEGMENT_STEP * math.ceil(tokens / (SEGMENT_STEP * pieces))
    return math.ceil(tokens / length), length


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """One call: its shapes, what λ is made from, and where packed sequences begin."""

    shape: tuple[int, int, int, int]
    value_dim: int
    dtype: torch.dtype
    source: DecaySource
    log2_scale: float
    cu: Tensor | None

    @classmethod
    def of(cls, q_bthk: Tensor, v_bthv: Tensor, source: DecaySource, scale: float, cu_seqlens: Tensor | None) -> _Scan:
        if not scale > 0:
            raise ValueError(f"scale={scale}: it must be positive, since its logarithm is added to those of the decays")
        dims = {"shape": tuple(q_bthk.shape), "value_dim": v_bthv.shape[-1], "dtype": q_bthk.dtype}
        return cls(**dims, source=source, log2_scale=math.log2(scale), cu=cu_seqlens)

    @property
    def sequences(self) -> int:
        return self.shape[0] if self.cu is None else self.cu.shape[0] - 1

    def slots(self, span: int) -> int:
        return slot_count(*self.shape[:2], None if self.cu is None else self.sequences, span)

    def checkpoints(self, launch: Launch) -> tuple[int, ...]:
        """The shape of the states that `recompute` keeps between its walks: those at the spans' ends among them."""
        _, tokens, heads, key_dim = self.shape
        span = launch.chunk * CHECKPOINT
        segments, length = self.segments(launch)
        stored = self.sequences * segments * (cdiv(length, span) + 1)
        return (stored if self.cu is None else tokens // span + 2 * self.sequences, heads, key_dim, self.value_dim)

    def blocks(self, launch: Launch) -> tuple[int, int]:
        return _blocks(self.shape[3], self.value_dim, launch.block_k, launch.block_v)

    def slices(self, launch: Launch) -> tuple[int, int]:
        return _slices(self.shape[3], self.value_dim, launch.block_k, launch.block_v)

    def segments(self, launch: Launch) -> tuple[int, int]:
        """How many segments a sequence is cut into, and the tokens of one; the last may be short."""
        batch, tokens, heads, _ = self.shape
        slices_k, slices_v = self.slices(launch)
        programs = batch * heads * slices_k * slices_v
        if self.cu is not None or 2 * programs >= launch.programs:
            return 1, tokens
        return _cut(tokens, programs, launch.programs)

    def new(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        return self.source.x.new_empty(sizes, dtype=dtype)

    def states(self) -> Tensor:
        return self.new(self.sequences, *self.shape[2:], self.value_dim, dtype=torch.float32)

    def kept_shape(self, config: Config) -> tuple[int, ...]:
        _, _, heads, key_dim = self.shape
        return (self.slots(config.kept_every), key_dim, heads, self.value_dim)

    def kept(self, config: Config) -> Tensor:
        return self.new(*self.kept_shape(config), dtype=self.dtype)

    def partial(self, like: Tensor, slices: int) -> Tensor:
        """Room for an output in which `slices` programs have a share: where there are several, one after the other in fp32."""
        return like.new_empty(like.shape) if slices == 1 else like.new_empty(slices, *like.shape, dtype=torch.float32)

    def parameters(self) -> dict[str, Tensor | None]:
        """The gain and the offset that the source's formula uses, in fp32."""
        used = PARAMETERS[self.source.kind]
        given = {"gain": self.source.gain, "offset": self.source.offset}
        return {name: widened(x) if name in used else None for name, x in given.items()}

    def outputs(
        self, inputs: dict[str, Tensor], launch: Launch, initial: Tensor | None, dq: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """Room for what a backward pass leaves, a share for each slice of a state; dq if it is there already."""
        slices_k, slices_v = self.slices(launch)
        parts = {"dq": ("q", slices_v), "dk": ("k", slices_v), "dv": ("v", slices_k)}
        room: dict[str, Tensor | None] = {} if dq is None else {"dq": dq}
        room |= {name: self.partial(inputs[like], n) for name, (like, n) in parts.items() if name not in room}
        slices = slices_k * slices_v
        room["d_log"] = self.new(*((slices,) if slices > 1 else ()), *self.shape[:3], dtype=torch.float32)
        return {**room, "d_initial": None if initial is None else self.states()}

    def gradients(
        self, inputs: dict[str, Tensor], dq: Tensor, dk: Tensor, dv: Tensor, d_log: Tensor, d_initial: Tensor | None
    ) -> Gradients:
        """What slices have written, summed; and from the gradient of log λ those of what made it."""
        whole = {"q": _summed(dq, inputs["q"]), "k": _summed(dk, inputs["k"]), "v": _summed(dv, inputs["v"])}
        return Gradients(**whole, **self.gate_gradients(d_log), initial_state=d_initial)

    def gate_gradients(self, d_log: Tensor) -> dict[str, Tensor | None]:
        """Those of x, gain and offset."""
        x, (batch, tokens, heads, _) = self.source.x, self.shape
        slices = d_log.shape[0] if d_log.dim() > x.dim() else 1
        if self.source.kind == "log" and slices == 1 and x.dtype == d_log.dtype:
            return {"x": d_log, "gain": None, "offset": None}
        rows, block_rows, block_heads = batch * tokens, 64, min(16, next_power_of_2(heads))
        grid = (cdiv(rows, block_rows), cdiv(heads, block_heads))
        dx, parameters = x.new_empty(x.shape), self.parameters()
        sums = {f"d_{name}": None if y is None else y.new_empty(grid[0], heads) for name, y in parameters.items()}
        strides = dict(zip(("x_b", "x_t", "x_h"), x.stride(), strict=True))
        with self.on_device:
            arguments = dict(
                d_log=d_log, x=x, **parameters, dx=dx, **sums, slope=float(self.source.slope), slices=slices, rows=rows,
                tokens=tokens, heads=heads, **strides, ROWS=block_rows, HEADS=block_heads, KIND=KINDS[self.source.kind],
            )  # fmt: skip
            launch_kernel(gate_kernel, grid, arguments)
        given = {"gain": self.source.gain, "offset": self.source.offset}
        summed = {name: sums[f"d_{name}"] for name in given}
        return {"x": dx, **{name: None if y is None else y.sum(dim=0).to(given[name].dtype) for name, y in summed.items()}}

    @property
    def on_device(self) -> AbstractContextManager[object]:
        return on_device_of(self.source.x)

    def walk(
        self,
        launch: Launch,
        inputs: dict[str, Tensor],
        *,
        every: int = 1,
        reverse: bool = False,
        each: bool = False,
        totals: Tensor | None = None,
        **others: Tensor | None,
    ) -> None:
        """Runs walk_kernel. A walk without o reads no q."""
        if others["o"] is None:
            inputs = {"k": inputs["k"], "v": inputs["v"]}
            others |= {"q": None, "q_b": 0, "q_t": 0, "q_h": 0}
        constants = {"REVERSE": reverse, "EVERY": every, "EACH": each or self.cu is not None}
        self.run(walk_kernel, launch, inputs, **others, totals=totals, **constants)

    def states_at_segments(
        self, launch: Launch, k: Tensor, v: Tensor, outside: Tensor | None, *, reverse: bool
    ) -> Tensor | None:
        """(B, segments, H, K, V): the state each segment starts from, or dS at its end; `outside` if there is one segment."""
        segments = self.segments(launch)[0]
        if segments == 1:
            return outside
        batch, _, heads, key_dim = self.shape
        added = self.new(batch, segments, heads, key_dim, self.value_dim, dtype=torch.float32)
        totals = self.new(batch, segments, heads, dtype=torch.float32)
        nothing = {"o": None, "initial": None, "saved": None}
        self.walk(launch, {"k": k, "v": v}, final=added, totals=totals, **nothing, reverse=reverse, each=True)
        size, block = key_dim * self.value_dim, 1024
        with self.on_device:
            arguments = {"added": added, "totals": totals, "outside": outside, "heads": heads, "segments": segments}
            arguments |= {"SIZE": size, "BLOCK": block, "REVERSE": reverse}
            launch_kernel(carry_kernel, (batch * heads, cdiv(size, block)), arguments)
        return added

    def run(self, kernel: Any, launch: Launch, inputs: dict[str, Tensor], chunks: int | None = None, **others: Any) -> None:
        """Runs a kernel for each head and span, or for each head and each of `chunks` chunks.

        Strides travel in units of 16 bytes where all allow it, so that the compiler knows that rows are aligned.
        """
        batch, tokens, heads, key_dim = self.shape
        x = self.source.x
        unit = 16 // self.dtype.itemsize
        given = {name: y.stride()[:3] for name, y in inputs.items()}
        align = 1 if any(step % unit for steps in given.values() for step in steps) else unit
        strides = {
            name: step // align for tensor, steps in given.items() for name, step in zip(axes(tensor), steps, strict=True)
        }
        strides |= zip(axes("x"), x.stride(), strict=True)
        segments, length = self.segments(launch)
        (block_k, block_v), (slices_k, slices_v) = self.blocks(launch), self.slices(launch)
        programs = self.sequences * segments * slices_k * slices_v if chunks is None else chunks
        segments = segments if self.cu is None else self.sequences
        single = self.dtype == torch.float32
        product = tl.float32 if single or (INTERPRETED and self.dtype == torch.bfloat16) else _TRITON_DTYPE[self.dtype]
        with self.on_device:
            arguments = dict(
                **inputs, x=x, **self.parameters(), cu=self.cu, **others, slope=float(self.source.slope),
                log2_scale=self.log2_scale, tokens=tokens, batches=batch, heads=heads, segments=segments, length=length,
                **strides, K=key_dim, V=self.value_dim, BLOCK_K=block_k, BLOCK_V=block_v, CHUNK=launch.chunk,
                KIND=KINDS[self.source.kind], ALIGN=align, LP=product, PRECISION="tf32x3" if single else "tf32", SPLIT=single,
                STAGES=launch.stages,
            )  # fmt: skip
            how = {"num_warps": launch.warps, "num_stages": launch.stages, **at_most(launch.registers)}
            launch_kernel(kernel, (programs * heads,), arguments, **how)
