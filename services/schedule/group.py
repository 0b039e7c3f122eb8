"""The train backend: a Ray Train worker group per trial, for long trials and several nodes.

Ray Train brings health checks, restarts of the whole group and elastic placement; its own checkpoints are not used (its
snapshot is written in place and a cut one blocks a run for good), and nothing is reported per step (each report costs a poll).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from services.study.fence import Fenced
from services.train.environment import prepare_process
from services.train.job import TrialFailed, TrialJob, World
from services.train.notice import NODE, Preempted

COLLECTIVE_TIMEOUT_S = 1800


def _worker_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank of the group."""
    job = TrialJob(**config["job"])
    resources = job.rank_resources
    prepare_process(resources.threads, resources.gpus)
    os.environ[NODE] = ray.get_runtime_context().get_node_id()
    from services.train import engine, loop

    context = train.get_context()
    # Ray Train shows every worker all GPUs of its node (NCCL wants that), so the device is not always the first
    device = str(get_device()) if resources.gpus else "cpu"
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=device)
    engine.join(world)
    try:
        return {"result": loop.train_trial(job, world)}
    except Preempted as notice:
        return {"preempted": str(notice)}
    # a refusal is raised: where one rank alone has it, the others wait for that rank, and only an error ends them


def train_in_group(job: TrialJob, cpus: float) -> dict[str, Any]:
    """Trains `job` in a new Train group: rank 0's answer, or what a rank refused. Raises what ended a worker otherwise."""
    resources = job.rank_resources
    per_worker = {"CPU": cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    scratch = tempfile.mkdtemp(prefix="decay-train-")  # Ray Train's own state: disposable
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config={"job": job.to_dict()},
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=per_worker
        ),
        run_config=train.RunConfig(
            name=f"{job.trial}-{time.time_ns()}",
            storage_path=scratch,
            failure_config=train.FailureConfig(max_failures=0),
        ),
    )
    try:
        answer: dict[str, Any] = trainer.fit().return_value
        return answer
    except train.WorkerGroupError as error:
        for said in error.worker_failures.values():
            for kind, word in ((TrialFailed, "failed"), (Fenced, "fenced")):
                if isinstance(_unwrapped(said), kind):
                    return {word: str(_unwrapped(said))}
        dead = [said for said in error.worker_failures.values() if isinstance(said, ray.exceptions.RayActorError)]
        raise next(iter([*dead, *error.worker_failures.values()]), error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unwrapped(error: Exception) -> BaseException:
    """What the worker itself raised, below Ray's wrappings."""
    inner: BaseException = error
    while True:
        below = getattr(inner, "cause", None) or inner.__cause__ or getattr(inner, "_base_exc", None)
        if below is None or below is inner:
            return inner
        inner = below
