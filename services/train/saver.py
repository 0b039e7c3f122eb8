"""Checkpoints written behind a trial's back: a step waits for the copy in host memory, a thread does the rest, one at a time.

Serialising, digests, fsync and the commit happen in a thread of each rank; the ranks' threads meet in a process group of their
own, so that they never stand in the way of the step's collectives, and the commit waits for all of them. Whatever stops one
rank's thread is known to all and is raised by the next `wait` on every rank: a checkpoint that fails is the trial's failure.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from services.study import faults
from services.study.fence import Fence, Fenced
from services.study.storage import Storage
from services.train import checkpoint
from services.train.engine import Engine
from services.train.job import TrialFailed, World
from services.train.randomness import random_state
from services.train.snapshot import HostMemory, Snapshot
from services.train.step_log import StepLog

log = logging.getLogger(__name__)
LEAVE_S = 120.0  # how long a trial that fails waits for the checkpoint that is being written


class Saver:
    """Saves one trial's checkpoints; collective: every rank has one. `fence` and `step_log` are rank 0's own."""

    def __init__(self, engine: Engine, storage: Storage, world: World, fence: Fence | None, step_log: StepLog | None) -> None:
        self._engine, self._storage, self._world = engine, storage, world
        self.whole: set[str] = set()  # checkpoints that this attempt has checked or written; the others may be damaged
        self._fence, self._log = fence, step_log
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in flight has failed on this rank, without waiting for it; `wait` raises why."""
        return self._error is not None

    def save(self, position: checkpoint.Position, files: dict[str, bytes]) -> None:
        """Copies the state and begins to write it; first waits for the checkpoint before. `files` are rank 0's own. Collective.

        Raises as `wait` does, for the checkpoint before.
        """
        self.wait()
        faults.point("checkpoint.begin", rank=self._world.rank, step=position.step)
        states, copies = self._engine.states(checkpoint.TAG)
        states[f"random_rank{self._world.rank}.pt"] = random_state()
        snapshot = Snapshot(states, copies, self._memory)
        work = (snapshot, position, files)
        self._thread = threading.Thread(target=self._run, args=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last checkpoint is committed.

        Raises, on every rank, what stopped it: Fenced when the attempt was replaced, OSError where it cannot be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Lets the checkpoint in flight end when the trial ends by an error of its own; not for ever, and raises nothing."""
        if self._thread is not None:
            self._thread.join(LEAVE_S)
            if self._thread.is_alive():
                log.error("a checkpoint has been in writing for %.0f s after its trial's end; it is left behind", LEAVE_S)
        if self._error is not None:
            log.warning("the last checkpoint was not committed (%s)", self._error)

    def _run(self, snapshot: Snapshot, position: checkpoint.Position, files: dict[str, bytes]) -> None:
        try:
            self._write(snapshot, position, files)
        except BaseException as error:
            self._error = error

    def _write(self, snapshot: Snapshot, position: checkpoint.Position, files: dict[str, bytes]) -> None:
        name = checkpoint.folder_name(position.step)
        scratch: Path | None = None
        try:
            scratch = self._together(lambda: self._make_scratch(name))[0]
            assert scratch is not None
            digests = self._together(lambda: self._write_own(snapshot, scratch, position.step, files))
            self._together(lambda: self._commit(name, scratch, position, digests))
        except BaseException:
            if self._world.leads and scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _make_scratch(self, name: str) -> Path | None:
        if not self._world.leads:
            return None
        scratch = checkpoint.scratch_folder(self._storage, name)
        os.makedirs(scratch)
        return scratch

    def _write_own(self, snapshot: Snapshot, scratch: Path, step: int, files: dict[str, bytes]) -> dict[str, tuple[int, str]]:
        """This rank's files, on the disk: {path below the folder: (size, SHA-256)}."""
        paths = snapshot.write(scratch)
        for file, data in files.items():
            (scratch / file).parent.mkdir(exist_ok=True)
            (scratch / file).write_bytes(data)
            paths.append(scratch / file)
        faults.point("checkpoint.write", rank=self._world.rank, step=step)
        return checkpoint.digested(paths, scratch)

    def _commit(
        self, name: str, scratch: Path, position: checkpoint.Position, digests: list[dict[str, tuple[int, str]]]
    ) -> None:
        if self._fence is None or self._log is None:
            return
        self._log.flush_to_disk()
        every = {key: value for part in digests for key, value in part.items()}
        there = {path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file()}
        if every.keys() != there:  # a network file system does not show what another rank wrote
            raise OSError(f"{scratch}: the ranks wrote {len(every)} files, there are {len(there)}")
        checkpoint.commit(self._storage, name, scratch, position, every, self._fence)
        faults.point("checkpoint.committed", step=position.step)
        self.whole.add(name)
        checkpoint.retain(self._storage, self.whole)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gave on each rank, once it is done on all; raises on every rank what it raised on one."""
        value, error = None, None
        try:
            value = work()
        except Exception as raised:
            error = raised
        parts: list[Any] = [(value, error)]
        if self._group is not None:
            parts = [None] * self._world.size
            dist.all_gather_object(parts, (value, _portable(error)), group=self._group)
        for other in (error, *(said for _, said in parts)):
            if other is not None:
                raise other
        return [given for given, _ in parts]


def _portable(error: Exception | None) -> Exception | None:
    """The error as another process can have it: others' classes may hold what cannot travel, or be made in other ways."""
    if error is None or type(error) in (RuntimeError, ValueError, TrialFailed, Fenced):
        return error
    if isinstance(error, OSError):
        return OSError(str(error)) if error.errno is None else OSError(error.errno, error.strerror, error.filename)
    return RuntimeError(f"{type(error).__name__}: {error}")
