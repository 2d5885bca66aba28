"""What experts prefer, side by side."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.charts.style import escape, figure_of, grid, heatmap, row_height


def profile_heatmap(table: pd.DataFrame, kind: str) -> go.Figure:
    """Classes by experts of `ordered_profiles`, both in the order of their likeness; what is not significant is faded.

    On top lies an unseen point on every cell that carries (layer, expert), for Plotly tells of no click on a heatmap.

    Args:
        table: Of `ordered_profiles`.
        kind: Its class column, "label" or "family".
    """
    cells = {
        name: grid(table.assign(value=table["log2_ratio"].where(table["found"] == sure)), "class_place", "place", "value")
        for name, sure in (("faded", False), ("found", True))
    }
    experts = table.drop_duplicates("place").sort_values("place")
    classes = table.drop_duplicates("class_place").sort_values("class_place")
    names = [f"L{layer} E{expert}" for layer, expert in zip(experts["layer"], experts["expert"], strict=True)]
    labels = [escape(str(name)) or "unnamed" for name in classes[kind]]
    maps = [_map(cells["faded"], names, labels).update(opacity=0.3, showscale=False), _map(cells["found"], names, labels)]
    title = f"Which experts prefer which {kind}, at equal words?"
    figure = figure_of(
        [*maps, _points(table, names, labels)], title, x="expert, alike ones together", y="", height=row_height(len(labels))
    )
    figure.update_layout(showlegend=False, clickmode="event+select", hovermode="closest", hoverdistance=-1)
    figure.update_xaxes(type="category", nticks=24, range=[-0.5, len(names) - 0.5])
    return figure.update_yaxes(type="category", automargin=True, range=[-0.5, len(labels) - 0.5])


def _map(cells: pd.DataFrame, names: list[str], labels: list[str]) -> go.Heatmap:
    return heatmap(cells, "chosen<br>over<br>expected", "").update(x=names, y=labels, hoverinfo="skip", hovertemplate=None)


def _points(table: pd.DataFrame, names: list[str], labels: list[str]) -> go.Scatter:
    """A square on every cell, by which it is pointed at and clicked."""
    hover = [
        f"log2 ratio {row.log2_ratio:+.2f} ({row.ci_low:+.2f} to {row.ci_high:+.2f}), q {row.q:.2g}"
        for row in table.itertuples()
    ]
    return go.Scatter(
        x=np.array(names)[table["place"]],
        y=np.array(labels)[table["class_place"]],
        customdata=table[["layer", "expert"]].to_numpy(),
        text=hover,
        mode="markers",
        marker={"symbol": "square", "size": 12, "opacity": 0},
        hovertemplate="%{x}, %{y}<br>%{text}<extra></extra>",
    )
