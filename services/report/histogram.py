"""One picture of how λ moved: a panel per layer, training step across, λ upwards on a logit scale, darkness the share.

Drawn from the Parquet table that telemetry leaves (columns step, layer, bin, lower, upper, count; edges in logit λ). Bins are
merged to SHOWN_BINS rows for the eye; the table keeps them all.
"""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq

SHOWN_BINS = 96
LIMIT = 12.0
TICKS = {-6.9: ".001", -4.6: ".01", -2.2: ".1", 0.0: ".5", 2.2: ".9", 4.6: ".99", 6.9: ".999", 9.2: ".9999"}
MAX_COLUMNS = 6


def draw_histogram(table: bytes, title: str) -> bytes | None:
    """PNG of the histograms in `table` (Parquet bytes); None where it has no rows, as for a model without λ."""
    frame = pq.read_table(io.BytesIO(table)).to_pandas()
    if frame.empty:
        return None
    middle = frame[["lower", "upper"]].clip(-LIMIT, LIMIT).mean(axis=1)
    frame["row"] = np.clip((middle + LIMIT) / (2 * LIMIT) * SHOWN_BINS, 0, SHOWN_BINS - 1).astype(int)
    steps = sorted(frame["step"].unique())
    layers = sorted(frame["layer"].unique())
    columns = min(MAX_COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns + 1, 2.6 * rows + 0.6), squeeze=False, sharex=True, sharey=True
    )
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    for axis, layer in zip(axes.flat, layers, strict=False):
        part = frame[frame["layer"] == layer].groupby(["row", "step"])["count"].sum().unstack(fill_value=0)
        image = part.reindex(index=range(SHOWN_BINS), columns=steps, fill_value=0).to_numpy(dtype=float)
        share = image / np.maximum(image.sum(axis=0, keepdims=True), 1)
        axis.imshow(np.sqrt(share), origin="lower", aspect="auto", cmap="Blues", extent=(0, len(steps), -LIMIT, LIMIT))
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.set_yticks(list(TICKS), list(TICKS.values()), fontsize=7)
        places = np.linspace(0, len(steps) - 1, min(4, len(steps))).round().astype(int)
        axis.set_xticks(places + 0.5, [str(steps[place]) for place in places], fontsize=7)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("λ (logit scale)", fontsize=9)
    figure.suptitle(f"decay of {title}: share of channels and positions", fontsize=10)
    figure.tight_layout()
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return sink.getvalue()
