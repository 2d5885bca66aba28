"""What experts prefer."""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES, surest_first
from ling_probe.charts.style import MUTED, PALETTE, SYMBOLS, escape, figure_of, grid, heatmap, intervals, row_height
from ling_probe.errors import UsageError

P_TICKS = (1, 0.3, 0.1, 0.05, 0.01, 0.001, 0.0001)


def specialisation_bars(table: pd.DataFrame, *, top: int = 12) -> go.Figure:
    """The surest rows of `label_specialisation` or `family_specialisation`: 95 % intervals, raw effect beside adjusted."""
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
    figure = figure_of(traces, _question(kind), x="effect, log2", y="corrected p (q)", height=420)
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
    cells = grid(found, "layer", "expert", "log2_ratio")
    heat = heatmap(cells, "choices<br>over<br>expected", "layer %{y}, expert %{x}<br>log2 ratio %{z:.2f}")
    title = f"Which experts prefer {escape(name)}? (q < 0.05)"
    return figure_of([heat], title, x="expert", y="layer", height=row_height(len(cells))).update_yaxes(type="category")


def _expert_name(row: Mapping[Hashable, Any], kind: str) -> str:
    return f"L{row['layer']} E{row['expert']} · {escape(str(row[kind]))}"


def _class_column(table: pd.DataFrame) -> str:
    return "label" if "label" in table.columns else "family"


def _question(kind: str) -> str:
    return ANALYSES[f"{kind}_specialisation"].question
