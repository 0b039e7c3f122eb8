"""Draws the same figures for a browser, where a line can be hidden, enlarged and asked for its value.

The figures are fragments without the plotting library: the page loads that once, from a file beside it, so that the
report opens on a machine without a network. Element names are fixed, so that the same input gives the same page.
"""

from __future__ import annotations

import plotly.graph_objects as go
import plotly.io

from services.report.lambda_axis import LambdaAxis, axis_for, horizon_text, lambda_text
from services.report.seed_spread import Configuration, LayerDecay, SizeRanking, over_layers
from services.report.still_figures import KINDS, OTHER_KIND

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b", "#000000")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "x")
KIND_SYMBOLS = {"vector": "circle", "scalar": "square", "vector, shared": "triangle-up"}


def moving_decay_figure(ranking: SizeRanking, element: str) -> str:
    """HTML fragment: median λ by layer, all methods on one axis; a method's dashed line is before training."""
    rows = ranking.rows
    scale = axis_for(d.median for r in rows for d in (*r.trained(), *r.initial()))
    figure = go.Figure()
    for index, row in enumerate(rows):
        color, symbol = PALETTE[index % len(PALETTE)], SYMBOLS[index // len(PALETTE) % len(SYMBOLS)]
        name = f"{row.rank}  {row.label}"
        figure.add_trace(_line(row.initial(), scale, name, color, symbol, trained=False))
        figure.add_trace(_line(row.trained(), scale, name, color, symbol, trained=True))
    positions, labels = zip(*scale.ticks(), strict=True)
    figure.update_yaxes(title="median λ (logit axis)", tickvals=positions, ticktext=labels, range=scale.limits())
    depth = max((len(r.trained()) for r in rows), default=1)
    figure.update_xaxes(title="layer", dtick=1 if depth <= 12 else 2)
    return as_fragment(figure, element, height=max(480, 130 + 19 * len(rows)))


def moving_loss_figure(ranking: SizeRanking, element: str) -> str:
    """HTML fragment: held-out loss against the median λ over the layers; each point names its method."""
    rows = [r for r in ranking.rows if r.trained()]
    scale = axis_for(v for r in rows for v in (over_layers(r.initial()), over_layers(r.trained())) if v is not None)
    figure = go.Figure()
    for kind in sorted({r.kind for r in rows}, reverse=True):
        figure.add_trace(_points(ranking, [r for r in rows if r.kind == kind], kind, scale))
    positions, labels = zip(*scale.ticks(), strict=True)
    figure.update_xaxes(
        title="median λ after training, median over the layers (logit axis); numbers are ranks",
        tickvals=positions, ticktext=labels, range=scale.limits(),
    )  # fmt: skip
    figure.update_yaxes(title="held-out loss (nats per token)")
    return as_fragment(figure, element, height=480)


def _line(decay: tuple[LayerDecay, ...], scale: LambdaAxis, name: str, color: str, symbol: str, *, trained: bool) -> go.Scatter:
    when = "trained" if trained else "before training"
    return go.Scatter(
        x=[d.layer for d in decay],
        y=[scale.place(d.median) for d in decay],
        customdata=[[lambda_text(d.median), lambda_text(d.p25), lambda_text(d.p75), horizon_text(d.median)] for d in decay],
        hovertemplate=f"<b>{name}</b>, {when}<br>layer %{{x}}: λ = %{{customdata[0]}}"
        "<br>quartiles %{customdata[1]} to %{customdata[2]}<br>remembers %{customdata[3]} tokens<extra></extra>",
        mode="lines+markers" if trained else "lines",
        line={"color": color, "width": 2 if trained else 1, "dash": "solid" if trained else "dash"},
        marker={"symbol": symbol, "size": 7},
        opacity=1.0 if trained else 0.55,
        name=name,
        legendgroup=name,
        showlegend=trained,
    )


def _points(ranking: SizeRanking, rows: list[Configuration], kind: str, scale: LambdaAxis) -> go.Scatter:
    medians = [over_layers(r.trained()) or 0.0 for r in rows]
    color, _ = KINDS.get(kind, OTHER_KIND)
    return go.Scatter(
        x=[scale.place(m) for m in medians],
        y=[r.held_out_loss for r in rows],
        error_y={"type": "data", "array": [r.seed_sd or 0.0 for r in rows], "thickness": 1, "width": 3},
        customdata=[
            [f"{r.rank}  {r.label}", lambda_text(m), f"{ranking.above_best(r):.4f}", len(r.trials)]
            for r, m in zip(rows, medians, strict=True)
        ],
        hovertemplate="<b>%{customdata[0]}</b><br>loss %{y:.4f} nats per token, +%{customdata[2]} above the best"
        "<br>λ = %{customdata[1]}, %{customdata[3]} seed(s)<extra></extra>",
        text=[str(r.rank) for r in rows],
        textposition="top right",
        mode="markers+text",
        marker={"color": color, "size": 9, "symbol": KIND_SYMBOLS.get(kind, "diamond")},
        name=f"{kind} decay",
    )


def as_fragment(figure: go.Figure, element: str, *, height: int) -> str:
    """The figure as HTML without the plotting library, in an element of the given name."""
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 70, "r": 20, "t": 20, "b": 55}, font={"size": 13},
        legend={"font": {"size": 11}}, hovermode="closest",
    )  # fmt: skip
    fragment: str = plotly.io.to_html(
        figure,
        include_plotlyjs=False,
        full_html=False,
        div_id=element,
        config={"displaylogo": False, "responsive": True},
    )
    return fragment
