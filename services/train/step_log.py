"""The step log: one JSON line per optimizer step, the only source of what MLflow shows and what a person reads while waiting.

Written by rank 0 to the trial's storage; the driver reads it from there and is the only one that talks to MLflow. It is part
of every checkpoint, so that after a kill the log is cut back to the checkpoint and grows again with the same lines: a step
never appears twice. On an object store, which cannot append, the whole file is put again at every flush.
"""

from __future__ import annotations

import json
import os
from typing import Any

from services.study.fence import Fence
from services.study.storage import Storage, canonical_json

NAME = "steps.jsonl"


class StepLog:
    """Lines of `{"step": n, metric: value, ...}`, steps counted from 1 and strictly growing."""

    def __init__(self, storage: Storage, fence: Fence, kept: bytes = b"") -> None:
        """Starts the log with `kept`, the lines of the checkpoint that is resumed from; anything after them is dropped."""
        self._storage = storage
        self._fence = fence
        self._content = bytearray(kept)
        self._path = storage.local_path / NAME if storage.local_path else None
        with fence.held():
            storage.write(NAME, bytes(kept))

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds lines; they are with the operating system when this returns, and on the disk at the next checkpoint.

        Raises Fenced, as the constructor does.
        """
        lines = b"".join(canonical_json(record).encode() + b"\n" for record in records)
        self._content += lines
        with self._fence.held():
            if self._path is None:
                self._storage.write(NAME, bytes(self._content))
                return
            with open(self._path, "ab", buffering=0) as stream:
                stream.write(lines)

    def content(self) -> bytes:
        """All lines, for a checkpoint."""
        return bytes(self._content)

    def flush_to_disk(self) -> None:
        """Survives a power cut after this."""
        if self._path is not None:
            with open(self._path, "rb") as stream:
                os.fsync(stream.fileno())


def parse(data: bytes) -> list[dict[str, Any]]:
    """The whole lines of a log; a last line still being written is left out."""
    whole = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]
