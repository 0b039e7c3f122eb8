"""What a study trains on, whichever way it comes: text in a token cache, or a recall task written by its generator.

The training loop sees only this: numbered windows of a split, each a pure function of its number, and a digest that stands for
all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from services.data.recall import RecallData
from services.data.token_cache import DataSpec, open_cache, prepare
from services.study.recall_task import Task, read_task


class Windows(Protocol):
    """One split."""

    def windows(self, seq_len: int) -> int:
        """How many windows of `seq_len` tokens there are. Raises ValueError where that length makes no sense."""

    def example(self, i: int, seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Tokens of window i and its targets (-100 does not count), both [seq_len]; None: each token's target is the next."""

    def excerpt(self, tokens: int, seq_len: int) -> NDArray[np.int64]:
        """About the first `tokens` tokens as rows, for statistics over positions and channels."""

    def tokens(self, seq_len: int) -> int:
        """Tokens in the split."""

    def targets(self, windows: int, seq_len: int) -> int:
        """How many targets the first `windows` windows have."""

    def target_entropy(self, windows: int, seq_len: int) -> float:
        """Entropy in nats of those targets: the loss of a model that knows only how frequent each is."""


class Corpus(Protocol):
    """Both splits. `path` names the data on this node, `manifest` has at least `source` and `spec`."""

    path: Path
    manifest: dict[str, Any]

    @property
    def train(self) -> Windows:
        """What is trained on."""

    @property
    def held_out(self) -> Windows:
        """What is not."""

    @property
    def digest(self) -> str:
        """sha256 hex over all that decides what a model sees."""

    @property
    def vocab_size(self) -> int:
        """Entries, without padding."""


def spec_of(keys: dict[str, Any]) -> DataSpec | Task:
    """The data that a study file's keys (without `workers`) or a manifest's `spec` name."""
    task = read_task(keys["source"], keys.get("recall"))
    return DataSpec(**keys) if task is None else task


def prepare_corpus(spec: DataSpec | Task, root: Path, *, workers: int = 1, progress: bool = True) -> Corpus:
    """Makes or opens the data below `root`; a task makes no files. Raises what `prepare` raises, or TaskError."""
    if isinstance(spec, Task):
        return RecallData(spec, root)
    return prepare(spec, root, workers=workers, progress=progress)


def open_corpus(path: Path, keys: dict[str, Any]) -> Corpus:
    """The data at `path`, or the same made again from `keys` where it cannot be reached."""
    spec = spec_of(keys)
    if isinstance(spec, DataSpec) and (path / "manifest.json").exists():
        return open_cache(path)
    return prepare_corpus(spec, path.parent, progress=False)
