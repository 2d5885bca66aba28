"""How experts go together."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import GRID, PALETTE, SYMBOLS, figure_of, grid, heatmap
from ling_probe.errors import UsageError


def coactivation_heatmap(table: pd.DataFrame, *, layer: int) -> go.Figure:
    """Lift of every pair of one layer's experts over the group-aware null.

    Raises:
        UsageError: The table has no such layer.
    """
    rows = table[table["layer"] == layer]
    if rows.empty:
        raise UsageError(f"layer {layer} is not in this table; these are: {', '.join(map(str, table['layer'].unique()))}")
    mirrored = rows.rename(columns={"expert": "other", "other": "expert"})
    cells = grid(pd.concat([rows, mirrored]), "expert", "other", "lift")
    heat = heatmap(cells, "together", "experts %{x} and %{y}<br>log2 lift %{z:.2f}")
    title = f"Layer {layer}: which experts are chosen together?"
    figure = figure_of([heat], title, x="expert", y="expert", height=560)
    return figure.update_yaxes(type="category", autorange="reversed", nticks=16)


def cluster_map(table: pd.DataFrame) -> go.Figure:
    """Experts of `expert_clusters` by their first two principal components, one colour and symbol a cluster."""
    traces = [
        go.Scatter(
            x=rows["x"].to_numpy(np.float32),
            y=rows["y"].to_numpy(np.float32),
            customdata=rows[["layer", "expert", "silhouette"]].to_numpy(np.float32),
            mode="markers",
            name=f"cluster {cluster}",
            marker={"color": PALETTE[place % 8], "symbol": SYMBOLS[(place + place // 8) % 8], "size": 8},
            hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}<br>silhouette %{customdata[2]:.2f}",
        )
        for place, (cluster, rows) in enumerate(table.groupby("cluster"))
    ]
    figure = figure_of(
        traces, ANALYSES["expert_clusters"].question, x="first component, log2", y="second component, log2", height=460
    )
    return figure.add_hline(y=0, line={"color": GRID}).add_vline(x=0, line={"color": GRID})
