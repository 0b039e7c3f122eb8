"""What a trial that the ledger calls finished has to show for it: its result, with the very bytes that the ledger noted.

A result that is gone or has other bytes is named, never skipped: a table with a silent hole looks complete.
"""

from __future__ import annotations

import hashlib

from services.study.ledger import TrialState
from services.study.result import TrialResult, UnreadableResult
from services.study.storage import Storage


def result_file(trial: str) -> str:
    """The name of a trial's result below the study."""
    return f"trials/{trial}/result.json"


def digest_of(raw: bytes) -> str:
    """What the ledger notes of a result and of a step log."""
    return hashlib.sha256(raw).hexdigest()


def check_steps(storage: Storage, trial: str, state: TrialState) -> None:
    """Raises UnreadableResult where the step log of a finished trial is not what it was when the trial finished."""
    name = f"trials/{trial}/steps.jsonl"
    if state.steps_sha256 and digest_of(storage.read(name) or b"") != state.steps_sha256:
        where = f"{storage.root}/{name}"
        raise UnreadableResult(f"{where} has other bytes than when the trial finished; run again to write it anew")


def result_of(storage: Storage, trial: str, state: TrialState) -> TrialResult | None:
    """The trial's result, None while it has none.

    Raises UnreadableResult: damaged, changed since it was finished, or gone although it is finished.
    """
    where = f"{storage.root}/{result_file(trial)}"
    raw = storage.read(result_file(trial))
    if raw is None:
        if state.state == "finished":
            raise UnreadableResult(f"{where} is gone although the trial is finished; run again, or restore it from MLflow")
        return None
    if state.result_sha256 and digest_of(raw) != state.result_sha256:
        raise UnreadableResult(
            f"{where} has other bytes than when the trial finished; run again to write it anew, or restore it from MLflow"
        )
    return TrialResult.from_json(raw, where=where)
