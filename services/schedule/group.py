"""The train backend: a Ray Train worker group per trial, for long trials and several nodes.

Ray Train brings health checks, restarts of the whole group and elastic placement; its own checkpoints are not used (its
snapshot is written in place and a cut one blocks a run for good), and nothing is reported per step (each report costs a poll).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from typing import Any

from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from services.train.environment import prepare_process
from services.train.job import TrialFailed, TrialJob, World

COLLECTIVE_TIMEOUT_S = 1800


def _worker_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank of the group."""
    job = TrialJob(**config["job"])
    resources = job.rank_resources
    prepare_process(resources.threads, resources.gpus)
    from services.train import engine, loop

    context = train.get_context()
    # Ray Train shows every worker all GPUs of its node (NCCL wants that), so the device is not always the first
    device = str(get_device()) if resources.gpus else "cpu"
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=device)
    engine.join(world)
    try:
        return {"result": loop.train_trial(job, world)}
    except TrialFailed as failure:
        return {"failed": str(failure)}


def train_in_group(job: TrialJob, cpus: float, max_failures: int) -> dict[str, Any]:
    """Trains `job` in a new Train group and returns rank 0's answer. Raises Ray Train's error after `max_failures` restarts."""
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
            failure_config=train.FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        answer: dict[str, Any] = trainer.fit().return_value
        return answer
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
