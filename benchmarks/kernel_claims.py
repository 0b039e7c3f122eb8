"""What the kernels were asked to reach on an H100, held against a run of the benchmark: threshold, measured, met or not.

What is surprising: where FLA's own gradients are wrong (its guard lifted on a Triton that miscompiles it) a comparison of
errors is met easily; the table of times shows its errors beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.kernel_results import DECAY_GRADIENTS, OURS, VALUES, decay_error, worst
from benchmarks.kernel_shapes import CLASSES, DELTA_CLASSES, DELTA_SHAPES, SHAPES

Record = dict[str, Any]
FLA = {
    "scalar": ("chunk_simple_gla", "fused_chunk_simple_gla"),
    "vector": ("chunk_gla",),
    "delta_none": ("chunk_delta_rule",),
    "delta_scalar": ("chunk_gated_delta_rule",),
    "delta_vector": ("chunk_kda", "chunk_dplr_delta_rule"),
    "delta_general": ("chunk_dplr_delta_rule",),
}
# At least this many times as fast as a rival, forward and backward, shape by shape as in SHAPES or DELTA_SHAPES.
FASTER = {
    ("scalar", "chunk_simple_gla"): (2.5, 2.3, 1.8, 1.8, 1.8, 1.8),
    ("scalar", "fused_chunk_simple_gla"): (1.3,),
    ("vector", "chunk_gla"): (4.0, 3.5, 3.5, 2.5, 2.5, 2.5),
    ("delta_none", "chunk_delta_rule"): (),
    ("delta_scalar", "chunk_gated_delta_rule"): (2.1, 1.6),
    ("delta_vector", "chunk_kda"): (3.0, 2.0),
    ("delta_vector", "chunk_dplr_delta_rule"): (3.0, 2.0),
    ("delta_general", "chunk_dplr_delta_rule"): (3.0, 2.0),
}
WITHIN_FLOOR = {"scalar": 1.7, "vector": 2.2}  # times the floor at the first shape
VALUE_ERROR, DECAY_ERROR, OVER_FLA = 6e-3, 1e-2, 1.25
FIRST_CALL_S = 15.0


def claims(document: Record) -> list[Record]:
    """Every claim about the classes that were run; `met` is None where it was not measured."""
    kinds = [kind for kind in CLASSES if kind in document["classes"]]
    return [claim for kind in kinds for part in (_speed, _errors, _resources) for claim in part(document, kind)]


def _speed(document: Record, kind: str) -> Iterator[Record]:
    measured = {(r["class"], r["peer"], tuple(r["shape"])): r["ratio"] for r in document["ratios"]}
    for peer in FLA[kind]:
        shapes = DELTA_SHAPES if kind in DELTA_CLASSES else SHAPES
        for shape, least in zip(shapes, FASTER[kind, peer], strict=False):
            value = measured.get((kind, peer, tuple(shape.numbers)))
            yield _claim(f"{kind} {shape}: times as fast as {peer}", least, value, at_least=True)
    if kind not in WITHIN_FLOOR:
        return
    row = _rows(document, kind, OURS).get(tuple(SHAPES[0].numbers))
    times = None if row is None or row["fwd_bwd_ms"] is None else row["fwd_bwd_ms"] / row["fwd_bwd_floor_ms"]
    yield _claim(f"{kind} {SHAPES[0]}: times the roofline floor", WITHIN_FLOOR[kind], times)


def _errors(document: Record, kind: str) -> Iterator[Record]:
    for name in _ours(kind):
        rows = _rows(document, kind, name)
        named = "o, dq, dk, dv, da, db" if kind == "delta_general" else "o, dq, dk, dv"
        yield _claim(f"{kind}, {name}: error of {named}", VALUE_ERROR, _largest(rows, lambda e: worst(e, VALUES)))
        yield _claim(f"{kind}, {name}: error of the decay's gradients", DECAY_ERROR, _largest(rows, decay_error))
    ours = _rows(document, kind, OURS)
    for peer in FLA[kind]:
        over = [_over(ours[shape], row) for shape, row in _rows(document, kind, peer).items() if shape in ours]
        over = [value for value in over if value is not None]
        yield _claim(f"{kind}: largest error over that of {peer}", OVER_FLA, max(over, default=None))
    bits = [row["same_bits"] for row in ours.values() if row.get("same_bits") is not None]
    yield _claim(f"{kind}: shapes at which two runs differ in a bit", 0, bits.count(False) if bits else None)


def _resources(document: Record, kind: str) -> Iterator[Record]:
    ours = _rows(document, kind, OURS)
    for peer in FLA[kind]:
        rows = _rows(document, kind, peer)
        over = [
            ours[shape]["peak_mib"] / row["peak_mib"]
            for shape, row in rows.items()
            if row.get("peak_mib") and ours.get(shape, {}).get("peak_mib")
        ]
        yield _claim(f"{kind}: peak memory over that of {peer}, at worst", 1.0, max(over, default=None))
    for name in _ours(kind):
        first = {(f["class"], f["contestant"]): f["seconds"] for f in document["first_call"]}.get((kind, name))
        yield _claim(f"{kind}, {name}: seconds of the first call of a model's kernels, cold", FIRST_CALL_S, first)


def _ours(kind: str) -> tuple[str, ...]:
    return (OURS,) if kind in DELTA_CLASSES else (OURS, f"{OURS}_fused")


def _rows(document: Record, kind: str, name: str) -> dict[tuple[int, ...], Record]:
    return {tuple(r["shape"]): r for r in document["rows"] if (r["class"], r["contestant"]) == (kind, name)}


def _largest(rows: dict[tuple[int, ...], Record], of: Callable[[Record], float | None]) -> float | None:
    values = [value for row in rows.values() if (value := of(row["errors"])) is not None]
    return max(values, default=None)


def _over(ours: Record, peer: Record) -> float | None:
    """The largest quotient of two errors of the same quantity."""
    shared = [name for name in VALUES + DECAY_GRADIENTS if ours["errors"].get(name) and peer["errors"].get(name)]
    return max((ours["errors"][name] / peer["errors"][name] for name in shared), default=None)


def _claim(what: str, threshold: float, measured: float | None, at_least: bool = False) -> Record:
    met = None if measured is None else bool(measured >= threshold if at_least else measured <= threshold)
    sign = "≥" if at_least else "≤"
    return {"claim": what, "threshold": f"{sign} {threshold:g}", "measured": measured, "met": met}
