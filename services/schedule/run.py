"""One run of a study under its lease: MLflow runs, Tune over the trials that the ledger does not call finished, and the end.

A courier thread carries step logs and results to MLflow while Tune trains. Tune's own state is thrown away: what counts is in
the ledger, and what workers wrote counts even where Tune or Ray gave up.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum

from ray import tune

from services.data.corpus import Corpus
from services.report.histogram import draw_histogram
from services.schedule.cluster import draining_nodes
from services.schedule.jobs import data_record, job_of, params_of
from services.schedule.trial import run_trial
from services.study import faults
from services.study.fence import Fence, Fenced
from services.study.file import StudyError
from services.study.ledger import Ledger, TrialState
from services.study.manifest import Manifest, check_unchanged, drift, next_manifest, read_manifest, write_manifest
from services.study.outcome import check_steps, digest_of, result_file, result_of
from services.study.plan import Plan, Trial
from services.study.result import UnreadableResult
from services.study.secrets import first_line, without_password
from services.study.storage import Storage
from services.track.courier import Courier
from services.track.runs import MlflowException, Tracker, TrackingError
from services.train.notice import tell_nodes

log = logging.getLogger(__name__)
POLL_S = 1.0
NODE_LOSSES = 20  # how often a trial may lose its node in one run; deaths of workers are counted by trial.py
OVER = ("finished", "quarantined")  # states of trials that a run does not start


class Exit(IntEnum):
    """How a run ended, for shells and schedulers."""

    COMPLETE = 0
    FAILED = 1
    REFUSED = 2
    INCOMPLETE = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run: `address` of a Ray cluster (None: RAY_ADDRESS or this machine), where progress lines go, whether to go on
    with changed data or code, and whether quarantined trials get another chance.
    """

    address: str | None = None
    say: Callable[[str], None] = print
    accept_drift: bool = False
    retry_quarantined: bool = False


@dataclass(kw_only=True)
class Run:
    """One run under the lease."""

    plan: Plan
    storage: Storage
    ledger: Ledger
    fence: Fence
    uri: str
    options: Options
    lost: threading.Event
    stopping: threading.Event
    _unreadable: set[str] = field(default_factory=set)
    _drains_unknown: bool = False
    _untracked: set[str] = field(default_factory=set)  # tracked once, by an MLflow store that is not there any more

    @property
    def _where(self) -> str:
        """The tracking store as ledger and manifest name it: without a password."""
        return without_password(self.uri)

    def go(self, cache: Corpus, at_once: int) -> Exit:
        say, study = self.options.say, self.plan.study
        old = read_manifest(self.storage)  # again, under the lease: another driver may have been here since
        if old is not None:
            check_unchanged(old, self.plan)
        record = data_record(cache, self.plan.trials[0].recipe)
        idle = not self._missing() and not self.options.retry_quarantined
        manifest = next_manifest(old, self.plan, record, self.options.accept_drift, idle)
        root = Storage(study.storage).local_path
        # a server keeps artifacts where it was told to; a database on this machine keeps them beside the studies
        local_store = root is not None and not self.uri.startswith("http")
        runs = {}
        try:
            tracker = Tracker(self.uri, root / "mlflow-artifacts" if local_store and root else None)
            tracker.open_study(study.name, study.question)
            courier = Courier(tracker, self.storage, manifest.started_ms, say, self.fence.check)
            for trial in self.plan.trials:
                run_id = tracker.open_trial(trial.id, trial.name, params_of(trial, self.plan), manifest.data)
                courier.add(trial.id, trial.name, run_id, trial.recipe.steps)
                runs[trial.id] = run_id
        except (MlflowException, OSError) as error:
            raise TrackingError(f"tracking.uri {self._where} failed ({first_line(error)}); mend it and run again") from error
        faults.point("driver.runs")
        known = manifest.tracking.get("runs", {}) if manifest.tracking.get("uri") == self._where else {}
        self._untracked = {trial for trial, run in runs.items() if known.get(trial, run) != run}
        manifest = replace(manifest, tracking={"uri": self._where, "parent": tracker.parent, "runs": runs})
        self._note_changes(old, manifest)  # before the manifest, which then differs no more
        with self.fence.held():
            write_manifest(self.storage, manifest)
        self.ledger.append("run", trials=len(self.plan.trials), pid=os.getpid(), driver=self.fence.driver)
        self._collect(courier)
        missing = self._missing()
        self._make_way(missing)
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
        return trials_to_run(self.storage, self.plan, self.ledger)

    def _note_changes(self, old: Manifest | None, new: Manifest) -> None:
        """Writes down what a person decided on the command line."""
        found = drift(old, new) if old is not None else []
        if found:
            self.ledger.append("drift", accepted=found)
            self.options.say(f"going on in spite of drift: {'; '.join(found)}")
        if self.options.retry_quarantined:
            for trial, state in self.ledger.states(trial.id for trial in self.plan.trials).items():
                if state.state == "quarantined":
                    self.ledger.append("released", trial)

    def _make_way(self, missing: list[Trial]) -> None:
        """Removes spoilt results of finished trials and reopens them: each is written again from its last checkpoint."""
        states = self.ledger.states(trial.id for trial in self.plan.trials)
        for trial in missing:
            if states[trial.id].state == "finished":
                self.options.say(f"{trial.name:<34} result or step log was damaged; written again from the last checkpoint")
                self.storage.delete(result_file(trial.id))
                self.ledger.append("reopened", trial.id)

    def _collect(self, courier: Courier) -> None:
        """Brings ledger and MLflow up to what workers have written: results that exist become finished, then tracked."""
        states = self.ledger.states(trial.id for trial in self.plan.trials)
        limit = self.plan.study.tracking.log_model_max_gib * 2**30
        for trial in self.plan.trials:
            if states[trial.id].tracked_in == self._where and trial.id not in self._untracked:
                continue
            raw = self.storage.read(result_file(trial.id))
            if raw is None:
                continue
            try:
                result = result_of(self.storage, trial.id, states[trial.id])
                assert result is not None
            except UnreadableResult as error:  # the others' results are still wanted
                if trial.id not in self._unreadable:
                    log.error("%s; delete that file and run again to write it anew from the last checkpoint", error)
                self._unreadable.add(trial.id)
                continue
            if states[trial.id].state != "finished":
                steps = self.storage.read(f"trials/{trial.id}/steps.jsonl") or b""
                sums = {"result_sha256": digest_of(raw), "steps_sha256": digest_of(steps)}
                self.ledger.append("finished", trial.id, held_out_loss=result.held_out_loss, **sums)
                self.options.say(f"{trial.name:<34} finished: held-out loss {result.held_out_loss:.4f} nats")
                faults.point("driver.finished")
            self._draw(trial)
            if courier.ready() and courier.deliver_result(trial.id, result, limit):
                faults.point("driver.tracked")
                self.ledger.append("tracked", trial.id, uri=self._where)
                self._untracked.discard(trial.id)

    def _draw(self, trial: Trial) -> None:
        table = self.storage.read(f"trials/{trial.id}/histograms.parquet")
        if table is None or self.storage.exists(f"trials/{trial.id}/histogram.png"):
            return
        picture = draw_histogram(table, trial.name)
        if picture is not None:
            self.storage.write(f"trials/{trial.id}/histogram.png", picture)

    def _train(self, missing: list[Trial], manifest: Manifest, courier: Courier, at_once: int) -> None:
        scratch = tempfile.mkdtemp(prefix="decay-tune-")
        stop = threading.Event()

        def carry() -> None:
            told: dict[str, int] = {}
            while not stop.wait(POLL_S):
                try:
                    told = self._pass_on_drains(told)
                    faults.point("driver.poll")
                    courier.poll()
                    self._collect(courier)
                except Fenced as replaced:
                    self.options.say(str(replaced))
                    self.lost.set()
                    return
                except Exception:  # a courier's trouble must not stop training; the last _collect raises it again
                    log.exception("courier")

        thread = threading.Thread(target=carry, name="courier", daemon=True)
        thread.start()
        try:
            self._fit_until_none_is_preempted(missing, manifest, at_once, scratch)
        except KeyboardInterrupt:
            self.options.say("interrupted; run again to go on")
        except Exception as error:  # Tune or Ray gave up: what workers wrote still counts, and no run may stay RUNNING
            log.debug("Tune", exc_info=True)
            self.options.say(f"Ray ended the run ({first_line(error)}); run again to go on")
        finally:
            stop.set()
            thread.join()
            shutil.rmtree(scratch, ignore_errors=True)
        if self.lost.is_set():  # the study belongs to another driver now: write nothing more
            return
        courier.patient = False  # the last chance of this run: ask once more whatever happened before
        courier.poll()
        self._collect(courier)

    def _pass_on_drains(self, told: dict[str, int]) -> dict[str, int]:
        """Tells workers which nodes Ray drains, where that has changed; what is known now."""
        try:
            drained = draining_nodes()
        except Exception as error:  # Ray's own state, not an interface it promises
            if not self._drains_unknown:
                log.warning("Ray does not say which nodes it drains (%s); a drained node's trials go on elsewhere", error)
            self._drains_unknown = True
            return told
        if drained != told:
            tell_nodes(self.storage, self.fence.driver, drained)
        return drained

    def _fit_until_none_is_preempted(self, missing: list[Trial], manifest: Manifest, at_once: int, scratch: str) -> None:
        """Trials that left on notice start again elsewhere, or here when nobody acted on the notice.

        Those that ran out of memory beside others start again after them, one at a time.
        """
        crowded: list[Trial] = []
        while missing and not self.stopping.is_set() and not self.lost.is_set():
            ended = self._fit(missing, manifest, at_once, scratch)
            crowded += [trial for trial in missing if ended.get(trial.id) == "crowded"]
            missing = [trial for trial in missing if ended.get(trial.id) == "preempted"]
            if missing and not self.stopping.is_set():
                self.options.say(f"{', '.join(trial.name for trial in missing)}: left on notice, go on")
                self.stopping.wait(POLL_S)
            if crowded and not missing:
                self.options.say(f"{', '.join(trial.name for trial in crowded)}: out of memory beside others, go on alone")
                missing, crowded, at_once = crowded, [], 1

    def _fit(self, missing: list[Trial], manifest: Manifest, at_once: int, scratch: str) -> dict[str, str]:
        """Runs these trials, `at_once` side by side; {trial: how it ended}, where it said so."""
        resources, backend = self.plan.study.resources, self.plan.backend
        jobs = {trial.id: job_of(trial, self.plan, self.storage, manifest, self.fence.driver) for trial in missing}
        trainable = tune.with_parameters(
            run_trial, jobs=jobs, backend=backend, cpus=resources.cpus_per_worker, retries=resources.max_failures,
            patience=resources.quarantine_after, alone=at_once == 1,
        )  # fmt: skip
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
                failure_config=tune.FailureConfig(max_failures=NODE_LOSSES),
            ),
        ).fit()
        for result in grid:
            if result.error is not None and result.config:
                reason = (str(result.error).strip().splitlines() or [type(result.error).__name__])[-1][:500]
                self.ledger.append("failed", result.config["trial"], reason=f"workers died: {reason}")
        ended = [(result.metrics or {}).get("ended") for result in grid]
        if any(how is None and result.error is None for how, result in zip(ended, grid, strict=True)):
            raise KeyboardInterrupt  # Tune answers the first one by ending early
        return {result.config["trial"]: str(how) for how, result in zip(ended, grid, strict=True) if how and result.config}

    def _end(self, tracker: Tracker, courier: Courier) -> Exit:
        faults.point("driver.end")
        states = self.ledger.states(trial.id for trial in self.plan.trials)
        names = {trial.id: trial.name for trial in self.plan.trials}
        for trial, state in states.items():
            if state.state in ("failed", "quarantined"):
                self.options.say(f"{names[trial]:<34} {state.state}: {state.reason}")
            if state.state != "finished":
                courier.mark_ended(trial, "FAILED" if state.state in ("failed", "quarantined") else "KILLED")
        complete = all(state.state == "finished" for state in states.values())
        complete = complete and not spoilt(self.storage, self.plan, states)
        tracked = not self._untracked and all(state.tracked_in == self._where for state in states.values())
        try:
            tracker.mark(tracker.parent, "FINISHED" if complete and tracked else "FAILED")
        except (MlflowException, OSError) as error:
            log.warning("MLflow did not take the end of the study (%s); run again to send it", first_line(error))
            tracked = False
        if complete and tracked:
            return Exit.COMPLETE
        return Exit.FAILED if any(state.state == "failed" for state in states.values()) else Exit.INCOMPLETE


def trials_to_run(storage: Storage, plan: Plan, ledger: Ledger, retry_quarantined: bool = False) -> list[Trial]:
    """The trials that a run starts: those that are not over, spoilt ones, and if wanted those that were set aside."""
    states = ledger.states(trial.id for trial in plan.trials)
    again = spoilt(storage, plan, states)
    if retry_quarantined:
        again |= {trial for trial, state in states.items() if state.state == "quarantined"}
    return [trial for trial in plan.trials if states[trial.id].state not in OVER or trial.id in again]


def spoilt(storage: Storage, plan: Plan, states: dict[str, TrialState]) -> set[str]:
    """Finished trials whose result or step log is damaged or gone and can be written again from a checkpoint.

    Raises StudyError naming the file where it cannot.
    """
    found = set()
    for trial in plan.trials:
        if states[trial.id].state != "finished":
            continue
        try:
            result_of(storage, trial.id, states[trial.id])
            check_steps(storage, trial.id, states[trial.id])
        except UnreadableResult as error:
            if not storage.list(f"trials/{trial.id}/checkpoints"):
                raise StudyError(f"{error} (it has no checkpoint to write it from)") from error
            found.add(trial.id)
    return found


def to_stderr(line: str) -> None:
    """Progress where it does not mix with a report on standard output."""
    print(without_password(line), file=sys.stderr, flush=True)
