"""Linear attention with one decay per head and token, as Triton kernels: programs walk along a sequence, chunk by chunk, and
keep the state on the chip.

    S_t = λ_t S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

What is unusual:
- λ is made in the kernels from what it is a function of (decay_source.py), and its gradient goes back through the formula
  there: log λ is never in memory.
- Three backward passes. `states`: the forward pass keeps the state at each chunk's start and one walk in reverse gives all
  gradients. `recompute`: nothing is kept, a walk forwards gives dq and one in reverse dk and dv. `split`, for states that are
  too large for one program: a walk in reverse keeps the state's gradient dS as well, and then all chunks are done at once.
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
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decay_source import DecaySource
from kernels.triton_gate import KINDS, Gradients
from kernels.triton_scalar_chunks import chunk_kernel
from kernels.triton_scalar_configs import SEGMENT_STEP, Config, Launch, candidates, default_config, padded
from kernels.triton_scalar_recompute import dkv_kernel, dq_kernel
from kernels.triton_scalar_reverse import reverse_kernel
from kernels.triton_scalar_walk import carry_kernel, walk_kernel

CHECKPOINT = 8
SEGMENT_TOKENS = 512  # fewest in a segment
PARAMETERS = {"log": (), "softplus": ("gain", "offset"), "floor": ("offset",)}  # what a source's formula has per head


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
    starts = scan.states_at_segments(launch, k_bthk, v_bthv, _wide(initial_state), reverse=False)
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
) -> Gradients:
    """Returns the gradients in the inputs' dtypes, that of the initial state in fp32.

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
    initial_state, d_final_state = _wide(initial_state), _wide(d_final_state)
    return _POLICIES[config.policy](scan, inputs, initial_state, saved, d_final_state, config)


def saved_like(
    q_bthk: Tensor, v_bthv: Tensor, config: Config, cu_seqlens: Tensor | None = None
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the states that `forward` keeps for the backward pass; (0,) where it keeps none."""
    if config.policy == "recompute":
        return (0,), q_bthk.dtype
    batch, tokens, heads, key_dim = q_bthk.shape
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (_slots(batch, tokens, packed, config.kept_every), heads, key_dim, v_bthv.shape[-1]), q_bthk.dtype


def _by_reverse_walk(
    scan: _Scan, inputs: dict[str, Tensor], initial: Tensor | None, saved: Tensor | None, d_final: Tensor | None, config: Config
) -> Gradients:
    launch = config.backward
    slices_k, slices_v = scan.slices(launch)
    ends = scan.states_at_segments(launch, inputs["q"], inputs["d"], d_final, reverse=True)
    dq, dk, dv = (scan.partial(inputs[name], n) for name, n in (("q", slices_v), ("k", slices_v), ("v", slices_k)))
    d_initial = None if initial is None else scan.states()
    gate = scan.gate_gradients(slices_k * slices_v, slices_k * slices_v * scan.spans(launch))
    outputs = {"dq": dq, "dk": dk, "dv": dv, "d_initial": d_initial, **gate}
    scan.run(reverse_kernel, launch, inputs, saved=saved, d_final=ends, **outputs)
    return scan.gradients(inputs, dq, dk, dv, gate, d_initial, slices_k * slices_v)


def _by_two_walks(
    scan: _Scan, inputs: dict[str, Tensor], initial: Tensor | None, saved: Tensor | None, d_final: Tensor | None, config: Config
) -> Gradients:
    early, late = config.dq or config.backward, config.backward
    slices_k, slices_v = scan.slices(late)
    if (early.chunk, *scan.slices(early), early.programs) != (late.chunk, slices_k, slices_v, late.programs):
        raise ValueError("policy `recompute`: the two walks of the backward pass differ in chunk, slices or programs")
    starts = scan.states_at_segments(early, inputs["k"], inputs["v"], initial, reverse=False)
    ends = scan.states_at_segments(late, inputs["q"], inputs["d"], d_final, reverse=True)
    dq, dk, dv = (scan.partial(inputs[name], n) for name, n in (("q", slices_v), ("k", slices_v), ("v", slices_k)))
    d_initial = None if initial is None else scan.states()
    gate = scan.gate_gradients(slices_k * slices_v, slices_k * slices_v * scan.spans(late))
    between = {"between_walks": torch.empty_like(gate["dx"], dtype=torch.float32), "EVERY": CHECKPOINT}
    between["checkpoints"] = scan.new(*scan.checkpoints(late), dtype=torch.float32)
    scan.run(dq_kernel, early, inputs, initial=starts, dq=dq, **between)
    scan.run(dkv_kernel, late, inputs, d_final=ends, dk=dk, dv=dv, d_initial=d_initial, **gate, **between)
    return scan.gradients(inputs, dq, dk, dv, gate, d_initial, slices_k * slices_v)


def _by_chunks(
    scan: _Scan, inputs: dict[str, Tensor], initial: Tensor | None, saved: Tensor | None, d_final: Tensor | None, config: Config
) -> Gradients:
    walk, launch = config.walk or config.forward, config.backward
    slices_k = scan.slices(walk)[0]
    every = config.kept_every // launch.chunk
    if scan.slices(launch)[1] > 1:
        raise ValueError("policy `split`: a program holds all of V")
    ends = scan.states_at_segments(walk, inputs["q"], inputs["d"], d_final, reverse=True)
    d_initial = None if initial is None else scan.states()
    in_walk = config.dv == "walk"
    dv = scan.partial(inputs["v"], slices_k if in_walk else 1)
    d_states = scan.kept(config)
    roles = {"q": inputs["k"], "k": inputs["q"], "v": inputs["d"]}
    outputs = {"o": dv if in_walk else None, "final": d_initial, "saved": d_states}
    scan.walk(walk, roles, initial=ends, **outputs, every=config.kept_every // walk.chunk, reverse=True)
    dq, dk = scan.partial(inputs["q"], 1), scan.partial(inputs["k"], 1)
    chunks = every * scan.slots(config.kept_every)
    gate = scan.gate_gradients(1, chunks)
    outputs = {"dq": dq, "dk": dk, "dv": None if in_walk else dv, **gate, "starts": saved, "ends": d_states}
    scan.run(chunk_kernel, launch, inputs, **outputs, EVERY=every, search_steps=scan.sequences.bit_length(), chunks=chunks)
    return scan.gradients(inputs, dq, dk, dv, gate, d_initial, 1)


_POLICIES = {"states": _by_reverse_walk, "recompute": _by_two_walks, "split": _by_chunks}
_INTERPRETED = not isinstance(walk_kernel, triton.runtime.JITFunction)
_TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _wide(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.float().contiguous()


def _summed(parts: Tensor, like: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(dim=0).to(like.dtype)


def _slots(batch: int, tokens: int, packed: int | None, span: int) -> int:
    """States kept for each head. `packed` sequences start at slots as triton_scalar_tiles.py says, with gaps."""
    return batch * triton.cdiv(tokens, span) if packed is None else tokens // span + packed


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
        return _slots(*self.shape[:2], None if self.cu is None else self.sequences, span)

    def checkpoints(self, launch: Launch) -> tuple[int, ...]:
        """The shape of the states that `recompute` keeps between its walks: those at the spans' ends among them."""
        _, tokens, heads, key_dim = self.shape
        span = launch.chunk * CHECKPOINT
        segments, length = self.segments(launch)
        stored = self.sequences * segments * (triton.cdiv(length, span) + 1)
        return (stored if self.cu is None else tokens // span + 2 * self.sequences, heads, key_dim, self.value_dim)

    def blocks(self, launch: Launch) -> tuple[int, int]:
        return min(launch.block_k, padded(self.shape[3])), min(launch.block_v, padded(self.value_dim))

    def slices(self, launch: Launch) -> tuple[int, int]:
        block_k, block_v = self.blocks(launch)
        return triton.cdiv(self.shape[3], block_k), triton.cdiv(self.value_dim, block_v)

    def segments(self, launch: Launch) -> tuple[int, int]:
        """How many segments a sequence is cut into, and the tokens of one; the last may be short."""
        batch, tokens, heads, _ = self.shape
        slices_k, slices_v = self.slices(launch)
        programs = batch * heads * slices_k * slices_v
        if self.cu is not None or 2 * programs >= launch.programs:
            return 1, tokens
        wanted = max(1, min(math.ceil(launch.programs / programs), tokens // SEGMENT_TOKENS))
        length = SEGMENT_STEP * math.ceil(tokens / (SEGMENT_STEP * wanted))
        return math.ceil(tokens / length), length

    def spans(self, launch: Launch) -> int:
        """Packed sequences, or segments of all sequences."""
        return self.sequences * self.segments(launch)[0]

    def new(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        return self.source.x.new_empty(sizes, dtype=dtype)

    def states(self) -> Tensor:
        return self.new(self.sequences, *self.shape[2:], self.value_dim, dtype=torch.float32)

    def kept_shape(self, config: Config) -> tuple[int, ...]:
        return (self.slots(config.kept_every), *self.shape[2:], self.value_dim)

    def kept(self, config: Config) -> Tensor:
        return self.new(*self.kept_shape(config), dtype=self.dtype)

    def partial(self, like: Tensor, slices: int) -> Tensor:
        """Room for an output in which `slices` programs have a share: in fp32 where there are several."""
        return like.new_empty(slices, *like.shape, dtype=like.dtype if slices == 1 else torch.float32)

    def parameters(self) -> dict[str, Tensor | None]:
        """The gain and the offset that the source's formula uses, in fp32."""
        used = PARAMETERS[self.source.kind]
        given = {"gain": self.source.gain, "offset": self.source.offset}
        return {name: _wide(x) if name in used else None for name, x in given.items()}

    def gate_gradients(self, slices: int, programs: int) -> dict[str, Tensor | None]:
        """Room for dx, by slice, and for the shares that each head's `programs` programs have in its gain and offset."""
        parts = {f"d_{name}": x for name, x in self.parameters().items()}
        sizes = (programs * self.shape[2],)
        parts = {name: None if x is None else x.new_zeros(sizes) for name, x in parts.items()}
        return {"dx": self.partial(self.source.x, slices), **parts}

    def gradients(
        self,
        inputs: dict[str, Tensor],
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        gate: dict[str, Tensor | None],
        d_initial: Tensor | None,
        slices: int,
    ) -> Gradients:
        """What slices and programs have written, summed."""
        heads = self.shape[2]
        named = {}
        for name in ("gain", "offset"):
            parts, like = gate[f"d_{name}"], getattr(self.source, name)
            named[name] = None if parts is None else parts.view(-1, heads, slices).sum(dim=(0, 2)).to(like.dtype)
        whole = {"q": _summed(dq, inputs["q"]), "k": _summed(dk, inputs["k"]), "v": _summed(dv, inputs["v"])}
        return Gradients(**whole, x=_summed(gate["dx"], self.source.x), **named, initial_state=d_initial)

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
        with torch.cuda.device(k.device) if k.is_cuda else nullcontext():
            carry_kernel[(batch * heads, triton.cdiv(size, block))](
                added, totals, outside, heads, segments, SIZE=size, BLOCK=block, REVERSE=reverse
            )
        return added

    def run(self, kernel: Any, launch: Launch, inputs: dict[str, Tensor], chunks: int | None = None, **others: Any) -> None:
        """Runs a kernel for each head and span, or for each head and each of `chunks` chunks.

        Strides travel in units of 16 bytes where all allow it, so that the compiler knows that rows are aligned.
        """
        batch, tokens, heads, key_dim = self.shape
        x = self.source.x
        unit = 16 // self.dtype.itemsize
        align = unit if all(stride % unit == 0 for tensor in inputs.values() for stride in tensor.stride()[:3]) else 1
        strides = {f"{name}_{axis}": y.stride(i) // align for name, y in inputs.items() for i, axis in enumerate("bth")}
        strides |= {f"x_{axis}": x.stride(i) for i, axis in enumerate("bth")}
        segments, length = self.segments(launch)
        (block_k, block_v), (slices_k, slices_v) = self.blocks(launch), self.slices(launch)
        programs = self.sequences * segments * slices_k * slices_v if chunks is None else chunks
        segments = segments if self.cu is None else self.sequences
        single = self.dtype == torch.float32
        product = tl.float32 if single or (_INTERPRETED and self.dtype == torch.bfloat16) else _TRITON_DTYPE[self.dtype]
        limit = {} if launch.registers is None else {"maxnreg": launch.registers}
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            kernel[(programs * heads,)](
                **inputs, x=x, **self.parameters(), cu=self.cu, **others, slope=float(self.source.slope),
                log2_scale=self.log2_scale, tokens=tokens, batches=batch, heads=heads, segments=segments, length=length,
                **strides, K=key_dim, V=self.value_dim, BLOCK_K=block_k, BLOCK_V=block_v, CHUNK=launch.chunk,
                KIND=KINDS[self.source.kind], ALIGN=align, LP=product, PRECISION="tf32x3" if single else "tf32", SPLIT=single,
                STAGES=launch.stages, num_warps=launch.warps, num_stages=launch.stages, **limit,
            )  # fmt: skip
