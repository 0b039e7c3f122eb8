"""Frees checkpoints: those of finished trials first, then the oldest ones until a quota is met. Results and weights stay.

A trial that is not finished keeps its newest complete checkpoint whatever the quota: removing it would throw away work that
`decay run` would have to do again. What a killed writer left is not complete, though it may be newer.
"""

from __future__ import annotations

import math
import re

from services.study.file import StudyError
from services.study.lease import take
from services.study.ledger import Ledger
from services.study.manifest import read_manifest
from services.study.storage import Storage

UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9,
         "TB": 10**12}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of "20GiB", "500 MB" or "1048576". Raises StudyError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = float(match[1]) * UNITS.get(match[2].upper(), math.nan) if match else math.nan
    if not math.isfinite(size):
        raise StudyError(f"quota {text!r} is no size; write one such as 20GiB")
    return int(size)


def clean_checkpoints(storage: Storage, quota: str | None, dry_run: bool) -> list[str]:
    """Removes (or with `dry_run` names) checkpoints; returns one line each and a total.

    Raises StudyError for a study that never started or a quota that is no size, LeaseHeld while the study runs.
    """
    limit = parse_size(quota) if quota is not None else None
    manifest = read_manifest(storage)
    if manifest is None:
        raise StudyError(f"no study in {storage.root}; nothing to clean")
    lease = take(storage)
    try:
        chosen = _of_finished(storage, manifest.trials)
        if limit is not None:
            chosen += _over_quota(storage, manifest.trials, limit, already=chosen)
        verb = "would free" if dry_run else "freed"
        sizes = {name: storage.size(name) for name in chosen}
        for name in chosen:
            if not dry_run:
                storage.delete(name)
        lines = [f"{verb} {size / 2**20:,.1f} MiB  {name}" for name, size in sizes.items()]
        return [*lines, f"{verb} {sum(sizes.values()) / 2**20:,.1f} MiB in {len(sizes)} checkpoints"]
    finally:
        lease.release()


def _checkpoints(storage: Storage, trial: str) -> list[str]:
    folder = f"trials/{trial}/checkpoints"
    return [f"{folder}/{name}" for name in storage.list(folder) if name.startswith("step_")]


def _of_finished(storage: Storage, trials: dict[str, str]) -> list[str]:
    states = Ledger(storage).states(trials)
    return [name for trial in trials if states[trial].state == "finished" for name in _checkpoints(storage, trial)]


def _over_quota(storage: Storage, trials: dict[str, str], limit: int, already: list[str]) -> list[str]:
    left = {name: storage.size(name) for trial in trials for name in _checkpoints(storage, trial) if name not in already}
    spare = left.keys() - {_newest_complete(storage, trial) for trial in trials}
    total, chosen = sum(left.values()), []
    for name in sorted(spare, key=lambda name: (name.rsplit("/", 1)[-1], name)):
        if total <= limit:
            break
        chosen.append(name)
        total -= left[name]
    return chosen


def _newest_complete(storage: Storage, trial: str) -> str | None:
    whole = [name for name in _checkpoints(storage, trial) if ".tmp" not in name and storage.exists(f"{name}/COMPLETE.json")]
    return max(whole, default=None)
