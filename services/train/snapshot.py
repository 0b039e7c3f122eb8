"""A copy of training state in host memory: what a step waits for when a checkpoint is due; the rest happens behind its back.

Whole storages are copied, not tensors, so that tensors which share memory still do and a file written from the copy is the file
that would have been written from the original. Buffers are kept from one copy to the next: allocating them takes longer than
filling them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor, nn


class HostMemory:
    """Host buffers for one copy of a state at a time; `copied` overwrites what the last one gave. Pinned where a GPU is."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._taken = 0
        self._storages: dict[int, Any] = {}

    def begin(self) -> None:
        """Starts a new copy; its parts are given to `copied`."""
        self._taken = 0
        self._storages = {}

    def copied(self, state: Any) -> Any:
        """`state` with every tensor in host memory, any other mutable part copied, and sharing kept."""
        tensors = {id(tensor): self._copy_of(tensor) for tensor in _tensors(state)}
        return copy.deepcopy(state, tensors)

    def end(self) -> None:
        """Waits until the copies are whole."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _copy_of(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = self._filled(storage, tensor.device)
        host = torch.empty(0, dtype=tensor.dtype)
        host.set_(self._storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
        host = nn.Parameter(host) if isinstance(tensor, nn.Parameter) else host
        host.__dict__.update(tensor.__dict__)  # DeepSpeed marks its flat groups so, and files keep the marks
        return host.requires_grad_(tensor.requires_grad)

    def _filled(self, storage: Any, device: torch.device) -> Any:
        size = storage.nbytes()
        if self._taken == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[self._taken].numel() != size:
            self._buffers[self._taken] = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        buffer = self._buffers[self._taken]
        self._taken += 1
        buffer.copy_(torch.empty(0, dtype=torch.uint8, device=device).set_(storage), non_blocking=True)
        return buffer.untyped_storage()


class Snapshot:
    """The files of a checkpoint before they are files: this rank's states by their path below the checkpoint's folder."""

    def __init__(self, states: dict[str, Any], copies: dict[str, Path], memory: HostMemory | None = None) -> None:
        """`copies` are files that go along as they are: {path below the folder: where it is now}."""
        memory = memory or HostMemory()
        memory.begin()
        self._states = memory.copied(states)
        self._copies = copies
        memory.end()

    def write(self, folder: Path) -> list[Path]:
        """Writes the files below `folder` and returns their paths."""
        paths = [folder / name for name in (*self._states, *self._copies)]
        for parent in {path.parent for path in paths}:
            parent.mkdir(parents=True, exist_ok=True)
        for name, state in self._states.items():
            torch.save(state, folder / name)
        for name, source in self._copies.items():
            copyfile(source, folder / name)
        return paths


def _tensors(value: Any) -> Iterable[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
