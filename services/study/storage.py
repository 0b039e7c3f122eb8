"""Where a study keeps its files: a folder or any fsspec URI, with writes that either happened or did not.

Surprising: a local folder gets write-to-a-new-name, fsync, rename; an object store gets one `put`, which is atomic there
and has no rename. The rest of the code sees one interface and never asks which it is, except where a process needs a real
path to work in (`local_path`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import fsspec

from services.study import faults
from services.study.secrets import without_password


class StorageError(ValueError):
    """A place that cannot be used, said in one line with the remedy."""


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, no NaN; what digests and ids are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fsync_folder(path: Path) -> None:
    """Makes a rename in `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    fsync_folder(path.parent)


class Storage:
    """A root folder or URI; every name below it is relative, with forward slashes.

    Raises StorageError for a protocol that is not installed or a name that leaves the root, by its spelling or through a
    link.
    """

    def __init__(self, url: str) -> None:
        self.url = url if url.endswith("://") or url == "/" else url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            said = without_password(f"storage {url!r}: {error}")
            raise StorageError(f"{said}; give a folder or install the package named") from error
        protocols = self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        self._local = "file" in protocols
        self._root = str(Path(root).absolute()) if self._local else root.rstrip("/")

    @property
    def address(self) -> str:
        """The root in a form another process can open: an absolute path or the URI, with its password where it has one."""
        return self._root if self._local else self.url

    @property
    def root(self) -> str:
        """The root as messages and records name it: `address` without a password."""
        return without_password(self.address)

    @property
    def local_path(self) -> Path | None:
        """The root as a path, or None on an object store."""
        return Path(self._root) if self._local else None

    def child(self, name: str) -> Storage:
        """The storage rooted at `name` below this one."""
        self._full(name)
        return Storage(f"{self.address}/{name}")

    def read(self, name: str) -> bytes | None:
        """The bytes stored under `name`, or None when there is nothing."""
        try:
            return cast(bytes, self._fs.cat_file(self._full(name)))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def read_from(self, name: str, offset: int) -> bytes | None:
        """What stands after `offset`; None when the file is missing or shorter than `offset` (it was rewritten)."""
        try:
            size = int(self._fs.info(self._full(name))["size"])
            if size < offset:
                return None
            return b"" if size == offset else cast(bytes, self._fs.cat_file(self._full(name), start=offset, end=size))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Stores `data` under `name`, whole or not at all."""
        faults.point("storage.write", file=name.rsplit("/", 1)[-1])
        if self._local:
            write_atomically(Path(self._full(name)), data)
        else:
            self._fs.pipe_file(self._full(name), data)

    def list(self, prefix: str) -> list[str]:
        """The names directly below the folder `prefix` (last path part), sorted; nothing when there is no such folder.

        Names that start with a dot are left out: they are being written, or a killed writer left them.
        """
        self._fs.invalidate_cache()
        folder = self._full(prefix)
        try:
            found = [str(item).rstrip("/") for item in self._fs.ls(folder, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [item.rsplit("/", 1)[-1] for item in found if item != folder]
        return sorted(name for name in names if not name.startswith("."))

    def delete(self, name: str) -> None:
        """Removes a file or a whole folder; silent when it is gone already."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._full(name), recursive=True)

    def size(self, name: str) -> int:
        """Bytes under `name`, folders summed."""
        try:
            return int(self._fs.du(self._full(name)))
        except FileNotFoundError:
            return 0

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of this name."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._full(name)))

    def put_folder(self, source: Path, name: str) -> None:
        """Copies a local folder to `name`; not atomic, so write what marks it as whole afterwards."""
        for path in sorted(source.rglob("*")):
            if path.is_file():
                self.write(f"{name}/{path.relative_to(source).as_posix()}", path.read_bytes())

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A local folder with the content of `name`: itself on a file system, a download elsewhere."""
        if self._local:
            yield Path(self._full(name))
            return
        scratch = Path(tempfile.mkdtemp(prefix="decay-"))
        try:
            self._fs.get(self._full(name), str(scratch / "copy"), recursive=True)
            yield scratch / "copy"
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def check_writable(self, need_bytes: int = 0) -> None:
        """Refuses a place that cannot be written or is too full; leaves nothing behind.

        Raises StorageError naming the path and the remedy.
        """
        if not self._local:
            return
        folder = Path(self._root)
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise StorageError(f"storage {self.url}: {folder} is no folder that can be written; choose another with --storage")
        free = shutil.disk_usage(folder).free
        if free < need_bytes:
            raise StorageError(
                f"storage {self.url}: {need_bytes / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free on {folder}; "
                "free space (decay clean) or choose another with --storage"
            )

    def _full(self, name: str) -> str:
        parts = name.split("/")
        if name.startswith("/") or any(part in ("..", "") for part in parts):
            raise StorageError(f"storage name {name!r} leaves its root {self.root}; give a name below it")
        full = f"{self._root}/{name}"
        if self._local and not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(self._root)):
            raise StorageError(f"storage name {name!r} leaves {self._root} through a link; replace the link by a folder")
        return full
