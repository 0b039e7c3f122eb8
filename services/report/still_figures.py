"""Draws the report's figures as PNG files that can be read on paper, in grey, and by the colour-blind.

A figure is drawn per size. Colours are Okabe and Ito's, and every colour has a marker shape of its own. Figures are
built without pyplot, so that no window system, global state or leaked figure is involved, and the same input gives the
same picture.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from services.report.lambda_axis import LambdaAxis, axis_for
from services.report.seed_spread import SEPARATED_AT_SD, Configuration, LayerDecay, SizeRanking, over_layers

INK, FAINT, GRID, BAND = "#222222", "#c9c9c9", "#e6e6e6", "#e4e4e4"
OTHER_KIND = ("#6b6b6b", "D")
KINDS = {"vector": ("#0072B2", "o"), "scalar": ("#D55E00", "s"), "vector, shared": ("#009E73", "^"), "paired": ("#CC79A7", "v")}
COLUMNS = 5
DPI = 150


def loss_figure(ranking: SizeRanking, unigram_entropy: float) -> bytes:
    """PNG: how far each method is below the unigram entropy, and, enlarged, how far above the best method."""
    rows = ranking.rows
    figure = Figure(figsize=(10.5, 1.7 + 0.25 * len(rows)), dpi=DPI, layout="constrained")
    whole, enlarged = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.15])
    for y, row in enumerate(rows):
        _loss_bar(whole, y, row, unigram_entropy)
    whole.axvline(unigram_entropy, color=INK, linewidth=1.2)
    whole.set_xlabel("held-out loss (nats per token)", fontsize=9)
    whole.set_title(f"from the unigram entropy, {unigram_entropy:.3f}, down", fontsize=9, color=INK, loc="left")
    whole.set_yticks(range(len(rows)), [f"{r.label}  {r.rank}" for r in rows], fontsize=8)
    whole.set_ylim(len(rows) - 0.4, -0.6)
    _enlarged_losses(enlarged, ranking)
    for axes in (whole, enlarged):
        _plain(axes, grid="x")
    _kind_legend(figure, rows)
    return _png(figure)


def decay_figure(ranking: SizeRanking) -> bytes:
    """PNG: a panel a method, median λ by layer, before (dashed) and after training; the other methods in grey."""
    rows = ranking.rows
    scale = axis_for(v for r in rows for d in (*r.trained(), *r.initial()) for v in (d.median, d.p25, d.p75))
    columns = min(COLUMNS, math.ceil(math.sqrt(len(rows))))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(max(2.25 * columns, 6.4) + 0.9, 1.9 * lines + 1.0), dpi=DPI, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    flat = list(panels.flat)
    faintness = min(1.0, 12 / len(rows))
    for axes, row in zip(flat, rows, strict=False):
        for other in rows:
            _medians(axes, other.trained(), scale, color=FAINT, linewidth=0.6, alpha=faintness, zorder=1)
        _decay_panel(axes, row, scale)
    for axes in flat[len(rows) :]:
        axes.set_visible(False)
    depth = max((len(r.trained()) for r in rows), default=1)
    for index in range(max(0, len(rows) - columns), len(rows)):
        flat[index].tick_params(labelbottom=True)
    flat[0].set_xlim(0.6, max(depth, 1) + 0.4)
    flat[0].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    flat[0].set_ylim(*scale.limits())
    positions, labels = zip(*scale.ticks(), strict=True)
    flat[0].set_yticks(positions, labels)
    figure.supxlabel("layer", fontsize=9, color=INK)
    figure.supylabel("median λ (logit axis)", fontsize=9, color=INK)
    _decay_legend(figure, rows)
    return _png(figure)


def loss_by_decay_figure(ranking: SizeRanking) -> bytes:
    """PNG: held-out loss against the median λ over the layers, each method moving from its initial to its trained λ."""
    rows = [r for r in ranking.rows if r.trained()]
    ends = [(r, over_layers(r.initial()), over_layers(r.trained())) for r in rows]
    scale = axis_for(v for _, a, b in ends for v in (a, b) if v is not None)
    figure = Figure(figsize=(9.5, 5.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for row, before, after in ends:
        if before is not None and after is not None:
            _decay_move(axes, row, scale.place(before), scale.place(after))
    positions, labels = zip(*scale.ticks(), strict=True)
    axes.set_xticks(positions, labels)
    axes.set_xlim(*scale.limits())
    axes.margins(y=0.08)
    axes.set_xlabel("median λ, median over the layers (logit axis)", fontsize=9)
    axes.set_ylabel("held-out loss (nats per token)", fontsize=9)
    axes.set_title("numbers are ranks; a line starts at the λ before training", fontsize=9, color=INK, loc="left")
    _plain(axes, grid="both")
    _kind_legend(figure, ranking.rows)
    return _png(figure)


def _loss_bar(axes: Axes, y: int, row: Configuration, unigram_entropy: float) -> None:
    color, marker = KINDS.get(row.kind, OTHER_KIND)
    axes.plot([unigram_entropy, row.held_out_loss], [y, y], color=color, linewidth=2.2, alpha=0.45, solid_capstyle="butt")
    axes.plot([row.held_out_loss], [y], marker=marker, color=color, markersize=5, linestyle="none")


def _enlarged_losses(axes: Axes, ranking: SizeRanking) -> None:
    above = [ranking.above_best(r) for r in ranking.rows]
    limit = _enlarged_limit(above)
    best = ranking.rows[0]
    for y, (row, difference) in enumerate(zip(ranking.rows, above, strict=True)):
        color, marker = KINDS.get(row.kind, OTHER_KIND)
        inside = difference <= limit
        seeds = [t.held_out_loss - best.held_out_loss for t in row.trials]
        if len(seeds) > 1 and inside:
            axes.plot(seeds, [y] * len(seeds), marker="|", color=color, alpha=0.6, markersize=8, linestyle="none")
        x = difference if inside else limit * 1.06
        axes.plot([x], [y], marker=marker if inside else ">", color=color, markersize=5, linestyle="none")
        axes.text(
            1.01,
            y,
            f"+{difference:.4f}" if difference else "best",
            fontsize=7,
            va="center",
            color=INK,
            transform=axes.get_yaxis_transform(),
        )
    reach = [SEPARATED_AT_SD * (ranking.sd_of_difference(best, row) or 0.0) for row in ranking.rows]
    axes.barh(range(len(reach)), [2 * r for r in reach], left=[-r for r in reach], height=1.0, color=BAND, zorder=0)
    known = ranking.pooled_sd is not None
    note = f"grey: within {SEPARATED_AT_SD:.0f} sd of the best" if known else "no noise floor: one seed each"
    axes.axvline(0, color=INK, linewidth=0.8)
    low = min([0.0, *(t.held_out_loss - best.held_out_loss for t in best.trials)])
    axes.set_xlim(low - 0.06 * limit, limit * 1.1)
    axes.set_xlabel("above the best (nats per token)", fontsize=9)
    axes.set_title(f"enlarged ({note})", fontsize=9, color=INK, loc="left")


def _enlarged_limit(above: Sequence[float]) -> float:
    """Where the enlarged axis ends: a method beyond eight times the median difference is an arrow at the edge."""
    differences = [a for a in above if a > 0]
    return max(a for a in differences if a <= 8 * median(differences)) if differences else 1e-3


def _decay_panel(axes: Axes, row: Configuration, scale: LambdaAxis) -> None:
    color, marker = KINDS.get(row.kind, OTHER_KIND)
    trained = row.trained()
    layers = [d.layer for d in trained]
    low, high = [scale.place(d.p25) for d in trained], [scale.place(d.p75) for d in trained]
    axes.fill_between(layers, low, high, color=color, alpha=0.2, linewidth=0, zorder=2)
    if len(layers) == 1:
        axes.vlines(layers, low, high, color=color, alpha=0.3, linewidth=6, zorder=2)
    if len(row.trials) > 1:
        for trial in row.trials:
            axes.plot(layers, [scale.place(p.median) for p in trial.decay_profile], color=color, linewidth=0.6, alpha=0.7)
    _medians(axes, row.initial(), scale, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=3)
    size = 3.5 if len(trained) <= 12 else 2.0
    _medians(axes, trained, scale, color=color, linewidth=1.6, marker=marker, markersize=size, zorder=4)
    if not trained:
        axes.text(0.5, 0.5, "no decay", ha="center", va="center", fontsize=8, color=INK, transform=axes.transAxes)
    axes.set_title(f"{row.rank}  {row.label}", fontsize=7.5, color=INK, loc="left")
    _plain(axes, grid="y")
    axes.tick_params(labelsize=7)


def _medians(axes: Axes, decay: Sequence[LayerDecay], scale: LambdaAxis, **style: object) -> None:
    axes.plot([d.layer for d in decay], [scale.place(d.median) for d in decay], **style)  # type: ignore[arg-type]


def _decay_move(axes: Axes, row: Configuration, before: float, after: float) -> None:
    color, marker = KINDS.get(row.kind, OTHER_KIND)
    loss = row.held_out_loss
    axes.plot([before, after], [loss, loss], color=color, linewidth=0.9, alpha=0.6)
    axes.plot([before], [loss], marker="|", color=color, markersize=6, linestyle="none")
    axes.plot([after], [loss], marker=marker, color=color, markersize=6, linestyle="none")
    axes.annotate(str(row.rank), (after, loss), xytext=(5, 3), textcoords="offset points", fontsize=7, color=INK)


def _kind_legend(figure: Figure, rows: Sequence[Configuration]) -> None:
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="none", markersize=5, label=f"{kind} decay")
        for kind, (color, marker) in _kinds_of(rows).items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _decay_legend(figure: Figure, rows: Sequence[Configuration]) -> None:
    handles = [
        Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (3, 2)), label="before training"),
        *(
            Line2D([], [], color=color, marker=marker, markersize=3.5, linewidth=1.6, label=f"trained, {kind}")
            for kind, (color, marker) in _kinds_of(rows).items()
        ),
        Line2D([], [], color=INK, alpha=0.2, linewidth=6, label="quartiles"),
    ]
    if len(rows) > 1:
        handles.append(Line2D([], [], color=FAINT, linewidth=1, label="the other methods"))
    columns = 3 if len(rows) < 10 else len(handles)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=7.5)


def _kinds_of(rows: Sequence[Configuration]) -> dict[str, tuple[str, str]]:
    return {kind: KINDS.get(kind, OTHER_KIND) for kind in sorted({r.kind for r in rows}, reverse=True)}


def _plain(axes: Axes, *, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
