"""The Ray cluster a study runs on: joined or started here, measured, and refused in one line when it is too small."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import ray

from services.study.file import Resources, StudyError

TEMPORARY = "/runtime_resources/working_dir_files/"


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What each node of the cluster has: (CPUs, GPUs)."""

    nodes: tuple[tuple[float, float], ...]

    @property
    def cpus(self) -> float:
        """CPUs in all."""
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs in all."""
        return sum(gpus for _, gpus in self.nodes)

    def workers(self, cpus: float, gpus: float) -> int:
        """How many workers of this shape fit, each on one node."""
        return sum(min(_times(there, cpus), _times(on_board, gpus)) for there, on_board in self.nodes)


def _times(there: float, asked: float) -> int:
    """How often `asked` goes into `there`, forgiving float dust; without bound where nothing is asked."""
    return int(there / asked + 1e-6) if asked else 10**9


def connect(address: str | None, dashboard: bool) -> Capacity:
    """Joins the cluster at `address` (or RAY_ADDRESS), else starts one on this machine. Raises StudyError."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    address = address or os.environ.get("RAY_ADDRESS") or None
    _check_answers(address)
    options = {"address": address} if address else {"include_dashboard": dashboard}
    if not address:
        _lock_own_cluster()
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StudyError(f"Ray cluster {address or 'on this machine'}: {first}; start one with `ray start --head`") from error
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Capacity(nodes=tuple((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes))


def _lock_own_cluster() -> None:
    """Keeps the token of a cluster that starts here to this user: Ray asks for it by default, and makes it readable for all."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
    except FileExistsError:
        path.chmod(0o600)


def _check_answers(address: str | None) -> None:
    """Refuses a host:port that nobody listens on; Ray itself would wait for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit() or "://" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise StudyError(
            f"Ray cluster {address} does not answer ({error}); start one with `ray start --head` or correct --address"
        ) from error


def draining_nodes() -> dict[str, int]:
    """Nodes that Ray was told to drain: {node id: deadline in ms since 1970, 0 for none}."""
    # Ray says it nowhere else; its own Train asks here too
    return dict(ray._private.state.state.get_draining_nodes() or {})


def disconnect() -> None:
    """Leaves the cluster; one that `connect` started ends."""
    ray.shutdown()


def trials_at_once(resources: Resources, capacity: Capacity) -> int:
    """How many trials fit side by side.

    Raises StudyError when not even one does.
    """
    for kind, asked, there, key in (
        ("GPU", resources.gpus_per_worker * resources.workers, capacity.gpus, "gpus_per_worker"),
        ("CPU", resources.cpus_per_worker * resources.workers, capacity.cpus, "cpus_per_worker"),
    ):
        if asked > there:
            raise StudyError(
                f"resources: one trial needs {asked:g} {kind} ({resources.workers} workers), the cluster has {there:g}; "
                f"lower resources.workers or resources.{key}, or add nodes"
            )
    fits = capacity.workers(resources.cpus_per_worker, resources.gpus_per_worker) // resources.workers
    if not fits:
        raise StudyError(
            f"resources: {resources.workers} workers of {resources.cpus_per_worker:g} CPU and "
            f"{resources.gpus_per_worker:g} GPU do not fit on the nodes one by one; ask for less a worker, or add larger nodes"
        )
    return min(fits, resources.max_concurrent_trials or fits)


def check_storage_outlives_job(storage: str) -> None:
    """Refuses a storage folder inside the working directory that Ray unpacks for a job and throws away. Raises StudyError."""
    if TEMPORARY in os.path.abspath(storage) and "://" not in storage:
        raise StudyError(
            f"storage {storage!r} lies in Ray's temporary working directory and would be lost with the job; "
            "give an absolute path on shared storage or a URI with --storage"
        )
