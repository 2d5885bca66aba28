"""How work spreads over experts."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, figure_of, grid, heatmap, legend_below, row_height, styled


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


def balance_lines(table: pd.DataFrame) -> go.Figure:
    """Gini and MaxVio by layer of `load_balance`, each above the floor of a router without preference."""
    table = table[table["family"] == "all"]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    layers = [str(layer) for layer in table["layer"]]
    for row, (name, title) in enumerate((("gini", "Gini"), ("max_vio", "MaxVio")), start=1):
        floor = f"{name}_floor"
        model = {"name": "model", "line": {"color": PALETTE[0]}, "mode": "lines+markers"}
        chance = {"name": "balanced router (chance)", "line": {"color": MUTED, "dash": "dash"}, "mode": "lines"}
        if name == "gini":
            hover = "layer %{x}: %{y:.4f} (%{customdata[0]:.4f} to %{customdata[1]:.4f})<extra></extra>"
            model |= {"customdata": table[["ci_low", "ci_high"]].to_numpy(), "hovertemplate": hover}
        figure.add_scatter(x=layers, y=table[name].to_numpy(), showlegend=row == 1, row=row, col=1, **model)
        figure.add_scatter(x=layers, y=table[floor].to_numpy(), showlegend=row == 1, row=row, col=1, **chance)
        figure.update_yaxes(title=title, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title="layer", row=2, col=1).update_xaxes(type="category")
    return styled(figure, ANALYSES["load_balance"].question, height=460)


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
