"""What changes to routing do to each kind of step."""

import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, SYMBOLS, escape, figure_of


def causal_bars(table: pd.DataFrame) -> go.Figure:
    """Effects of `causal_effects` beside those of matched experts: 95 % over problems, and the middle 95 % of the draws."""
    traces = []
    for place, (measure, title) in enumerate((("own", "in steps of the label"), ("other", "in other steps"))):
        rows = table[table["measure"] == measure]
        names = [f"{escape(str(row.label))} · {row.kind} {row.dose:g}" for row in rows.itertuples()]
        traces.append(
            _points(rows, names, ("effect", "ci_low", "ci_high"), f"changed, {title}", PALETTE[place], SYMBOLS[place])
        )
        traces.append(
            _points(rows, names, ("control", "control_low", "control_high"), f"matched, {title}", MUTED, SYMBOLS[place])
        )
    height = 160 + 44 * table.groupby(["label", "kind", "dose"]).ngroups
    figure = figure_of(traces, ANALYSES["causal_effects"].question, x="rise of the loss, nats a token", y="", height=height)
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_layout(scattermode="group").update_yaxes(autorange="reversed", type="category", automargin=True)


def _points(
    rows: pd.DataFrame, names: list[str], columns: tuple[str, str, str], title: str, colour: str, symbol: str
) -> go.Scatter:
    middle, low, high = columns
    return go.Scatter(
        x=rows[middle].to_numpy(),
        y=names,
        mode="markers",
        name=title,
        marker={"color": colour, "symbol": symbol, "size": 9},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": (rows[high] - rows[middle]).to_numpy(),
            "arrayminus": (rows[middle] - rows[low]).to_numpy(),
            "color": colour,
        },
        hovertemplate="%{y}<br>%{x:.4f} nats a token<extra></extra>",
    )
