"""From a study's files to its report: reads results and ledger, builds the pages, prints the table, logs it all to MLflow."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from rich.console import Console

from services.report import build_report, console_table
from services.schedule.places import study_storage, tracking_uri
from services.study.file import Study, StudyError
from services.study.ledger import Ledger
from services.study.manifest import Manifest, read_manifest
from services.study.outcome import result_of
from services.study.plan import Plan, make_plan
from services.study.published import published_loss
from services.study.result import Omission, StudySummary, TrialResult
from services.study.secrets import without_password
from services.study.storage import Storage
from services.track.runs import MlflowException, Tracker, is_file_database

log = logging.getLogger(__name__)


def report_study(study: Study, console: Console) -> None:
    """Writes `<study>/report/`, prints its table and says how to open MLflow. Raises StudyError before the first result."""
    storage = study_storage(study)
    manifest = read_manifest(storage)
    if manifest is None:
        raise StudyError(f"study {study.name!r} has not started in {study.storage}; start it with decay run")
    plan = make_plan(study)
    results = _results(plan, storage, manifest)
    summary = _summary(plan, storage, manifest, results)
    uri = tracking_uri(study)
    if results:
        if storage.local_path is not None:
            build_report(summary, results, storage.local_path / "report")
            _log(uri, manifest, storage.local_path / "report")
        else:
            with tempfile.TemporaryDirectory() as folder:
                build_report(summary, results, Path(folder))
                storage.put_folder(Path(folder), "report")
                _log(uri, manifest, Path(folder))
        console.print(console_table(summary, results))
        console.print(f"report: {storage.root}/report/")
    else:
        console.print(f"study {study.name}: no finished trial to report yet")
    console.print(how_to_open(uri), soft_wrap=True)


def study_results(study: Study) -> list[TrialResult]:
    """The results of a study's finished trials. Raises StudyError before the first."""
    storage = study_storage(study)
    manifest = read_manifest(storage)
    results = [] if manifest is None else _results(make_plan(study), storage, manifest)
    if not results:
        raise StudyError(f"study {study.name!r} has no finished trial in {study.storage}; run it with decay run")
    return results


def how_to_open(uri: str) -> str:
    """The sentence that tells how to look at the runs."""
    uri = without_password(uri)
    if is_file_database(uri):
        return f"compare the runs in MLflow: mlflow ui --backend-store-uri {uri}  then open http://127.0.0.1:5000"
    return f"compare the runs in MLflow: {uri}"


def _results(plan: Plan, storage: Storage, manifest: Manifest) -> list[TrialResult]:
    found = []
    runs = manifest.tracking.get("runs", {})
    states = Ledger(storage).states(trial.id for trial in plan.trials)
    for trial in plan.trials:
        result = result_of(storage, trial.id, states[trial.id])
        if result is not None:
            printed = published_loss(trial.point, trial.config.size)
            found.append(result.model_copy(update={"mlflow_run_id": runs.get(trial.id), "published_loss": printed}))
    return found


def _summary(plan: Plan, storage: Storage, manifest: Manifest, results: list[TrialResult]) -> StudySummary:
    states = Ledger(storage).states(trial.id for trial in plan.trials)
    done = {result.trial_id for result in results}
    given_up = ("failed", "quarantined")
    failed = [(t.name, states[t.id].reason) for t in plan.trials if states[t.id].state in given_up and t.id not in done]
    waiting = [(t.name, states[t.id].state) for t in plan.trials if states[t.id].state in ("waiting", "started")]
    waiting = [(name, state) for name, state in waiting if name not in {result.name for result in results}]
    return StudySummary(
        name=plan.study.name,
        question=plan.study.question.strip(),
        data=f"{manifest.data['source']}: {manifest.data['description']} (digest {manifest.data['digest'][:12]})",
        tokenizer=plan.study.data.tokenizer if plan.study.data.recall is None else "none: the task generates its tokens",
        held_out_tokens=manifest.data["held_out_tokens"],
        unigram_entropy=manifest.data["unigram_entropy_nats"],
        tracking_uri=manifest.tracking.get("uri", ""),
        n_trials=len(plan.trials),
        n_finished=len(results),
        failed=tuple(Omission(name=name, reason=reason) for name, reason in failed),
        unfinished=tuple(Omission(name=name, reason=state) for name, state in waiting),
        refused=tuple(Omission(name=cell.name, reason=cell.reason) for cell in plan.refused),
    )


def _log(uri: str, manifest: Manifest, folder: Path) -> None:
    parent = manifest.tracking.get("parent")
    if not parent:
        return
    try:
        Tracker(uri, None).log_folder(parent, folder, "report")
    except (MlflowException, OSError) as error:
        log.warning("the report is written but MLflow did not take it (%s)", str(error).splitlines()[0])
