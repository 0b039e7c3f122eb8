"""Which configuration of the Triton scans was measured to be the fastest, by architecture, kind of decay, K and V.

What is unusual: nothing is tuned at run time. The table is a data file, tuned.json, that benchmarks/tune_kernels.py writes, and
that script admits a configuration only after its numbers and gradients were compared with the definition. Where the table has
no row, a launcher's own default is taken; so it is where there is no table, as in an exported model.
Source: benchmarks/tune_kernels.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

TABLE = Path(__file__).with_name("tuned.json")
Granularity = Literal["scalar", "vector", "delta_scalar", "delta_vector", "delta_general"]
C = TypeVar("C")
_on_trial: dict[tuple[str, str, int, int], Row] = {}
_made: dict[Any, tuple[Row, Any]] = {}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: `config` holds the fields of a launcher's configuration, `milliseconds` are of forward and backward
    over `shape` (B, T, H, K, V)."""

    architecture: str
    granularity: Granularity
    key_dim: int
    value_dim: int
    config: dict[str, Any]
    milliseconds: float
    shape: list[int]
    gpu: str
    versions: str
    date: str

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What it is looked up by."""
        return self.architecture, self.granularity, self.key_dim, self.value_dim


def tuned_config(architecture: str, granularity: str, key_dim: int, value_dim: int, kind: type[C]) -> C | None:
    """The measured configuration, of the class `kind`; None where nothing was measured. ValueError for a damaged table."""
    key = (architecture, granularity, key_dim, value_dim)
    row = _on_trial.get(key) or rows(TABLE).get(key)
    if row is None:
        return None
    found = _made.get((kind, key))
    if found is None or found[0] is not row:
        found = _made[kind, key] = row, made(kind, row.config, f"{TABLE.name}: config of {' '.join(map(str, row.key))}")
    return found[1]


def on_trial(row: Row) -> None:
    """Puts a row in place of the table's, for this process alone: that is how a configuration is tried."""
    _on_trial[row.key] = row


@cache
def rows(path: Path) -> dict[tuple[str, str, int, int], Row]:
    """The table's rows by their keys; none where there is no file. ValueError says what is wrong and where."""
    if not path.exists():
        return {}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of configurations ({error}); {_REMEDY}") from error
    found: dict[tuple[str, str, int, int], Row] = {}
    for number, given in enumerate(listed):
        row = made(Row, given, f"{path.name}: row {number}")
        if row.key in found:
            raise ValueError(f"{path.name}: row {number} repeats {' '.join(map(str, row.key))}; keep one")
        found[row.key] = row
    return found


def write_rows(path: Path, measured: list[Row]) -> None:
    """Replaces the rows of the same keys and keeps the others; the file is replaced at once."""
    merged = {row.key: row for row in [*rows(path).values(), *measured]}
    text = json.dumps({"rows": [asdict(merged[key]) for key in sorted(merged)]}, indent=1) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    rows.cache_clear()


def made(kind: type[C], given: Any, where: str) -> C:
    """A dataclass from JSON, inner ones too. ValueError names the field that is unknown, missing or of another type."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}, not a set of fields; {_REMEDY}")
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}, it has {', '.join(names)}; {_REMEDY}")
    values = {name: _value(hints[name], value, f"{where}: {name}") for name, value in given.items()}
    try:
        return kind(**values)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"{where}: {error}; {_REMEDY}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType, Literal) else (hint,)
    for choice in choices:
        if is_dataclass(choice) and isinstance(value, dict):
            return made(choice, value, where)
        if _is_a(value, choice):
            return value
    raise ValueError(f"{where} is {value!r}, not {' or '.join(getattr(c, '__name__', repr(c)) for c in choices)}; {_REMEDY}")


def _is_a(value: Any, choice: Any) -> bool:
    kind = get_origin(choice) or choice
    if not isinstance(kind, type):  # one of a Literal's words
        return bool(value == kind)
    return type(value) in ((int, float) if kind is float else (kind,))


_REMEDY = "write it anew with benchmarks/tune_kernels.py, or restore it"
