"""Submits a study as a Ray job: a thin layer over Ray's own client, equal to the plain `ray job submit` in the docs."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ray.job_submission import JobStatus, JobSubmissionClient

from services.study.file import StudyError, read_study
from services.study.plan import make_plan
from services.study.storage import Storage

# what must not travel: environments, histories, results and secrets (Ray refuses packages above 100 MiB)
EXCLUDES = [".venv", ".git", "runs", "*.egg-info", ".env", "**/__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"]
RETRY_S = 5.0
COMMAND = ("python", "-m", "services.cli", "run")
ROOT = Path(__file__).parents[2]


def submit_study(
    study_file: Path, storage: str | None, address: str, wait: bool, out: TextIO, options: Sequence[str] = ()
) -> int:
    """Submits `decay run` of a study file inside this checkout; returns the job's exit code (0 when not waiting).

    options: those of `decay run` that are passed on, such as "--accept-drift".

    Raises StudyError for a file outside the checkout, a storage that would be lost with the job, and a cluster that does
    not answer.
    """
    study = read_study(study_file, storage)
    make_plan(study)
    place = Storage(study.storage)
    if place.local_path is not None and not Path(study.storage).is_absolute() and "://" not in study.storage:
        raise StudyError(
            f"storage {study.storage!r} is relative and would be lost with the job; give an absolute path on storage that "
            "every node sees, or a URI, with --storage"
        )
    try:
        inside = study_file.resolve().relative_to(ROOT)
    except ValueError as error:
        raise StudyError(f"study file {study_file} is outside {ROOT} and would not travel; move it there") from error
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=shlex.join([*COMMAND, str(inside), "--storage", study.storage, *options]),
            runtime_env={"working_dir": str(ROOT), "excludes": EXCLUDES},
            metadata={"decay.study": study.name},
        )
    except (ConnectionError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise StudyError(f"Ray at {address} did not take the job ({first}); is that its dashboard address?") from error
    print(f"submitted {study.name} as {job}; log: ray job logs {job} --address {address} -f", file=out)
    return _follow(client, job, out) if wait else 0


def _follow(client: JobSubmissionClient, job: str, out: TextIO) -> int:
    shown = 0
    while True:
        try:
            status = client.get_job_status(job)
            logs = client.get_job_logs(job)
        except (ConnectionError, RuntimeError) as error:
            print(f"the dashboard did not answer ({str(error).splitlines()[0]}); asking again", file=out)
            time.sleep(RETRY_S)
            continue
        out.write(logs[shown:])
        out.flush()
        shown = len(logs)
        if status.is_terminal():
            code = client.get_job_info(job).driver_exit_code
            return 0 if status == JobStatus.SUCCEEDED else int(code or 1)
        time.sleep(2.0)
