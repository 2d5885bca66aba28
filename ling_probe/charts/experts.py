"""How experts go together."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import GRID, PALETTE, SYMBOLS, escape, figure_of, grid, heatmap, row_height
from ling_probe.errors import UsageError


def coactivation_heatmap(table: pd.DataFrame, *, layer: int, clusters: pd.DataFrame | None = None) -> go.Figure:
    """Lift of every pair of one layer's experts over the group-aware null.

    With `clusters` (of `expert_clusters`), experts of a co-activation cluster stand together, the largest first.

    Raises:
        UsageError: The table has no such layer.
    """
    rows = table[table["layer"] == layer]
    if rows.empty:
        raise UsageError(f"layer {layer} is not in this table; these are: {', '.join(map(str, table['layer'].unique()))}")
    mirrored = rows.rename(columns={"expert": "other", "other": "expert"})
    cells = grid(pd.concat([rows, mirrored]), "expert", "other", "lift")
    if clusters is not None:
        order = _of(clusters, "coactivation", layer).sort_values(["cluster", "expert"], kind="stable")["expert"]
        cells = cells.reindex(index=order, columns=order)
    heat = heatmap(cells, "together", "experts %{x} and %{y}<br>log2 lift %{z:.2f}")
    title = f"Layer {layer}: which experts are chosen together?"
    figure = figure_of([heat], title, x="expert", y="expert", height=560)
    if clusters is not None:
        figure.update_traces(x=[str(expert) for expert in cells.columns])
        figure.update_xaxes(type="category", nticks=16)
    return figure.update_yaxes(type="category", autorange="reversed", nticks=16)


def _of(clusters: pd.DataFrame, view: str, layer: int | None) -> pd.DataFrame:
    every = clusters["scope"] == "all layers"
    rows = clusters[(clusters["view"] == view) & (every if layer is None else ~every & (clusters["layer"] == layer))]
    if rows.empty:
        place = "all layers" if layer is None else f"layer {layer}"
        raise UsageError(f"no clusters of view {view} for {place} in this table; it has {', '.join(clusters['view'].unique())}")
    return rows


def cluster_map(table: pd.DataFrame, *, view: str | None = None, layer: int | None = None) -> go.Figure:
    """Experts of `expert_clusters` in one view, by their first two principal components, a colour and symbol a cluster.

    Args:
        table: Of `expert_clusters`.
        view: The first of the table by default.
        layer: Within this layer; over all layers, or the first that there is, by default.

    Raises:
        UsageError: The table has no such clustering.
    """
    view = view or str(table["view"].iloc[0])
    if layer is None and not ((table["view"] == view) & (table["scope"] == "all layers")).any():
        layer = int(table.loc[table["view"] == view, "layer"].iloc[0])
    shown = _of(table, view, layer)
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
        for place, (cluster, rows) in enumerate(shown.groupby("cluster"))
    ]
    place, kinds = "all layers" if layer is None else f"layer {layer}", "yes" if shown["kinds"].iloc[0] else "no"
    title = f"Do experts fall into kinds by {escape(view)}, {place}? ({kinds})"
    figure = figure_of(traces, title, x="first component (no unit)", y="second component (no unit)", height=460)
    return figure.add_hline(y=0, line={"color": GRID}).add_vline(x=0, line={"color": GRID})


def cluster_maps(table: pd.DataFrame) -> list[go.Figure]:
    """A `cluster_map` of each view that the table has."""
    return [cluster_map(table, view=str(view)) for view in table["view"].unique()]


def agreement_heatmap(table: pd.DataFrame) -> go.Figure:
    """Adjusted Rand index of every two views by layer, of `cluster_agreement`; 0 is chance, layer 0 stands for all layers."""
    rows = table.assign(pair=table["view"] + " · " + table["other"])
    cells = grid(rows, "pair", "layer", "ari")
    heat = go.Heatmap(
        z=cells.to_numpy(np.float32),
        x=["all" if name == "0" else name for name in map(str, cells.columns)],
        y=[escape(pair) for pair in cells.index],
        zmin=-1,
        zmid=0,
        zmax=1,
        colorscale="RdBu_r",
        colorbar={"title": "adjusted<br>Rand index", "tickvals": [-1, 0, 1], "ticktext": ["-1", "chance", "same"]},
        hovertemplate="%{y}<br>layer %{x}: %{z:.2f}<extra></extra>",
        hoverongaps=False,
    )
    question = ANALYSES["cluster_agreement"].question
    figure = figure_of([heat], question, x="layer", y="", height=row_height(len(cells)))
    return figure.update_xaxes(type="category").update_yaxes(type="category", automargin=True)
