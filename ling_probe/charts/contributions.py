"""What experts add to the residual stream."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, SYMBOLS, escape, figure_of


def saliency_scatter(table: pd.DataFrame) -> go.Figure:
    """Mean contribution against load, an expert a point, of `expert_saliency`; the dashed line is the even share."""
    layers = [
        go.Scatter(
            x=rows["load"].to_numpy(np.float32),
            y=rows["saliency"].to_numpy(np.float32),
            customdata=rows[["layer", "expert", "share"]].to_numpy(np.float32),
            mode="markers",
            name=f"layer {layer}",
            marker={"color": PALETTE[place % 8], "symbol": SYMBOLS[(place + place // 8) % 8], "size": 6, "opacity": 0.7},
            hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}<br>load %{x:.2%}, mean contribution %{y:.3g}<br>"
            "%{customdata[2]:.2%} of its layer",
        )
        for place, (layer, rows) in enumerate(table.groupby("layer"))
    ]
    figure = figure_of(layers, ANALYSES["expert_saliency"].question, x="load", y="mean contribution (norm)", height=460)
    figure.add_vline(x=1 / table["expert"].nunique(), line={"color": MUTED, "dash": "dash"}, annotation_text="even share")
    return figure.update_xaxes(tickformat=".1%").update_yaxes(type="log")


def norm_rank_lines(table: pd.DataFrame) -> go.Figure:
    """Share of tokens whose heaviest expert writes most, by layer, of `norm_rank`, each beside its chance."""
    return _layer_lines(
        table,
        ANALYSES["norm_rank"].question,
        [
            ("top_norm", "largest output", 0, "solid"),
            ("chance", "chance of it", 0, "dash"),
            ("top_contribution", "largest contribution", 1, "solid"),
            ("dealt_contribution", "chance of it, outputs dealt anew", 1, "dash"),
        ],
        y="share of tokens",
    )


def shared_lines(table: pd.DataFrame) -> go.Figure:
    """Share of the shared expert by layer, of all tokens and of each step label, of `shared_share`."""
    kind = "label" if (table["kind"] == "label").any() else "family"
    whole = table[table["kind"] == "layer"]
    traces = [
        go.Scatter(
            x=[str(layer) for layer in rows["layer"]],
            y=rows["share"].to_numpy(np.float32),
            mode="lines+markers",
            name=escape(str(name)),
            line={"color": PALETTE[place % 8], "width": 1},
            marker={"symbol": SYMBOLS[(place + place // 8) % 8], "size": 6},
            hovertemplate="layer %{x}: %{y:.2%}",
        )
        for place, (name, rows) in enumerate(table[table["kind"] == kind].groupby("name"))
    ]
    every = [
        go.Scatter(
            x=[str(layer) for layer in whole["layer"]],
            y=whole[column].to_numpy(np.float32),
            mode="lines",
            name=name,
            line={"color": MUTED, "width": width, "dash": dash},
            hovertemplate="layer %{x}: %{y:.2%}",
        )
        for column, name, width, dash in (
            ("share", "all tokens", 3, "solid"),
            ("least", "bounds", 1, "dot"),
            ("most", "bounds", 1, "dot"),
        )
    ]
    every[2].showlegend = False
    figure = figure_of([*every, *traces], ANALYSES["shared_share"].question, x="layer", y="share of norms", height=460)
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"})
    return figure.update_xaxes(type="category").update_yaxes(tickformat=".0%", rangemode="tozero")


def attribution_lines(table: pd.DataFrame) -> go.Figure:
    """What the routed experts of each layer add to the next token's logit, of `logit_attribution`, and where answers follow."""
    return _layer_lines(
        table.drop_duplicates("layer"),
        ANALYSES["logit_attribution"].question,
        [("routed", "completion", 0, "solid"), ("answer_routed", "answer", 1, "solid")],
        y="direct attribution, logits a token",
    ).add_hline(y=0, line={"color": MUTED, "dash": "dash"})


def attribution_scatter(table: pd.DataFrame) -> go.Figure:
    """Mean direct attribution of every expert by layer, of `logit_attribution`: promoting above the line, demoting below."""
    found = table["q"] < 0.05
    traces = [
        go.Scatter(
            x=rows["layer"].astype(str),
            y=rows["mean"].to_numpy(np.float32),
            customdata=rows[["expert", "rank", "share"]].to_numpy(np.float32),
            mode="markers",
            name=name,
            marker={"color": colour, "size": 6, "opacity": 0.6},
            hovertemplate="layer %{x}, expert %{customdata[0]}<br>%{y:.2f} logits when chosen<br>mean rank %{customdata[1]:.1f}"
            "<br>%{customdata[2]:.2%} of its layer",
        )
        for rows, name, colour in (
            (table[found], "q < 0.05", PALETTE[0]),
            (table[~found], "not significant", MUTED),
        )
        if len(rows)
    ]
    question = ANALYSES["logit_attribution"].question
    figure = figure_of(traces, question, x="layer", y="direct attribution when chosen, logits", height=420)
    order = [str(layer) for layer in table["layer"].unique()]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=order)
    return figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})


def norm_strip(table: pd.DataFrame) -> go.Figure:
    """The largest output norm of every expert by layer, of `super_experts`; those that stand apart are marked."""
    traces = [
        go.Scatter(
            x=rows["layer"].astype(str),
            y=rows["max_norm"].to_numpy(np.float32),
            customdata=rows[["expert", "times_median"]].to_numpy(np.float32),
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.7},
            hovertemplate="layer %{x}, expert %{customdata[0]}<br>norm %{y:.3g}, %{customdata[1]:.1f} times the middle",
        )
        for name, colour, symbol, rows in (
            ("experts", PALETTE[0], "circle", table[~table["stands_apart"]]),
            ("stand apart", PALETTE[1], "diamond", table[table["stands_apart"]]),
        )
        if len(rows)
    ]
    figure = figure_of(traces, ANALYSES["super_experts"].question, x="layer", y="largest output norm", height=420)
    order = [str(layer) for layer in table["layer"].unique()]
    return figure.update_xaxes(type="category", categoryorder="array", categoryarray=order).update_yaxes(type="log")


def _layer_lines(table: pd.DataFrame, title: str, lines: list[tuple[str, str, int, str]], *, y: str) -> go.Figure:
    traces = [
        go.Scatter(
            x=[str(layer) for layer in table["layer"]],
            y=table[column].to_numpy(np.float32),
            mode="lines+markers",
            name=name,
            line={"color": PALETTE[colour], "dash": dash},
            hovertemplate="layer %{x}: %{y:.3g}",
        )
        for column, name, colour, dash in lines
    ]
    return figure_of(traces, title, x="layer", y=y, height=420).update_xaxes(type="category")
