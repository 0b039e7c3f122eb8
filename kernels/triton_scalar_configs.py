"""How the scalar-decay kernels may be run for given dims: a configuration that is right, and others worth timing.

What is unusual: a walk has as many programs as there are heads and slices, and each keeps its part of a state in registers, so
the slices are as large as registers allow. Chunks done all at once have programs enough, and may as well be small. Eight warps
go with chunks of 128: products of 64 rows would be done twice.
Source: the registers, spills and shared memory that Triton 3.6 compiles these to for sm_90a; the times are for
benchmarks/tune_kernels.py to find.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from kernels.launching import padded

SEGMENT_STEP = 128  # a segment's tokens are a multiple of it


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one kernel runs; block_k and block_v are the largest slice of a state that one program holds at a time.

    programs: as many as fill the device; where a walk has less than half of them, sequences are cut into segments.
    """

    chunk: int
    warps: int
    stages: int
    block_k: int = 64
    block_v: int = 64
    registers: int | None = None
    programs: int = 512


@dataclass(frozen=True, kw_only=True)
class Config:
    """policy: `states`, `recompute` or `split`.

    backward: the walk in reverse under `states` and `recompute`, the kernel for all chunks under `split`. dq: the walk forwards
    of `recompute`, in place of backward. walk, span, dv: of `split`: the walk that makes dS; tokens from one kept state to the
    next, one or two chunks of backward; which of the two kernels makes dv, "walk" or "chunk".
    fp32 inputs under `recompute` have their states computed once more in the backward pass, then go as under `states`.
    """

    policy: str
    forward: Launch
    backward: Launch
    dq: Launch | None = None
    walk: Launch | None = None
    span: int | None = None
    dv: str = "chunk"

    def __post_init__(self) -> None:
        """ValueError for parts that do not go together."""
        if self.policy == "states" and not self.kept_every == self.forward.chunk == self.backward.chunk:
            raise ValueError("policy `states`: both walks go by the same chunk")
        if self.policy == "split" and self.kept_every not in (self.backward.chunk, 2 * self.backward.chunk):
            raise ValueError("policy `split`: a state is kept for every chunk of the backward pass, or for every second one")
        walks = (self.forward, self.walk or self.forward)
        if SEGMENT_STEP % self.kept_every or any(self.kept_every % walk.chunk for walk in walks):
            raise ValueError(f"a state is kept where a chunk of the walks ends, and every {SEGMENT_STEP} tokens among others")

    @property
    def kept_every(self) -> int:
        """Tokens from one kept state to the next."""
        return self.span or self.forward.chunk


@cache
def default_config(key_dim: int, value_dim: int, dtype: torch.dtype) -> Config:
    """Returns a configuration that is right for these dims, and by what it compiles to a fast one."""
    return candidates(key_dim, value_dim, dtype)[0]


def candidates(key_dim: int, value_dim: int, dtype: torch.dtype) -> list[Config]:
    """Returns configurations worth timing for these dims, the default first. fp32 inputs have the default alone."""
    if dtype == torch.float32:
        launch = Launch(chunk=32, warps=4, stages=1, block_k=32, block_v=32)
        return [Config(policy="states", forward=launch, backward=launch)]
    width = padded(value_dim)
    if padded(key_dim) == 256:
        return _widest_keys(width)
    if padded(key_dim) == 128:
        return _wide_keys(width)
    return _narrow(width) if width == 64 else _wide_values(width)


# The walk that makes dS: any block of a state does by itself, so small ones, and many programs.
_THIN = Launch(chunk=64, warps=4, stages=3, registers=128)
_THIN_LONG = Launch(chunk=128, warps=4, stages=2)


def _chunks(block_v: int, **changes: int) -> Launch:
    return replace(Launch(chunk=64, warps=4, stages=1, block_v=block_v), **changes)  # type: ignore[arg-type]


def _split(forward: Launch, walk: Launch, backward: Launch, **others: int | str) -> Config:
    return Config(policy="split", forward=forward, walk=walk, backward=backward, **others)  # type: ignore[arg-type]


def _narrow(width: int) -> list[Config]:
    """K and V up to 64: a state fits a program that has all else as well."""
    forward = backward = Launch(chunk=64, warps=4, stages=3)
    crowded = replace(forward, stages=2, registers=168)  # three programs on a multiprocessor
    return [
        Config(policy="states", forward=forward, backward=backward),
        Config(policy="states", forward=crowded, backward=backward),
        _split(forward, _THIN, _chunks(width)),
        _split(crowded, _THIN, _chunks(width, registers=168)),
        _split(forward, forward, _chunks(width, registers=168), dv="walk"),
        _split(forward, _THIN, _chunks(width), span=128),
        _split(replace(forward, chunk=128, warps=8, stages=2), _THIN_LONG, _chunks(width), span=128),
        Config(policy="recompute", forward=forward, backward=backward, dq=replace(backward, stages=2)),
    ]


def _wide_keys(width: int) -> list[Config]:
    """K up to 128: the forward pass has all of K in a program, or each would have a share in every output."""
    forward = Launch(chunk=64, warps=4, stages=2, block_k=128)
    chunks = _chunks(width)
    shallow = replace(_THIN, stages=2, registers=None)
    if width == 256:
        found = [_split(forward, _THIN, chunks), _split(forward, _THIN, replace(chunks, warps=8))]
        return [*found, _split(forward, shallow, chunks), _split(forward, forward, chunks, dv="walk")]
    crowded = replace(chunks, registers=168)  # three programs on a multiprocessor
    large = Launch(chunk=128, warps=8, stages=1, block_k=128, block_v=width, programs=256)
    walks = Config(policy="states", forward=forward, backward=Launch(chunk=64, warps=4, stages=1))
    return [
        *((walks, replace(walks, backward=replace(walks.backward, stages=2))) if width == 64 else ()),
        *(_split(forward, _THIN, launch) for launch in ((crowded, chunks) if width == 64 else (chunks, crowded))),
        _split(forward, shallow, replace(chunks, stages=2)),
        _split(forward, forward, chunks, dv="walk"),
        _split(forward, forward, crowded, dv="walk"),
        _split(forward, _THIN, chunks, span=128),
        _split(large, _THIN_LONG, chunks, span=128),
        _split(large, large, chunks, span=128, dv="walk"),
        _split(large, large, replace(chunks, chunk=128, warps=8), span=128, dv="walk"),
    ]


def _wide_values(width: int) -> list[Config]:
    """K up to 64, V above: the forward pass has slices of V."""
    forward = Launch(chunk=64, warps=4, stages=3)
    whole = Launch(chunk=64, warps=4, stages=2, block_v=128)
    chunks = _chunks(width)
    found = [_split(forward, _THIN, chunks), _split(whole, _THIN, chunks), _split(whole, whole, chunks, dv="walk")]
    if width == 256:
        return [*found, _split(whole, _THIN, replace(chunks, warps=8))]
    crowded = replace(chunks, registers=168)
    found += [_split(whole, whole, crowded, dv="walk"), _split(whole, _THIN, crowded)]
    return [*found, _split(whole, _THIN, chunks, span=128)]


def _widest_keys(width: int) -> list[Config]:
    """K up to 256: 8 warps hold a slice of V with all of K."""
    forward = Launch(chunk=64, warps=8, stages=2, block_k=256, programs=256)
    shallow = replace(forward, stages=1)
    four = replace(shallow, warps=4, programs=512)
    partial = Launch(chunk=64, warps=4, stages=2, block_k=128)
    chunks, eight = _chunks(width), _chunks(width, warps=8)
    return [
        _split(forward, _THIN, chunks),
        _split(shallow, _THIN, chunks),
        _split(four, _THIN, chunks),
        _split(forward, _THIN, eight),
        _split(forward, forward, chunks, dv="walk"),
        _split(partial, _THIN, chunks),
    ]
