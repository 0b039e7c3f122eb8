"""A study with one finished trial, made by hand: real tokens, weights and files, and no training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from decay_core.model import DecayLinearTransformer, ModelConfig, build_model
from services.data.token_cache import DataSpec, prepare
from services.study.file import read_study
from services.study.ledger import Ledger
from services.study.manifest import next_manifest, write_manifest
from services.study.mechanism import mechanism_code
from services.study.plan import Plan, Trial, make_plan
from services.study.result import TrialResult
from services.study.storage import Storage

TEXT = "".join(f"My fellow citizens, the {n}th report of this year is before the Congress.\n" for n in range(400))
SPACE = [{"decay": ["mamba2", {"simple_decay": 0.99}], "granularity": ["vector", "scalar"]}]
LOSS, UNIGRAM, MEDIANS = 4.0625, 5.125, ((0.93125, 0.8125), (0.90625, 0.71875))


def write_study(folder: Path, **changes: Any) -> Path:
    """A study file whose text and storage lie in `folder`."""
    source = folder / "text.txt"
    source.write_text(TEXT)
    recipe = {"steps": 10, "batch_size": 2, "seq_len": 32, "eval_every": 5, "eval_sequences": 2,
              "checkpoint_every": 5, "telemetry_every": 5}  # fmt: skip
    study = {
        "name": "made", "question": "Is a hand-made trial\nexported?", "space": SPACE, "sizes": ["nano"], "recipe": recipe,
        "data": {"source": str(source), "tokenizer": "bpe-300"}, "storage": str(folder / "runs"),
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | changes))
    return path


def shaken(config: ModelConfig, seed: int = 1) -> DecayLinearTransformer:
    """A model whose every parameter matters: fresh ones start with branches that add nothing."""
    model = build_model(config, seed=seed)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return model


def finish(path: Path, index: int = 0) -> tuple[Plan, Trial, DecayLinearTransformer]:
    """Writes all that a study with one finished trial has; returns the plan, the trial and its model."""
    study = read_study(path)
    plan = make_plan(study)
    trial, storage = plan.trials[index], Storage(study.storage).child(study.name)
    cache = prepare(DataSpec(**study.data.model_dump(exclude={"workers"})), Path(study.storage) / "data", progress=False)
    data = {"digest": cache.digest, "path": str(cache.path), "source": study.data.source,
            "description": "made by a test", "spec": cache.manifest["spec"]}  # fmt: skip
    write_manifest(storage, next_manifest(None, plan, data))
    model = shaken(trial.config)
    weights = save(model.state_dict())
    storage.write(f"trials/{trial.id}/model/model.safetensors", weights)
    storage.write(f"trials/{trial.id}/model/config.json", json.dumps(trial.config.to_dict()).encode())
    result = result_of(trial, weights_sha256=hashlib.sha256(weights).hexdigest())
    storage.write(f"trials/{trial.id}/result.json", result.to_json().encode())
    Ledger(storage).append("finished", trial.id)
    return plan, trial, model


def result_of(trial: Trial, **changes: Any) -> TrialResult:
    """What the trial measured."""
    fields: dict[str, Any] = {
        "trial_id": trial.id, "name": trial.name, "method": trial.method, "point": trial.point.to_dict(), "size": trial.size,
        "seed": trial.seed, "parameters": trial.parameters, "steps": trial.recipe.steps, "tokens": trial.tokens,
        "held_out_loss": LOSS, "train_loss_last_100": 4.25, "unigram_entropy": UNIGRAM, "vocab_size": trial.config.vocab_size,
        "tokens_per_second": 1.0, "wall_s": 1.0, "decay_profile": [_layer(i, m[1]) for i, m in enumerate(MEDIANS, 1)],
        "initial_decay_profile": [_layer(i, m[0]) for i, m in enumerate(MEDIANS, 1)], "order_hash": "0" * 64,
        "world_size": 1, "zero_stage": 0, "mechanism": mechanism_code(trial.point),
    }  # fmt: skip
    return TrialResult.model_validate(fields | changes)


def _layer(layer: int, median: float) -> dict[str, Any]:
    return {"layer": layer, "median": median, "p25": 0.5, "p75": 0.96875, "mean": 0.75, "min": 0.25, "max": 0.984375}
