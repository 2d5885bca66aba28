"""How runs compare."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES, surest_first
from ling_probe.charts.style import (
    MUTED,
    PALETTE,
    SYMBOLS,
    escape,
    figure_of,
    grid,
    heatmap,
    intervals,
    layer_colours,
    lines_with_intervals,
    row_height,
)

FINAL = "share of the final experts"
BESIDE = {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}
"""Place of a legend with many entries."""


def saturation_curves(table: pd.DataFrame) -> go.Figure:
    """Agreement with the final model by checkpoint of `router_saturation`, a line a layer, darkest first; dashed is chance."""
    layers = list(table.groupby("layer"))
    colours = layer_colours(len(layers))
    traces: list[go.Scatter] = []
    for (layer, rows), colour in zip(layers, colours, strict=True):
        names = [escape(str(name)) for name in rows["checkpoint"]]
        traces += lines_with_intervals(names, rows, ("agreement", "ci_low", "ci_high"), f"layer {layer}", colour)
        traces.append(_null(names, rows["chance"], "loads alone (chance)", MUTED, "dash", shown=layer == layers[0][0]))
    figure = figure_of(traces, ANALYSES["router_saturation"].question, x="checkpoint", y=FINAL, height=440)
    figure.update_layout(legend=BESIDE)
    return figure.update_xaxes(type="category").update_yaxes(range=[0, 1], tickformat=".0%")


def saturation_lines(table: pd.DataFrame) -> go.Figure:
    """The same by layer, a line a checkpoint, above the same token elsewhere (dotted) and chance (dashed)."""
    return _by_layer(table.rename(columns={"checkpoint": "against"}), "Which layers settled first?", FINAL)


def agreement_lines(table: pd.DataFrame) -> go.Figure:
    """Agreement by layer of `route_agreement`, a line a run compared with, above the same token elsewhere and chance."""
    whole = table[table["margin"] == "all"]
    return _by_layer(whole, ANALYSES["route_agreement"].question, "share of the experts in common")


def _by_layer(table: pd.DataFrame, title: str, y: str) -> go.Figure:
    traces: list[go.Scatter] = []
    for place, (name, rows) in enumerate(table.groupby("against", sort=False)):
        layers, colour = [str(layer) for layer in rows["layer"]], PALETTE[place % 8]
        bounds = ("agreement", "ci_low", "ci_high")
        traces += lines_with_intervals(layers, rows, bounds, f"against {escape(str(name))}", colour)
        first = place == 0
        traces.append(_null(layers, rows["token_agreement"], "same token elsewhere", colour, "dot", shown=first))
        traces.append(_null(layers, rows["chance"], "loads alone (chance)", MUTED, "dash", shown=first))
    figure = figure_of(traces, title, x="layer", y=y, height=440)
    figure.update_layout(legend=BESIDE)
    return figure.update_xaxes(type="category").update_yaxes(range=[0, 1.02], tickformat=".0%")


def _null(x: Sequence[str], y: pd.Series, name: str, colour: str, dash: str, *, shown: bool) -> go.Scatter:
    """A thin line of what chance makes of it; one entry in the legend for all of a name."""
    line = {"color": colour, "dash": dash, "width": 1}
    hover = f"{name} %{{y:.1%}}<extra></extra>"
    return go.Scatter(
        x=x, y=y.to_numpy(), name=name, mode="lines", line=line, legendgroup=name, showlegend=shown, hovertemplate=hover
    )


def margin_lines(table: pd.DataFrame) -> go.Figure:
    """Choices that differ by how close they were, a line a layer and run of `route_agreement`."""
    close = table[table["margin"] != "all"]
    traces = [
        go.Scatter(
            x=rows["margin"].to_list(),
            y=rows["decisions_differ"].to_numpy(),
            customdata=rows["tokens"].to_numpy(),
            mode="lines+markers",
            name=f"layer {layer}, {escape(str(name))}",
            line={"color": PALETTE[place % 8]},
            marker={"symbol": SYMBOLS[(place + place // 8) % 8]},
            hovertemplate="margin %{x}<br>%{y:.2%} of %{customdata:,} choices differ",
        )
        for place, ((name, layer), rows) in enumerate(close.groupby(["against", "layer"], sort=False))
    ]
    title = "Do the runs differ where the choice was close?"
    figure = figure_of(traces, title, x="margin of the choice, choice score", y="choices that differ", height=420)
    figure.update_layout(legend=BESIDE)
    order = close.drop_duplicates("margin").sort_values("margin_low")["margin"].to_list()
    return figure.update_xaxes(type="category", categoryarray=order).update_yaxes(rangemode="tozero", tickformat=".0%")


def shift_heatmap(table: pd.DataFrame, *, against: str) -> go.Figure:
    """Layers by experts of `load_shift` against one run; what is not significant is left blank."""
    rows = table[table["against"] == against]
    cells = grid(rows.assign(log2_ratio=rows["log2_ratio"].where(rows["q"] < 0.05)), "layer", "expert", "log2_ratio")
    heat = heatmap(cells, "share over<br>the other's", "layer %{y}, expert %{x}<br>log2 ratio %{z:.2f}")
    title = f"Which experts are used more, or less, than in {escape(against)}? (q < 0.05)"
    return figure_of([heat], title, x="expert", y="layer", height=row_height(len(cells))).update_yaxes(type="category")


def shift_bars(table: pd.DataFrame, *, top: int = 12) -> go.Figure:
    """The surest rows of `load_shift` with their 95 % intervals."""
    rows = surest_first(table.dropna(subset="p")).head(top)
    names = [f"L{row.layer} E{row.expert} · {escape(str(row.against))}" for row in rows.itertuples()]
    point = go.Scatter(
        x=rows["log2_ratio"].to_numpy(),
        y=names,
        mode="markers",
        name="shift (grey: not significant)",
        marker={"color": np.where(rows["q"] < 0.05, PALETTE[0], MUTED), "size": 10},
        customdata=rows[["share", "share_against", "q"]].to_numpy(),
        hovertemplate="%{y}<br>%{customdata[0]:.2%} and %{customdata[1]:.2%}, q %{customdata[2]:.3g}<extra></extra>",
    )
    title = "Which experts shifted most?"
    figure = figure_of(
        [intervals(rows, names), point], title, x="share over the other run's, log2", y="", height=140 + 28 * len(rows)
    )
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True)


def accuracy_bars(table: pd.DataFrame) -> go.Figure:
    """Differences of `accuracy_difference` in the share of right answers, with their 95 % intervals."""
    names = [f"{escape(str(row.family))} · {escape(str(row.against))}" for row in table.itertuples()]
    point = go.Scatter(
        x=table["difference"].to_numpy(),
        y=names,
        mode="markers",
        name="this run less the other (grey: not significant)",
        marker={"color": np.where(table["q"] < 0.05, PALETTE[0], MUTED), "size": 10},
        customdata=table[["share", "other_share", "problems", "q"]].to_numpy(),
        hovertemplate="%{y}<br>%{customdata[0]:.1%} and %{customdata[1]:.1%} of %{customdata[2]:,} problems, "
        "q %{customdata[3]:.3g}<extra></extra>",
    )
    title, x = ANALYSES["accuracy_difference"].question, "difference in the share of right answers"
    figure = figure_of([intervals(table, names), point], title, x=x, y="", height=140 + 28 * len(table))
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    figure.update_xaxes(tickformat="+.0%")
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True)
