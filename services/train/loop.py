"""The training loop of one trial, the same on every rank and behind both backends.

The global batch of a step is a pure function of (seed, step); ranks take slices of it, so the batch does not depend on their
number. Losses stay on the device and are read every LOG_EVERY steps. Resuming puts back weights, optimizer shards, generators,
the step log and the hash chain over sample ids; what follows is then equal bit for bit to a run that was never stopped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from decay_core.decay_stats import decay_profile
from decay_core.kernel_seam import forget_scans, scans_taken
from decay_core.model import build_model
from decay_core.recipe import Recipe
from services.data.corpus import Corpus, Windows, open_corpus
from services.data.order import INITIAL_HASH, SampleOrder, next_hash, shard
from services.study import faults
from services.study.fence import Fence, claim
from services.study.ledger import Ledger
from services.study.storage import Storage
from services.train import checkpoint
from services.train.engine import Engine, is_finite, one_engine
from services.train.finish import finish
from services.train.job import TrialFailed, TrialJob, World
from services.train.notice import NOTICE_S, Preempted, due
from services.train.randomness import make_deterministic, seed_rank
from services.train.saver import Saver
from services.train.step_log import StepLog
from services.train.telemetry import FOLDER as HISTOGRAMS
from services.train.telemetry import Telemetry, as_metrics, file_name, histogram_file, mend_histograms, read_histograms

log = logging.getLogger(__name__)
LOG_EVERY = 10
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
SHOWN_WINDOWS = 16  # of a batch whose loss is not finite
PROFILE_KEYS = ("median", "p25", "p75", "mean", "min", "max")
PROFILE_TOKENS = 2048  # the paper's decay figures: one forward over 2048 tokens


@dataclass(kw_only=True)
class Progress:
    """What changes from step to step and is carried by checkpoints."""

    step: int = 0
    order_hash: str = INITIAL_HASH
    train_seconds: float = 0.0
    held_out_loss: float | None = None
    held_out_accuracy: float | None = None
    held_out_sequence_accuracy: float | None = None
    initial_profile: list[dict[str, float]] = field(default_factory=list)
    histograms: dict[str, str] = field(default_factory=dict)
    world_sizes: list[int] = field(default_factory=list)  # the numbers of ranks that trained, one after the other
    kernels: list[str] = field(default_factory=list)  # which implementations computed the recurrences, over all attempts


class Trainer:
    """One rank of one trial. `run` trains to the end and returns the result as JSON values (rank 0) or an empty dict."""

    def __init__(self, job: TrialJob, world: World, engine: Engine, cache: Corpus) -> None:
        self.job, self.world, self.engine, self.cache = job, world, engine, cache
        self.recipe: Recipe = job.training_recipe
        self.study_storage = Storage(job.storage)
        self.storage = self.study_storage.child(f"trials/{job.trial}")
        self.order = SampleOrder(cache.train.windows(self.recipe.seq_len), job.seed)
        self.telemetry = Telemetry(job.model_config.size.layers, world)
        self.progress = Progress()
        self.log: StepLog | None = None
        self.fence: Fence | None = None
        self.saver: Saver
        self.histograms: dict[str, bytes] = {}  # rank 0: every telemetry file so far, which checkpoints carry along
        self._pending: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._clock = time.monotonic()
        self._flush_every = LOG_EVERY
        self._saved_step = -1

    def run(self) -> dict[str, Any]:
        """Resumes or starts, trains every remaining step, finishes. Collective."""
        forget_scans()
        self._resume()
        self._announce()
        self._clock = time.monotonic()
        try:
            while self.progress.step < self.recipe.steps:
                self._step()
            self.saver.wait()
        finally:
            self.saver.close()
        return finish(self)

    def _resume(self) -> None:
        found: list[Any] = [None]
        kept = b""
        if self.world.leads:
            self.fence = claim(self.study_storage, self.job.driver, self.job.trial)
            checkpoint.sweep(self.storage)
            found = [_outcome(lambda: checkpoint.newest_valid(self.storage))]
        self._share(found)
        if isinstance(found[0], str):
            raise TrialFailed(found[0])
        if found[0] is None:
            self.progress.initial_profile = self.profile()
        else:
            name, complete = found[0]
            elastic = self.job.rank_resources.elastic
            position = checkpoint.load(self.engine, self.storage, name, complete, self.world, elastic)
            self.progress = Progress(step=position.step, order_hash=position.order_hash, **position.extra)
            self.progress.world_sizes = self.progress.world_sizes or [position.world_size]  # earlier releases wrote none
            kept = self.storage.read(f"{checkpoint.FOLDER}/{name}/steps.jsonl") or b""
            if self.fence is not None:
                self._take_histograms(name)
        if self.progress.world_sizes[-1:] != [self.world.size] and self.progress.step < self.recipe.steps:
            self.progress.world_sizes.append(self.world.size)
        if self.fence is not None:
            self.log = StepLog(self.storage, self.fence, kept)
        self.saver = Saver(self.engine, self.storage, self.world, self.fence, self.log)
        if found[0] is not None:
            self.saver.whole.add(found[0][0])

    def _take_histograms(self, name: str) -> None:
        """Those of before the checkpoint, from its copies, which also mend what is damaged (an early release made none)."""
        copies = self.storage.child(f"{checkpoint.FOLDER}/{name}")
        digests = self.progress.histograms
        self.histograms = read_histograms(self.storage, digests) | read_histograms(copies, digests)
        assert self.fence is not None
        with self.fence.held():
            mend_histograms(self.storage, self.histograms)

    def _announce(self) -> None:
        """Says in the ledger that an attempt began: where, with which processes, from which step."""
        who: list[Any] = [f"{socket.gethostname()}:{os.getpid()}"] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(who, f"{socket.gethostname()}:{os.getpid()}")
        if self.world.leads:
            details = {"processes": who, "from_step": self.progress.step, "driver": self.job.driver}
            Ledger(self.study_storage, self.fence).append("attempt", self.job.trial, **details)

    def _step(self) -> None:
        recipe, step = self.recipe, self.progress.step
        observed = (step + 1) % recipe.telemetry_every == 0 or step == 0
        if observed:
            self.telemetry.begin()
        faults.point("train.data", rank=self.world.rank, step=step + 1)
        ids = self.order.ids(step, recipe.batch_size)
        tokens_bt, targets_bt = self._batch(self.cache.train, shard(ids, self.world.rank, self.world.size))
        parts = self.engine.accumulate
        targets = [None] * parts if targets_bt is None else targets_bt.chunk(parts)
        norm: Any = None
        losses = []
        for index, (micro, wanted) in enumerate(zip(tokens_bt.chunk(parts), targets, strict=True)):
            watching = observed and index == 0
            faults.point("train.forward", rank=self.world.rank, step=step + 1, seed=self.job.seed)
            losses.append(self.engine.backward(micro, self.telemetry.observe if watching else None, wanted))
            faults.point("train.reduce", rank=self.world.rank, step=step + 1)
            norm = self.engine.advance(recipe.lr_at(step))
        self._losses.append(torch.stack(losses).mean())
        self.progress.step = step + 1
        self.progress.order_hash = next_hash(self.progress.order_hash, step, ids)
        self._pending.append({"step": step + 1, "train/learning_rate": recipe.lr_at(step), "train/grad_norm": norm})
        self._after_step(observed)

    def _after_step(self, observed: bool) -> None:
        recipe, done = self.recipe, self.progress.step
        last = done == recipe.steps
        save = done % recipe.checkpoint_every == 0 or last
        judge = done % recipe.eval_every == 0 or last
        if not (save or judge or observed or done % self._flush_every == 0):
            return
        count = len(self._losses)
        self._flush_losses()
        seconds = (time.monotonic() - self._clock) / count
        if judge:
            self._pending[-1].update(self._judge())
        self._check_finite()
        if observed:
            stats = self.telemetry.reduce()
            self._pending[-1].update(as_metrics(stats))
            if self.fence is not None:
                data = histogram_file(done, stats)
                self.histograms[file_name(done)] = data
                self.progress.histograms[file_name(done)] = hashlib.sha256(data).hexdigest()
                with self.fence.held():
                    self.storage.write(f"{HISTOGRAMS}/{file_name(done)}", data)
        if self.log is not None:
            faults.point("train.log", step=done)
            self.log.append(self._pending)
            faults.point("train.logged", step=done)
        self._pending.clear()
        if save:
            self._save()
        self._leave_if_asked(seconds)
        self._clock = time.monotonic()

    def _leave_if_asked(self, step_seconds: float) -> None:
        """Saves and raises Preempted when any rank has notice. Collective; also agrees how often to look from now on.

        Raises what stopped a checkpoint, on all ranks, as soon as one of them has seen it.
        """
        reason, begun = due(self.study_storage, self.job.driver), time.monotonic()
        agreed = torch.tensor([float(bool(reason)), step_seconds, float(self.saver.failed)], device=self.world.device)
        if self.world.size > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        asked, slowest, broken = agreed.tolist()
        if broken:
            self.saver.wait()
        self._flush_every = max(1, min(LOG_EVERY, int(NOTICE_S / 6 / max(slowest, 1e-9))))
        if not asked or self.progress.step == self.recipe.steps:
            return
        if self._saved_step != self.progress.step:
            self._save()
        self.saver.wait()
        if self.world.leads:
            said = reason or "another rank's node has notice"
            details = {"step": self.progress.step, "reason": said, "seconds": round(time.monotonic() - begun, 3)}
            Ledger(self.study_storage, self.fence).append("preempted", self.job.trial, **details)
        raise Preempted(reason)

    def _flush_losses(self) -> None:
        """Reads the losses and norms of the steps since the last flush: the only wait for the device."""
        losses = torch.stack(self._losses).float()
        if self.world.size > 1:
            dist.all_reduce(losses)
            losses /= self.world.size
        values = losses.tolist()
        seconds = time.monotonic() - self._clock
        self.progress.train_seconds += seconds
        tokens = self.recipe.batch_size * self.recipe.seq_len * len(values)
        for record, loss in zip(self._pending, values, strict=True):
            record["train/loss"] = loss
            record["train/grad_norm"] = float(record["train/grad_norm"])
            record["train/tokens_per_second"] = tokens / max(seconds, 1e-9)
        self._losses.clear()

    def _check_finite(self) -> None:
        for record in self._pending:
            for key in ("train/loss", "train/grad_norm", "held_out/loss"):
                if not is_finite(record.get(key, 0.0)):
                    windows = self.order.ids(record["step"] - 1, self.recipe.batch_size)
                    said = ", ".join(map(str, windows[:SHOWN_WINDOWS])) + (" ..." if len(windows) > SHOWN_WINDOWS else "")
                    raise TrialFailed(
                        f"{key} is {record[key]} at step {record['step']} (windows {said} of the training data); last "
                        "checkpoint kept; lower recipe.lr or raise precision, under another study name"
                    )

    def _save(self) -> None:
        files = {}
        if self.log is not None:
            files = {
                "steps.jsonl": self.log.content(),
                "deepspeed_config.json": json.dumps(self.engine.config, indent=1).encode(),
                **{f"{HISTOGRAMS}/{name}": data for name, data in self.histograms.items()},
            }
        progress = self.progress
        progress.kernels = self.kernels()
        position = checkpoint.Position(
            step=progress.step,
            order_hash=progress.order_hash,
            world_size=self.world.size,
            extra={
                "train_seconds": progress.train_seconds,
                "held_out_loss": progress.held_out_loss,
                "held_out_accuracy": progress.held_out_accuracy,
                "held_out_sequence_accuracy": progress.held_out_sequence_accuracy,
                "initial_profile": progress.initial_profile,
                "histograms": dict(progress.histograms),
                "world_sizes": progress.world_sizes,
                "kernels": progress.kernels,
            },
        )
        self.saver.save(position, files)
        self._saved_step = progress.step

    def kernels(self) -> list[str]:
        """What this attempt and those before it have taken, in an order that does not depend on them."""
        return sorted({*self.progress.kernels, *scans_taken()})

    def _judge(self) -> dict[str, float]:
        """Scores the held-out windows, keeps the scores for the result and returns them as metrics. Collective."""
        loss, *shares = self.held_out_scores(self.recipe.eval_sequences)
        self.progress.held_out_loss = loss
        metrics = {"held_out/loss": loss}
        if shares:
            self.progress.held_out_accuracy, self.progress.held_out_sequence_accuracy = shares
            metrics |= {"held_out/accuracy": shares[0], "held_out/sequence_accuracy": shares[1]}
        return metrics

    def held_out_scores(self, sequences: int) -> list[float]:
        """Means over the first `sequences` held-out windows, shared over the ranks: loss in nats, and where the data says
        what is asked for, the shares of targets and of whole windows that are right. Collective.
        """
        stream = self.cache.held_out
        total = min(sequences, stream.windows(self.recipe.seq_len))
        mine = list(range(self.world.rank, total, self.world.size))
        rounds = -(-total // self.world.size)
        size = self.job.rank_resources.micro_batch_size
        summed = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for start in range(0, rounds, size):
            ids = mine[start : start + size]
            # a rank that has run out still takes part (ZeRO-3 gathers are collective), with weight 0
            scores = self._scores(*self._batch(stream, ids or [0]))
            weight = torch.tensor([float(len(ids))], device=self.world.device)
            summed = summed + torch.cat([scores.double() * len(ids), weight])
        if self.world.size > 1:
            dist.all_reduce(summed)
        return [float(total / summed[-1]) for total in summed[:-1]]

    def _scores(self, tokens_bt: Tensor, targets_bt: Tensor | None) -> Tensor:
        if targets_bt is None:
            return self.engine.loss(tokens_bt).reshape(1)
        return self.engine.judge(tokens_bt, targets_bt)

    def profile(self) -> list[dict[str, float]]:
        """The paper's decay figure: lambda per layer over the first PROFILE_TOKENS held-out tokens. Collective under ZeRO-3."""
        rows = self.cache.held_out.excerpt(PROFILE_TOKENS, self.recipe.seq_len)
        with torch.no_grad():
            profile = decay_profile(self.engine.model, torch.from_numpy(rows).to(self.world.device))
        return [{"layer": row["layer"] + 1} | {key: row[key] for key in PROFILE_KEYS} for row in profile]

    def _batch(self, windows: Windows, ids: list[int]) -> tuple[Tensor, Tensor | None]:
        """Tokens of the windows and their targets, None where every token's target is the next one."""
        examples = [windows.example(index, self.recipe.seq_len) for index in ids]
        tokens_bt = self._on_device([tokens for tokens, _ in examples])
        targets = [targets for _, targets in examples if targets is not None]
        return tokens_bt, self._on_device(targets) if targets else None

    def _on_device(self, rows: list[Any]) -> Tensor:
        return torch.stack([torch.from_numpy(row) for row in rows]).to(self.world.device, non_blocking=True)

    def _share(self, box: list[Any]) -> None:
        if self.world.size > 1:
            dist.broadcast_object_list(box, 0)


def together(world: World, call: Callable[[], Any]) -> Any:
    """The value of `call` on this rank, unless it is refused on any rank: then every rank raises TrialFailed.

    Without this the refusing rank would leave and the others wait for it in their next collective.
    """
    value, reason = None, ""
    try:
        value = call()
    except ValueError as refusal:  # the data's own errors
        reason = str(refusal)
    except TrialFailed as refusal:
        reason = str(refusal)
    reasons = [reason]
    if world.size > 1:
        reasons = [""] * world.size
        dist.all_gather_object(reasons, reason)
    for rank, said in enumerate(reasons):
        if said:
            raise TrialFailed(said if world.size == 1 else f"rank {rank}: {said}")
    return value


def _outcome(call: Any) -> Any:
    """The value of a call, or the message of its refusal, so that all ranks hear the same."""
    try:
        return call()
    except TrialFailed as refusal:
        return str(refusal)


def open_data(job: TrialJob) -> Corpus:
    """The data of a job on this node: the shared cache, or the same tokens made again where it cannot be reached.

    Raises TrialFailed when the digest is not the study's.
    """
    cache = open_corpus(Path(job.data["path"]), job.data["spec"])
    if cache.digest != job.data["digest"]:
        raise TrialFailed(
            f"data at {cache.path} has digest {cache.digest[:12]}, the study started with {job.data['digest'][:12]}; "
            "restore the data"
        )
    return cache


def train_trial(job: TrialJob, world: World) -> dict[str, Any]:
    """Trains one trial to its end on this rank; collective over `world`, whose process group must exist.

    Returns the result (rank 0) as JSON values. Raises TrialFailed for what would fail again the same way.
    """
    resources = job.rank_resources
    make_deterministic(resources.threads, resources.deterministic)
    cache: Corpus = together(world, lambda: open_data(job))
    model = build_model(job.model_config, seed=job.seed)
    seed_rank(job.seed, world.rank)
    with one_engine(model, job.training_recipe, resources, world) as engine:
        try:
            return Trainer(job, world, engine, cache).run()
        except (OSError, RuntimeError) as error:
            said = disk_trouble(error)
            if not said:
                raise
            where = Storage(job.storage).root
            raise TrialFailed(f"{said} below {where}; what was saved before is kept: mend it and run again") from error


def disk_trouble(error: Exception) -> str:
    """What a full, broken or read-only disk made of a write, in a few words; empty for any other error."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.strerror} at {error.filename}" if error.filename else str(error.strerror)
    # torch's own writer does not say why; its reader lives in the same file
    said = str(error)
    unwritten = "PytorchStreamWriter" in said or ("inline_container.cc" in said and "PytorchStreamReader" not in said)
    return "a checkpoint file could not be written whole (is the disk full?)" if unwritten else ""
