"""The driver: one run of a study. Running it again is resuming; running a finished study does nothing.

Everything that can be refused is refused before anything is written. Then the lease is taken, and run.py does the rest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator

from services.data.corpus import Corpus, prepare_corpus
from services.schedule import cluster
from services.schedule.jobs import data_record, data_spec
from services.schedule.places import data_cache_root, study_storage, tracking_uri
from services.schedule.run import Exit, Options, Run
from services.study.file import Study, StudyError
from services.study.lease import Heartbeat, take
from services.study.ledger import Ledger
from services.study.manifest import Manifest, check_unchanged, next_manifest, read_manifest
from services.study.plan import Plan, make_plan
from services.study.storage import Storage
from services.track.runs import check_reachable, is_file_database


def run_study(study: Study, options: Options) -> Exit:
    """Runs what is missing of a study. Raises StudyError, LeaseHeld, TrackingError, CacheError before anything is written."""
    storage = study_storage(study)
    old = read_manifest(storage)
    plan = make_plan(study)
    if old is not None:
        check_unchanged(old, plan)
    ledger = Ledger(storage)
    states = ledger.states(trial.id for trial in plan.trials)
    missing = [trial for trial in plan.trials if states[trial.id].state != "finished"]
    storage.check_writable(plan.disk_bytes(missing))
    uri = tracking_uri(study)
    check_reachable(uri)
    try:
        at_once = _capacity(plan, uri, options) if missing else 0
        cache = _prepare_data(plan, old)
        lease = take(storage)
        try:
            with Heartbeat(lease, on_loss=interrupt) as heartbeat, stopped_by_sigterm():
                run = Run(plan=plan, storage=storage, ledger=ledger, uri=uri, options=options, lost=heartbeat.lost)
                return run.go(cache, at_once)
        finally:
            lease.release()
    finally:
        cluster.disconnect()


def interrupt() -> None:
    """What Ctrl-C does: Tune stops its trials and returns, and the run ends as incomplete."""
    os.kill(os.getpid(), signal.SIGINT)


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM (`ray job stop`, Slurm, Kubernetes) end a run in order, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare_data(plan: Plan, old: Manifest | None) -> Corpus:
    """The tokens of a study; a cache made just now for data that is then refused is removed again."""
    study, root = plan.study, data_cache_root(plan.study)
    there = set(root.iterdir()) if root.exists() else set()
    cache = prepare_corpus(data_spec(study), root, workers=study.data.workers)
    try:
        _check_long_enough(cache, plan)
        next_manifest(old, plan, data_record(cache, plan.trials[0].recipe))
    except StudyError:
        if cache.path not in there:
            shutil.rmtree(cache.path, ignore_errors=True)  # a recall task has no files
            cache.path.with_name(f"{cache.path.name}.lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # only where nothing else is in them
                root.rmdir()
                root.parent.rmdir()
        raise
    return cache


def _check_long_enough(cache: Corpus, plan: Plan) -> None:
    seq_len = max(trial.recipe.seq_len for trial in plan.trials)
    for name, stream in (("training", cache.train), ("held-out", cache.held_out)):
        if stream.windows(seq_len) < 1:
            raise StudyError(
                f"data.source {plan.study.data.source}: the {name} text has {stream.tokens(seq_len)} tokens, less than one "
                f"sequence of recipe.seq_len {seq_len}; use more text, another data.held_out_percent or a shorter seq_len"
            )


def _capacity(plan: Plan, uri: str, options: Options) -> int:
    capacity = cluster.connect(options.address, dashboard=plan.backend == "train")
    nodes = len(capacity.nodes)
    if nodes > 1 and is_file_database(uri):
        raise StudyError(
            f"tracking.uri {uri} is a file and the cluster has {nodes} nodes; start `mlflow server` and give "
            "its http:// address as tracking.uri"
        )
    if nodes > 1 and plan.study.resources.workers > 1 and Storage(plan.study.storage).local_path is None:
        raise StudyError(
            f"storage {plan.study.storage} is no folder and a trial's workers may lie on several of the {nodes} nodes; give a "
            "folder that every node sees, or resources.workers: 1"
        )
    return cluster.trials_at_once(plan.study.resources, capacity)
