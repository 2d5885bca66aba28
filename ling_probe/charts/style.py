"""How every figure looks: colours, ticks, heatmaps, and text that Plotly shows letter by letter."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.colors import sample_colorscale

EXPORT_CONFIG: dict[str, Any] = {"showSendToCloud": False, "displaylogo": False, "responsive": True}
"""For `to_html` and for pages: nothing is offered to a cloud."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
"""Okabe and Ito's colours, with two of Tol's for the eighth cluster."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star", "triangle-down")
MUTED = "rgba(128,128,128,0.9)"
GRID = "rgba(128,128,128,0.25)"
FOLDS = {"tickvals": [-2, -1, 0, 1, 2], "ticktext": ["¼", "½", "even", "2×", "4×"]}


def escape(text: str) -> str:
    """Text that Plotly shows letter by letter.

    >>> escape("<b>R&D")
    '&lt;b>R&amp;D'
    """
    return text.replace("&", "&amp;").replace("<", "&lt;")


def standalone_html(figure: go.Figure) -> str:
    """A page with the figure alone, which works without a network."""
    body = pio.to_html(figure, full_html=False, include_plotlyjs=True, config=EXPORT_CONFIG)
    title = html.unescape(str(figure.layout.title.text or "Figure"))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>body {{ background: white; }}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def layer_colours(layers: int) -> list[str]:
    """A colour for each of so many layers, the first darkest; all can be seen on white and on black."""
    return sample_colorscale("Viridis", np.linspace(0.35, 0.85, layers))


def grid(table: pd.DataFrame, down: str, across: str, value: str) -> pd.DataFrame:
    """Values of a tidy table as rows by columns; a cell named twice is refused."""
    # pivot refuses a cell named twice; pivot_table would average it unseen.
    return table.pivot(index=down, columns=across, values=value)  # noqa: PD010


def heatmap(cells: pd.DataFrame, bar: str, hover: str) -> go.Heatmap:
    """A heatmap of log2 ratios from a quarter to four times, saturated beyond."""
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


def intervals(rows: pd.DataFrame, names: Sequence[str]) -> go.Scatter:
    """The 95 % intervals of rows, one line each."""
    ends = [(low, high, None) for low, high in zip(rows["ci_low"], rows["ci_high"], strict=True)]
    return go.Scatter(
        x=[end for three in ends for end in three],
        y=[place for name in names for place in (name, name, None)],
        mode="lines",
        name="95 % interval",
        line={"color": PALETTE[0], "width": 2},
        hoverinfo="skip",
    )


def effect_dots(rows: pd.DataFrame, names: Sequence[str], *, hover: Sequence[str], x: str) -> go.Figure:
    """Effects of rows (`effect`) with their 95 % intervals, one line each; grey are those with no q below 0.05.

    Args:
        rows: With `effect`, `ci_low`, `ci_high` and `q`.
        names: Of the rows, escaped and each another.
        hover: What more is told of each, escaped.
        x: Title of the axis of the effect, with its unit.
    """
    found = rows["q"] < 0.05
    dots = go.Scatter(
        x=rows["effect"].to_numpy(),
        y=list(names),
        mode="markers",
        showlegend=False,
        marker={"color": [_sign_colour(*row) for row in zip(rows["effect"], found, strict=True)], "size": 9},
        customdata=[
            f"{told}, q {q:.3g}" if q == q else f"{told}, not tested" for told, q in zip(hover, rows["q"], strict=True)
        ],
        hovertemplate="%{y}: %{x}<br>%{customdata}<extra></extra>",
    )
    lines = intervals(rows, names).update(line_color=MUTED, showlegend=False)
    figure = figure_of([lines, dots], "", x=x, y="", height=110 + 24 * len(rows))
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True)


def _sign_colour(effect: float, found: bool) -> str:
    return MUTED if not found else PALETTE[1] if effect > 0 else PALETTE[0]


def lines_with_intervals(
    x: Sequence[str], rows: pd.DataFrame, columns: tuple[str, str, str], name: str, colour: str
) -> list[go.Scatter]:
    """A line over the band of its interval; `columns` are its middle, lower and upper bound."""
    middle, low, high = (rows[column].to_numpy() for column in columns)
    band = go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *low[::-1]],
        mode="lines",
        fill="toself",
        fillcolor=colour,
        opacity=0.2,
        line={"width": 0},
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )
    bounds = np.stack([low, high], axis=1)
    line = {"color": colour}
    hover = "%{y:.4g} (95 % interval %{customdata[0]:.4g} to %{customdata[1]:.4g})"
    shown = {"name": name, "legendgroup": name, "hovertemplate": hover, "customdata": bounds}
    return [band, go.Scatter(x=list(x), y=middle, mode="lines+markers", line=line, **shown)]


def row_height(rows: int) -> int:
    """Pixels of a heatmap with so many rows."""
    return min(900, 200 + 24 * rows)


def figure_of(traces: Sequence[Any], title: str, *, x: str, y: str, height: int) -> go.Figure:
    """Traces as a figure with named axes."""
    figure = go.Figure(list(traces))
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)
    return styled(figure, title, height=height)


def legend_below(figure: go.Figure) -> go.Figure:
    """A figure whose legend has too many entries for the line under its title."""
    return figure.update_layout(legend={"y": -0.2, "yanchor": "top"})


def styled(figure: go.Figure, title: str, *, height: int) -> go.Figure:
    """A figure in the style of all."""
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
