"""What `decay diff` compares: a study file, a study's folder, or one trial of a folder, as plain values by heading.

`folder:trial` names a trial by its name or its id, cut short as long as it is the only one. What is unusual: a folder is read
as its manifest and its results say, so that two releases can be compared; only the design of a trial that has no result yet
is taken from today's plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decay_core.design import DesignPoint
from services.study.file import Study, StudyError, read_study
from services.study.ledger import Ledger
from services.study.manifest import Manifest, filled, read_manifest, resolved
from services.study.outcome import result_of
from services.study.plan import Plan, Trial, make_plan
from services.study.result import TrialResult
from services.study.storage import Storage

Values = dict[str, Any]
BITS = ("workers", "gpus_per_worker", "threads_per_worker", "zero_stage", "micro_batch_size", "deterministic")
CODE = "code of the mechanism"
WIDTH = "GLU width"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two: its values by heading, the ids of its trials by name, and the results of those that have one.

    A single trial is its only one, under the name "".
    """

    kind: str
    parts: dict[str, Values]
    trials: dict[str, str]
    results: dict[str, TrialResult] = field(default_factory=dict)


def read_side(said: str) -> Side:
    """Reads what `said` names. Raises StudyError when it names nothing, or several trials."""
    if Path(said).is_file():
        study = read_study(said)
        plan = make_plan(study)
        return Side(kind="study", parts=_study_parts(resolved(study), plan), trials={t.name: t.id for t in plan.trials})
    storage = Storage(said)
    if (manifest := read_manifest(storage)) is not None:
        trials = {name: trial for trial, name in manifest.trials.items()}
        return Side(kind="study", parts=_folder_parts(manifest), trials=trials, results=_results(storage, manifest))
    folder, _, trial = said.rpartition(":")
    if not folder or "/" in trial or (manifest := read_manifest(Storage(folder))) is None:
        raise StudyError(f"{said} is no study file and holds no study.json; give a study file, its folder, or folder:trial")
    return _trial_side(said, Storage(folder), manifest, _find(manifest, trial, folder))


def _find(manifest: Manifest, wanted: str, folder: str) -> str:
    """The id of the trial called `wanted`."""
    by_name = [trial for trial, name in manifest.trials.items() if name == wanted]
    found = by_name or [trial for trial in manifest.trials if wanted and trial.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise StudyError(f"{wanted} begins {len(found)} ids in {folder}: {', '.join(sorted(found)[:4])}; write more of it")
    names = ", ".join(sorted(manifest.trials.values())[:4])
    raise StudyError(f"{folder} has no trial {wanted!r}; it has {names}{' ...' if len(manifest.trials) > 4 else ''}")


def _trial_side(said: str, storage: Storage, manifest: Manifest, trial: str) -> Side:
    study = filled(manifest.study)
    parts = _shared_parts(study)
    parts["data"]["digest"] = manifest.data["digest"]
    result, planned = _results(storage, manifest).get(manifest.trials[trial]), _planned(study, trial)
    if result is not None:
        point, size, seed, varied = result.point, result.size, result.seed, result.varied
        parts[CODE] = dict(result.mechanism)
    elif planned is not None:
        point, size, seed, varied = planned.point.to_dict(), planned.size, planned.seed, planned.varied
    else:
        raise StudyError(
            f"{said} has no result, and this release does not plan it; run it, or compare a trial that has finished"
        )
    parts["design"] = _with_defaults(point) | {"size": size, "seed": seed}
    if planned is not None:
        parts["design"][WIDTH] = planned.config.size.glu_dim  # `match` sets it, and neither point nor size says so
    parts["recipe"] |= varied
    return Side(kind="trial", parts=parts, trials={"": trial}, results={} if result is None else {"": result})


def _planned(study: Values, trial: str) -> Trial | None:
    """A trial as today's code plans it; None where it plans no such trial."""
    plan = _plan(study)
    return next((one for one in plan.trials if one.id == trial), None) if plan else None


def _with_defaults(point: Mapping[str, Any]) -> Values:
    """A point as an earlier release wrote it, with the axes that came since."""
    try:
        return DesignPoint.from_dict(dict(point)).to_dict()
    except ValueError:
        return dict(point)


def _folder_parts(manifest: Manifest) -> dict[str, Values]:
    study = filled(manifest.study)
    parts = _study_parts(study, _plan(study))
    parts["data"]["digest"] = manifest.data["digest"]
    return parts


def _plan(study: Values) -> Plan | None:
    """The plan of a manifest's study; None where another release wrote it."""
    try:
        return make_plan(Study.model_validate(study))
    except ValueError:
        return None


def _study_parts(study: Values, plan: Plan | None) -> dict[str, Values]:
    parts = _shared_parts(study)
    parts["study"] = {key: study.get(key) for key in ("question", "sizes", "seeds", "match")}
    parts["recipe"] |= {f"vary.{key}": values for key, values in study.get("vary", {}).items()}
    if plan is not None:
        parts["design"] = {trial.point.name: "planned" for trial in plan.trials}
        parts["design"] |= {cell.name: f"refused: {cell.reason}" for cell in plan.refused}
    return parts


def _shared_parts(study: Values) -> dict[str, Values]:
    """What studies and trials both have: the parts that bear on the bits of a result."""
    resources = study.get("resources", {})
    return {
        "recipe": dict(study.get("recipe", {})),
        "model": dict(study.get("model", {})),
        "data": {key: value for key, value in study.get("data", {}).items() if key != "workers"},
        "resources": {key: resources[key] for key in BITS if key in resources},
    }


def _results(storage: Storage, manifest: Manifest) -> dict[str, TrialResult]:
    found = {}
    states = Ledger(storage).states(manifest.trials)
    for trial, name in manifest.trials.items():
        result = result_of(storage, trial, states[trial])
        if result is not None:
            found[name] = result
    return found
