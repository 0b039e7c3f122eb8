"""What is told to a trial's workers, kept in the manifest and shown in MLflow, all as plain JSON values."""

from __future__ import annotations

from typing import Any

from decay_core.recipe import Recipe
from services.data.corpus import Corpus, spec_of
from services.data.token_cache import DataSpec
from services.study.file import Study
from services.study.manifest import Manifest
from services.study.plan import Plan, Trial
from services.study.recall_task import Task
from services.study.storage import Storage


def data_spec(study: Study) -> DataSpec | Task:
    """The data of a study as services/data knows it."""
    return spec_of(study.data.model_dump(exclude={"workers"}))


def data_record(cache: Corpus, recipe: Recipe) -> dict[str, Any]:
    """What the manifest keeps of the data; the entropy and the tokens are those that the held-out loss is taken on."""
    windows = min(recipe.eval_sequences, cache.held_out.windows(recipe.seq_len))
    manifest = cache.manifest
    return {
        "digest": cache.digest,
        "path": str(cache.path),
        "source": str(manifest["source"]["name"]),
        "description": str(manifest["source"]["description"]),
        "spec": manifest["spec"],
        "tokenizer_sha256": manifest.get("tokenizer", {}).get("sha256"),
        "unigram_entropy_nats": cache.held_out.target_entropy(windows, recipe.seq_len),
        "held_out_tokens": cache.held_out.targets(windows, recipe.seq_len),
        "train_tokens": cache.train.tokens(recipe.seq_len),
    }


def job_of(trial: Trial, plan: Plan, storage: Storage, manifest: Manifest, driver: int = 0) -> dict[str, Any]:
    """What a trial's workers are told."""
    resources = plan.study.resources
    per_rank = trial.recipe.batch_size // resources.workers
    return {
        "study": plan.study.name,
        "driver": driver,
        "trial": trial.id,
        "name": trial.name,
        "method": trial.method,
        "varied": trial.varied,
        "seed": trial.seed,
        "storage": storage.address,
        "config": trial.content["config"],
        "recipe": trial.content["recipe"],
        "data": {key: manifest.data[key] for key in ("digest", "path", "spec")},
        "resources": {
            "workers": resources.workers,
            "threads": resources.threads_per_worker,
            "gpus": resources.gpus_per_worker,
            "zero_stage": resources.zero_stage,
            "micro_batch_size": resources.micro_batch_size or per_rank,
            "deterministic": resources.deterministic,
            "elastic": resources.elastic,
        },
    }


def params_of(trial: Trial, plan: Plan) -> dict[str, Any]:
    """What MLflow shows as parameters and compares on resume; not the number of ranks where that may change."""
    resources = plan.study.resources
    ranks = {"workers": resources.workers, "micro_batch_size": resources.micro_batch_size}
    flat = {f"recipe.{key}": value for key, value in trial.content["recipe"].items()}
    data = dict(trial.content["data"])
    flat |= {f"data.recall.{key}": value for key, value in data.pop("recall", {}).items()}
    flat |= {f"data.{key}": value for key, value in data.items()}
    return {
        **trial.point.to_dict(),
        "method": trial.method,
        "size": trial.size,
        "seed": trial.seed,
        "parameters": trial.parameters,
        "inner_gain_init": trial.config.inner_gain,
        "threads_per_worker": resources.threads_per_worker,
        "zero_stage": resources.zero_stage,
        **({} if resources.elastic else ranks),
        **flat,
    }
