"""What a run of the benchmark has found: the workers' records in, one JSON document out, with ratios.

What is surprising: a contestant may be timed in several processes, before and after its rivals; its time is the median of all
repeats, the spread their range. A ratio is the rival's time over ours, forward and backward together: above 1, ours is faster.
`gpu` stands where the host's time is left out.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.kernel_shapes import CLASSES, SOFTMAX, Roofline, Shape, floor_ms

SCHEMA = 1
OURS = "ours"
Record = dict[str, Any]
# Where one decay has several inputs, its worst gradient counts as that of log λ; β's counts among them.
DECAY_GRADIENTS = ("dg", "df", "dgain", "doffset", "dbeta")
VALUES = ("o", "dq", "dk", "dv", "da", "db")
# A right kernel in 16 bits is below 1e-2, a wrong one near 1.
WRONG = 5e-2


class Results:
    """Records by what they are about; `document` may be asked for at any time."""

    def __init__(self, about: Record) -> None:
        self.about, self.host = about, Record()
        self.notes: list[str] = []
        self.rows: dict[tuple[str, str, tuple[int, ...]], Record] = {}
        self.errors: dict[tuple[str, str, tuple[int, ...]], dict[str, float]] = {}
        self.first_call: dict[tuple[str, str], Record] = {}
        self.launches: dict[tuple[str, str], list[int]] = {}
        self.tuning: dict[str, Record] = {}

    def add(self, record: Record) -> None:
        """Takes one record of a worker."""
        about = record.get("class", ""), record.get("contestant", "")
        kind = record["record"]
        if kind == "row":
            self._add_row(record)
        elif kind == "errors":
            self.errors[(*about, tuple(record["dims"]))] = record["errors"]
        elif kind == "first_call":
            self.first_call[about] = {name: record[name] for name in ("seconds", "parts", "kernels")}
        elif kind == "launches":
            self.launches[about] = record["launches"]
        elif kind == "tuning":
            kept = self.tuning.setdefault(record["contestant"], {"compile_s": 0.0, "tune_s": 0.0, "configs": 0})
            for name in kept.keys() & record.keys():
                kept[name] += record[name]
            kept.update({name: record[name] for name in ("chosen",) if name in record})
        elif kind == "facts":
            self.host = {name: value for name, value in record.items() if name not in ("record", "class", "contestant")}
        elif kind == "note" and record["text"] not in self.notes:
            self.notes.append(record["text"])

    def _add_row(self, record: Record) -> None:
        key = record["class"], record["contestant"], tuple(record["shape"])
        row = self.rows.setdefault(key, {})
        for name, value in record.items():
            if name.endswith("_repeats"):
                row[name] = [*row.get(name, []), *value]
            elif name.startswith("peak"):
                row[name] = max(row.get(name, 0.0), value)
            elif name == "same_bits":
                row[name] = row.get(name, True) and value
            elif name == "failed" or name not in row:
                row[name] = value
        if row.get("fwd_bwd_repeats"):
            row.pop("skipped", None)

    @property
    def roofline(self) -> Roofline:
        """Of the host's GPU, or of none."""
        given = self.about.get("bandwidth_tb_s")
        found = Roofline.of(self.host.get("gpu", ""), self.host.get("copy_tb_s", 1.0), self.host.get("matmul_tflop_s", 1.0))
        return found if given is None else Roofline(terabytes_per_s=given, teraflops_per_s=found.teraflops_per_s)

    def document(self) -> Record:
        """Everything, as it stands in the JSON file."""
        rows = [self._finished(row) for row in self.rows.values()]
        return {
            "schema": SCHEMA,
            **self.about,
            "host": self.host,
            "roofline": {"tb_per_s": self.roofline.terabytes_per_s, "tflop_per_s": self.roofline.teraflops_per_s},
            "rows": rows,
            "ratios": ratios(rows),
            "first_call": [{"class": c, "contestant": name, **found} for (c, name), found in self.first_call.items()],
            "tuning": self.tuning,
            "notes": self.notes,
        }

    def _finished(self, row: Record) -> Record:
        kind, name, shape = row["class"], row["contestant"], Shape.of(row["shape"])
        done = {key: value for key, value in row.items() if key != "record"}
        errors = self.errors.get((kind, name, shape.dims), {})
        floors = floor_ms(shape, kind, self.roofline)
        for direction, floor in zip(("fwd", "fwd_bwd"), floors, strict=True):
            repeats = row.get(f"{direction}_repeats", [])
            time = statistics.median(repeats) if repeats else None
            done[f"{direction}_ms"] = _round(time)
            done[f"{direction}_spread"] = _round((max(repeats) - min(repeats)) / time) if repeats else None
            alone = row.get(f"{direction}_gpu_repeats", [])
            done[f"{direction}_gpu_ms"] = _round(statistics.median(alone)) if alone else None
            done[f"{direction}_floor_ms"] = _round(floor)
            done[f"{direction}_of_floor"] = _round(floor / time) if repeats else None
        first = self.first_call.get((kind, name))
        done["first_call_s"] = self._first_call_of_tuned(name) if first is None else first["seconds"]
        done["launches"] = self.launches.get((kind, name))
        done["errors"] = {key: _finite(value) for key, value in errors.items()}
        done["wrong"] = bool(errors) and not all(value <= WRONG for value in errors.values())
        return done

    def _first_call_of_tuned(self, name: str) -> float | None:
        """Compiling is shared by many processes in a run and is summed: what one process would have waited for."""
        spent = self.tuning.get(name)
        return None if spent is None or not spent["configs"] else round(spent["compile_s"] + spent["tune_s"], 1)


def ratios(rows: list[Record]) -> list[Record]:
    """Every rival against ours at every shape where both were timed."""
    timed = [row for row in rows if row["fwd_bwd_ms"] is not None]
    found = []
    for kind in CLASSES:
        for ours in (row for row in timed if row["class"] == kind and row["contestant"] == OURS):
            for peer in timed:
                if peer["shape"] == ours["shape"] and peer["class"] in (kind, SOFTMAX) and not peer["ours"]:
                    found.append(_ratio(kind, ours, peer))
    return found


def _ratio(kind: str, ours: Record, peer: Record) -> Record:
    return {
        "class": kind,
        "peer": peer["contestant"],
        "shape": ours["shape"],
        "ours_ms": ours["fwd_bwd_ms"],
        "peer_ms": peer["fwd_bwd_ms"],
        "ratio": _round(peer["fwd_bwd_ms"] / ours["fwd_bwd_ms"]),
        "error_ours": worst(ours["errors"]),
        "error_peer": worst(peer["errors"]),
    }


def worst(errors: dict[str, float | None], names: tuple[str, ...] = VALUES + DECAY_GRADIENTS) -> float | None:
    """The largest error of these names: None where none was measured, infinity (JSON has none) where one is not finite."""
    values = [errors[name] for name in names if name in errors]
    if not values:
        return None
    return math.inf if None in values else max(values)


def decay_error(errors: dict[str, float | None]) -> float | None:
    """The error of log λ's gradient, or the worst of those of its inputs."""
    return worst(errors, DECAY_GRADIENTS)


def failures(document: Record) -> list[str]:
    """What of ours is wrong or crashed, one line each."""
    found = []
    for row in (row for row in document["rows"] if row["ours"]):
        where = f"{row['class']}, {row['contestant']}, {Shape.of(row['shape'])}"
        if row.get("failed"):
            found.append(f"{where}: {row['failed']}")
        if row["wrong"]:
            found.append(f"{where}: wrong against fp64: {row['errors']}")
        if row.get("same_bits") is False:
            found.append(f"{where}: two runs gave different bits")
    return found


def write(path: Path, document: Record) -> None:
    """Replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def _plain(value: Any) -> Any:
    """The same with what JSON cannot say (NaN, infinity) as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _finite(value) if isinstance(value, float) else value


def _finite(value: float) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
