"""Decay telemetry: per-layer histograms of lambda over all ranks, as metrics for curves and as Parquet for machines.

Counts are taken on the device while the step runs, summed over ranks at the next flush, and never wait for the host inside
the step. Each telemetry step is one small Parquet file under a name made of its step, so that a replayed step overwrites
itself instead of appearing twice.
"""

from __future__ import annotations

import hashlib
import io
import math
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from torch import Tensor

from decay_core.decay_stats import DecayStats, bin_edges
from services.study.storage import Storage
from services.train.job import World

FOLDER = "histograms"
LONGEST_HORIZON = 1e9  # tokens; λ = 1 has an infinite one, which neither JSON nor MLflow can hold
COLUMNS = pa.schema(
    {
        "step": pa.int64(),
        "layer": pa.int64(),
        "bin": pa.int64(),
        "lower": pa.float64(),
        "upper": pa.float64(),
        "count": pa.int64(),
    }
)
METRICS = ("p05", "p25", "p50", "p75", "p95", "mean", "min", "max", "share_near_0", "share_near_1", "horizon")


class Telemetry:
    """Observes one step's decays and reduces them; `observe` goes into the model's forward."""

    def __init__(self, layers: int, world: World) -> None:
        self._layers = layers
        self._world = world
        self._stats: DecayStats | None = None

    def begin(self) -> None:
        """Starts a fresh histogram for the coming forward passes."""
        self._stats = DecayStats(layers=self._layers, device=self._world.device)

    def observe(self, layer: int, log_decay: Tensor) -> None:
        """Takes one layer's log decay; given to the model."""
        assert self._stats is not None
        self._stats.observe(layer, log_decay)

    def reduce(self) -> DecayStats:
        """The histogram over all ranks; collective."""
        assert self._stats is not None
        counts, extremes = self._stats.tensors()
        if self._world.size > 1:
            dist.all_reduce(counts)
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        reduced = DecayStats.from_tensors(counts, extremes)
        self._stats = None
        return reduced


def as_metrics(stats: DecayStats) -> dict[str, float]:
    """Scalars named like `decay/layer_03/p50` (layers from 1); none for a layer without a decay."""
    return {
        f"decay/layer_{layer + 1:02d}/{key}": min(summary[key], LONGEST_HORIZON)
        for layer, summary in enumerate(stats.summary())
        if summary
        for key in METRICS
    }


def histogram_file(step: int, stats: DecayStats) -> bytes:
    """The counts of one step as Parquet: rows (step, layer, bin, lower, upper, count), edges in logit(λ), no empty bins."""
    counts, _ = stats.tensors()
    rows: list[dict[str, Any]] = []
    edges = [-math.inf, *bin_edges(), math.inf]
    for layer, layer_counts in enumerate(counts.cpu().tolist()):
        for index, count in enumerate(layer_counts):
            if count:
                rows.append(
                    {
                        "step": step,
                        "layer": layer + 1,
                        "bin": index,
                        "lower": edges[index],
                        "upper": edges[index + 1],
                        "count": count,
                    }
                )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=COLUMNS), sink)
    return sink.getvalue()


def file_name(step: int) -> str:
    """The histogram file of a step."""
    return f"step_{step:08d}.parquet"


def read_histograms(storage: Storage, digests: dict[str, str]) -> dict[str, bytes]:
    """Those of the named files that have the bytes that their digests say."""
    found = {name: storage.read(f"{FOLDER}/{name}") or b"" for name in digests}
    return {name: data for name, data in found.items() if hashlib.sha256(data).hexdigest() == digests[name]}


def mend_histograms(storage: Storage, files: dict[str, bytes]) -> None:
    """Writes again what is missing or has other bytes than it had when it was made."""
    for name, data in files.items():
        if storage.read(f"{FOLDER}/{name}") != data:
            storage.write(f"{FOLDER}/{name}", data)


def merge_histograms(files: dict[str, bytes]) -> bytes:
    """All telemetry steps as one Parquet file."""
    parts = [pq.read_table(io.BytesIO(data)) for _, data in sorted(files.items())]
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(parts), sink)
    return sink.getvalue()
