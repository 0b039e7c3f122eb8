"""A corpus as tokens on disk, made once and then only read: `prepare` makes it, `open_cache` opens it.

`manifest.json` is written last, so its presence means that the cache is complete. Until then every finished batch is
kept: a preparer that was killed goes on where it stopped, and ends with the same digest, whatever the number of
workers. The digest stands for the tokens and the choices that made them, not for paths, times or hosts.
A damaged shard is rebuilt only into the very tokens it held; if the text has changed since, the cache is refused.

Source: no end-of-text between documents ("none") is what the paper's code does (flame/data.py); "eos" is the remedy.
"""

import errno
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from services.data import sources, tokenizers
from services.data.encoding import Plan, encode_batches
from services.data.manifest import FORMAT, MANIFEST, digest, read_manifest, unigram_figures
from services.data.shards import (
    SPLITS,
    CacheError,
    Record,
    Writer,
    check_shard,
    document_sum,
    is_held_out,
    record_name,
    write_atomically,
)
from services.data.token_stream import TokenStream

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which text, cut into which tokens. `held_out_percent` None takes the source's own (sotu 5, others 1 or 5).

    The split takes whole documents by the sha256 of their text, in steps of 0.01 percent.
    """

    source: str
    tokenizer: str = "gpt2"
    boundary: Literal["none", "eos"] = "none"
    held_out_percent: float | None = None
    text_field: str = "text"
    max_documents: int | None = None

    def check(self) -> None:
        """Raise CacheError or TokenizerError (both ValueError) where a value is impossible."""
        tokenizers.check_name(self.tokenizer)
        if self.boundary not in ("none", "eos"):
            raise CacheError(f"data: boundary {self.boundary!r} does not exist; use none or eos")
        percent = 0.0 if self.held_out_percent is None else self.held_out_percent
        if not 0 <= percent < 100 or abs(100 * percent - round(100 * percent)) > 1e-6:
            raise CacheError(f"data: held_out_percent {percent} must be at least 0, below 100 and in steps of 0.01")
        if self.max_documents is not None and self.max_documents < 1:
            raise CacheError(f"data: max_documents {self.max_documents} leaves no text; use at least 1 or leave it out")


class TokenCache:
    """A complete cache. `train` and `held_out` are token streams; `manifest` is all that is known about them."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.train, self.held_out = (TokenStream(path, [record[split] for record in manifest["shards"]]) for split in SPLITS)

    @property
    def digest(self) -> str:
        """sha256 hex over tokens, tokenizer and the choices that made them."""
        return str(self.manifest["digest"])

    @property
    def held_out_digest(self) -> str:
        """sha256 hex over the held-out documents' text, whatever the tokenizer."""
        return str(self.manifest["held_out"]["documents_sha256"])

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer, without padding."""
        return int(self.manifest["tokenizer"]["entries"])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises CacheError where its file was changed."""
        path = self.path / TOKENIZER
        try:
            loaded = tokenizers.load(path)
            good = tokenizers.digest(loaded) == self.manifest["tokenizer"]["sha256"]
        except Exception:  # the library raises bare Exception for a file it cannot read
            good = False
        if not good:
            raise CacheError(f"token cache: {path} is missing or changed; delete the folder and prepare again")
        return loaded


def open_cache(path: Path, verify: bool = False) -> TokenCache:
    """Open a complete cache. File sizes are always checked; `verify` also sums every token (about 1 GB/s).

    Raises CacheError where the cache is incomplete or damaged.
    """
    manifest = read_manifest(path)
    cache = TokenCache(path, manifest)
    for record in manifest["shards"]:
        for split in SPLITS:
            check_shard(path, record[split], verify=verify)
    if verify or not (path / TOKENIZER).is_file():
        cache.tokenizer()
    return cache


def prepare(spec: DataSpec, cache_root: Path, *, workers: int = 1, progress: bool = True) -> TokenCache:
    """Make the cache of `spec` in a folder below `cache_root`, or open it if it is there.

    Uses `workers` processes; a second preparer of the same cache waits for the first. Raises CacheError, SourceError
    or TokenizerError (all ValueError), each with one line: disk full, text missing, cache damaged beyond repair.
    """
    spec.check()
    if workers < 1:
        raise CacheError(f"data: {workers} workers; use at least 1")
    source = sources.find(spec.source)
    percent = source.held_out_percent if spec.held_out_percent is None else spec.held_out_percent
    spec = replace(spec, held_out_percent=float(percent))
    folder = cache_root / _folder_name(spec, source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            return _open_or_build(_Job(spec=spec, source=source, folder=folder, workers=workers, progress=progress))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"token cache {folder}: no disk space left; free some or choose another cache folder, "
                "then run again: finished batches are kept"
            ) from error
        raise CacheError(f"token cache {folder}: {error.strerror or error}; check the folder") from error


@dataclass(frozen=True, kw_only=True)
class _Job:
    spec: DataSpec
    source: sources.Source
    folder: Path
    workers: int
    progress: bool

    def documents(self) -> Iterator[str]:
        return itertools.islice(self.source.documents(self.spec.text_field), self.spec.max_documents)

    def training_documents(self) -> Iterator[str]:
        percent = self.spec.held_out_percent or 0.0
        return (text for text in self.documents() if not is_held_out(document_sum(text), percent))

    def text_bytes(self) -> int | None:
        return self.source.text_bytes() if self.spec.max_documents is None else None


def _open_or_build(job: _Job) -> TokenCache:
    known: dict[str, Any] | None = None
    if (job.folder / MANIFEST).exists():
        try:
            return open_cache(job.folder)
        except CacheError:
            known = read_manifest(job.folder)  # raises where not a shard but the manifest itself is damaged
    manifest = _build(job, known)
    if known is not None and manifest["digest"] != known["digest"]:
        raise CacheError(
            f"token cache {job.folder}: damaged, and the text has changed since it was made; "
            "delete the folder and prepare again"
        )
    write_atomically(job.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return open_cache(job.folder)


def _build(job: _Job, known: dict[str, Any] | None) -> dict[str, Any]:
    """Write the tokenizer and all shards that are not there yet; return the manifest without writing it."""
    spec, folder = job.spec, job.folder
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    tokenizer = tokenizers.build(spec.tokenizer, job.training_documents())
    sum_, entries = tokenizers.digest(tokenizer), tokenizer.get_vocab_size()
    if known is not None and known["tokenizer"]["sha256"] != sum_:
        raise CacheError(
            f"token cache {folder}: damaged, and its tokenizer cannot be made again from today's text; "
            "delete the folder and prepare again"
        )
    write_atomically(folder / TOKENIZER, tokenizer.to_str().encode())
    writer = Writer(
        folder=folder,
        tokenizer_sha256=sum_,
        dtype="uint16" if entries <= 1 << 16 else "uint32",
        end_of_text=entries - 1 if spec.boundary == "eos" else None,
    )
    plan = Plan(
        writer=writer,
        tokenizer=tokenizer,
        held_out_percent=spec.held_out_percent or 0.0,
        known=known["shards"] if known else None,
        text_bytes=job.text_bytes(),
        workers=job.workers,
        progress=job.progress,
    )
    records, held_out_sum = encode_batches(job.documents(), plan)
    _remove_stale(folder, records)
    return _manifest(job, writer, records, entries, held_out_sum)


def _remove_stale(folder: Path, records: list[Record]) -> None:
    """Batches that an earlier attempt wrote from a longer version of the text."""
    wanted = {record_name(record["batch"]) for record in records} | {MANIFEST, TOKENIZER}
    wanted |= {record[split]["file"] for record in records for split in SPLITS}
    for file in folder.iterdir():
        if file.name not in wanted and re.fullmatch(r"\d{5,}\.(json|(train|held_out)\.arrow)", file.name):
            file.unlink()


def _manifest(job: _Job, writer: Writer, records: list[Record], entries: int, held_out_sum: str) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "source": {"name": job.spec.source, "description": job.source.description, "licence": job.source.licence},
        "spec": asdict(job.spec),
        "tokenizer": {"name": job.spec.tokenizer, "sha256": writer.tokenizer_sha256, "entries": entries},
        "dtype": writer.dtype,
        "made_with": {name: metadata.version(name) for name in ("tokenizers", "pyarrow", "datasets")},
    }
    for split in SPLITS:
        manifest[split] = {key: sum(record[split][key] for record in records) for key in ("documents", "tokens", "text_bytes")}
    manifest["held_out"]["documents_sha256"] = held_out_sum
    manifest["shards"] = records
    if not manifest["train"]["tokens"]:
        raise CacheError(
            f"data: source {job.spec.source!r} leaves no training text; check the source, held_out_percent and max_documents"
        )
    cache = TokenCache(job.folder, manifest)
    manifest |= unigram_figures(cache.train.counts(entries), cache.held_out.counts(entries))
    manifest["digest"] = digest(manifest)
    return manifest


def _folder_name(spec: DataSpec, source: sources.Source) -> str:
    """Such as sotu-bpe-2048-1a2b3c4d: readable, and different for every choice in the spec."""
    content = json.dumps({**asdict(spec), "source": source.identity, "format": FORMAT}, sort_keys=True)
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", source.slug)[:40]
    return f"{slug}-{spec.tokenizer}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one preparer at a time. The lock lies beside the folder, so that the folder may be deleted by hand."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"token cache {folder.name}: another process is preparing it, waiting", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
