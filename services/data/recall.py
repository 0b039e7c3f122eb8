"""Recall tasks as numbered sequences: example i of a split is a pure function of (the task's keys, split, i, seq_len).

There are no files and no shuffling: the order of samples, resuming and ranks work as on text. A generator that counts (Philox)
is set to the example's number, and only integers and one logarithm are drawn from it, none of NumPy's distributions, whose
streams may change with its version. The digest covers the keys and the first examples, so that a changed generator is noticed.

Held out is decided by content, as it is for text: an example whose hash falls into the first quarter is held out. A split draws
again until an example is its own, so no held-out example is ever trained on, whatever the numbers of examples.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.data.shards import SPLITS
from services.study.recall_task import Induction, Mqar, Needle, Task, TaskError, check_length

FORMAT = 1  # raise it when an example of equal keys changes
NO_TARGET = -100
HELD_OUT_BELOW = 64  # of the 256 values of the hash's first byte
ATTEMPTS = 1000  # the chance that a split with a fair share of the examples misses so often is below 1e-124
DIGESTED, DIGESTED_LENGTH = 8, 64  # examples a split, tokens (more where the task needs more)

Tokens = NDArray[np.int64]


class Draws:
    """Random integers of one example. Call `start` first; equal arguments give equal draws."""

    def __init__(self, key: bytes) -> None:
        self._bits = np.random.Philox(key=np.frombuffer(key, dtype="<u8").astype(np.uint64))
        self._state = self._bits.state

    def start(self, index: int, attempt: int) -> None:
        """Goes to the draws of one attempt at one example; the lowest word of the counter runs while drawing."""
        self._state["state"]["counter"] = np.array([0, attempt, index, 0], dtype=np.uint64)
        self._bits.state = self._state

    def below(self, limit: int, count: int) -> Tokens:
        """`count` integers from 0 to limit − 1 (the remainder's bias, below limit / 2^64, is nothing)."""
        return (self._bits.random_raw(count) % np.uint64(limit)).astype(np.int64)

    def some(self, count: int, n: int) -> Tokens:
        """`count` of 0 … n − 1, none twice, in random order."""
        return _smallest(count, self._bits.random_raw(n))

    def weighted(self, count: int, weights: NDArray[np.float64]) -> Tokens:
        """`count` places drawn without replacement by weight: exponential clocks, the fastest first."""
        uniform = ((self._bits.random_raw(len(weights)) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return _smallest(count, -np.log(uniform) / weights)


def _smallest(count: int, values: NDArray[Any]) -> Tokens:
    """Where the `count` smallest values are, in their order."""
    among = np.argpartition(values, count - 1)[:count] if count < len(values) else np.arange(len(values))
    return among[np.argsort(values[among])]


def _mqar(task: Mqar, draws: Draws, seq_len: int) -> tuple[Tokens, Tokens]:
    """Keys are the first half of the vocabulary, values the second; filler is any token, the answer itself is not shown."""
    half, context = task.vocab_size // 2, 2 * task.pairs
    tokens, targets = _blank(draws.below(task.vocab_size, seq_len))
    keys, values = draws.some(task.pairs, half), half + draws.some(task.pairs, half)
    tokens[0:context:2], tokens[1:context:2] = keys, values
    places = (seq_len - context) // 2
    place = draws.weighted(task.answers, np.arange(1, places + 1, dtype=np.float64) ** (task.power - 1.0))
    asked, at = draws.some(task.answers, task.pairs), context + 2 * place
    tokens[at], targets[at] = keys[asked], values[asked]
    return tokens, targets


def _induction(task: Induction, draws: Draws, seq_len: int) -> tuple[Tokens, Tokens]:
    """Token 0 is the marker; all others are filler and possible answers."""
    tokens, targets = _blank(1 + draws.below(task.vocab_size - 1, seq_len))
    at = int(draws.below(seq_len - 2, 1)[0])
    tokens[at] = tokens[-1] = 0
    targets[-1] = tokens[at + 1]
    return tokens, targets


def _needle(task: Needle, draws: Draws, seq_len: int) -> tuple[Tokens, Tokens]:
    """Keys are the first quarter of the vocabulary, values the second, filler the other half."""
    quarter, context = task.vocab_size // 4, seq_len - task.answers
    tokens, targets = _blank(2 * quarter + draws.below(task.vocab_size - 2 * quarter, seq_len))
    keys, values = draws.some(task.pairs, quarter), quarter + draws.some(task.pairs, quarter)
    # pairs that do not overlap: distinct places in a text where every pair is one token, then one further for each pair before
    at = np.sort(draws.some(task.pairs, context - task.pairs)) + np.arange(task.pairs)
    tokens[at], tokens[at + 1] = keys, values
    asked = draws.some(task.answers, task.pairs)
    tokens[context:], targets[context:] = keys[asked], values[asked]
    return tokens, targets


_GENERATORS: dict[type[Task], Callable[..., tuple[Tokens, Tokens]]] = {Mqar: _mqar, Induction: _induction, Needle: _needle}


def _blank(tokens: Tokens) -> tuple[Tokens, Tokens]:
    return tokens, np.full_like(tokens, NO_TARGET)


class ExampleStream:
    """One split of a task."""

    def __init__(self, task: Task, split: str) -> None:
        self._task, self._split = task, split
        self._count = {"train": task.train_examples, "held_out": task.held_out_examples}[split]
        self._draws: dict[int, Draws] = {}  # by seq_len

    def windows(self, seq_len: int) -> int:
        """How many examples there are. Raises TaskError where `seq_len` does not hold one, or none is to be found."""
        check_length(self._task, seq_len)
        self.example(0, seq_len)
        return self._count

    def example(self, i: int, seq_len: int) -> tuple[Tokens, Tokens]:
        """Tokens and targets of example i, int64 [seq_len]; targets are −100 but where a token is asked for.

        Raises IndexError outside 0 … examples − 1.
        """
        if not 0 <= i < self._count:
            raise IndexError(f"recall task {self._task.name}: example {i} of {self._count} does not exist")
        if seq_len not in self._draws:
            self._draws[seq_len] = Draws(self._key(seq_len))
        draws = self._draws[seq_len]
        for attempt in range(ATTEMPTS):
            draws.start(i, attempt)
            tokens, targets = _GENERATORS[type(self._task)](self._task, draws, seq_len)
            if is_held_out(tokens) == (self._split == "held_out"):
                return tokens, targets
        raise TaskError(
            f"data.source {self._task.name}: no {self._split} example in {ATTEMPTS} draws, there are too few different ones; "
            "raise vocab_size in data.recall or recipe.seq_len"
        )

    def excerpt(self, tokens: int, seq_len: int) -> Tokens:
        """As many of the first examples as `tokens` tokens hold, at least one, int64 [examples, seq_len]."""
        rows = min(self._count, max(1, tokens // seq_len))
        return np.stack([self.example(i, seq_len)[0] for i in range(rows)])

    def tokens(self, seq_len: int) -> int:
        """Tokens in all examples."""
        return self._count * seq_len

    def targets(self, windows: int, seq_len: int) -> int:
        """How many answers the first `windows` examples have."""
        return min(windows, self._count) * self._task.answers

    def target_entropy(self, windows: int, seq_len: int) -> float:
        """Entropy in nats of an answer, of the distribution that it is drawn from and not of those that were drawn."""
        return math.log(self._task.answer_tokens)

    def _key(self, seq_len: int) -> bytes:
        keys = self._task.model_dump(exclude={"train_examples", "held_out_examples"})
        content = json.dumps([FORMAT, self._task.name, keys, self._split, seq_len], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16, person=b"recall-task").digest()


def is_held_out(tokens: Tokens) -> bool:
    """The split rule: it depends on the sequence alone, so equal sequences share a split."""
    return hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=1).digest()[0] < HELD_OUT_BELOW


class RecallData:
    """A task as data of a study. Nothing is written; `path` only names it."""

    def __init__(self, task: Task, root: Path) -> None:
        self.task = task
        self.train, self.held_out = (ExampleStream(task, split) for split in SPLITS)
        self.digest = self._digest()
        self.path = root / f"{task.name}-{self.digest[:8]}"
        self.manifest: dict[str, Any] = {
            "source": {"name": task.name, "description": task.about, "licence": "none: generated"},
            "spec": {"source": task.name, "recall": task.model_dump()},
            "digest": self.digest,
        }

    @property
    def vocab_size(self) -> int:
        """Tokens of the task."""
        return self.task.vocab_size

    def _digest(self) -> str:
        """sha256 hex over the keys and the first examples of both splits."""
        length = max(DIGESTED_LENGTH, self.task.shortest)
        summed = hashlib.sha256(json.dumps([FORMAT, self.task.name, self.task.model_dump()], sort_keys=True).encode())
        for stream, count in ((self.train, self.task.train_examples), (self.held_out, self.task.held_out_examples)):
            for index in range(min(DIGESTED, count)):
                for row in stream.example(index, length):
                    summed.update(row.astype("<i8").tobytes())
        return summed.hexdigest()
