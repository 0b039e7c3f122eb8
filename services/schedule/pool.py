"""The warm backend: worker processes that outlive a trial, for trials shorter than a Train group's start.

A Tune trial actor is reused from trial to trial and keeps its workers in a module global, so imports, CUDA and NCCL start once.
Surprising: when one rank dies the others hang in a collective, so a failed trial kills the whole pool and the retry gets a
new one; and a trial's result must not depend on what ran before it in the process (a test holds that).
"""

from __future__ import annotations

import os
import socket
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from services.study.fence import Fenced
from services.train.environment import device_of, prepare_process
from services.train.job import TrialFailed, TrialJob, World
from services.train.notice import NODE, Preempted

START_TIMEOUT_S = 300.0
CULPRIT_S = 1.0


class Worker:
    """One rank's process. Trains one trial at a time, joining a new process group for each."""

    def __init__(self, rank: int, size: int, threads: int, gpus: float) -> None:
        prepare_process(threads, gpus)
        os.environ[NODE] = ray.get_runtime_context().get_node_id()
        self._world = World(rank=rank, size=size, device=device_of(gpus))
        from services.train import loop  # slow: imports torch and DeepSpeed, once per process

        self._loop = loop

    def address(self) -> tuple[str, int]:
        """This node's address and a free port for the process group's store."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def train(self, job: dict[str, Any], address: tuple[str, int]) -> dict[str, Any]:
        """Trains the job; {"result": ...}, {"failed": reason}, {"preempted": reason} or {"fenced": reason}."""
        from services.train import engine

        world = self._world
        os.environ.update(
            MASTER_ADDR=address[0],
            MASTER_PORT=str(address[1]),
            RANK=str(world.rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(world.size),
            LOCAL_SIZE="1",
        )
        engine.join(world)
        try:
            return {"result": self._loop.train_trial(TrialJob(**job), world)}
        except TrialFailed as failure:
            return {"failed": str(failure)}
        except Preempted as notice:
            return {"preempted": str(notice)}
        except Fenced as replaced:
            return {"fenced": str(replaced)}
        finally:
            engine.leave()


class Pool:
    """The workers of one trial actor, one per bundle of its placement group."""

    def __init__(self, size: int, cpus: float, gpus: float, threads: int) -> None:
        self.shape = (size, cpus, gpus, threads)
        group = ray.util.get_current_placement_group()
        # the trial actor itself takes no bundle, so bundle i belongs to rank i
        strategies = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(size)]
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(Worker)
        self._workers = [
            actor.options(scheduling_strategy=strategies[rank]).remote(rank, size, threads, gpus) for rank in range(size)
        ]

    def train(self, job: TrialJob) -> dict[str, Any]:
        """Trains one job on all ranks; rank 0's answer. Raises ray.exceptions.RayError when a worker died."""
        address = ray.get(self._workers[0].address.remote(), timeout=START_TIMEOUT_S)
        running = [worker.train.remote(job.to_dict(), address) for worker in self._workers]
        waiting = list(running)
        while waiting:  # the first death must not wait for ranks that hang because of it
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                answer = ray.get(done[0])
            except ray.exceptions.RayError as error:
                raise self._culprit(error, waiting) from None
            if "failed" in answer or "fenced" in answer:
                return dict(answer)
        return dict(ray.get(running[0]))

    def _culprit(self, first: Exception, waiting: list[Any]) -> Exception:
        """The death itself where one worker died and another complained first that its peer was gone."""
        ended, _ = ray.wait(waiting, num_returns=len(waiting), timeout=CULPRIT_S) if waiting else ([], [])
        errors: list[Exception] = [first]
        for reference in ended:
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                errors.append(error)
        return next((error for error in errors if isinstance(error, ray.exceptions.RayActorError)), first)

    def kill(self) -> None:
        """Ends every worker at once."""
        for worker in self._workers:
            ray.kill(worker)


_pool: Pool | None = None


def train_in_pool(job: TrialJob, cpus: float) -> dict[str, Any]:
    """Trains `job` in this process's pool, which is made on first use and dropped after any failure."""
    global _pool
    resources = job.rank_resources
    shape = (resources.workers, cpus, resources.gpus, resources.threads)
    if _pool is not None and _pool.shape != shape:
        drop_pool()
    if _pool is None:
        _pool = Pool(resources.workers, cpus, resources.gpus, resources.threads)
    healthy = False
    try:
        answer = _pool.train(job)
        healthy = "result" in answer
        return answer
    finally:
        if not healthy:
            drop_pool()


def drop_pool() -> None:
    """Ends the pool, if there is one."""
    global _pool
    if _pool is not None:
        _pool.kill()
        _pool = None
