"""The Ray cluster a study runs on: joined or started here, measured, and refused in one line when it is too small."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import ray

from services.study.file import Resources, StudyError

TEMPORARY = "/runtime_resources/working_dir_files/"


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the cluster has in all, and on how many nodes."""

    cpus: float
    gpus: float
    nodes: int


def connect(address: str | None, dashboard: bool) -> Capacity:
    """Joins the cluster at `address` (or RAY_ADDRESS), else starts one on this machine. Raises StudyError."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    address = address or os.environ.get("RAY_ADDRESS") or None
    options = {"address": address} if address else {"include_dashboard": dashboard}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StudyError(f"Ray cluster {address or 'on this machine'}: {first}; start one with `ray start --head`") from error
    total = ray.cluster_resources()
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return Capacity(cpus=total.get("CPU", 0.0), gpus=total.get("GPU", 0.0), nodes=nodes)


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
    fits = int(capacity.cpus // (resources.cpus_per_worker * resources.workers))
    if resources.gpus_per_worker:
        fits = min(fits, int(capacity.gpus / (resources.gpus_per_worker * resources.workers) + 1e-9))
    return min(fits, resources.max_concurrent_trials or fits)


def check_storage_outlives_job(storage: str) -> None:
    """Refuses a storage folder inside the working directory that Ray unpacks for a job and throws away. Raises StudyError."""
    if TEMPORARY in os.path.abspath(storage) and "://" not in storage:
        raise StudyError(
            f"storage {storage!r} lies in Ray's temporary working directory and would be lost with the job; "
            "give an absolute path on shared storage or a URI with --storage"
        )
