"""The tokens of one split as a single long row, read window by window from memory-mapped shards.

A window is `seq_len` consecutive tokens; windows do not overlap, may cross documents and shards, and what is left at
the end is dropped. The loss is taken on the `seq_len` − 1 targets inside a window, as in the paper's runs.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.data.shards import Record, read_tokens


class TokenStream:
    """Tokens of `parts` (the records of one split, in order) found in `folder`.

    Files are mapped when first touched; a pickled stream carries paths, not tokens.
    """

    def __init__(self, folder: Path, parts: list[Record]) -> None:
        self._folder = folder
        self._parts = parts
        self._starts = np.cumsum([0, *(part["tokens"] for part in parts)], dtype=np.int64)
        self._mapped: dict[int, NDArray[Any]] = {}

    @property
    def n_tokens(self) -> int:
        """Tokens in the split."""
        return int(self._starts[-1])

    def windows(self, seq_len: int) -> int:
        """How many whole windows of `seq_len` tokens there are. Raises ValueError below 2 tokens: no target."""
        if seq_len < 2:
            raise ValueError(f"token windows: seq_len {seq_len} leaves no target; use at least 2")
        return self.n_tokens // seq_len

    def window(self, i: int, seq_len: int) -> NDArray[np.int64]:
        """Tokens i·seq_len … (i+1)·seq_len − 1, int64 [seq_len]. Raises IndexError outside 0 … windows − 1."""
        if not 0 <= i < self.windows(seq_len):
            raise IndexError(f"token windows: window {i} of {self.windows(seq_len)} of {seq_len} tokens does not exist")
        row = np.empty(seq_len, dtype=np.int64)
        done, position = 0, i * seq_len
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        while done < seq_len:
            inside = position + done - int(self._starts[shard])
            piece = self._shard(shard)[inside : inside + seq_len - done]
            row[done : done + len(piece)] = piece
            done, shard = done + len(piece), shard + 1
        return row

    def example(self, i: int, seq_len: int) -> tuple[NDArray[np.int64], None]:
        """Window i, and no targets of its own: in text each token is the target of the one before."""
        return self.window(i, seq_len), None

    def excerpt(self, tokens: int, seq_len: int) -> NDArray[np.int64]:
        """The first `tokens` tokens, or all where there are fewer, as one row, int64 [1, tokens]; `seq_len` cuts nothing."""
        return self.window(0, min(tokens, self.n_tokens))[None]

    def tokens(self, seq_len: int) -> int:
        """Tokens in the split, whatever `seq_len`."""
        return self.n_tokens

    def targets(self, windows: int, seq_len: int) -> int:
        """How many targets the first `windows` windows have."""
        return min(windows, self.windows(seq_len)) * (seq_len - 1)

    def counts(self, entries: int) -> NDArray[np.int64]:
        """How often each of `entries` ids occurs, int64 [entries]; reads everything once."""
        total = np.zeros(entries, dtype=np.int64)
        for part in self._parts:
            total += np.bincount(read_tokens(self._folder / part["file"]), minlength=entries)
        return total

    def target_entropy(self, windows: int, seq_len: int) -> float:
        """Entropy in nats of the targets of the first `windows` windows: what the held-out loss is taken on."""
        rows = [self.window(index, seq_len)[1:] for index in range(min(windows, self.windows(seq_len)))]
        counts = np.unique(np.concatenate(rows), return_counts=True)[1].astype(np.float64)
        share = counts / counts.sum()
        return float(-(share * np.log(share)).sum())

    def _shard(self, number: int) -> NDArray[Any]:
        if number not in self._mapped:
            self._mapped[number] = read_tokens(self._folder / self._parts[number]["file"])
        return self._mapped[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}
