"""How the sequences of one call are cut along time: into chunks, and into spans that a program walks along.

What is surprising: where sequences are packed, their lengths are known on the device only. The tables are made there, without
the host waiting, and have room for the most pieces there can be; a piece past the last has no tokens.
Source: cu_seqlens as flash-linear-attention has it: N + 1 boundaries in one row of tokens, from 0 to T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Programs of a walk below which sequences are cut into segments, the programs wanted then (four per multiprocessor of an
# H100), tokens per segment, and what a segment's length is a multiple of: so is every chunk's.
FEW_PROGRAMS, WANTED_PROGRAMS, SEGMENT_TOKENS, STEP = 256, 4 * 132, 512, 128


@dataclass(frozen=True, kw_only=True)
class Spans:
    """What programs walk along: whole sequences, or, if `cut`, segments of `length` tokens.

    table: (count, 3) first token, tokens, first chunk; bounds: first span of each sequence and their number. Both None where
    nothing is packed: then a sequence has `segments` spans, of which the last may be short.
    """

    count: int
    segments: int
    length: int
    cut: bool
    table: Tensor | None = None
    bounds: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """B rows of T tokens, or, with cu_seqlens (N + 1,), N sequences in one row."""

    rows: int
    tokens: int
    cu_seqlens: Tensor | None = None

    @property
    def count(self) -> int:
        return self.rows if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def chunks(self, chunk: int) -> int:
        """How many chunks there are, or, packed, can be."""
        if self.cu_seqlens is None:
            return self.rows * math.ceil(self.tokens / chunk)
        return self.tokens // chunk + self.count

    def chunk_table(self, chunk: int) -> Tensor | None:
        """(chunks, 3): first token, tokens, number; None where nothing is packed."""
        return None if self.cu_seqlens is None else _pieces(self.cu_seqlens, self.tokens, chunk, chunk)[0]

    def spans(self, programs: int, chunk: int) -> Spans:
        """`programs`: how many walk along one sequence side by side."""
        length = self._segment(programs)
        if self.cu_seqlens is None:
            segments = math.ceil(self.tokens / length)
            return Spans(count=self.rows * segments, segments=segments, length=length, cut=segments > 1)
        if length >= self.tokens:
            table = _whole(self.cu_seqlens, chunk)
            return Spans(count=self.count, segments=1, length=self.tokens, cut=False, table=table)
        table, bounds = _pieces(self.cu_seqlens, self.tokens, length, chunk)
        return Spans(count=len(table), segments=1, length=length, cut=True, table=table, bounds=bounds)

    def _segment(self, programs: int) -> int:
        """Tokens per segment; at least T where nothing is to be cut."""
        if self.count * programs >= FEW_PROGRAMS:
            return self.tokens
        wanted = math.ceil(WANTED_PROGRAMS / (self.rows * programs))
        wanted = max(1, min(wanted, self.tokens // SEGMENT_TOKENS))
        return STEP * math.ceil(self.tokens / (STEP * wanted))


def _first_pieces(cu_seqlens: Tensor, size: int) -> Tensor:
    """(N + 1,): the first piece of `size` tokens of each sequence, and how many there are."""
    return F.pad(((cu_seqlens.diff() + size - 1) // size).cumsum(0), (1, 0))


def _pieces(cu_seqlens: Tensor, tokens: int, size: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Pieces of `size` tokens as (first token, tokens, first chunk), and each sequence's first piece."""
    bounds = _first_pieces(cu_seqlens, size)
    sequences = len(cu_seqlens) - 1
    piece = torch.arange(tokens // size + sequences, device=cu_seqlens.device)
    sequence = torch.searchsorted(bounds[1:], piece, right=True).clamp(max=sequences - 1)
    inside = (piece - bounds[sequence]) * size
    first = cu_seqlens[sequence] + inside
    count = (cu_seqlens[sequence + 1] - first).clamp(0, size)
    number = _first_pieces(cu_seqlens, chunk)[sequence] + inside // chunk
    return torch.stack([first, count, number], dim=1).to(torch.int32), bounds.to(torch.int32)


def _whole(cu_seqlens: Tensor, chunk: int) -> Tensor:
    return torch.stack([cu_seqlens[:-1], cu_seqlens.diff(), _first_pieces(cu_seqlens, chunk)[:-1]], dim=1).to(torch.int32)
