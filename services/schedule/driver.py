"""The driver: one run of a study. Running it again is resuming; running a finished study does nothing.

Everything that can be refused is refused before anything is written. Then: lease, manifest, MLflow runs, and Tune over
the trials that the ledger does not call finished, with a courier thread carrying step logs to MLflow. Tune's own state is
thrown away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from ray import tune

from decay_core.recipe import Recipe
from services.data.token_cache import DataSpec, TokenCache, prepare
from services.report.histogram import draw_histogram
from services.schedule import cluster
from services.schedule.trial import run_trial
from services.study.file import Study, StudyError
from services.study.lease import Heartbeat, take
from services.study.ledger import Ledger
from services.study.manifest import Manifest, check_unchanged, next_manifest, read_manifest, write_manifest
from services.study.plan import Plan, Trial, make_plan
from services.study.result import TrialResult, UnreadableResult
from services.study.storage import Storage
from services.track.courier import Courier
from services.track.runs import MlflowException, Tracker, TrackingError, check_reachable, default_uri, is_file_database

log = logging.getLogger(__name__)
POLL_S = 1.0


class Exit(IntEnum):
    """How a run ended, for shells and schedulers."""

    COMPLETE = 0
    FAILED = 1
    REFUSED = 2
    INCOMPLETE = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run: `address` of a Ray cluster (None: RAY_ADDRESS or this machine), and where progress lines go."""

    address: str | None = None
    say: Callable[[str], None] = print


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
                run = _Run(plan=plan, storage=storage, ledger=ledger, uri=uri, options=options, lost=heartbeat.lost)
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


def _prepare_data(plan: Plan, old: Manifest | None) -> TokenCache:
    """The tokens of a study; a cache made just now for data that is then refused is removed again."""
    study, root = plan.study, data_cache_root(plan.study)
    there = set(root.iterdir()) if root.exists() else set()
    cache = prepare(data_spec(study), root, workers=study.data.workers)
    try:
        _check_long_enough(cache, plan)
        next_manifest(old, plan, data_record(cache, study.to_recipe()))
    except StudyError:
        if cache.path not in there:
            shutil.rmtree(cache.path)
            cache.path.with_name(f"{cache.path.name}.lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # only where nothing else is in them
                root.rmdir()
                root.parent.rmdir()
        raise
    return cache


def _check_long_enough(cache: TokenCache, plan: Plan) -> None:
    seq_len = max(trial.recipe.seq_len for trial in plan.trials)
    for name, stream in (("training", cache.train), ("held-out", cache.held_out)):
        if stream.windows(seq_len) < 1:
            raise StudyError(
                f"data.source {plan.study.data.source}: the {name} text has {stream.n_tokens} tokens, less than one "
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


@dataclass(kw_only=True)
class _Run:
    """One run under the lease."""

    plan: Plan
    storage: Storage
    ledger: Ledger
    uri: str
    options: Options
    lost: threading.Event
    _unreadable: set[str] = field(default_factory=set)

    def go(self, cache: TokenCache, at_once: int) -> Exit:
        say, study = self.options.say, self.plan.study
        old = read_manifest(self.storage)  # again, under the lease: another driver may have been here since
        if old is not None:
            check_unchanged(old, self.plan)
        manifest = next_manifest(old, self.plan, data_record(cache, study.to_recipe()))
        root = Storage(study.storage).local_path
        # a server keeps artifacts where it was told to; a database on this machine keeps them beside the studies
        local_store = root is not None and not self.uri.startswith("http")
        runs = {}
        try:
            tracker = Tracker(self.uri, root / "mlflow-artifacts" if local_store and root else None)
            tracker.open_study(study.name, study.question)
            courier = Courier(tracker, self.storage, manifest.started_ms, say)
            for trial in self.plan.trials:
                run_id = tracker.open_trial(trial.id, trial.name, params_of(trial, self.plan), manifest.data)
                courier.add(trial.id, trial.name, run_id, trial.recipe.steps)
                runs[trial.id] = run_id
        except (MlflowException, OSError) as error:
            raise TrackingError(f"tracking.uri {self.uri} failed ({_first_line(error)}); mend it and run again") from error
        manifest = replace(manifest, tracking={"uri": self.uri, "parent": tracker.parent, "runs": runs})
        write_manifest(self.storage, manifest)
        self.ledger.append("run", trials=len(self.plan.trials), pid=os.getpid())
        self._collect(courier)
        missing = self._missing()
        done = len(self.plan.trials) - len(missing)
        begun = "new study" if old is None else "resuming study"
        say(f"{begun} {study.name} in {self.storage.root}: {len(self.plan.trials)} trials, {done} finished, "
            f"{len(missing)} to run ({self.plan.backend} backend, {at_once} at a time)")  # fmt: skip
        if missing:
            self._train(missing, manifest, courier, at_once)
        if self.lost.is_set():
            say(f"study {study.name}: another driver took it over; this one stopped")
            return Exit.INCOMPLETE
        return self._end(tracker, courier)

    def _missing(self) -> list[Trial]:
        states = self.ledger.states(trial.id for trial in self.plan.trials)
        return [trial for trial in self.plan.trials if states[trial.id].state != "finished"]

    def _collect(self, courier: Courier) -> None:
        """Brings ledger and MLflow up to what workers have written: results that exist become finished, then tracked."""
        states = self.ledger.states(trial.id for trial in self.plan.trials)
        limit = self.plan.study.tracking.log_model_max_gib * 2**30
        for trial in self.plan.trials:
            if states[trial.id].tracked_in == self.uri:
                continue
            raw = self.storage.read(f"trials/{trial.id}/result.json")
            if raw is None:
                continue
            try:
                result = TrialResult.from_json(raw, where=f"{self.storage.root}/trials/{trial.id}/result.json")
            except UnreadableResult as error:  # the others' results are still wanted
                if trial.id not in self._unreadable:
                    log.error("%s; delete that file and run again to write it anew from the last checkpoint", error)
                self._unreadable.add(trial.id)
                continue
            if states[trial.id].state != "finished":
                self.ledger.append("finished", trial.id, held_out_loss=result.held_out_loss)
                self.options.say(f"{trial.name:<34} finished: held-out loss {result.held_out_loss:.4f} nats")
            self._draw(trial)
            if courier.ready() and courier.deliver_result(trial.id, result, limit):
                self.ledger.append("tracked", trial.id, uri=self.uri)

    def _draw(self, trial: Trial) -> None:
        table = self.storage.read(f"trials/{trial.id}/histograms.parquet")
        if table is not None and not self.storage.exists(f"trials/{trial.id}/histogram.png"):
            self.storage.write(f"trials/{trial.id}/histogram.png", draw_histogram(table, trial.name))

    def _train(self, missing: list[Trial], manifest: Manifest, courier: Courier, at_once: int) -> None:
        scratch = tempfile.mkdtemp(prefix="decay-tune-")
        stop = threading.Event()

        def carry() -> None:
            while not stop.wait(POLL_S):
                try:
                    courier.poll()
                    self._collect(courier)
                except Exception:  # a courier's trouble must not stop training; the last _collect raises it again
                    log.exception("courier")

        thread = threading.Thread(target=carry, name="courier", daemon=True)
        thread.start()
        try:
            self._fit(missing, manifest, at_once, scratch)
        except KeyboardInterrupt:
            self.options.say("interrupted; run again to go on")
        except Exception as error:  # Tune or Ray gave up: what workers wrote still counts, and no run may stay RUNNING
            log.debug("Tune", exc_info=True)
            self.options.say(f"Ray ended the run ({_first_line(error)}); run again to go on")
        finally:
            stop.set()
            thread.join()
            shutil.rmtree(scratch, ignore_errors=True)
        if self.lost.is_set():  # the study belongs to another driver now: write nothing more
            return
        courier.patient = False  # the last chance of this run: ask once more whatever happened before
        courier.poll()
        self._collect(courier)

    def _fit(self, missing: list[Trial], manifest: Manifest, at_once: int, scratch: str) -> None:
        resources, backend = self.plan.study.resources, self.plan.backend
        jobs = {trial.id: job_of(trial, self.plan, self.storage, manifest) for trial in missing}
        trainable = tune.with_parameters(
            run_trial, jobs=jobs, backend=backend, cpus=resources.cpus_per_worker, retries=resources.max_failures
        )
        bundle = {"CPU": resources.cpus_per_worker}
        if resources.gpus_per_worker:
            bundle["GPU"] = resources.gpus_per_worker
        warm = backend == "warm"
        # a warm trial brings its workers' bundles; a Train group asks for its own, so its trial only needs a seat on the head
        wanted = tune.PlacementGroupFactory(
            [{}, *([bundle] * resources.workers)] if warm else [{"node:__internal_head__": 0.001}]
        )
        grid = tune.Tuner(
            tune.with_resources(trainable, wanted),
            param_space={"trial": tune.grid_search([trial.id for trial in missing])},
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=warm),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=resources.max_failures if warm else 0),
            ),
        ).fit()
        for result in grid:
            if result.error is not None and result.config:
                reason = (str(result.error).strip().splitlines() or [type(result.error).__name__])[-1][:500]
                self.ledger.append("failed", result.config["trial"], reason=f"workers died: {reason}")

    def _end(self, tracker: Tracker, courier: Courier) -> Exit:
        states = self.ledger.states(trial.id for trial in self.plan.trials)
        names = {trial.id: trial.name for trial in self.plan.trials}
        for trial, state in states.items():
            if state.state == "failed":
                self.options.say(f"{names[trial]:<34} failed: {state.reason}")
            if state.state != "finished":
                courier.mark_ended(trial, "FAILED" if state.state == "failed" else "KILLED")
        complete = all(state.state == "finished" for state in states.values())
        tracked = all(state.tracked_in == self.uri for state in states.values())
        try:
            tracker.mark(tracker.parent, "FINISHED" if complete and tracked else "FAILED")
        except (MlflowException, OSError) as error:
            log.warning("MLflow did not take the end of the study (%s); run again to send it", _first_line(error))
            tracked = False
        if complete and tracked:
            return Exit.COMPLETE
        return Exit.FAILED if any(state.state == "failed" for state in states.values()) else Exit.INCOMPLETE


def data_spec(study: Study) -> DataSpec:
    """The data of a study as the cache knows it."""
    return DataSpec(**study.data.model_dump(exclude={"workers"}))


def data_record(cache: TokenCache, recipe: Recipe) -> dict[str, Any]:
    """What the manifest keeps of the data; the entropy and the tokens are those that the held-out loss is taken on."""
    windows = min(recipe.eval_sequences, cache.held_out.windows(recipe.seq_len))
    manifest = cache.manifest
    return {
        "digest": cache.digest,
        "path": str(cache.path),
        "source": str(manifest["source"]["name"]),
        "description": str(manifest["source"]["description"]),
        "spec": manifest["spec"],
        "unigram_entropy_nats": cache.held_out.target_entropy(windows, recipe.seq_len),
        "held_out_tokens": windows * (recipe.seq_len - 1),
        "train_tokens": cache.train.n_tokens,
    }


def job_of(trial: Trial, plan: Plan, storage: Storage, manifest: Manifest) -> dict[str, Any]:
    """What a trial's workers are told."""
    resources = plan.study.resources
    per_rank = trial.recipe.batch_size // resources.workers
    return {
        "study": plan.study.name,
        "trial": trial.id,
        "name": trial.name,
        "method": trial.method,
        "varied": trial.varied,
        "seed": trial.seed,
        "storage": storage.root,
        "config": trial.content["config"],
        "recipe": trial.content["recipe"],
        "data": {key: manifest.data[key] for key in ("digest", "path", "spec")},
        "resources": {
            "workers": resources.workers,
            "threads": resources.threads_per_worker,
            "gpus": resources.gpus_per_worker,
            "zero_stage": resources.zero_stage,
            "micro_batch_size": resources.micro_batch_size or per_rank,
            "deterministic": resources.deterministic,
        },
    }


def params_of(trial: Trial, plan: Plan) -> dict[str, Any]:
    """What MLflow shows as parameters and compares on resume."""
    resources = plan.study.resources
    flat = {f"recipe.{key}": value for key, value in trial.content["recipe"].items()}
    flat |= {f"data.{key}": value for key, value in trial.content["data"].items()}
    return {
        **trial.point.to_dict(),
        "method": trial.method,
        "size": trial.size,
        "seed": trial.seed,
        "parameters": trial.parameters,
        "inner_gain_init": trial.config.inner_gain,
        "workers": resources.workers,
        "threads_per_worker": resources.threads_per_worker,
        "zero_stage": resources.zero_stage,
        "micro_batch_size": resources.micro_batch_size,
        **flat,
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def to_stderr(line: str) -> None:
    """Progress where it does not mix with a report on standard output."""
    print(line, file=sys.stderr, flush=True)
