"""Fences: whoever was replaced cannot write any more, even if it only slept and wakes up later.

A study counts its drivers (`fence.json`, raised by one each time the lease is taken), a trial its attempts
(`trials/<id>/fence.json`). A writer carries the numbers that it was given; before it commits anything it looks whether they
still stand, and on a file system it holds a lock from that look until the commit, so that no successor comes in between.
Surprising: a stopped process keeps its locks. A successor that waited LOCK_S for a trial's lock replaces the lock file; what
the sleeper had looked at before can then still be committed once, with the same bytes as any other attempt would write.
On an object store there are no locks, and the look alone protects.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from filelock import FileLock, Timeout

from services.study.sealed import seal, unseal
from services.study.storage import Storage, StorageError

log = logging.getLogger(__name__)
NAME = "fence.json"
LOCK = ".fence.lock"
LOCK_S = 10.0


class Fenced(RuntimeError):
    """This writer was replaced by another one: it stops and writes nothing more."""


@dataclass(frozen=True, kw_only=True)
class Fence:
    """What a writer was given: the driver's number, and for an attempt its trial and token. `storage` is the study's."""

    storage: Storage
    driver: int
    trial: str = ""
    token: str = ""

    def check(self) -> None:
        """Raises Fenced when another driver or another attempt has taken over, or nobody can tell because the file is lost."""
        now = driver_number(self.storage)
        if self.driver and not now:
            lost = f"{self.storage.root}/{NAME} is lost or damaged"
            raise Fenced(f"{lost}: driver {self.driver} may have been replaced; stopping, run again")
        if now > self.driver:
            raise Fenced(f"driver {self.driver} was replaced by driver {now}; stopping")
        if self.trial and _read(self.storage, self._file).get("token") != self.token:
            raise Fenced(f"this attempt of trial {self.trial} was replaced by another; stopping")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Checks, and keeps successors of a trial's attempt out while what is inside is done. Raises Fenced."""
        with _locked(self.storage, f"trials/{self.trial}" if self.trial else ""):
            self.check()
            yield

    @property
    def _file(self) -> str:
        return f"trials/{self.trial}/{NAME}"


def driver_number(storage: Storage) -> int:
    """The number of the study's latest driver; 0 before the first, and where the file is damaged."""
    number = _read(storage, NAME).get("driver", 0)
    return number if isinstance(number, int) else 0


def next_driver(storage: Storage, at_least: int) -> int:
    """Takes the next driver's number, above `at_least` (what the ledger knows of, should the file be lost)."""
    with _locked(storage, ""):
        number = max(driver_number(storage), at_least) + 1
        storage.write(NAME, seal({"driver": number}))
    return number


def claim(storage: Storage, driver: int, trial: str) -> Fence:
    """The fence of a new attempt of `trial` under driver number `driver`; older attempts are fenced from now on.

    Raises Fenced where that driver was replaced itself.
    """
    fence = Fence(storage=storage, driver=driver, trial=trial, token=uuid.uuid4().hex)
    with _locked(storage, f"trials/{trial}"):
        Fence(storage=storage, driver=driver).check()
        storage.write(fence._file, seal({"driver": driver, "token": fence.token}))
    return fence


def _read(storage: Storage, name: str) -> dict[str, object]:
    raw = storage.read(name)
    try:
        return unseal(raw) if raw else {}
    except (ValueError, TypeError):
        log.warning("%s/%s is damaged; the next attempt writes it anew", storage.root, name)
        return {}


@contextlib.contextmanager
def _locked(storage: Storage, folder: str) -> Iterator[None]:
    if storage.local_path is None:
        yield
        return
    path = storage.local_path / folder / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=LOCK_S)
    try:
        lock.acquire()
    except Timeout:
        log.warning("%s has been held for %.0f s by a process that stands still; replacing it", path, LOCK_S)
        path.unlink(missing_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise StorageError(
                f"{path} has been held for twice {LOCK_S:.0f} s; end the process that holds it (fuser {path}), or run again"
            ) from error
    try:
        yield
    finally:
        lock.release()
