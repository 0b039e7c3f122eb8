"""How often a model recalls exactly, against how many numbers it may remember: one figure for all sizes, still and moving.

A line joins the sizes of one method, or, where a study varies the width of a head, the widths at one size: what changes the
size of a state and little else. A configuration without an accuracy (a study on text) or without a known state size is not in
the figure.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import cycle

import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from services.report.moving_figures import PALETTE, SYMBOLS, as_fragment
from services.report.seed_spread import Configuration, SizeRanking
from services.report.still_figures import DPI, GRID, INK

MARKERS = ("o", "s", "^", "D", "X")  # as many as SYMBOLS, and no divisor of the colours: 40 lines differ
LEGEND_ROWS = 24
NAMED_SIZES = 8  # lines, at most, whose points have room for the name of their size


def has_recall(rankings: Sequence[SizeRanking]) -> bool:
    """Whether there is anything to draw."""
    return bool(_lines(rankings))


def recall_figure(rankings: Sequence[SizeRanking]) -> bytes:
    """PNG: held-out exact-match accuracy upwards, state size across (log), the share that guessing reaches dashed."""
    lines = _lines(rankings)
    figure = Figure(figsize=(9.5, 5.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for (name, rows), color, marker in zip(lines.items(), cycle(PALETTE), cycle(MARKERS), strict=False):
        x, y = [row.state_size for row in rows], [row.accuracy for row in rows]
        spread = [row.accuracy_sd or 0.0 for row in rows]
        axes.errorbar(x, y, yerr=spread, color=color, marker=marker, markersize=5, linewidth=1.2, capsize=2, label=name)
        for row in rows if len(rankings) > 1 and len(lines) <= NAMED_SIZES else ():
            axes.annotate(row.size, (row.state_size, row.accuracy), xytext=(4, 4), textcoords="offset points", fontsize=6)
    axes.axhline(_guessing(lines), color=INK, linewidth=0.9, linestyle=(0, (3, 2)), label="guessing")
    sizes = [row.state_size or 1 for rows in lines.values() for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** math.floor(math.log2(min(sizes)) - 0.1), 2 ** math.ceil(math.log2(max(sizes)) + 0.1))
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("state size (numbers a sequence, log axis)", fontsize=9)
    axes.set_ylabel("exact-match accuracy on held-out answers", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    figure.legend(loc="outside right upper", ncols=math.ceil((len(lines) + 1) / LEGEND_ROWS), frameon=False, fontsize=7.5)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def moving_recall_figure(rankings: Sequence[SizeRanking], element: str) -> str:
    """HTML fragment of the same figure; each point names its method, size and accuracies."""
    lines = _lines(rankings)
    figure = go.Figure()
    for (name, rows), color, symbol in zip(lines.items(), cycle(PALETTE), cycle(SYMBOLS), strict=False):
        figure.add_trace(
            go.Scatter(
                x=[row.state_size for row in rows],
                y=[row.accuracy for row in rows],
                error_y={"type": "data", "array": [row.accuracy_sd or 0.0 for row in rows], "thickness": 1, "width": 3},
                customdata=[[row.label, row.size, f"{row.state_size:,}", len(row.trials)] for row in rows],
                hovertemplate="<b>%{customdata[0]}</b>, %{customdata[1]}<br>%{y:.1%} of the answers right"
                "<br>state of %{customdata[2]} numbers, %{customdata[3]} seed(s)<extra></extra>",
                mode="lines+markers",
                line={"color": color, "width": 1.5},
                marker={"symbol": symbol, "size": 8},
                name=name,
            )
        )
    figure.add_hline(y=_guessing(lines), line={"color": INK, "width": 1, "dash": "dash"}, annotation_text="guessing")
    figure.update_xaxes(title="state size (numbers a sequence, log axis)", type="log")
    figure.update_yaxes(title="exact-match accuracy on held-out answers", range=[-0.03, 1.03], tickformat=".0%")
    return as_fragment(figure, element, height=max(480, 130 + 19 * len(lines)))


def _lines(rankings: Sequence[SizeRanking]) -> dict[str, list[Configuration]]:
    """Configurations by what they share, each line by state size."""
    found: dict[str, dict[tuple[str, object], Configuration]] = {}
    for row in (row for ranking in rankings for row in ranking.rows):
        if row.accuracy is None or row.state_size is None:
            continue
        line, place = found.setdefault(_name(row), {}), (row.size, row.trials[0].point.get("head_dim"))
        if place not in line or row.accuracy > (line[place].accuracy or 0.0):
            line[place] = row
    lines: dict[str, list[Configuration]] = {}
    for name, line in sorted(found.items()):
        several_widths = len({size for size, _ in line}) < len(line)
        for row in sorted(line.values(), key=lambda row: (row.parameters, row.state_size or 0)):
            lines.setdefault(f"{name}, {row.size}" if several_widths and len(rankings) > 1 else name, []).append(row)
    return lines


def _name(row: Configuration) -> str:
    """The method without the width of a head and without what the study varies in the recipe, but for the length."""
    varied = row.trials[0].varied
    words = row.method.split(" ")[:1] if varied else [row.label]
    words += [f"seq_len={varied['seq_len']}"] if "seq_len" in varied else []
    return re.sub(r"-dh\d+\b", "", " ".join(words))


def _guessing(lines: dict[str, list[Configuration]]) -> float:
    """Answers are equally likely, so their entropy says how many there are."""
    return math.exp(-max(row.unigram_entropy for rows in lines.values() for row in rows))
