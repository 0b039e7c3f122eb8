"""The driver: one run of a study. Running it again is resuming; running a finished study does nothing.

Everything that can be refused is refused before anything is written. Then the lease is taken, and run.py does the rest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator

from services.data.corpus import Corpus, prepare_corpus
from services.schedule import cluster
from services.schedule.jobs import data_record, data_spec
from services.schedule.places import data_cache_root, study_storage, tracking_uri
from services.schedule.run import Exit, Options, Run, trials_to_run
from services.study.fence import Fence, Fenced
from services.study.file import Study, StudyError
from services.study.lease import Heartbeat, take
from services.study.ledger import Ledger
from services.study.manifest import Manifest, check_unchanged, next_manifest, read_manifest
from services.study.plan import Plan, make_plan
from services.study.storage import Storage
from services.track.runs import check_reachable, is_file_database
from services.train.notice import NOTICE_S, tell_all

GRACE_S = NOTICE_S - 8.0  # what is left of a notice is for the end of the run: MLflow, ledger, Ray


def run_study(study: Study, options: Options) -> Exit:
    """Runs what is missing of a study. Raises StudyError, LeaseHeld, TrackingError, CacheError before anything is written."""
    storage = study_storage(study)
    old = read_manifest(storage)
    plan = make_plan(study)
    if old is not None:
        check_unchanged(old, plan)
    ledger = Ledger(storage)
    missing = trials_to_run(storage, plan, ledger, options.retry_quarantined)
    storage.check_writable(plan.disk_bytes(missing))
    uri = tracking_uri(study)
    check_reachable(uri)
    try:
        at_once = _capacity(plan, uri, options) if missing else 0
        cache = _prepare_data(plan, old, options.accept_drift, idle=not missing)
        lease = take(storage, at_least=_last_driver(ledger))
        fence = Fence(storage=storage, driver=lease.driver)
        try:
            with Heartbeat(lease, on_loss=interrupt) as heartbeat, stopped_by_sigterm(fence, options.say) as stopping:
                run = Run(
                    plan=plan, storage=storage, ledger=Ledger(storage, fence), fence=fence, uri=uri, options=options,
                    lost=heartbeat.lost, stopping=stopping,
                )  # fmt: skip
                try:
                    return run.go(cache, at_once)
                except Fenced as replaced:
                    options.say(f"study {study.name}: {replaced}")
                    return Exit.INCOMPLETE
        finally:
            lease.release()
    finally:
        cluster.disconnect()


def _last_driver(ledger: Ledger) -> int:
    return max((int(event.details.get("driver", 0)) for event in ledger.events() if event.kind == "run"), default=0)


def interrupt() -> None:
    """What Ctrl-C does: Tune stops its trials and returns, and the run ends as incomplete."""
    os.kill(os.getpid(), signal.SIGINT)


@contextlib.contextmanager
def stopped_by_sigterm(fence: Fence, say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Makes SIGTERM (`ray job stop`, Slurm, Kubernetes) end a run in order: every trial saves and leaves, then the run ends.

    A trial that takes longer than GRACE_S, and a second SIGTERM, end the run as Ctrl-C does. Yields what is set meanwhile.
    """
    stopping, over = threading.Event(), threading.Event()

    def notice() -> None:
        say("asked to stop: trials save and leave")
        try:
            tell_all(fence.storage, fence.driver)
        except Exception:  # storage is away, whatever its client raises then: nobody can save
            interrupt()
            return
        if not over.wait(GRACE_S):
            interrupt()

    def handle(*_: object) -> None:
        if stopping.is_set():
            interrupt()
            return
        stopping.set()
        threading.Thread(target=notice, name="notice", daemon=True).start()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stopping
    finally:
        over.set()
        signal.signal(signal.SIGTERM, before)


def _prepare_data(plan: Plan, old: Manifest | None, accept_drift: bool, idle: bool) -> Corpus:
    """The tokens of a study; a cache made just now for data that is then refused is removed again."""
    study, root = plan.study, data_cache_root(plan.study)
    there = set(root.iterdir()) if root.exists() else set()
    cache = prepare_corpus(data_spec(study), root, workers=study.data.workers)
    try:
        _check_long_enough(cache, plan)
        next_manifest(old, plan, data_record(cache, plan.trials[0].recipe), accept_drift, idle)
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
