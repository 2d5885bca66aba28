"""How work spreads over experts."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, figure_of, grid, heatmap, row_height, styled


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
        figure.add_scatter(x=layers, y=table[name].to_numpy(), showlegend=row == 1, row=row, col=1, **model)
        figure.add_scatter(x=layers, y=table[floor].to_numpy(), showlegend=row == 1, row=row, col=1, **chance)
        figure.update_yaxes(title=title, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title="layer", row=2, col=1).update_xaxes(type="category")
    return styled(figure, ANALYSES["load_balance"].question, height=460)
