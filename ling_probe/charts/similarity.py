"""What sequences have in common."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, figure_of


def usage_overlap(table: pd.DataFrame) -> go.Figure:
    """Overlap by layer of `usage_similarity`, beside what one common load, token identity and chance give."""
    lines = [
        _line(table, "jaccard", "sequences", PALETTE[0]),
        _line(table, "pooled", "one common load", PALETTE[1], dash="dash"),
        _line(table, "token", "token identity alone", PALETTE[2], dash="dot"),
        _line(table, "chance", "random sets (chance)", MUTED, dash="dash"),
    ]
    return _by_layer(lines, "overlap of experts (Jaccard)")


def usage_correlation(table: pd.DataFrame) -> go.Figure:
    """Rank correlation of that overlap with hidden states, by layer, beside what families and token identity give."""
    told = table.dropna(subset="correlation")
    ends = told[["correlation_low", "correlation_high"]].to_numpy()
    interval = go.Scatter(
        x=[layer for layer in map(str, told["layer"]) for _ in range(3)],
        y=[end for low, high in ends for end in (low, high, None)],
        mode="lines",
        name="95 % interval",
        line={"color": PALETTE[0], "width": 2},
        hoverinfo="skip",
    )
    lines = [
        interval,
        _line(told, "correlation", "usage and hidden states", PALETTE[0]),
        _line(told, "family_correlation", "families alone", PALETTE[1], dash="dash"),
        _line(told, "token_correlation", "token identity alone", PALETTE[2], dash="dot"),
    ]
    figure = _by_layer(lines, "rank correlation over pairs")
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    return figure


def usage_figures(table: pd.DataFrame) -> list[go.Figure]:
    """The overlap, and its correlation with hidden states where vectors were kept."""
    return [usage_overlap(table), *([usage_correlation(table)] if table["correlation"].notna().any() else [])]


def _line(table: pd.DataFrame, column: str, name: str, colour: str, dash: str = "solid") -> go.Scatter:
    return go.Scatter(
        x=list(map(str, table["layer"])),
        y=table[column].to_numpy(),
        name=name,
        mode="lines+markers",
        line={"color": colour, "dash": dash},
        hovertemplate="layer %{x}<br>%{y:.3f}",
    )


def _by_layer(lines: Sequence[go.Scatter], y: str) -> go.Figure:
    return figure_of(lines, ANALYSES["usage_similarity"].question, x="layer", y=y, height=380).update_xaxes(type="category")
