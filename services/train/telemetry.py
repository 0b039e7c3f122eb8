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


def write_histogram(storage: Storage, step: int, stats: DecayStats) -> str:
    """Stores the counts of one step: rows (step, layer, bin, lower, upper, count), edges in logit(λ), empty bins left out.

    Returns the file's SHA-256, which checkpoints carry.
    """
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
    storage.write(f"{FOLDER}/{file_name(step)}", sink.getvalue())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def file_name(step: int) -> str:
    """The histogram file of a step."""
    return f"step_{step:08d}.parquet"


def damaged_histogram(storage: Storage, digests: dict[str, str]) -> str:
    """The first of the named files that is missing or has other bytes than its digest says; empty when all are whole."""
    for name, digest in digests.items():
        if hashlib.sha256(storage.read(f"{FOLDER}/{name}") or b"").hexdigest() != digest:
            return f"{FOLDER}/{name}"
    return ""


def merge_histograms(storage: Storage, last_step: int) -> bytes:
    """All telemetry steps up to `last_step` as one Parquet file."""
    parts = []
    for name in storage.list(FOLDER):
        if name.endswith(".parquet") and int(name[5:13]) <= last_step:
            data = storage.read(f"{FOLDER}/{name}")
            parts.append(pq.read_table(io.BytesIO(data or b"")))
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(parts), sink)
    return sink.getvalue()
