"""How fast a worker will be: measured where a finished trial tells it, and a stated assumption elsewhere.

A trial is worth as a measurement what it was run as: a result counts for trials of the same size, precision, share of a GPU
and threads, on the device that is asked about. The same design point goes first; another point of that size is scaled by its
operations per token, which is to say that it ran at the same FLOP/s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from decay_core.design import DesignPoint
from decay_core.model import ModelConfig
from decay_core.sizes import get_size
from services.study.accelerators import ACCELERATORS, Accelerator
from services.study.cost import flops_per_token
from services.study.file import Resources, Study
from services.study.plan import CPU_GFLOPS_PER_THREAD, GPU_GFLOPS, Plan, Trial
from services.study.storage import Storage

CPU = "cpu"
# What our Triton scan reaches of an H100's dense bf16 speed (services/study/plan.py says how it was measured).
ASSUMED_MFU = GPU_GFLOPS / 1000 / ACCELERATORS["H100"].tflops


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Sustained speed of one worker: `kind` says in a word or two where the figure is from, `source` in full."""

    gflops: float
    kind: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one finished trial says: on which device, under which conditions, at how many GFLOP/s a worker."""

    point: DesignPoint
    size: str
    device: str
    conditions: tuple[Any, ...]
    gflops: float
    where: str


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The speeds of one plan: `measurements` of other trials, and what is assumed where none fits."""

    study: Study
    assumed: Rate
    gpu: Accelerator | None = None
    measurements: tuple[Measurement, ...] = ()

    def of(self, trial: Trial) -> Rate:
        """The rate to estimate `trial` with."""
        wanted = conditions(self.study.resources, trial.recipe.precision)
        fitting = [one for one in self.measurements if (one.size, one.conditions) == (trial.size, wanted)]
        fitting = [one for one in fitting if self._asked_about(one.device)]
        same = [one for one in fitting if one.point == trial.point]
        if same:
            return _median(same, "measured")
        return _median(fitting, "other point") if fitting else self.assumed

    def _asked_about(self, device: str) -> bool:
        if self.gpu is not None:
            return self.gpu.is_called(device)
        return (device == CPU) == (self.study.resources.gpus_per_worker == 0)


def _median(found: list[Measurement], kind: str) -> Rate:
    count, devices = len(found), ", ".join(sorted({one.device for one in found}))
    studies = ", ".join(sorted({one.where for one in found}))
    source = f"median of {count} finished trial{'s' * (count > 1)} of this size on {devices} (study {studies})"
    return Rate(gflops=median(one.gflops for one in found), kind=kind, source=source)


def assumed_rate(plan: Plan, gpu: Accelerator | None, mfu: float | None) -> Rate:
    """What is assumed without a measurement: the share `mfu` of a named GPU's peak, or the plan's own rate."""
    resources = plan.study.resources
    if gpu is None or (mfu is None and resources.assumed_gflops_per_worker is not None):
        given = resources.assumed_gflops_per_worker is not None
        return Rate(gflops=plan.gflops_per_worker, kind="assumed", source=_said(plan, given))
    share = min(resources.gpus_per_worker or 1.0, 1.0)
    why = "--mfu" if mfu is not None else "what our Triton scan reaches on an H100; --mfu sets another"
    used = ASSUMED_MFU if mfu is None else mfu
    return Rate(gflops=gpu.tflops * 1000 * share * used, kind=f"MFU {used:.1%}", source=f"of {gpu.tflops:g} TFLOP/s, {why}")


def _said(plan: Plan, given: bool) -> str:
    if given:
        return "resources.assumed_gflops_per_worker"
    figure, what = (GPU_GFLOPS, "GPU") if plan.study.resources.gpus_per_worker else (CPU_GFLOPS_PER_THREAD, "thread")
    return f"{figure:,.0f} a {what}"


def conditions(resources: Resources, precision: str) -> tuple[Any, ...]:
    """What must be equal for a speed to be worth something elsewhere; threads matter where there is no GPU."""
    share = min(resources.gpus_per_worker, 1.0)
    return (precision, share, resources.threads_per_worker if share == 0 else 0)


def measurements(root: Storage) -> list[Measurement]:
    """What the finished trials of every study below `root` say; files that cannot be read say nothing. Folders only."""
    if root.local_path is None:
        return []
    return [one for name in root.list(".") for one in _of_study(root, name)]


def _of_study(root: Storage, name: str) -> Iterator[Measurement]:
    manifest = _json(root, f"{name}/study.json")
    for trial in root.list(f"{name}/trials") if manifest else ():
        result = _json(root, f"{name}/trials/{trial}/result.json")
        try:
            if result:
                yield _measurement(manifest["study"], result)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):  # another release wrote it, or it is damaged
            continue


def _measurement(study: dict[str, Any], result: dict[str, Any]) -> Measurement:
    resources = Resources.model_validate(study["resources"])
    recipe = study["recipe"] | result.get("varied", {})
    point, size = DesignPoint.from_dict(result["point"]), get_size(result["size"])
    config = ModelConfig(point=point, size=size, vocab_size=result["vocab_size"])
    per_worker = result["tokens_per_second"] / result["world_size"]
    return Measurement(
        point=config.point,
        size=result["size"],
        device=result.get("device") or (CPU if resources.gpus_per_worker == 0 else "a GPU"),
        conditions=conditions(resources, recipe["precision"]),
        gflops=flops_per_token(config, recipe["seq_len"]) * per_worker / 1e9,
        where=study["name"],
    )


def _json(root: Storage, name: str) -> dict[str, Any]:
    try:
        value = json.loads(root.read(name) or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
