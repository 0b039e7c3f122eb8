"""Writes the report's numbers as CSV, unrounded, for a person's own plots.

Numbers are printed so that reading them back gives the same float64; an unknown number is an empty cell.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from services.report.seed_spread import Configuration, SizeRanking, over_layers
from services.study.result import TrialResult

ROW_HEADER = (
    "size", "rank", "method", "label", "kind", "seeds", "parameters", "held_out_loss", "seed_sd", "pooled_seed_sd",
    "above_best", "not_separated_from_ranks", "unigram_entropy", "below_unigram", "train_loss_last_100",
    "initial_median_lambda_over_layers", "median_lambda_first_layer", "median_lambda_middle_layer",
    "median_lambda_last_layer", "median_lambda_over_layers", "tokens_per_second",
    "held_out_accuracy", "state_size", "published_loss", "train_loss_above_published",
)  # fmt: skip
LAYER_HEADER = ("size", "method", "seed", "trial_id", "when", "layer", "median", "p25", "p75", "mean", "min", "max")
TRIAL_LEAVES_OUT = frozenset({"point", "decay_profile", "initial_decay_profile", "varied", "mechanism"})


def ranking_csv(rankings: Sequence[SizeRanking]) -> str:
    """One line per configuration, in the order of the report's tables."""
    return _csv(ROW_HEADER, (_ranking_line(ranking, row) for ranking in rankings for row in ranking.rows))


def layer_csv(results: Sequence[TrialResult]) -> str:
    """One line per trial, moment (initial or trained) and layer: the decay figures' data."""
    lines = (
        (t.size, t.method, t.seed, t.trial_id, when, p.layer, p.median, p.p25, p.p75, p.mean, p.min, p.max)
        for t in _ordered(results)
        for when, profile in (("initial", t.initial_decay_profile), ("trained", t.decay_profile))
        for p in profile
    )
    return _csv(LAYER_HEADER, lines)


def trial_csv(results: Sequence[TrialResult]) -> str:
    """One line per trial with every field of its result but profiles and digests of code.

    The design point's axes and the varied fields of the recipe have columns.
    """
    fields = [name for name in TrialResult.model_fields if name not in TRIAL_LEAVES_OUT]
    axes = sorted({axis for t in results for axis in t.point})
    varied = sorted({key for t in results for key in t.varied})
    lines = (
        [*(getattr(t, f) for f in fields), *(t.point.get(a) for a in axes), *(t.varied.get(key) for key in varied)]
        for t in _ordered(results)
    )
    return _csv([*fields, *(f"point_{axis}" for axis in axes), *(f"varied_{key}" for key in varied)], lines)


def _ranking_line(ranking: SizeRanking, row: Configuration) -> Sequence[object]:
    trained, initial = row.trained(), row.initial()
    layers = [trained[i].median for i in (0, (len(trained) + 1) // 2 - 1, -1)] if trained else [None] * 3
    close = " ".join(map(str, ranking.not_separated(row))) if ranking.pooled_sd is not None else None
    return (
        row.size, row.rank, row.method, row.label, row.kind, len(row.trials), row.parameters,
        row.held_out_loss, row.seed_sd, ranking.pooled_sd, ranking.above_best(row), close,
        row.unigram_entropy, row.unigram_entropy - row.held_out_loss, row.train_loss,
        over_layers(initial), *layers, over_layers(trained), row.tokens_per_second,
        row.accuracy, row.state_size, row.published_loss, row.above_published,
    )  # fmt: skip


def _ordered(results: Sequence[TrialResult]) -> list[TrialResult]:
    return sorted(results, key=lambda t: (t.size, t.method, t.seed, t.trial_id))


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return buffer.getvalue()
