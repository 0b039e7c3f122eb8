"""Writes a study's report into a folder: Markdown, HTML, CSV and figures.

The report is a pure function of the summary and the results: the order in which results are given does not matter, and
nothing in it depends on the clock. Every file is replaced in one step, the pages last, so that a reader never sees a
page whose figures are missing. Knows nothing of Ray, MLflow, DeepSpeed or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.offline

from services.report.csv_files import layer_csv, ranking_csv, trial_csv
from services.report.html_page import html_page
from services.report.markdown_page import markdown_page
from services.report.moving_figures import moving_decay_figure, moving_loss_figure
from services.report.page_content import RECALL_FIGURE, figure_names, page_blocks
from services.report.recall_figures import has_recall, moving_recall_figure, recall_figure
from services.report.seed_spread import SizeRanking, rank_by_size
from services.report.still_figures import decay_figure, loss_by_decay_figure, loss_figure
from services.study.result import StudySummary, TrialResult
from services.study.storage import write_atomically

LIBRARY = "plotly.min.js"


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Where the report's files are. `table_csv` has a line per configuration, the others per trial and per layer."""

    markdown: Path
    html: Path
    table_csv: Path
    trials_csv: Path
    layers_csv: Path
    figures: tuple[Path, ...]


def build_report(summary: StudySummary, results: Sequence[TrialResult], out_dir: Path) -> ReportFiles:
    """Write the report into `out_dir`, replacing an earlier one.

    Works with no result at all, since a study whose trials all failed needs a report most. Raises ValueError when a
    trial is given twice, or when two trials of one configuration have the same seed.
    """
    rankings = rank_by_size(results)
    blocks = page_blocks(summary, results, rankings)
    pictures = {name: picture for ranking in rankings for name, picture in _pictures(ranking).items()}
    if has_recall(rankings):
        pictures[RECALL_FIGURE] = recall_figure(rankings)
    for name, picture in pictures.items():
        write_atomically(out_dir / name, picture)
    for name, text in (
        ("table.csv", ranking_csv(rankings)),
        ("trials.csv", trial_csv(results)),
        ("layers.csv", layer_csv(results)),
        (LIBRARY, plotly.offline.get_plotlyjs()),
        ("report.md", markdown_page(blocks)),
        ("report.html", html_page(summary.question or summary.name, blocks, _moving(rankings), LIBRARY)),
    ):
        write_atomically(out_dir / name, text.encode())
    return ReportFiles(
        markdown=out_dir / "report.md",
        html=out_dir / "report.html",
        table_csv=out_dir / "table.csv",
        trials_csv=out_dir / "trials.csv",
        layers_csv=out_dir / "layers.csv",
        figures=tuple(out_dir / name for name in pictures),
    )


def _pictures(ranking: SizeRanking) -> dict[str, bytes]:
    names = figure_names(ranking.size)
    pictures = {names["loss"]: loss_figure(ranking, ranking.rows[0].unigram_entropy)}
    if any(row.trained() for row in ranking.rows):
        pictures[names["decay"]] = decay_figure(ranking)
        pictures[names["loss_by_decay"]] = loss_by_decay_figure(ranking)
    return pictures


def _moving(rankings: Sequence[SizeRanking]) -> dict[str, str]:
    moving = {"accuracy": moving_recall_figure(rankings, "accuracy")} if has_recall(rankings) else {}
    for index, ranking in enumerate(rankings):
        if any(row.trained() for row in ranking.rows):
            moving[f"decay:{ranking.size}"] = moving_decay_figure(ranking, f"decay-{index}")
            moving[f"loss_by_decay:{ranking.size}"] = moving_loss_figure(ranking, f"loss-by-decay-{index}")
    return moving
