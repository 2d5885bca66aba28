"""What changes to routing do to each kind of step."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, SYMBOLS, escape, figure_of, lines_with_intervals, styled

EFFECT, CONTROL = ("effect", "ci_low", "ci_high"), ("control", "control_low", "control_high")
MOST_PANELS = 4
"""Dose-response curves beside each other."""


def causal_figures(table: pd.DataFrame) -> list[go.Figure]:
    """What there is to see of `causal_effects`: losses, answers where the model wrote some, doses where there are several."""
    kinds = table[table["measure"] == "selectivity"].groupby("kind")["dose"].nunique()
    curves = [dose_curves(table, str(kind)) for kind, doses in kinds.items() if doses > 1]
    return [causal_bars(table), *([written_bars(table)] if (table["measure"] == "solved").any() else []), *curves]


def causal_bars(table: pd.DataFrame) -> go.Figure:
    """Effects of `causal_effects` beside those of matched experts: 95 % over problems, and the middle 95 % of the draws."""
    measures = (("own", "in steps of the label"), ("other", "in other steps"))
    return _bars(
        table, measures, ANALYSES["causal_effects"].question, "rise of the loss, nats a token", "%{x:.4f} nats a token"
    )


def written_bars(table: pd.DataFrame) -> go.Figure:
    """Changes of what the model solves when it writes itself, beside those under the same change to matched experts."""
    measures = (("solved", "answers"), ("steps_right", "steps"))
    title = "What becomes of what the model writes itself?"
    figure = _bars(table, measures, title, "change of the share that is right", "%{x:.1%}")
    return figure.update_xaxes(tickformat=".0%")


def dose_curves(table: pd.DataFrame, kind: str) -> go.Figure:
    """Selectivity against the dose of a kind of change, over the band of the same dose of matched experts.

    One panel a label: those with the largest excess at any dose.
    """
    rows = table[(table["measure"] == "selectivity") & (table["kind"] == kind)]
    labels = rows.groupby("label")["excess"].max().nlargest(MOST_PANELS).index
    figure = make_subplots(cols=len(labels), shared_yaxes=True, subplot_titles=[escape(str(label)) for label in labels])
    for place, label in enumerate(labels, start=1):
        mine = rows[rows["label"] == label].sort_values("dose")
        for columns, name, colour in ((CONTROL, "matched experts", MUTED), (EFFECT, "preferred experts", PALETTE[0])):
            band, line = lines_with_intervals([f"{dose:g}" for dose in mine["dose"]], mine, columns, name, colour)
            figure.add_trace(band, row=1, col=place)
            figure.add_trace(line.update(showlegend=place == 1), row=1, col=place)
    figure.update_xaxes(title="value" if kind == "bias" else "experts", type="linear")
    figure.update_yaxes(title="selectivity, nats a token", col=1)
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    return styled(figure, f"Does more of it do more? ({kind})", height=420).update_layout(
        margin_t=110, legend_y=1.12, title_y=0.97
    )


def _bars(table: pd.DataFrame, measures: tuple[tuple[str, str], ...], title: str, x: str, shown: str) -> go.Figure:
    traces = []
    for place, (measure, where) in enumerate(measures):
        rows = table[table["measure"] == measure]
        names = [f"{escape(str(row.label))} · {row.kind} {row.dose:g}" for row in rows.itertuples()]
        traces.append(_points(rows, names, EFFECT, f"changed, {where}", PALETTE[place], SYMBOLS[place], shown))
        traces.append(_points(rows, names, CONTROL, f"matched, {where}", MUTED, SYMBOLS[place], shown))
    here = table[table["measure"].isin([name for name, _ in measures])]
    height = 160 + 44 * here.groupby(["label", "kind", "dose"]).ngroups
    figure = figure_of(traces, title, x=x, y="", height=height)
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_layout(scattermode="group").update_yaxes(autorange="reversed", type="category", automargin=True)


def _points(
    rows: pd.DataFrame, names: list[str], columns: tuple[str, str, str], title: str, colour: str, symbol: str, shown: str
) -> go.Scatter:
    middle, low, high = columns
    return go.Scatter(
        x=rows[middle].to_numpy(),
        y=names,
        mode="markers",
        orientation="h",
        name=title,
        marker={"color": colour, "symbol": symbol, "size": 9},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": (rows[high] - rows[middle]).to_numpy(),
            "arrayminus": (rows[middle] - rows[low]).to_numpy(),
            "color": colour,
        },
        hovertemplate=f"%{{y}}<br>{shown}<extra></extra>",
    )
