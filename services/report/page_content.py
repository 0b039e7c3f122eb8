"""What the report says, in order, as headings, paragraphs, tables and figures that Markdown and HTML both print.

The doubt comes before the numbers: what the seeds can tell stands above the table that it limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.report.published_table import SENTENCE, published_table
from services.report.recall_figures import has_recall
from services.report.seed_spread import SizeRanking
from services.report.tables import (
    Table,
    comparability_sentences,
    counts_sentence,
    decay_table,
    fact_table,
    headline,
    loss_table,
    noise_sentences,
    omission_table,
    recall_sentences,
    trial_table,
)
from services.study.result import StudySummary, TrialResult


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A heading; level 1 is the page's title."""

    level: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Running text; **words** are bold."""

    text: str


@dataclass(frozen=True, kw_only=True)
class FigureSlot:
    """Where a figure goes: `still` is the PNG's path from the report's folder, `moving` the interactive one's key."""

    still: str
    alt: str
    moving: str | None = None


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A table that opens on a click."""

    summary: str
    table: Table


RECALL_FIGURE = "figures/accuracy.png"

Block = Heading | Paragraph | Table | FigureSlot | Folded


def figure_names(size: str) -> dict[str, str]:
    """The PNG paths of one size, relative to the report's folder, by kind of figure."""
    safe = "".join(c if c.isalnum() or c in "._" else "_" for c in size)
    return {kind: f"figures/{kind}-{safe}.png" for kind in ("loss", "decay", "loss_by_decay")}


def page_blocks(summary: StudySummary, results: Sequence[TrialResult], rankings: Sequence[SizeRanking]) -> list[Block]:
    """The whole report."""
    blocks: list[Block] = [Heading(level=1, text=summary.question or summary.name)]
    blocks += [Paragraph(text=f"Study **{summary.name}**. Trials: {counts_sentence(summary)}.")]
    blocks += [Paragraph(text=headline(r)) for r in rankings] or [Paragraph(text="No trial has a result yet.")]
    blocks += [Paragraph(text=text) for text in comparability_sentences(summary, results)]
    blocks += _recall_blocks(rankings)
    for ranking in rankings:
        blocks += _size_blocks(ranking)
    blocks += _omission_blocks(summary)
    blocks += [Heading(level=2, text="What it ran on"), fact_table(summary, results)]
    if results:
        blocks += [Folded(summary=f"Every trial ({len(results)})", table=trial_table(results))]
    return blocks


def _recall_blocks(rankings: Sequence[SizeRanking]) -> list[Block]:
    sentences = recall_sentences(rankings)
    if not sentences:
        return []
    blocks: list[Block] = [Heading(level=2, text="Exact-match accuracy against state size")]
    blocks += [Paragraph(text=text) for text in sentences]
    if has_recall(rankings):
        blocks += [FigureSlot(still=RECALL_FIGURE, alt="exact-match accuracy against state size", moving="accuracy")]
    return blocks


def _size_blocks(ranking: SizeRanking) -> list[Block]:
    names = figure_names(ranking.size)
    blocks: list[Block] = [Heading(level=2, text=f"Held-out loss, {ranking.size}")]
    blocks += [Paragraph(text=text) for text in noise_sentences(ranking)]
    blocks += [
        Paragraph(
            text="Losses are nats per token, ± the standard deviation between seeds where there are several. "
            "The unigram entropy is the loss of a model that knows only how frequent each held-out token is."
        ),
        loss_table(ranking),
        FigureSlot(still=names["loss"], alt=f"held-out loss by method, {ranking.size}"),
        *_published_blocks(ranking),
        Heading(level=2, text=f"Decay, {ranking.size}"),
    ]
    if not any(row.trained() for row in ranking.rows):
        return [*blocks, Paragraph(text="No method of this size has a decay.")]
    return [
        *blocks,
        Paragraph(
            text="Median λ in one pass over a fixed text, over all positions and channels (vector) or heads (scalar): "
            "before training → trained, the median over the seeds. λ is the share of the state kept at each token; "
            "1/(1−λ) is how many tokens it remembers. The last columns are the median of the layers' medians."
        ),
        decay_table(ranking),
        FigureSlot(still=names["decay"], alt=f"median λ by layer, {ranking.size}", moving=f"decay:{ranking.size}"),
        FigureSlot(
            still=names["loss_by_decay"],
            alt=f"held-out loss against median λ, {ranking.size}",
            moving=f"loss_by_decay:{ranking.size}",
        ),
    ]


def _published_blocks(ranking: SizeRanking) -> list[Block]:
    table = published_table(ranking)
    if table is None:
        return []
    return [Heading(level=2, text=f"Beside the paper, {ranking.size}"), Paragraph(text=SENTENCE), table]


def _omission_blocks(summary: StudySummary) -> list[Block]:
    blocks: list[Block] = [Heading(level=2, text="Without a result")]
    table = omission_table(summary)
    if summary.n_unnamed:
        blocks += [Paragraph(text=f"{summary.n_unnamed} planned trial(s) have not finished and are not named below.")]
    if table.rows:
        return [*blocks, table]
    if not summary.n_unnamed:
        blocks += [Paragraph(text="Nothing: every point was accepted and every trial finished.")]
    return blocks
