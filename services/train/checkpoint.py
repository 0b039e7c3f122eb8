"""Checkpoints that are whole or do not exist: written under a new name, digested, then committed by one rename.

A checkpoint is a folder `step_XXXXXXXX` with DeepSpeed's files, each rank's generators, the step log so far and COMPLETE.json,
which names every file with its size and SHA-256 and is written last. A reader takes the newest folder whose COMPLETE holds;
a folder that does not hold is set aside with a warning, never used and never silently replaced by a fresh start.
saver.py writes the files, behind the back of the steps that follow; here is what a checkpoint is, its commit and its way back.
On an object store there is no rename: the files go up first and COMPLETE.json last, which is the commit there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.study import faults
from services.study.fence import Fence
from services.study.sealed import seal, unseal
from services.study.storage import Storage, fsync_folder, write_atomically
from services.train.engine import Engine
from services.train.job import TrialFailed, World
from services.train.randomness import restore_random_state
from services.train.telemetry import FOLDER as HISTOGRAMS
from services.train.telemetry import read_histograms

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
COMPLETE = "COMPLETE.json"
TAG = "deepspeed"
KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where training stands after `step` optimizer steps, and the hash of all sample ids used so far."""

    step: int
    order_hash: str
    world_size: int
    extra: dict[str, Any]


def folder_name(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def newest_valid(storage: Storage) -> tuple[str, dict[str, Any]] | None:
    """The newest checkpoint that holds, as (name, COMPLETE's content); None when there never was one.

    Raises TrialFailed when checkpoints exist and none holds.
    """
    names = _committed(storage)
    for name in reversed(names):
        problem, complete = _inspect(storage, name)
        if not problem:
            return name, complete
        log.warning("checkpoint %s/%s/%s does not hold (%s); set aside", storage.root, FOLDER, name, problem)
    if names:
        raise TrialFailed(
            f"none of the {len(names)} checkpoints in {storage.root}/{FOLDER} holds; restore one, "
            "or delete that folder to train this trial from the start"
        )
    return None


def load(
    engine: Engine, storage: Storage, name: str, complete: dict[str, Any], world: World, elastic: bool = False
) -> Position:
    """Puts a checkpoint back on this rank: weights, optimizer shard, generators. Collective.

    `elastic` allows one of another number of ranks. A rank that the writers had goes on with its generators; the others keep
    those that their seed gave them. Raises TrialFailed.
    """
    position = Position(**complete["position"])
    other = position.world_size != world.size
    if other and not elastic:
        raise TrialFailed(
            f"checkpoint {storage.root}/{FOLDER}/{name} was written by {position.world_size} ranks, this study asks for "
            f"{world.size}; set resources.workers: {position.world_size}, or resources.elastic: true to go on with {world.size}"
        )
    copy: AbstractContextManager[Path] = storage.local_copy(f"{FOLDER}/{name}")
    with copy as folder:
        try:
            if world.rank < position.world_size:
                restore_random_state(torch.load(folder / f"random_rank{world.rank}.pt", weights_only=True))
            if other:
                engine.load_of_others(str(folder), TAG, position.world_size, world.rank)
            else:
                engine.load(str(folder), TAG)
        except pickle.UnpicklingError as error:
            raise TrialFailed(
                f"checkpoint {storage.root}/{FOLDER}/{name} holds more than tensors and was refused (weights_only); "
                "somebody replaced it: delete that folder to go on from the one before"
            ) from error
    return position


def sweep(storage: Storage) -> None:
    """Removes what killed writers left; only rank 0, before training."""
    committed = set(_committed(storage))
    for name in storage.list(FOLDER):
        if name not in committed:
            storage.delete(f"{FOLDER}/{name}")


def _committed(storage: Storage) -> list[str]:
    """Names of committed checkpoints, oldest first. On an object store COMPLETE.json is the commit, on a disk the rename is."""
    names = [name for name in storage.list(FOLDER) if name.startswith("step_") and ".tmp" not in name]
    if storage.local_path is None:
        return [name for name in names if storage.exists(f"{FOLDER}/{name}/{COMPLETE}")]
    return names


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def scratch_folder(storage: Storage, name: str) -> Path:
    """A new folder on the target's own file system (so that the commit is a rename), or a temporary one for an object store."""
    base = storage.local_path / FOLDER if storage.local_path else Path(os.environ.get("TMPDIR", "/tmp"))
    return base / f"{name}.tmp-{uuid.uuid4().hex[:8]}"


def digested(paths: list[Path], folder: Path) -> dict[str, tuple[int, str]]:
    """{path below `folder`: (size, SHA-256)} of files that are flushed to the disk here."""
    found = {}
    for path in paths:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        found[path.relative_to(folder).as_posix()] = (path.stat().st_size, sha256_of(path))
    return found


def commit(
    storage: Storage, name: str, scratch: Path, position: Position, files: dict[str, tuple[int, str]], fence: Fence
) -> None:
    """Makes the files in `scratch`, digested as `files` says, the checkpoint `name`. Raises Fenced."""
    body = {"position": position.__dict__, "files": {key: list(value) for key, value in sorted(files.items())}}
    text = seal(body)
    if storage.local_path is None:
        try:
            fence.check()
            storage.put_folder(scratch, f"{FOLDER}/{name}")
            fence.check()
            storage.write(f"{FOLDER}/{name}/{COMPLETE}", text)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return
    write_atomically(scratch / COMPLETE, text)
    faults.point("checkpoint.commit", step=position.step)
    final = storage.local_path / FOLDER / name
    damaged = scratch.with_name(f"{scratch.name}-replaced")
    with fence.held():
        if final.exists():  # an older attempt got this far; equal bits are no reason to trust it over what was just checked
            os.rename(final, damaged)
        os.rename(scratch, final)
        fsync_folder(final.parent)
    shutil.rmtree(damaged, ignore_errors=True)  # not under the fence's lock, for which the steps may be waiting


def _inspect(storage: Storage, name: str) -> tuple[str, dict[str, Any]]:
    """Why a checkpoint does not hold ("" when it does), and what its COMPLETE says."""
    raw = storage.read(f"{FOLDER}/{name}/{COMPLETE}")
    if raw is None:
        return f"{COMPLETE} is missing", {}
    try:
        complete = unseal(raw)
        with storage.local_copy(f"{FOLDER}/{name}") as folder:
            for file, (size, digest) in complete["files"].items():
                path = folder / file
                if not path.is_file() or path.stat().st_size != size:
                    return f"{file} is missing or cut", {}
                if sha256_of(path) != digest:
                    return f"{file} has other bytes than were written", {}
        lost = _lost_histogram(storage, complete)
        if lost:
            return f"{lost} of before it is missing or damaged", {}
    except (ValueError, KeyError, TypeError) as error:
        return f"{COMPLETE} is damaged ({type(error).__name__})", {}
    return "", complete


def _lost_histogram(storage: Storage, complete: dict[str, Any]) -> str:
    """The first histogram that a checkpoint of an earlier release goes on from and that is lost; those of today hold copies."""
    digests = Position(**complete["position"]).extra.get("histograms", {})
    alone = {name: digest for name, digest in digests.items() if f"{HISTOGRAMS}/{name}" not in complete["files"]}
    whole = read_histograms(storage, alone)
    return next((f"{HISTOGRAMS}/{name}" for name in alone if name not in whole), "")


def retain(storage: Storage, whole: set[str]) -> None:
    """Keeps the newest KEPT of the checkpoints that are known to be `whole`, and removes all others before the newest.

    A damaged one counts for nothing: with fewer than KEPT that are whole nothing is removed.
    """
    kept = sorted(whole)[-KEPT:]
    if len(kept) == KEPT:
        for name in _committed(storage):
            if name not in kept and name < kept[-1]:
                storage.delete(f"{FOLDER}/{name}")
