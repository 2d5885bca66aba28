"""How work spreads over experts."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, figure_of, grid, heatmap, layer_colours, legend_below, row_height, styled


def load_heatmap(table: pd.DataFrame, *, group_size: int | None = None) -> go.Figure:
    """Layers by experts of `expert_load`; colour runs from a quarter of the even share to four times it, and saturates there.

    With `group_size` a line separates the router's groups.
    """
    cells = grid(table, "layer", "expert", "log2_ratio")
    heat = heatmap(cells, "load", "layer %{y}, expert %{x}<br>log2 of load over even share %{z:.2f}")
    figure = figure_of([heat], ANALYSES["expert_load"].question, x="expert", y="layer", height=row_height(len(cells)))
    for edge in range(group_size or len(cells.columns), len(cells.columns), group_size or 1):
        figure.add_vline(x=edge - 0.5, line={"color": MUTED, "width": 1})
    return figure.update_yaxes(type="category")


MEASURES = {"gini": "Gini", "max_vio": "MaxVio", "entropy": "entropy"}
"""Columns of `load_balance` that are drawn; the more even the load, the lower the first two and the higher the last."""


def balance_lines(table: pd.DataFrame, *, family: str = "all") -> go.Figure:
    """Gini, MaxVio and entropy by layer of `load_balance`, each beside that of a router without preference."""
    table = table[table["family"] == family]
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    layers = [str(layer) for layer in table["layer"]]
    for row, (name, title) in enumerate(MEASURES.items(), start=1):
        model = {"name": "model", "line": {"color": PALETTE[0]}, "mode": "lines+markers"}
        chance = {"name": "balanced router (chance)", "line": {"color": MUTED, "dash": "dash"}, "mode": "lines"}
        if name == "gini":
            hover = "layer %{x}: %{y:.4f} (%{customdata[0]:.4f} to %{customdata[1]:.4f})<extra></extra>"
            model |= {"customdata": table[["ci_low", "ci_high"]].to_numpy(), "hovertemplate": hover}
        figure.add_scatter(x=layers, y=table[name].to_numpy(), showlegend=row == 1, row=row, col=1, **model)
        figure.add_scatter(x=layers, y=table[f"{name}_floor"].to_numpy(), showlegend=row == 1, row=row, col=1, **chance)
        figure.update_yaxes(title=title, rangemode="normal" if name == "entropy" else "tozero", row=row, col=1)
    figure.update_xaxes(title="layer", row=3, col=1).update_xaxes(type="category")
    return styled(figure, ANALYSES["load_balance"].question, height=560)


def lorenz_curves(table: pd.DataFrame, *, family: str = "all") -> go.Figure:
    """Share of the choices by share of the experts of `load_curve`, a line a layer, over the range of balanced routers."""
    rows = table[table["family"] == family]
    layers = list(rows.groupby("layer"))
    floor = layers[0][1]
    x, low, high = (np.append(0.0, floor[name]) for name in ("experts", "floor_low", "floor_high"))
    band = go.Scatter(
        x=np.append(x, x[::-1]),
        y=np.append(high, low[::-1]),
        name="95 % of balanced routers",
        mode="lines",
        fill="toself",
        fillcolor=MUTED,
        opacity=0.4,
        line={"width": 0},
        hoverinfo="skip",
    )
    even = go.Scatter(x=[0, 1], y=[0, 1], name="perfectly even", mode="lines", line={"color": MUTED, "dash": "dash"})
    lines = [
        go.Scatter(
            x=x,
            y=np.append(0.0, line["share"]),
            customdata=np.append(-1, line["expert"]),
            name=f"layer {layer}",
            mode="lines",
            line={"color": colour},
            hovertemplate=f"layer {layer}: %{{x:.0%}} of experts: %{{y:.1%}}<br>up to expert %{{customdata}}<extra></extra>",
        )
        for (layer, line), colour in zip(layers, layer_colours(len(layers)), strict=True)
    ]
    title = ANALYSES["load_curve"].question
    names = {"x": "share of the experts, the least loaded first", "y": "share of the choices"}
    figure = figure_of([band, even, *lines], title, **names, height=460)
    return legend_below(figure).update_xaxes(tickformat=".0%", range=[0, 1]).update_yaxes(tickformat=".0%", range=[0, 1])


def bias_against_load(table: pd.DataFrame) -> go.Figure:
    """Experts of `loads_with_bias` by their load and the bias of the router, a colour a layer, darkest first."""
    layers = list(table.groupby("layer"))
    dots = [
        go.Scatter(
            x=rows["log2_ratio"].to_numpy(),
            y=rows["bias"].to_numpy(),
            customdata=rows[["layer", "expert"]].to_numpy(),
            name=f"layer {layer}",
            mode="markers",
            marker={"color": colour, "size": 7, "opacity": 0.75},
            hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}<br>log2 load %{x:.2f}, bias %{y:.4f}<extra></extra>",
        )
        for (layer, rows), colour in zip(layers, layer_colours(len(layers)), strict=True)
    ]
    title = "Do the experts that the bias helps do more of the work?"
    figure = figure_of(dots, title, x="load over the even share, log2", y="bias", height=460)
    legend_below(figure).add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    return figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})


SCOPES = {"run": "whole run", "sequence": "one sequence"}


def coverage_curves(table: pd.DataFrame) -> go.Figure:
    """Share of the choices by number of experts of `coverage`, a line a layer, beside a router without preference."""
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=list(SCOPES.values()), horizontal_spacing=0.05)
    for col, scope in enumerate(SCOPES, start=1):
        rows = table[table["scope"] == scope]
        for place, (layer, line) in enumerate(rows.groupby("layer")):
            figure.add_scatter(
                x=line["experts"].to_numpy(), y=line["share"].to_numpy(), mode="lines+markers", name="a layer", row=1, col=col,
                line={"color": PALETTE[0]}, opacity=0.5, showlegend=col == 1 and not place,
                hovertemplate=f"layer {layer}: %{{y:.0%}} of choices by %{{x:.1f}} experts<extra></extra>",
            )  # fmt: skip
        chance = rows.drop_duplicates("share")
        figure.add_scatter(
            x=chance["floor"].to_numpy(), y=chance["share"].to_numpy(), mode="lines", name="balanced router (chance)",
            line={"color": MUTED, "dash": "dash"}, showlegend=col == 1, row=1, col=col,
        )  # fmt: skip
    figure.update_xaxes(title="experts, the most loaded first", rangemode="tozero")
    figure.update_yaxes(title="share of choices", tickformat=".0%", row=1, col=1)
    return legend_below(styled(figure, ANALYSES["coverage"].question, height=440))


def weight_bars(table: pd.DataFrame) -> go.Figure:
    """Shares of `weight_concentration` by layer, stacked from the largest weight; the line is what an equal weight has."""
    whole = table[table["kind"] == "all"]
    bars = [
        go.Bar(
            x=[str(layer) for layer in rows["layer"]],
            y=rows["share"].to_numpy(),
            name=f"weight {rank}",
            marker={"color": PALETTE[place % len(PALETTE)]},
            customdata=rows["cumulative"].to_numpy(),
            hovertemplate=f"layer %{{x}}, weight {rank}: %{{y:.1%}}<br>with those before it %{{customdata:.1%}}<extra></extra>",
        )
        for place, (rank, rows) in enumerate(whole.groupby("rank"))
    ]
    title = ANALYSES["weight_concentration"].question
    figure = figure_of(bars, title, x="layer", y="share of a token's weight", height=420)
    figure.update_layout(barmode="stack").update_xaxes(type="category").update_yaxes(tickformat=".0%", range=[0, 1])
    return figure.add_hline(y=table["even"].iloc[0], line={"color": MUTED, "dash": "dash"})
