"""The report's main table for a terminal, narrow enough for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.table
from rich.markup import escape

from services.report.lambda_axis import lambda_text
from services.report.seed_spread import Configuration, SizeRanking, over_layers, rank_by_size
from services.report.tables import counts_sentence, rank_list
from services.study.result import StudySummary, TrialResult

MOST_OMISSIONS = 12  # of a kind; a whole product of axes refuses hundreds
ONLY_WITH_SEEDS = frozenset({"seeds", "not\nseparated"})
ONLY_WITH_RECALL = frozenset({"right"})
COLUMNS = (
    "rank", "method", "seeds", "right", "held-out\nloss", "above\nbest", "not\nseparated", "λ\ntrained", "tokens/s",
)  # fmt: skip


def console_table(summary: StudySummary, results: Sequence[TrialResult]) -> rich.table.Table:
    """Held-out loss by configuration, lowest first within a size, with the trained λ; omissions in the caption.

    Sizes are headings when there are several; seeds, not separated and the share of right answers appear only where they say
    something. A number that does not fit ends in an ellipsis: it never loses digits silently.
    """
    rankings = rank_by_size(results)
    table = rich.table.Table(
        title=escape(summary.question or summary.name),
        caption=_caption(summary, rankings, results),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    one_seed = all(r.pooled_sd is None for r in rankings)
    recall = any(row.accuracy is not None for ranking in rankings for row in ranking.rows)
    left_out = (ONLY_WITH_SEEDS if one_seed else frozenset()) | (frozenset() if recall else ONLY_WITH_RECALL)
    shown = [name for name in COLUMNS if name not in left_out]
    for name in shown:
        table.add_column(name, **_layout(name))
    for ranking in rankings:
        if len(rankings) > 1:
            table.add_row("", f"[bold]{escape(ranking.size)}")
        for row in ranking.rows:
            cells = _cells(ranking, row)
            table.add_row(*(cells[name] for name in shown))
        table.add_section()
    return table


def _layout(name: str) -> dict[str, Any]:
    if name == "method":
        return {"min_width": 16, "overflow": "fold"}
    if name == "not\nseparated":
        return {"min_width": 9, "overflow": "fold", "justify": "right"}
    return {"no_wrap": True, "overflow": "ellipsis", "justify": "right"}


def _cells(ranking: SizeRanking, row: Configuration) -> dict[str, str]:
    decay = over_layers(row.trained())
    return {
        "rank": str(row.rank),
        "method": escape(row.label),
        "seeds": str(len(row.trials)),
        "right": "none" if row.accuracy is None else f"{100 * row.accuracy:.1f} %",
        "held-out\nloss": f"{row.held_out_loss:.4f}",
        "above\nbest": "best" if row.rank == 1 else f"+{ranking.above_best(row):.4f}",
        "not\nseparated": rank_list(ranking.not_separated(row)) if ranking.pooled_sd is not None else "unknown",
        "λ\ntrained": "none" if decay is None else lambda_text(decay),
        "tokens/s": f"{row.tokens_per_second:,.0f}",
    }


def _caption(summary: StudySummary, rankings: Sequence[SizeRanking], results: Sequence[TrialResult]) -> str:
    lines = [
        f"nats per token; the held-out tokens' unigram entropy is {summary.unigram_entropy:.4f}",
        "λ is the median of the layers' medians",
        f"trials: {counts_sentence(summary)}",
        *_kernels(results),
    ]
    for ranking in rankings:
        if ranking.pooled_sd is None:
            lines.append(f"{ranking.size}: one seed each, so no noise floor: the order may not survive another seed")
        else:
            lines.append(f"{ranking.size}: standard deviation between seeds {ranking.pooled_sd:.4f}")
    for label, omissions in (
        ("failed", summary.failed),
        ("unfinished", summary.unfinished),
        ("refused", summary.refused),
    ):
        lines += [f"{label}: {o.name}: {o.reason}" for o in omissions[:MOST_OMISSIONS]]
        lines += [f"{label}: {more} more, all in the report"] if (more := len(omissions) - MOST_OMISSIONS) > 0 else []
    return escape("\n".join(lines))


def _kernels(results: Sequence[TrialResult]) -> list[str]:
    """Which implementations computed the recurrences, and in how many trials."""
    trials = Counter(kernel for result in results for kernel in result.kernels)
    return [f"{kernel}: {count} trial{'s' * (count > 1)}" for kernel, count in trials.most_common(MOST_OMISSIONS)]
