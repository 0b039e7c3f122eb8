"""Notices that this process will soon be ended: from the driver (SIGTERM), from the cloud (a file), from Ray (a node drain).

Each rank looks at every flush of the loop; the ranks agree, save a checkpoint and leave, so that nothing is lost and nothing
is counted as a failure. Surprising: a cloud's notice file that is older than its deadline and the same time again is taken for
a notice that nobody acted on, or the trial could never go on there.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from services.study.storage import Storage, canonical_json

NOTICE_S = 30.0  # what clouds give between a notice and the end
FILE = "DECAY_NOTICE_FILE"  # where a node's agent puts the cloud's notice; its time of change is when it came
NODE = "DECAY_NODE"  # this worker's node, as the driver names it
STOP = "notice.json"
DRAIN = "draining.json"


class Preempted(Exception):
    """The trial saved its state and left because of a notice; it goes on from there."""


def tell_all(storage: Storage, driver: int) -> None:
    """The driver asks every attempt of its study to save and leave."""
    storage.write(STOP, canonical_json({"driver": driver, "time": time.time()}).encode())


def tell_nodes(storage: Storage, driver: int, nodes: dict[str, int]) -> None:
    """The driver passes on which nodes Ray drains: {node id: deadline in ms since 1970, 0 for none}."""
    storage.write(DRAIN, canonical_json({"driver": driver, "nodes": nodes}).encode())


def due(storage: Storage, driver: int) -> str:
    """Why this process should save and leave now; empty when nobody asked. `storage` is the study's."""
    if _record(storage, STOP, driver):
        return "the driver was told to stop"
    if os.environ.get(NODE, "-") in _record(storage, DRAIN, driver).get("nodes", {}):
        return "Ray drains this node"
    path = os.environ.get(FILE)
    if path and _fresh(Path(path)):
        return f"the cloud's notice in {path}"
    return ""


def _fresh(path: Path) -> bool:
    try:
        return abs(time.time() - path.stat().st_mtime) < 2 * NOTICE_S
    except OSError:
        return False


def _record(storage: Storage, name: str, driver: int) -> dict[str, dict[str, int]]:
    """What the driver of this attempt wrote; nothing of an earlier driver counts."""
    raw = storage.read(name)
    try:
        values = json.loads(raw) if raw else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) and values.get("driver") == driver else {}
