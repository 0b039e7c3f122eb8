"""Batches of documents through the tokenizer, here or in worker processes, in order and each only once.

The parent reads and splits the text; workers encode and write. At most workers + 1 batches are in flight, so memory
stays bounded. A worker ends when its parent does: the standard pool would leave it waiting for ever.
"""

import hashlib
import itertools
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait

from tokenizers import Tokenizer

from services.data import shards
from services.data.progress import Progress
from services.data.shards import Batch, CacheError, Record, Writer

SPARE_DISK = 1.05  # frames and records beside the tokens
SAMPLE_CHARACTERS = 1 << 16

_Submit = Callable[[Batch, Record | None], "Future[Record]"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to encode. `known` are the records of a damaged cache, which must come out equal, or None.

    `text_bytes` estimates the whole text, None if unknown; `held_out_percent` is the split.
    """

    writer: Writer
    tokenizer: Tokenizer
    held_out_percent: float
    known: list[Record] | None
    text_bytes: int | None
    workers: int
    progress: bool


def encode_batches(documents: Iterable[str], plan: Plan) -> tuple[list[Record], str]:
    """Write every batch that is not there yet; the records in order and the sha256 of the held-out documents.

    Raises CacheError (not enough disk, text changed under a damaged cache, a worker died), OSError from the disk,
    SourceError from the text.
    """
    records: dict[int, Record] = {}
    pending: deque[tuple[Batch, Future[Record]]] = deque()
    held_out_sum, disk_checked = hashlib.sha256(), False

    def finish_first() -> None:
        batch, future = pending.popleft()
        records[batch.number] = future.result()
        progress.add(batch.n_bytes)

    with Progress("tokenising", plan.text_bytes, plan.progress) as progress, _pool(plan) as submit:
        for batch in shards.batches(documents, plan.held_out_percent):
            held_out_sum.update(b"".join(batch.held_out_sums))
            expected = _expected(batch, plan)
            record = plan.writer.kept(batch)
            if record is not None:
                records[batch.number] = record
                progress.add(batch.n_bytes)
                continue
            if not disk_checked:
                _check_disk(batch, plan)
                disk_checked = True
            pending.append((batch, submit(batch, expected)))
            if len(pending) > plan.workers:
                finish_first()
        while pending:
            finish_first()
    if plan.known is not None and len(records) != len(plan.known):
        raise _changed(plan)
    return [records[number] for number in sorted(records)], held_out_sum.hexdigest()


def _expected(batch: Batch, plan: Plan) -> Record | None:
    if plan.known is None:
        return None
    if batch.number >= len(plan.known) or plan.known[batch.number]["text_sha256"] != batch.text_sha256:
        raise _changed(plan)
    return plan.known[batch.number]


def _changed(plan: Plan) -> CacheError:
    return CacheError(
        f"token cache {plan.writer.folder}: damaged, and the text has changed since it was made; "
        "delete the folder and prepare again"
    )


def _check_disk(batch: Batch, plan: Plan) -> None:
    """Raise CacheError unless the disk can take what is still to be written, judged by a sample of this batch."""
    documents = itertools.islice(batch.train or batch.held_out, 100)
    sample = "".join(itertools.islice(itertools.chain.from_iterable(documents), SAMPLE_CHARACTERS))
    tokens = shards.encode([sample], plan.tokenizer, None, plan.writer.dtype)
    bytes_per_text_byte = tokens.nbytes / max(1, len(sample.encode()))
    there = sum(file.stat().st_size for file in plan.writer.folder.glob("*.arrow"))
    whole = max(plan.text_bytes or 0, batch.n_bytes)
    need = int(whole * bytes_per_text_byte * SPARE_DISK) - there
    free = shutil.disk_usage(plan.writer.folder).free
    if need > free:
        raise CacheError(
            f"token cache {plan.writer.folder}: no disk space: about {need / 1e9:.3g} GB are needed, "
            f"{free / 1e9:.3g} GB are free; free some or choose another cache folder"
        )


@contextmanager
def _pool(plan: Plan) -> Iterator[_Submit]:
    """A function that has a batch written: at once where there is one worker, else in a process of its own."""
    if plan.workers == 1:
        yield lambda batch, expected: _done(plan.writer.write(batch, plan.tokenizer, expected))
        return
    pool = ProcessPoolExecutor(
        plan.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(plan.tokenizer.to_str(),),
    )
    try:
        yield lambda batch, expected: pool.submit(_write_in_worker, plan.writer, batch, expected)
    except BrokenProcessPool:
        raise CacheError(
            f"token cache {plan.writer.folder}: a tokenising process died (out of memory?); "
            "run again with fewer workers: finished batches are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done(record: Record) -> "Future[Record]":
    future: Future[Record] = Future()
    future.set_result(record)
    return future


_tokenizer: Tokenizer | None = None  # one per worker process, parsed once


def _start_worker(tokenizer_json: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.from_str(tokenizer_json)
    _tokenizer.encode_special_tokens = True
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process only"
    wait([parent.sentinel])
    os._exit(1)


def _write_in_worker(writer: Writer, batch: Batch, expected: Record | None) -> Record:
    assert _tokenizer is not None, "the pool starts every worker with _start_worker"
    return writer.write(batch, _tokenizer, expected)
