"""One batch of documents on disk: a file of training tokens, a file of held-out tokens and a record of both.

Documents are cut into batches in the order of the source, by bytes of text alone, so the files do not depend on who
writes them. A batch exists once its record does: tokens are written to a temporary name, flushed, renamed, and the
record comes last. The sums are over the token bytes (little endian), not over the file, since the frame that Arrow
puts around them may change with its version.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

from services.data import tokenizers
from services.data.sources import SourceError

SPLITS = ("train", "held_out")
FIRST_BATCH_BYTES = 2 << 20  # small first batches give small corpora parallel work and points to resume from,
LARGEST_BATCH_BYTES = 64 << 20  # large later ones keep a 10 B token corpus below 1000 files
BATCHES_PER_SIZE = 4

Record = dict[str, Any]


class CacheError(ValueError):
    """A token cache that is incomplete, damaged or cannot be written; the message is one line."""


@dataclass(kw_only=True)
class Batch:
    """Consecutive documents, already split. `document_sums` holds their sha256 in order, both splits together."""

    number: int
    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    train_bytes: int = 0
    held_out_bytes: int = 0
    document_sums: list[bytes] = field(default_factory=list)
    held_out_sums: list[bytes] = field(default_factory=list)

    @property
    def text_sha256(self) -> str:
        """Stands for the batch's documents and their bounds."""
        return hashlib.sha256(b"".join(self.document_sums)).hexdigest()

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of text, both splits."""
        return self.train_bytes + self.held_out_bytes


def document_sum(document: str) -> bytes:
    """sha256 of the text. Raises SourceError for text that is not Unicode (a lone surrogate)."""
    try:
        return hashlib.sha256(document.encode()).digest()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"a document starting {document[:40]!r} is not valid Unicode ({error.reason}, character "
            f"{error.start}); clean the data"
        ) from None


def is_held_out(sum_: bytes, percent: float) -> bool:
    """The split rule: it depends on the document's text alone, so equal documents share a split."""
    return int.from_bytes(sum_[:8], "big") % 10_000 < round(percent * 100)


def batches(documents: Iterable[str], held_out_percent: float) -> Iterator[Batch]:
    """Cut a stream of documents into batches of 2, 4, … 64 MiB, four of each size, the rest of the last."""
    batch = Batch(number=0)
    for document in documents:
        sum_, size = document_sum(document), len(document.encode())
        batch.document_sums.append(sum_)
        if is_held_out(sum_, held_out_percent):
            batch.held_out.append(document)
            batch.held_out_sums.append(sum_)
            batch.held_out_bytes += size
        else:
            batch.train.append(document)
            batch.train_bytes += size
        if batch.n_bytes >= min(LARGEST_BATCH_BYTES, FIRST_BATCH_BYTES << (batch.number // BATCHES_PER_SIZE)):
            yield batch
            batch = Batch(number=batch.number + 1)
    if batch.document_sums:
        yield batch


def encode(documents: list[str], tokenizer: Tokenizer, end_of_text: int | None, dtype: str) -> NDArray[Any]:
    """All tokens of the documents in order, [n] of `dtype`; `end_of_text` follows each document unless None."""
    with tokenizers.threads(False):
        encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    tail = [] if end_of_text is None else [end_of_text]
    parts = [np.array(document.ids + tail, dtype=dtype) for document in encoded]
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Turns batches into files of `folder`. `tokenizer_sha256` is recorded to recognise files of another tokenizer."""

    folder: Path
    tokenizer_sha256: str
    end_of_text: int | None
    dtype: str

    def write(self, batch: Batch, tokenizer: Tokenizer, expected: Record | None) -> Record:
        """Encode and commit one batch. `expected` is what a finished cache says it held.

        Raises CacheError where the tokens differ from `expected` (nothing is written then), OSError from the disk.
        """
        record: Record = {"batch": batch.number, "text_sha256": batch.text_sha256, "tokenizer_sha256": self.tokenizer_sha256}
        tokens = {split: encode(getattr(batch, split), tokenizer, self.end_of_text, self.dtype) for split in SPLITS}
        for split in SPLITS:
            record[split] = {
                "file": f"{batch.number:05d}.{split}.arrow",
                "documents": len(getattr(batch, split)),
                "text_bytes": getattr(batch, f"{split}_bytes"),
                "tokens": len(tokens[split]),
                "sha256": token_sum(tokens[split]),
            }
            if expected is not None and record[split]["sha256"] != expected[split]["sha256"]:
                raise CacheError(
                    f"token cache {self.folder}: {record[split]['file']} cannot be restored, today's text "
                    "or tokenizer gives other tokens; delete the folder and prepare again"
                )
        for split in SPLITS:
            frame = _frame(tokens[split])
            record[split]["file_bytes"] = len(frame)
            write_atomically(self.folder / record[split]["file"], frame)
        write_atomically(self.folder / record_name(batch.number), json.dumps(record, indent=1).encode())
        return record

    def kept(self, batch: Batch) -> Record | None:
        """The record of this very batch if an earlier attempt wrote it and every token is still right, else None."""
        try:
            record: Record = json.loads((self.folder / record_name(batch.number)).read_bytes())
            same = (record["text_sha256"], record["tokenizer_sha256"]) == (batch.text_sha256, self.tokenizer_sha256)
            if not same:
                return None
            for split in SPLITS:
                check_shard(self.folder, record[split], verify=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record


def record_name(number: int) -> str:
    """File name of the record of batch `number`."""
    return f"{number:05d}.json"


def token_sum(tokens: NDArray[Any]) -> str:
    """sha256 over the tokens as little-endian bytes."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=tokens.dtype.newbyteorder("<")).data).hexdigest()


def read_tokens(path: Path) -> NDArray[Any]:
    """The tokens of a shard, [n], memory mapped and read-only. Raises CacheError where it is not a shard."""
    try:
        with pa.memory_map(str(path)) as file:
            column = pa.ipc.open_file(file).read_all().column("tokens")
        chunks = [chunk.to_numpy(zero_copy_only=True) for chunk in column.chunks]
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise CacheError(
            f"token cache: {path} cannot be read ({type(error).__name__}); "
            "prepare again, which rebuilds this file, or delete the folder"
        ) from None
    return chunks[0] if chunks else np.empty(0, dtype=column.type.to_pandas_dtype())


def check_shard(folder: Path, part: Record, *, verify: bool) -> None:
    """Raise CacheError unless the shard described by `part` is there in full; `verify` also sums its tokens."""
    path = folder / part["file"]
    size = path.stat().st_size if path.is_file() else None
    if size != part["file_bytes"]:
        what = "is missing" if size is None else f"has {size} bytes instead of {part['file_bytes']}"
    elif verify and token_sum(read_tokens(path)) != part["sha256"]:
        what = "holds other tokens than were written"
    else:
        return
    raise CacheError(f"token cache: {path} {what}; prepare again, which rebuilds this file, or delete the folder")


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write, flush to the disk, rename: a reader sees the whole content or none. A failed write leaves no file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _frame(tokens: NDArray[Any]) -> memoryview:
    """The tokens as an Arrow IPC file with one column in one record batch, so that mapping it copies nothing."""
    batch = pa.record_batch([pa.array(tokens)], names=["tokens"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as file:
        file.write_batch(batch)
    return memoryview(sink.getvalue())
