"""How routing moves: along the text, from prompt to completion, from layer to layer."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, figure_of, grid, heatmap, lines_with_intervals, styled
from ling_probe.errors import UsageError


def churn_lines(table: pd.DataFrame) -> go.Figure:
    """Churn by layer of `routing_churn` beside that of shuffled tokens, and what a boundary adds, if that can be told."""
    told = table["p"].notna().any()
    figure = make_subplots(rows=2 if told else 1, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    layers = [str(layer) for layer in table["layer"]]
    for trace in lines_with_intervals(layers, table, ("churn", "churn_low", "churn_high"), "next token", PALETTE[0]):
        figure.add_trace(trace, row=1, col=1)
    chance = {"name": "tokens in random order (chance)", "line": {"color": MUTED, "dash": "dash"}, "mode": "lines"}
    figure.add_scatter(x=layers, y=table["shuffled"].to_numpy(), row=1, col=1, **chance)
    figure.update_yaxes(title="experts changed", tickformat=".0%", row=1, col=1)
    if told:
        bounds = ("boundary_effect", "ci_low", "ci_high")
        for trace in lines_with_intervals(layers, table, bounds, "across a step boundary, at equal words", PALETTE[1]):
            figure.add_trace(trace, row=2, col=1)
        figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"}, row=2, col=1)
        figure.update_yaxes(title="more changed", tickformat="+.1%", row=2, col=1)
    figure.update_xaxes(type="category").update_xaxes(title="layer", row=2 if told else 1, col=1)
    return styled(figure, ANALYSES["routing_churn"].question, height=500 if told else 340)


def rollout_lines(table: pd.DataFrame) -> go.Figure:
    """Divergence of prompt and completion by layer of `prompt_rollout`: as they are, and at equal tokens."""
    layers = [str(layer) for layer in table["layer"]]
    traces = [
        *lines_with_intervals(layers, table, ("raw_divergence", "raw_low", "raw_high"), "as they are", PALETTE[1]),
        *lines_with_intervals(layers, table, ("divergence", "ci_low", "ci_high"), "at equal tokens", PALETTE[0]),
    ]
    figure = figure_of(traces, ANALYSES["prompt_rollout"].question, x="layer", y="divergence of the loads, bits", height=420)
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_xaxes(type="category")


def transition_lines(table: pd.DataFrame) -> go.Figure:
    """What an expert tells of the next layer's, by layer of `layer_transition`: in all, by the token, and beyond it."""
    rows = table.drop_duplicates("layer")
    pairs = [f"{here} to {there}" for here, there in zip(rows["layer"], rows["next_layer"], strict=True)]
    traces = [
        go.Scatter(x=pairs, y=rows["information"].to_numpy(), name="in all", mode="lines+markers", line={"color": PALETTE[1]}),
        go.Scatter(
            x=pairs,
            y=rows["token_information"].to_numpy(),
            name="by the token alone",
            mode="lines",
            line={"color": MUTED, "dash": "dash"},
        ),
        *lines_with_intervals(pairs, rows, ("beyond_token", "beyond_low", "beyond_high"), "beyond the token", PALETTE[0]),
    ]
    figure = figure_of(
        traces, ANALYSES["layer_transition"].question, x="from layer to layer", y="mutual information, bits", height=420
    )
    return figure.update_xaxes(type="category").update_yaxes(rangemode="tozero")


def transition_heatmap(table: pd.DataFrame, *, layer: int) -> go.Figure:
    """Every transition from one layer of `layer_transition` to the next, over what the token makes of it.

    Raises:
        UsageError: No transition starts in the layer.
    """
    rows = table[table["layer"] == layer]
    if rows.empty:
        raise UsageError(f"no transition from layer {layer} in this table; these start one: {_told(table['layer'])}")
    cells = grid(rows, "expert", "next_expert", "log2_ratio")
    heat = heatmap(cells, "over the<br>token", "from expert %{y} to %{x}<br>log2 ratio %{z:.2f}")
    there = rows["next_layer"].iloc[0]
    title = f"Where do the tokens of an expert of layer {layer} go in layer {there}?"
    figure = figure_of([heat], title, x=f"expert of layer {there}", y=f"expert of layer {layer}", height=560)
    return figure.update_yaxes(type="category", autorange="reversed", nticks=16)


def _told(layers: pd.Series) -> str:
    return ", ".join(str(layer) for layer in np.unique(layers))
