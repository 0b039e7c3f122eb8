"""The ledger: the only truth about what a study has done.

One event is one small file, written atomically under a name that never repeats, so that several processes append without
a lock and a killed writer leaves nothing. Tune's and MLflow's state are caches of what stands here (ray.md P1-P5 say why).
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from services.study.fence import Fence
from services.study.sealed import seal, unseal
from services.study.secrets import without_password
from services.study.storage import Storage, StorageError

Kind = Literal[
    "run", "attempt", "died", "preempted", "finished", "failed", "tracked", "quarantined", "released", "drift", "reopened"
]  # fmt: skip
FOLDER = "ledger"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened: `kind`, the trial it concerns ("" for the study), a time and details."""

    kind: Kind
    trial: str
    time_ns: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """What the ledger says of one trial: its state, how often it was started, why it failed, which MLflow has all of it.

    Of `attempts`, `preemptions` ended on notice and `deaths` by a worker's death; the rest ended with their driver or node.
    """

    state: Literal["waiting", "started", "failed", "quarantined", "finished"]
    attempts: int = 0
    reason: str = ""
    tracked: bool = False
    tracked_in: str = ""
    preemptions: int = 0
    deaths: int = 0
    result_sha256: str = ""
    steps_sha256: str = ""


class Ledger:
    """Events of one study under `<study>/ledger/`. A writer that may be replaced gives its `fence`."""

    def __init__(self, storage: Storage, fence: Fence | None = None) -> None:
        self._storage = storage
        self._fence = fence
        self._seen: dict[str, Event] = {}

    def append(self, kind: Kind, trial: str = "", **details: Any) -> Event:
        """Writes one event; it is on the disk when this returns. Raises Fenced."""
        event = Event(kind=kind, trial=trial, time_ns=time.time_ns(), details=_masked(details))
        name = f"{FOLDER}/{event.time_ns:020d}-{uuid.uuid4().hex[:8]}.json"
        body = {"kind": kind, "trial": trial, "time_ns": event.time_ns, "details": event.details}
        with self._fence.held() if self._fence else contextlib.nullcontext():
            self._storage.write(name, seal(body))
        return event

    def events(self) -> list[Event]:
        """All events, oldest first. Raises StorageError naming a file that is not an event (cut or edited)."""
        for name in self._storage.list(FOLDER):
            if name in self._seen:
                continue
            raw = self._storage.read(f"{FOLDER}/{name}")
            try:
                self._seen[name] = _parse(raw or b"")
            except (ValueError, TypeError) as error:
                raise StorageError(
                    f"ledger event {self._storage.root}/{FOLDER}/{name} is damaged ({error}); "
                    "move it away to run its trial again"
                ) from error
        return [self._seen[name] for name in sorted(self._seen)]

    def states(self, trials: Iterable[str]) -> dict[str, TrialState]:
        """The state of each of `trials`. A finished trial stays finished whatever comes after it but its being reopened."""
        states = {trial: TrialState(state="waiting") for trial in trials}
        for event in self.events():
            old = states.get(event.trial)
            if old is None:
                continue
            states[event.trial] = _next_state(old, event)
        return states


def _masked(value: Any) -> Any:
    """`value` with no password in any text: reasons quote the errors of whatever failed."""
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return without_password(value) if isinstance(value, str) else value


def _parse(raw: bytes) -> Event:
    event = Event(**unseal(raw))
    if event.kind not in get_args(Kind):
        raise ValueError(f"no such kind: {event.kind!r}")
    if not (isinstance(event.trial, str) and isinstance(event.time_ns, int) and isinstance(event.details, dict)):
        raise TypeError("a field of another type")
    return event


def _next_state(old: TrialState, event: Event) -> TrialState:
    counted = replace(
        old,
        attempts=old.attempts + (event.kind == "attempt"),
        preemptions=old.preemptions + (event.kind == "preempted"),
        deaths=old.deaths + (event.kind == "died"),
    )
    if event.kind == "reopened":  # what it had is gone; what comes next is noted anew
        return replace(counted, state="started", tracked=False, tracked_in="", result_sha256="", steps_sha256="")
    if event.kind == "tracked":
        counted = replace(counted, tracked=True, tracked_in=str(event.details.get("uri", "")))
    if event.kind == "finished":
        result, steps = (str(event.details.get(key, "")) for key in ("result_sha256", "steps_sha256"))
        counted = replace(counted, result_sha256=result, steps_sha256=steps)
    if old.state == "finished" or event.kind in ("finished", "tracked"):
        return replace(counted, state="finished", reason="")
    if event.kind in ("failed", "quarantined"):
        return replace(counted, state=event.kind, reason=str(event.details.get("reason", "")))
    return replace(counted, state="started", reason="")
