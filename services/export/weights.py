"""A trained model's safetensors file, copied with other names and in another order.

What is surprising: transformers maps the file into memory, and a matrix product on a CPU rounds differently where a matrix
does not begin at a multiple of 64 bytes. So here the data begin at one, and tensors whose size is no multiple come last:
what is loaded then computes what was trained, bit for bit. Bytes are copied, never read as numbers.
Source: the format as the package safetensors documents it: 8 bytes that say how long the header is, the header (JSON), the
data without gaps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

ALIGNMENT = 64  # bytes; where torch's own allocator places a tensor
LENGTH_BYTES = 8
COPIED_AT_ONCE = 1 << 24
Header = dict[str, dict[str, Any]]


def read_header(path: Path) -> Header:
    """{tensor: {dtype, shape, data_offsets}} of a safetensors file. Raises ValueError where it is none."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        header: Header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header


def copy_weights(source: Path, target: Path, prefix: str) -> None:
    """Writes the tensors of `source` to `target`, each name with `prefix` before it."""
    old = read_header(source)
    order = sorted(old, key=lambda name: (_size(old[name]) % ALIGNMENT != 0, name))
    with open(source, "rb") as origin, open(target, "wb") as copy:
        start = LENGTH_BYTES + int.from_bytes(origin.read(LENGTH_BYTES), "little")
        copy.write(_header_bytes(old, order, prefix))
        for name in order:
            origin.seek(start + old[name]["data_offsets"][0])
            _copy(origin, copy, _size(old[name]))


def _header_bytes(old: Header, order: list[str], prefix: str) -> bytes:
    """Length and header of the new file; blanks at its end bring the data to a multiple of ALIGNMENT."""
    new: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + _size(old[name])
        new[prefix + name] = {**old[name], "data_offsets": [start, end]}
    text = json.dumps(new, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _size(entry: dict[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end) - int(start)


def _copy(origin: BinaryIO, copy: BinaryIO, size: int) -> None:
    while size:
        part = origin.read(min(size, COPIED_AT_ONCE))
        if not part:
            raise ValueError("the safetensors file is shorter than its header says")
        copy.write(part)
        size -= len(part)
