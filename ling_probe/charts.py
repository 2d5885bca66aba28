"""A table in, a Plotly figure out; no arithmetic, so a figure never shows what its table does not hold.

Every figure's title is the question it answers, axes name their unit, and the line of no effect is drawn. Colours can be told
apart with any colour vision. Labels come from benchmarks and models, so what Plotly would read as markup is escaped.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ling_probe.analysis import ANALYSES, surest_first
from ling_probe.errors import UsageError

EXPORT_CONFIG: dict[str, Any] = {"showSendToCloud": False, "displaylogo": False, "responsive": True}
"""For `to_html` and for pages: nothing is offered to a cloud."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
"""Okabe and Ito's colours, with two of Tol's for the eighth cluster."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star", "triangle-down")
MUTED = "rgba(128,128,128,0.9)"
GRID = "rgba(128,128,128,0.25)"
FOLDS = {"tickvals": [-2, -1, 0, 1, 2], "ticktext": ["¼", "½", "even", "2×", "4×"]}
P_TICKS = (1, 0.3, 0.1, 0.05, 0.01, 0.001, 0.0001)
LOSS_TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


def escape(text: str) -> str:
    """Text that Plotly shows letter by letter.

    >>> escape("<b>R&D")
    '&lt;b>R&amp;D'
    """
    return text.replace("&", "&amp;").replace("<", "&lt;")


def load_heatmap(table: pd.DataFrame, *, group_size: int | None = None) -> go.Figure:
    """Layers by experts of `expert_load`; colour runs from a quarter of the even share to four times it, and saturates there.

    With `group_size` a line separates the router's groups.
    """
    cells = _grid(table, "layer", "expert", "log2_ratio")
    heat = _heat(cells, "load", "layer %{y}, expert %{x}<br>log2 of load over even share %{z:.2f}")
    figure = _figure([heat], ANALYSES["expert_load"].question, x="expert", y="layer", height=_row_height(len(cells)))
    for edge in range(group_size or len(cells.columns), len(cells.columns), group_size or 1):
        figure.add_vline(x=edge - 0.5, line={"color": MUTED, "width": 1})
    return figure.update_yaxes(type="category")


def balance_lines(table: pd.DataFrame) -> go.Figure:
    """Gini and MaxVio by layer of `load_balance`, each above the floor of a router without preference."""
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
    return _styled(figure, ANALYSES["load_balance"].question, height=460)


def specialisation_bars(table: pd.DataFrame, *, top: int = 12) -> go.Figure:
    """The surest rows of `label_specialisation` or `family_specialisation`: 95 % intervals, raw effect beside adjusted."""
    kind, rows = _class_column(table), surest_first(table.dropna(subset="p")).head(top)
    names = [_expert_name(row, kind) for row in rows.to_dict("records")]
    found = ["q < 0.05" if q < 0.05 else "not significant" for q in rows["q"]]
    traces = [
        _intervals(rows, names),
        go.Scatter(
            x=rows["log2_ratio"].to_numpy(),
            y=names,
            mode="markers",
            name="at equal tokens (grey: not significant)",
            marker={"color": [PALETTE[0] if each == "q < 0.05" else MUTED for each in found], "size": 10},
            customdata=np.stack([rows["q"].map("{:.3g}".format), found], axis=1),
            hovertemplate="%{y}<br>log2 ratio %{x:.2f}, q %{customdata[0]} (%{customdata[1]})<extra></extra>",
        ),
        go.Scatter(
            x=rows["raw_log2_ratio"].to_numpy(),
            y=names,
            mode="markers",
            name="raw, tokens included",
            marker={"color": PALETTE[1], "symbol": "diamond-open", "size": 9},
            hovertemplate="%{y}<br>raw log2 ratio %{x:.2f}<extra></extra>",
        ),
    ]
    figure = _figure(traces, _question(kind), x="effect, log2", y="", height=140 + 28 * len(rows))
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True)


def specialisation_volcano(table: pd.DataFrame, *, most: int = 4000) -> go.Figure:
    """Effect against corrected p; the dashed line is q = 0.05. Of longer tables the `most` rows of smallest p are drawn."""
    kind, drawn = _class_column(table), table.dropna(subset="p").nsmallest(most, "p")
    traces = [
        go.Scatter(
            x=rows["log2_ratio"].to_numpy(np.float32),
            y=rows["q"].to_numpy(np.float32),
            customdata=rows[["layer", "expert"]].to_numpy(np.uint16),
            mode="markers",
            name=escape(str(name)),
            marker={"color": PALETTE[place % 8], "symbol": SYMBOLS[(place + place // 8) % 8], "size": 6, "opacity": 0.7},
            hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}<br>log2 ratio %{x:.2f}, q %{y:.3g}",
        )
        for place, (name, rows) in enumerate(drawn.groupby(kind))
    ]
    figure = _figure(traces, _question(kind), x="effect, log2", y="corrected p (q)", height=420)
    figure.add_hline(y=0.05, line={"color": MUTED, "dash": "dash"})
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(type="log", autorange="reversed", tickvals=P_TICKS, ticktext=[f"{p:g}" for p in P_TICKS])


def specialisation_heatmap(table: pd.DataFrame, name: str) -> go.Figure:
    """Layers by experts of the adjusted effect for one label or family; what is not significant is left blank.

    Raises:
        UsageError: The table has no such label or family.
    """
    kind = _class_column(table)
    rows = table[table[kind] == name]
    if rows.empty:
        raise UsageError(f'no {kind} "{name}" in this table; these there are: {", ".join(sorted(table[kind].unique()))}')
    found = rows.assign(log2_ratio=rows["log2_ratio"].where(rows["q"] < 0.05))
    cells = _grid(found, "layer", "expert", "log2_ratio")
    heat = _heat(cells, "choices<br>over<br>expected", "layer %{y}, expert %{x}<br>log2 ratio %{z:.2f}")
    title = f"Which experts prefer {escape(name)}? (q < 0.05)"
    return _figure([heat], title, x="expert", y="layer", height=_row_height(len(cells))).update_yaxes(type="category")


def coactivation_heatmap(table: pd.DataFrame, *, layer: int) -> go.Figure:
    """Lift of every pair of one layer's experts over the group-aware null.

    Raises:
        UsageError: The table has no such layer.
    """
    rows = table[table["layer"] == layer]
    if rows.empty:
        raise UsageError(f"layer {layer} is not in this table; these are: {', '.join(map(str, table['layer'].unique()))}")
    mirrored = rows.rename(columns={"expert": "other", "other": "expert"})
    cells = _grid(pd.concat([rows, mirrored]), "expert", "other", "lift")
    heat = _heat(cells, "together", "experts %{x} and %{y}<br>log2 lift %{z:.2f}")
    title = f"Layer {layer}: which experts are chosen together?"
    figure = _figure([heat], title, x="expert", y="expert", height=560)
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
    figure = _figure(
        traces, ANALYSES["expert_clusters"].question, x="first component, log2", y="second component, log2", height=460
    )
    return figure.add_hline(y=0, line={"color": GRID}).add_vline(x=0, line={"color": GRID})


def _grid(table: pd.DataFrame, down: str, across: str, value: str) -> pd.DataFrame:
    # pivot refuses a cell named twice; pivot_table would average it unseen.
    return table.pivot(index=down, columns=across, values=value)  # noqa: PD010


def _heat(cells: pd.DataFrame, bar: str, hover: str) -> go.Heatmap:
    return go.Heatmap(
        z=cells.to_numpy(np.float32),
        x=cells.columns.to_numpy(),
        y=[str(row) for row in cells.index],
        zmin=-2,
        zmax=2,
        colorscale="RdBu_r",
        colorbar={"title": bar, **FOLDS},
        hovertemplate=f"{hover}<extra></extra>",
        hoverongaps=False,
    )


def _intervals(rows: pd.DataFrame, names: Sequence[str]) -> go.Scatter:
    ends = [(low, high, None) for low, high in zip(rows["ci_low"], rows["ci_high"], strict=True)]
    return go.Scatter(
        x=[end for three in ends for end in three],
        y=[place for name in names for place in (name, name, None)],
        mode="lines",
        name="95 % interval",
        line={"color": PALETTE[0], "width": 2},
        hoverinfo="skip",
    )


def _expert_name(row: Mapping[Hashable, Any], kind: str) -> str:
    return f"L{row['layer']} E{row['expert']} · {escape(str(row[kind]))}"


def _class_column(table: pd.DataFrame) -> str:
    return "label" if "label" in table.columns else "family"


def _question(kind: str) -> str:
    return ANALYSES[f"{kind}_specialisation"].question


def _row_height(rows: int) -> int:
    return min(900, 200 + 24 * rows)


def _figure(traces: Sequence[Any], title: str, *, x: str, y: str, height: int) -> go.Figure:
    figure = go.Figure(list(traces))
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)
    return _styled(figure, title, height=height)


def training_curves(log: pd.DataFrame) -> go.Figure:
    """Loss, MaxVio and bias range through training: one row a logged step, lists by routed layer as `train.jsonl` has them."""
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for place, (name, title) in enumerate((("loss", "whole text"), ("solution_loss", "solution alone"))):
        line = {"color": PALETTE[place], "width": 1}
        figure.add_scatter(x=log["step"], y=log[name], name=title, mode="lines", line=line, row=1, col=1)
    for row, name in ((2, "max_vio"), (3, "bias_range")):
        for layer, values in enumerate(zip(*log[name], strict=True), start=1):
            line = {"color": PALETTE[(layer + 1) % 8], "width": 1}
            title = f"routed layer {layer}"
            figure.add_scatter(
                x=log["step"], y=values, name=title, showlegend=row == 2, mode="lines", line=line, row=row, col=1
            )
    figure.update_yaxes(title="loss (nats)", type="log", tickvals=LOSS_TICKS, row=1, col=1).update_yaxes(
        title="MaxVio", row=2, col=1
    )
    figure.update_yaxes(title="bias range (score)", row=3, col=1).update_xaxes(title="step", row=3, col=1)
    return _styled(figure, "How did loss, balance and router bias go through training?", height=760)


def _styled(figure: go.Figure, title: str, *, height: int) -> go.Figure:
    figure.update_layout(
        template="none",
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 16}},
        font={"family": "system-ui, sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=height,
        margin={"l": 60, "r": 20, "t": 60, "b": 60},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        showlegend=any(trace.type != "heatmap" for trace in figure.data),
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True, title_standoff=8)
    return figure
