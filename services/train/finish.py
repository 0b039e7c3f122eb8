"""What comes after the last step, in this order and each exactly once: held-out loss, decay profile, weights, result.

Each part writes under a fixed name and depends on the final weights alone, so a kill in between costs nothing: the resumed
attempt starts from the last checkpoint, finds no steps left and does them again with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as to_safetensors

from decay_core.model import state_size
from services.study import faults
from services.study.mechanism import mechanism_code
from services.study.result import TrialResult
from services.train.environment import device_name
from services.train.step_log import parse
from services.train.telemetry import mend_histograms, merge_histograms

if TYPE_CHECKING:
    from services.train.loop import Trainer

LAST_LOSSES = 100


def finish(trainer: Trainer) -> dict[str, Any]:
    """Profile, export and result of a trained trial. Collective; rank 0 writes and returns the result."""
    faults.point("finish.weights", rank=trainer.world.rank)
    profile = trainer.profile()
    weights = {name: value for name, value in trainer.engine.weights(keep=trainer.world.leads)}
    if trainer.log is None or trainer.fence is None:
        return {}
    with trainer.fence.held():
        digest = _export(trainer, weights)
    job, recipe, progress = trainer.job, trainer.recipe, trainer.progress
    losses = [record["train/loss"] for record in parse(trainer.log.content())]
    tokens = recipe.steps * recipe.batch_size * recipe.seq_len
    result = TrialResult(
        trial_id=job.trial,
        name=job.name,
        method=job.method or job.model_config.point.name,
        point=job.model_config.point.to_dict(),
        size=job.model_config.size.name,
        seed=job.seed,
        parameters=sum(value.numel() for value in weights.values()),
        steps=recipe.steps,
        tokens=tokens,
        held_out_loss=progress.held_out_loss,
        train_loss_last_100=sum(losses[-LAST_LOSSES:]) / len(losses[-LAST_LOSSES:]),
        unigram_entropy=trainer.cache.held_out.target_entropy(recipe.eval_sequences, recipe.seq_len),
        vocab_size=job.model_config.vocab_size,
        tokens_per_second=tokens / progress.train_seconds,
        wall_s=progress.train_seconds,
        decay_profile=profile,
        initial_decay_profile=progress.initial_profile,
        weights_sha256=digest,
        order_hash=progress.order_hash,
        world_size=progress.world_sizes[-1],
        world_sizes=tuple(progress.world_sizes),
        zero_stage=job.rank_resources.zero_stage,
        mlflow_run_id=None,
        held_out_accuracy=progress.held_out_accuracy,
        held_out_sequence_accuracy=progress.held_out_sequence_accuracy,
        state_size=state_size(job.model_config, recipe.seq_len),
        device=device_name(trainer.world.device),
        varied=job.varied,
        mechanism=mechanism_code(job.model_config.point),
        kernels=tuple(trainer.kernels()),
    )
    faults.point("finish.result")
    with trainer.fence.held():
        mend_histograms(trainer.storage, trainer.histograms)
        trainer.storage.write("histograms.parquet", merge_histograms(trainer.histograms))
        trainer.storage.write("result.json", result.to_json().encode())
    faults.point("finish.done")
    values: dict[str, Any] = json.loads(result.to_json())
    return values


def _export(trainer: Trainer, weights: dict[str, torch.Tensor]) -> str:
    """Writes `model/model.safetensors` and its config; returns the SHA-256 of the file."""
    data = to_safetensors({name: value.contiguous() for name, value in weights.items()})
    trainer.storage.write("model/model.safetensors", data)
    config = json.dumps(trainer.job.config, indent=1, sort_keys=True)
    trainer.storage.write("model/config.json", config.encode())
    return hashlib.sha256(data).hexdigest()
