"""What experts prefer."""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES, surest_first, surest_picked
from ling_probe.charts.style import GRID, MUTED, PALETTE, SYMBOLS, escape, figure_of, grid, heatmap, intervals, row_height
from ling_probe.errors import UsageError

SMALLEST_P = 1e-12
"""Where smaller p are drawn: beyond it, they differ by nothing a reader could use."""
P_AXIS: dict[str, Any] = {
    "type": "log",
    "tickvals": [1, 0.05, 1e-3, 1e-6, 1e-9, SMALLEST_P],
    "ticktext": ["1", "0.05", "0.001", "1e-6", "1e-9", "≤ 1e-12"],
}


def specialisation_bars(table: pd.DataFrame, *, top: int = 12) -> go.Figure:
    """The surest rows of a specialisation by label, family or answer: 95 % intervals, raw effect beside adjusted."""
    kind, rows = _class_column(table), surest_first(table.dropna(subset="p")).head(top)
    names = [_expert_name(row, kind) for row in rows.to_dict("records")]
    found = ["q < 0.05" if q < 0.05 else "not significant" for q in rows["q"]]
    traces = [
        intervals(rows, names),
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
    figure = figure_of(traces, _question(kind), x="effect, log2", y="", height=140 + 28 * len(rows))
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True)


def replication(table: pd.DataFrame, *, most: int = 1000) -> go.Figure:
    """Effect on the half of the problems that a row was picked on, against its effect on the other half, with its interval.

    On the dashed diagonal both are the same; nearer to 0 than it, what was picked looked larger than it is.
    """
    kind, drawn = _class_column(table), surest_picked(table).head(most)
    traces = [_held_out_intervals(drawn)]
    for name, held, color, symbol in (("replicated", True, PALETTE[0], "circle"), ("not replicated", False, PALETTE[1], "x")):
        rows = drawn[drawn["replicated"] == held]
        traces.append(
            go.Scatter(
                x=rows["picked_log2_ratio"].to_numpy(np.float32),
                y=rows["held_out_log2_ratio"].to_numpy(np.float32),
                mode="markers",
                name=name,
                text=[_expert_name(row, kind) for row in rows.to_dict("records")],
                marker={"color": color, "symbol": symbol, "size": 7, "opacity": 0.8},
                hovertemplate="%{text}<br>where picked %{x:.2f}, held out %{y:.2f}<extra></extra>",
            )
        )
    title = "Do effects picked on one half of the problems hold on the other?"
    figure = figure_of(traces, title, x="effect where picked, log2", y="held-out effect, log2", height=460)
    figure.add_hline(y=0, line={"color": GRID}).add_vline(x=0, line={"color": GRID})
    return figure.add_shape(type="line", x0=-9, y0=-9, x1=9, y1=9, line={"color": MUTED, "dash": "dash"})


def _held_out_intervals(rows: pd.DataFrame) -> go.Scatter:
    ends = zip(rows["held_out_low"], rows["held_out_high"], strict=True)
    return go.Scatter(
        x=[place for x in rows["picked_log2_ratio"] for place in (x, x, None)],
        y=[end for low, high in ends for end in (low, high, None)],
        mode="lines",
        name="95 % interval, held out",
        line={"color": GRID, "width": 1},
        hoverinfo="skip",
    )


def token_shares(table: pd.DataFrame, *, top: int = 12) -> go.Figure:
    """Share of each family's tokens that choose an expert, words included, of the experts with the largest log-odds z."""
    names = {name: place for place, name in enumerate(sorted(table["family"].unique()))}
    marked = table.sort_values("log_odds_z", key=abs, ascending=False).drop_duplicates(["layer", "expert"]).head(top)
    rows = marked[["layer", "expert"]].merge(table, how="left", on=["layer", "expert"])
    traces = [
        go.Bar(
            x=[f"L{layer} E{expert}" for layer, expert in zip(some["layer"], some["expert"], strict=True)],
            y=some["token_share"].to_numpy(),
            name=escape(str(name)),
            marker={"color": PALETTE[names[name] % 8]},
            customdata=some["log_odds_z"].to_numpy(),
            hovertemplate="%{x}: %{y:.2%} of its tokens, z %{customdata:.1f}",
        )
        for name, some in rows.groupby("family")
    ]
    title = "What share of each family's tokens chooses an expert?"
    figure = figure_of(traces, title, x="expert", y="share of tokens", height=420)
    figure.add_hline(y=float(table["even_share"].iloc[0]), line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(tickformat=".0%").update_xaxes(type="category")


def specialisation_volcano(table: pd.DataFrame, *, most: int = 4000) -> go.Figure:
    """Effect against corrected p, cut off at `SMALLEST_P`; the dashed line is q = 0.05.

    Of longer tables the `most` rows of smallest p are drawn.
    """
    kind, drawn = _class_column(table), table.dropna(subset="p").nsmallest(most, "p")
    traces = [
        go.Scatter(
            x=rows["log2_ratio"].to_numpy(np.float32),
            y=rows["q"].clip(SMALLEST_P).to_numpy(),
            customdata=rows[["layer", "expert", "q"]].to_numpy(float),
            mode="markers",
            name=escape(str(name)),
            marker={"color": PALETTE[place % 8], "symbol": SYMBOLS[(place + place // 8) % 8], "size": 6, "opacity": 0.7},
            hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}<br>log2 ratio %{x:.2f}, q %{customdata[2]:.3g}",
        )
        for place, (name, rows) in enumerate(drawn.groupby(kind))
    ]
    figure = figure_of(traces, _question(kind), x="effect, log2", y="corrected p (q)", height=420)
    figure.add_hline(y=0.05, line={"color": MUTED, "dash": "dash"})
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(autorange="reversed", **P_AXIS)


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
    cells = grid(found, "layer", "expert", "log2_ratio")
    heat = heatmap(cells, "choices<br>over<br>expected", "layer %{y}, expert %{x}<br>log2 ratio %{z:.2f}")
    title = f"Which experts prefer {escape(name)}? (q < 0.05)"
    return figure_of([heat], title, x="expert", y="layer", height=row_height(len(cells))).update_yaxes(type="category")


def _expert_name(row: Mapping[Hashable, Any], kind: str) -> str:
    return f"L{row['layer']} E{row['expert']} · {escape(str(row[kind]))}"


def _class_column(table: pd.DataFrame) -> str:
    return next(kind for kind in _ANALYSIS if kind in table.columns)


_ANALYSIS = {"label": "label_specialisation", "family": "family_specialisation", "answer": "correctness_specialisation"}
"""Analysis of each class column."""


def _question(kind: str) -> str:
    return ANALYSES[_ANALYSIS[kind]].question
