"""The lease: one driver per study, and a dead driver does not hold it for ever.

The holder renews a small file; whoever finds it decides: same host and the process is gone, or not renewed for
`EXPIRY_S`: dead, taken over. Clocks of two hosts may be hours apart, so a time in the file is believed only where it says that
the holder lives; otherwise the taker watches for EXPIRY_S of its own whether the file is renewed. Surprising: deciding and
taking happen under an operating system lock on a local file system; an object store has none, so there the taker writes, waits
and looks whether its own token is still the one that stands.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from services.study.fence import next_driver
from services.study.storage import Storage, canonical_json

log = logging.getLogger(__name__)
EXPIRY_S = 60.0
RENEW_S = 10.0
SETTLE_S = 1.0
SKEW_S = 86_400.0  # clocks of two hosts differ by less; a time further off is no living driver's
WATCH_S = 1.0
LOCK_S = 30.0
NAME = "lease.json"


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds since 1970, seconds that never jump, and a wait; a test has its own."""

    wall: Callable[[], float] = time.time
    steady: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


SYSTEM = Clock()


class LeaseHeld(ValueError):
    """Another driver works on this study."""


class Lease:
    """Taken by `take`, kept by calling `renew` at least every RENEW_S, given back by `release`."""

    def __init__(self, storage: Storage, token: str, clock: Clock) -> None:
        self.driver = 0  # this driver's number, see fence.py
        self._clock = clock
        self._storage = storage
        self._token = token
        self._renewed = -math.inf

    def renew(self) -> None:
        """Says that this driver lives; cheap to call often. Raises LeaseHeld when somebody else took over."""
        if self._clock.steady() - self._renewed < RENEW_S:
            return
        with _critical_section(self._storage):
            held = _read(self._storage)
            if held is None or held.get("token") != self._token:
                raise LeaseHeld("this driver was taken for dead and another took over the study; stopping")
            self._write()

    def release(self) -> None:
        """Gives the lease back, unless it is another driver's by now."""
        with _critical_section(self._storage):
            held = _read(self._storage)
            if held is not None and held.get("token") == self._token:
                self._storage.delete(NAME)

    def _write(self) -> None:
        process = psutil.Process()
        body = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": process.pid,
            "process_started": process.create_time(),
            "renewed": self._clock.wall(),
        }
        self._storage.write(NAME, canonical_json(body).encode())
        self._renewed = self._clock.steady()


class Heartbeat:
    """Renews a lease in a thread of its own, so that a slow upload never makes a live driver look dead.

    `lost` is set, and `on_loss` called once, when another driver took the study over.
    """

    def __init__(self, lease: Lease, on_loss: Callable[[], None]) -> None:
        self.lost = threading.Event()
        self._lease, self._on_loss = lease, on_loss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(RENEW_S / 4):
            try:
                self._lease.renew()
            except LeaseHeld:
                self.lost.set()
                self._on_loss()
                return
            except Exception as error:  # storage is away for a moment, whatever its client raises: the lease has EXPIRY_S
                log.warning("the lease could not be renewed (%s); trying again", error)


def take(storage: Storage, at_least: int = 0, clock: Clock = SYSTEM) -> Lease:
    """Takes the study's lease and the next driver's number, above `at_least`; whoever had them before is fenced from now on.

    Waits up to EXPIRY_S where only that tells whether a holder on another host lives. Raises LeaseHeld saying who has it, since
    when, and what to do.
    """
    lease = Lease(storage, uuid.uuid4().hex, clock)
    silent = _silent(storage, clock)
    with _critical_section(storage):
        held = _read(storage)
        if held is not None and held != silent and _alive(held, clock) is not False:
            raise LeaseHeld(
                f"study at {storage.root} is being run by process {held.get('pid')} on {held.get('host')} "
                f"(heard of {max(0.0, _age(held, clock)):.0f} s ago); wait for it, or stop it and run again"
            )
        lease._write()
        lease.driver = next_driver(storage, at_least)
    if storage.local_path is None:
        clock.sleep(SETTLE_S)
        after = _read(storage)
        if after is None or after.get("token") != lease._token:
            raise LeaseHeld(f"study at {storage.root} was taken by another driver in the same moment; run again")
    return lease


def _read(storage: Storage) -> dict[str, Any] | None:
    raw = storage.read(NAME)
    if raw is None:
        return None
    try:
        held = json.loads(raw)
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _silent(storage: Storage, clock: Clock) -> dict[str, Any] | None:
    """The lease that nobody renewed while this process watched, where nothing else tells whether its holder lives."""
    held = _read(storage)
    if held is None or _alive(held, clock) is not None:
        return None
    log.warning("watching for %.0f s whether %s on %s still renews its lease", EXPIRY_S, held.get("pid"), held.get("host"))
    end = clock.steady() + EXPIRY_S
    while clock.steady() < end:
        clock.sleep(WATCH_S)
        if _read(storage) != held:
            return None
    return held


def _alive(held: dict[str, Any], clock: Clock) -> bool | None:
    """Whether the process of a lease still lives; None where the clocks of two hosts do not tell."""
    if held.get("host") == socket.gethostname():
        try:
            process = psutil.Process(int(held["pid"]))
            same = abs(process.create_time() - float(held["process_started"])) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, KeyError, ValueError, TypeError, OverflowError):
            return False
    age = _age(held, clock)
    if not -SKEW_S < age < SKEW_S:
        return False
    return True if 0 <= age < EXPIRY_S else None


def _age(held: dict[str, Any], clock: Clock) -> float:
    """Seconds since the holder was heard of; for ever where the file does not say."""
    renewed = held.get("renewed")
    return clock.wall() - renewed if isinstance(renewed, int | float) else math.inf


@contextlib.contextmanager
def _critical_section(storage: Storage) -> Iterator[None]:
    if storage.local_path is None:
        yield
        return
    folder: Path = storage.local_path
    os.makedirs(folder, exist_ok=True)
    try:
        with FileLock(folder / ".lease.lock", timeout=LOCK_S):
            yield
    except Timeout as error:
        raise LeaseHeld(
            f"{folder}/.lease.lock has been held for {LOCK_S:.0f} s; another driver is starting or hangs: stop it, or run again"
        ) from error
