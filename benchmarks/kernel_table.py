"""The benchmark's JSON as Markdown: a table for each class of decay, the claims, and what was measured on."""

from __future__ import annotations

from typing import Any

from benchmarks.kernel_claims import claims
from benchmarks.kernel_results import OURS, VALUES, decay_error
from benchmarks.kernel_shapes import CLASSES, SOFTMAX, Shape

Record = dict[str, Any]
NOTHING = "–"
HEADINGS = (
    "contestant", "fwd ms", "fwd+bwd ms", "spread", "over ours", "GPU alone, fwd+bwd ms", "over ours there", "fwd floor ms",
    "fwd+bwd floor ms", "of the floor", "peak MiB", "first call s", "launches", *(f"error {name}" for name in VALUES),
    "error of the decay", "remark",
)  # fmt: skip


def render(document: Record) -> str:
    """The whole page part."""
    parts = [_about(document)]
    for kind in CLASSES:
        shapes = {tuple(row["shape"]): None for row in document["rows"] if row["class"] == kind}
        for shape in shapes:
            parts.append(f"### {_title(kind)}, (B, T, H, D) = {_shape(shape)}\n\n{_table(document, kind, shape)}")
    parts.append(f"### Claims\n\n{_claims(document)}")
    if document["notes"]:
        parts.append("### Remarks of the run\n\n" + "\n".join(f"- {_cell(note)}" for note in document["notes"]))
    return "\n\n".join(parts) + "\n"


def _title(kind: str) -> str:
    rule, _, decay = kind.rpartition("_")
    return f"{decay.capitalize()} decay" if not rule else f"Delta rule, {'no' if decay == 'none' else decay} decay"


def _about(document: Record) -> str:
    host = {name: NOTHING for name in ("gpu", "gpu_memory_gib", "driver", "cpus")} | document["host"]
    versions = [f"{name} {version}" for name, version in host.get("versions", {}).items() if version]
    return (
        f"Measured on {host['gpu']} ({host['gpu_memory_gib']} GiB, driver {host['driver']}, {host['cpus']} CPU cores), "
        f"{document['date']}; {', '.join(versions)}.\nInputs {document['dtype']}, decay `{document['decay']}`. "
        f"Floors at {document['roofline']['tb_per_s']:g} TB/s; a copy reached {_number(host.get('copy_tb_s'))} TB/s here."
    )


def _table(document: Record, kind: str, shape: tuple[int, ...]) -> str:
    over = {r["peer"]: r["ratio"] for r in document["ratios"] if r["class"] == kind and tuple(r["shape"]) == shape}
    rows = [row for row in document["rows"] if tuple(row["shape"]) == shape and row["class"] in (kind, SOFTMAX)]
    alone = next((row.get("fwd_bwd_gpu_ms") for row in rows if row["contestant"] == OURS), None)
    body = [_line(_cells(row, over, alone)) for row in rows]
    return "\n".join([_line(HEADINGS), _line("---" for _ in HEADINGS), *body])


def _cells(row: Record, over: dict[str, float], alone: float | None) -> list[str]:
    """`alone`: ours on the GPU alone."""
    errors, on_gpu = row["errors"], row.get("fwd_bwd_gpu_ms")
    remark = "; ".join(str(row[key]) for key in ("failed", "skipped", "remark") if row.get(key))
    if row["wrong"]:
        remark = f"WRONG; {remark}".removesuffix("; ")
    return [
        row["contestant"],
        _number(row["fwd_ms"]),
        _number(row["fwd_bwd_ms"]),
        _percent(row["fwd_bwd_spread"]),
        NOTHING if row["ours"] else _number(over.get(row["contestant"])),
        _number(on_gpu),
        NOTHING if row["ours"] or not alone or not on_gpu else _number(on_gpu / alone),
        _number(row["fwd_floor_ms"]),
        _number(row["fwd_bwd_floor_ms"]),
        _percent(row["fwd_bwd_of_floor"]),
        _number(row.get("peak_mib")),
        _number(row["first_call_s"]),
        NOTHING if row["launches"] is None else " + ".join(map(str, row["launches"])),
        *(_error(errors.get(name), name in errors) for name in VALUES),
        _error(decay_error(errors), decay_error(errors) is not None),
        remark,
    ]


def _claims(document: Record) -> str:
    answers = {True: "yes", False: "no", None: "not measured"}
    body = [[c["claim"], c["threshold"], _number(c["measured"]), answers[c["met"]]] for c in claims(document)]
    return "\n".join(_line(cells) for cells in (["claim", "threshold", "measured", "met"], ["---"] * 4, *body))


def _shape(numbers: tuple[int, ...]) -> str:
    shape = Shape.of(numbers)
    dims = f"{shape.key_dim}" if len(numbers) == 4 else f"K {shape.key_dim}, V {shape.value_dim}"
    return f"({shape.batch}, {shape.tokens}, {shape.heads}, {dims})"


def _line(cells: Any) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %" if value < 0.1 else f"{100 * value:.0f} %"


def _error(value: float | None, measured: bool) -> str:
    if not measured:
        return NOTHING
    return "not finite" if value is None or value == float("inf") else f"{value:.1e}"
