"""Where a study keeps what it writes: its own folder, the token caches and MLflow.

Surprising: a default exists only where storage is a folder. Elsewhere MLflow must be named, and token caches lie on each node.
"""

from __future__ import annotations

import os
from pathlib import Path

from services.schedule import cluster
from services.study.file import Study, StudyError
from services.study.storage import Storage
from services.track.runs import default_uri


def study_storage(study: Study) -> Storage:
    """The folder or prefix of one study. Raises StudyError for a place that would not outlive the job."""
    cluster.check_storage_outlives_job(study.storage)
    return Storage(study.storage).child(study.name)


def tracking_uri(study: Study) -> str:
    """The study's MLflow: the file's, else MLFLOW_TRACKING_URI, else SQLite beside the studies.

    Raises StudyError where there is no default: storage that is not a folder.
    """
    named = study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if named:
        return named
    root = Storage(study.storage).local_path
    if root is None:
        raise StudyError(f"storage {study.storage} is no folder, so MLflow has no default place; set tracking.uri")
    return default_uri(root)


def data_cache_root(study: Study) -> Path:
    """Where token caches lie: beside the studies, or on each node where storage is no folder."""
    root = Storage(study.storage).local_path
    return (root / "data") if root else Path.home() / ".cache" / "decay" / "data"
