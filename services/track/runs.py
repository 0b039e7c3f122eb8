"""A study in MLflow: one experiment, one parent run, one child run per trial, found again by tags.

Only the driver writes here, so a run is created once. Surprising: a metric's time stamp is the study's start plus its step in
seconds, not the wall clock, so that sending a point twice stores it once (MLflow drops exact duplicates).
"""

from __future__ import annotations

import json
import logging
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
# one line per migrated table is nobody's business here
logging.getLogger("alembic").setLevel(logging.WARNING)

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from services.study.secrets import without_password  # noqa: E402

TRIAL_TAG = "decay.trial"
STUDY_TAG = "decay.study"
BATCH_METRICS = 1000  # MLflow's limit per call
PARAM_CHARACTERS = 500


class TrackingError(ValueError):
    """MLflow cannot be used as configured: one line with the remedy."""


def default_uri(storage_root: Path) -> str:
    """SQLite beside the studies."""
    return f"sqlite:///{storage_root / 'mlflow.db'}"


def check_reachable(uri: str) -> None:
    """Refuses a tracking URI that does not answer; writes nothing. Raises TrackingError."""
    scheme = urllib.parse.urlparse(uri).scheme
    if scheme in ("http", "https"):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
                answer.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise TrackingError(
                f"tracking.uri {uri} does not answer ({reason}); start the MLflow server or correct the URI"
            ) from error
        _check_open(uri)  # /health answers even to hosts and users that the server turns away
        return
    if scheme == "sqlite":
        folder = _sqlite_path(uri).parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise TrackingError(f"tracking.uri {uri}: {folder} is no folder that can be written; choose another place")
        return
    if scheme not in ("postgresql", "mysql", "mssql") and not scheme.startswith(("postgresql+", "mysql+", "mssql+")):
        raise TrackingError(
            f"tracking.uri {uri}: scheme {scheme or '(none)'!r} is not usable; give sqlite:///, http(s):// or a database URI"
        )
    _check_open(uri)


def _check_open(uri: str) -> None:
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow's, SQLAlchemy's, requests': whatever it is, the store cannot be used
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if re.search(r"\b401\b", first):
            first = "it asks for a user and a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise TrackingError(without_password(f"tracking.uri {uri} cannot be opened: {first}")) from error


def is_file_database(uri: str) -> bool:
    """Whether the store is one file, which several nodes must not open."""
    return urllib.parse.urlparse(uri).scheme == "sqlite"


class Tracker:
    """The MLflow side of one study. `open_study` before anything else; every call may raise MlflowException or OSError."""

    def __init__(self, uri: str, artifact_root: Path | None) -> None:
        self.uri = uri
        self._artifact_root = artifact_root
        self._experiment = ""
        self.parent = ""
        with _one_at_a_time(uri):  # a fresh SQLite store is created and migrated here, before anybody else opens it
            self._client = MlflowClient(uri)
            self._client.search_experiments(max_results=1)

    def open_study(self, name: str, question: str) -> None:
        """Finds or creates the experiment and its parent run, and reopens the latter."""
        with _one_at_a_time(self.uri):
            found = self._client.get_experiment_by_name(name)
            if found is None:
                location = (self._artifact_root / name).as_uri() if self._artifact_root else None
                self._experiment = self._client.create_experiment(name, artifact_location=location)
            else:
                self._experiment = found.experiment_id
            self.parent = self._find_or_create(STUDY_TAG, name, name, {"mlflow.note.content": question})
        self._client.update_run(self.parent, status="RUNNING")

    def open_trial(self, trial: str, name: str, params: dict[str, Any], data: dict[str, Any]) -> str:
        """Finds or creates the run of a trial and returns its id. What its creator, killed in between, left out is added.

        Raises TrackingError when the run has other parameters than the trial.
        """
        found = self._find(TRIAL_TAG, trial)
        run_id = found or self._find_or_create(TRIAL_TAG, trial, name, {"mlflow.parentRunId": self.parent})
        known = self._client.get_run(run_id)
        self._compare_params(run_id, known.data.params, params)
        if not known.inputs.dataset_inputs:
            source = json.dumps({"source": data["source"]})
            dataset = Dataset(name=data["source"][:200], digest=data["digest"][:36], source_type="decay", source=source)
            tag = InputTag("mlflow.data.context", "training")
            self._client.log_inputs(run_id, datasets=[DatasetInput(dataset=dataset, tags=[tag])])
        if found is None:
            self._client.update_run(run_id, status="SCHEDULED")
        return run_id

    def mark(self, run_id: str, status: str) -> None:
        """Sets a run's status: RUNNING, or an end (FINISHED, FAILED, KILLED) when it is not ended that way already."""
        if status == "RUNNING":
            self._client.update_run(run_id, status=status)
        elif self._client.get_run(run_id).info.status != status:
            self._client.set_terminated(run_id, status)

    def status(self, run_id: str) -> str:
        """The run's status as MLflow spells it."""
        return str(self._client.get_run(run_id).info.status)

    def last_step(self, run_id: str) -> int:
        """The last step that MLflow has of a run; 0 for none."""
        history = self._client.get_metric_history(run_id, "train/loss")
        return max((metric.step for metric in history), default=0)

    def log_steps(self, run_id: str, records: list[dict[str, Any]], started_ms: int) -> int:
        """Sends step records whole, in order; returns the last step sent. A failure in between leaves whole steps."""
        last = 0
        for batch in _batches(records):
            metrics = [
                Metric(key, float(value), started_ms + record["step"] * 1000, record["step"])
                for record in batch
                for key, value in record.items()
                if key != "step" and value is not None
            ]
            self._client.log_batch(run_id, metrics=metrics)
            last = batch[-1]["step"]
        return last

    def set_summary(self, run_id: str, values: dict[str, Any]) -> None:
        """Final figures as tags, which the run table of the UI shows as columns."""
        tags = [RunTag(f"result.{key}", str(value)) for key, value in values.items()]
        self._client.log_batch(run_id, tags=tags)

    def log_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Stores one file as an artifact; the same name is overwritten."""
        self._client.log_artifact(run_id, str(path), folder)

    def log_folder(self, run_id: str, path: Path, folder: str) -> None:
        """Stores a folder as artifacts."""
        self._client.log_artifacts(run_id, str(path), folder)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Stores a text as an artifact."""
        self._client.log_text(run_id, text, name)

    def _find(self, tag: str, value: str) -> str | None:
        runs: list[Run] = self._client.search_runs([self._experiment], f"tags.`{tag}` = '{value}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def _find_or_create(self, tag: str, value: str, name: str, tags: dict[str, str]) -> str:
        found = self._find(tag, value)
        if found is not None:
            return found
        created = self._client.create_run(self._experiment, run_name=name, tags={tag: value, **tags})
        return str(created.info.run_id)

    def _compare_params(self, run_id: str, known: dict[str, str], params: dict[str, Any]) -> None:
        for key, value in params.items():
            if key in known and known[key] != str(value)[:PARAM_CHARACTERS]:
                raise TrackingError(
                    f"MLflow run {run_id} has {key}={known[key]}, the trial has {value}; another study wrote it: "
                    "rename this study or use another tracking store"
                )
        missing = [Param(k, str(v)[:PARAM_CHARACTERS]) for k, v in params.items() if k not in known]
        if missing:
            self._client.log_batch(run_id, params=missing)


def _batches(records: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    """Groups whole records so that no call has more than BATCH_METRICS metrics (one larger record goes alone)."""
    batch: list[dict[str, Any]] = []
    size = 0
    for record in records:
        if batch and size + len(record) > BATCH_METRICS:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += len(record)
    if batch:
        yield batch


def _sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))


class _one_at_a_time:
    """Serialises drivers that share a SQLite store while it is created, migrated or searched-then-created in."""

    def __init__(self, uri: str) -> None:
        self._lock: FileLock | None = None
        if is_file_database(uri):
            path = _sqlite_path(uri)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(f"{path}.lock", timeout=120)

    def __enter__(self) -> None:
        if self._lock is not None:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()


__all__ = ["MlflowException", "Tracker", "TrackingError", "check_reachable", "default_uri", "is_file_database"]
