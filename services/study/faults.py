"""Fault points: named places in the service where a test lets the real process die, hang or fail, once.

`DECAY_FAULTS` names a JSON file of faults; without it a fault point is one comparison. Each fault says where (`point`, and
what must agree of what the point tells: rank, step, trial), at which visit of a process, what happens (`action`) and how often
in all. Before it acts it writes a record, flushed to the disk, below `<file>.fired/`: the record is the proof that the fault
was real, and its name, which can be made only once, keeps a resumed process from the same fault.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

VARIABLE = "DECAY_FAULTS"
KEYS = {"name", "point", "action", "where", "visit", "times", "seconds"}
# Every point, and what it stands for; a test holds that the code has exactly these.
POINTS = {
    "train.data": "before a step reads its windows",
    "train.forward": "before a forward pass",
    "train.reduce": "after backward, before gradients meet",
    "train.optimizer": "inside the optimizer's step, weights partly new",
    "train.log": "before step lines are written",
    "train.logged": "after they are written",
    "checkpoint.begin": "before anything of a checkpoint is written",
    "checkpoint.write": "this rank's files are written, not digested",
    "checkpoint.commit": "everything is written and digested, not renamed",
    "checkpoint.committed": "renamed, older ones not yet removed",
    "finish.weights": "after the last step, before weights are exported",
    "finish.result": "weights exported, no result yet",
    "finish.done": "the result is written, nobody has been told",
    "driver.runs": "MLflow runs are made, the manifest does not name them",
    "driver.poll": "before the driver carries step logs to MLflow",
    "driver.send": "MLflow took a batch, the driver has not noted it",
    "driver.finished": "the ledger calls a trial finished, MLflow has not its result",
    "driver.tracked": "MLflow has a result, the ledger does not say so",
    "driver.end": "every trial has ended, the study's run has not",
    "storage.write": "before a file is written whole",
}


class _Plan:
    """The faults of this process, read once."""

    def __init__(self, path: Path) -> None:
        self.faults: list[dict[str, Any]] = json.loads(path.read_text())
        for fault in self.faults:
            if fault["point"] not in POINTS or fault["action"] not in _ACTIONS or not fault.keys() <= KEYS:
                raise ValueError(f"{path}: no such fault: {fault}")
        self.fired = path.with_name(f"{path.name}.fired")
        self.fired.mkdir(exist_ok=True)
        self.visits = [0] * len(self.faults)

    def visit(self, point: str, where: dict[str, Any]) -> None:
        for index, fault in enumerate(self.faults):
            wanted = fault.get("where", {})
            if fault["point"] != point or any(where.get(key) != value for key, value in wanted.items()):
                continue
            self.visits[index] += 1
            if self.visits[index] >= fault.get("visit", 1) and self._claim(fault, where):
                _ACTIONS[fault["action"]](fault)

    def _claim(self, fault: dict[str, Any], where: dict[str, Any]) -> bool:
        """Writes the next free record of this fault; False when all of its times are used up."""
        body = {"name": fault["name"], "point": fault["point"], "phase": POINTS[fault["point"]], "action": fault["action"],
                "where": where, "pid": os.getpid(), "node": os.environ.get("DECAY_NODE"), "time": time.time()}  # fmt: skip
        for number in range(fault.get("times", 1)):
            try:
                fd = os.open(self.fired / f"{fault['name']}.{number}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                continue
            with os.fdopen(fd, "w") as stream:
                json.dump(body, stream, default=str)
                stream.flush()
                os.fsync(stream.fileno())
            return True
        return False


def _kill(fault: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_parent(fault: dict[str, Any]) -> None:
    """In a Ray worker the parent is its raylet: the node is lost, and its workers end with it."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60.0)


def _stop(fault: dict[str, Any]) -> None:
    """Stands still until somebody sends SIGCONT: the zombie that wakes after its successor started."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _fail(fault: dict[str, Any]) -> None:
    raise RuntimeError(f"fault {fault['name']} at {fault['point']}")


def _no_space(fault: dict[str, Any]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), fault["name"])


def _io_error(fault: dict[str, Any]) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), fault["name"])


def _out_of_memory(fault: dict[str, Any]) -> None:
    """Takes memory until the allocator of torch refuses, under a limit on this process's address space; then the limit goes."""
    import torch

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, before[1]))
    try:
        kept = [torch.empty(2**26, dtype=torch.uint8) for _ in range(64)]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    raise RuntimeError(f"{len(kept)} pieces of memory were to be had, which should not be")


def _slow(fault: dict[str, Any]) -> None:
    time.sleep(fault.get("seconds", 1.0))


_ACTIONS = {
    "kill": _kill, "kill-parent": _kill_parent, "stop": _stop, "fail": _fail, "no-space": _no_space, "io-error": _io_error,
    "slow": _slow, "out-of-memory": _out_of_memory,
}  # fmt: skip

_plan = _Plan(Path(os.environ[VARIABLE])) if os.environ.get(VARIABLE) else None


def armed() -> bool:
    """Whether this process has faults to run into."""
    return _plan is not None


def point(name: str, /, **where: Any) -> None:
    """A fault point: nothing, unless a test asked for a fault here."""
    if _plan is not None:
        _plan.visit(name, where)
