"""How steps' operations and mistakes show in routing."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, SYMBOLS, escape, figure_of, legend_below, lines_with_intervals


def transfer_bars(table: pd.DataFrame) -> go.Figure:
    """Bits of `operation_transfer` on problems of the other run, and where it was learnt; the dotted line is all there is."""
    others = [
        go.Bar(
            x=rows["features"].to_numpy(),
            y=rows["bits"].to_numpy(),
            name=f"judged on {escape(str(name))}",
            marker={"color": PALETTE[place % len(PALETTE)]},
            error_y=_errors(rows, "bits", ("ci_low", "ci_high")),
            hovertemplate="%{x}<br>%{y:.3f} bits<extra></extra>",
        )
        for place, (name, rows) in enumerate(table.groupby("against", sort=False))
    ]
    rows = table.drop_duplicates("features")
    home = go.Scatter(
        x=rows["features"].to_numpy(),
        y=rows["home"].to_numpy(),
        name="held out where it was learnt",
        mode="markers",
        marker={"symbol": "diamond", "size": 11, "color": MUTED},
        hovertemplate="%{x}<br>%{y:.3f} bits<extra></extra>",
    )
    question = ANALYSES["operation_transfer"].question
    figure = figure_of([*others, home], question, x="", y="bits of the label, over guessing by frequency", height=440)
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    figure.add_hline(y=float(table["entropy"].iloc[0]), line={"color": MUTED, "dash": "dot"}, annotation_text="all there is")
    return figure.update_layout(barmode="group")


def onset_lines(table: pd.DataFrame) -> go.Figure:
    """Bits of `label_onset` by token of the step, for each description; the dotted line is all there is to tell."""
    traces = [
        trace
        for place, (name, rows) in enumerate(table.groupby("features", sort=False))
        for trace in lines_with_intervals(
            [str(each) for each in rows["place"]], rows, ("bits", "ci_low", "ci_high"), str(name), PALETTE[place]
        )
    ]
    axis = "token of the step (0: the token before it)"
    question = ANALYSES["label_onset"].question
    figure = figure_of(traces, question, x=axis, y="bits of the label, over guessing by frequency", height=460)
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    figure.add_hline(y=float(table["entropy"].iloc[0]), line={"color": MUTED, "dash": "dot"}, annotation_text="all there is")
    return figure.update_xaxes(type="category")


def carrier_bars(table: pd.DataFrame, *, top: int = 20) -> go.Figure:
    """What the first experts of `label_carriers` cost unseen problems, with 95 % intervals; at 0 they carry nothing."""
    rows = table[table["kind"] == "expert"].nsmallest(top, "rank")
    names = [f"L{row['layer']} E{row['expert']} · {escape(str(row['label']))}" for row in rows.to_dict("records")]
    shown = (("lost", "unseen", "circle"), ("found", "they were chosen on", "diamond-open"))
    traces = [
        go.Scatter(
            x=rows[column].to_numpy(),
            y=names,
            mode="markers",
            name=f"on problems {name}",
            marker={"color": PALETTE[place], "symbol": symbol, "size": 9},
            error_x=_errors(rows, "lost", ("ci_low", "ci_high")) if column == "lost" else None,
            hovertemplate="%{y}<br>%{x:.4f} bits<extra></extra>",
        )
        for place, (column, name, symbol) in enumerate(shown)
    ]
    question = ANALYSES["label_carriers"].question
    figure = figure_of(traces, question, x="bits per step lost without the expert", y="", height=180 + 24 * len(rows))
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True)


def carrier_layers(table: pd.DataFrame) -> go.Figure:
    """What each layer of `label_carriers` tells alone, what is lost without it, and what it adds to words."""
    rows = table[table["kind"] == "layer"]
    shown = (("alone", "alone", "alone"), ("lost", "ci", "lost without it"), ("gain", "gain", "added to words and place"))
    x = [str(layer) for layer in rows["layer"]]
    traces = [
        trace
        for place, (column, stem, name) in enumerate(shown)
        for trace in lines_with_intervals(x, rows, (column, f"{stem}_low", f"{stem}_high"), name, PALETTE[place])
    ]
    title = "What does each layer tell of a step's kind?"
    figure = figure_of(traces, title, x="layer", y="bits per step", height=420)
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_xaxes(type="category")


def pair_lines(table: pd.DataFrame) -> go.Figure:
    """Share of experts that twin tokens of `minimal_pairs` do not share, by layer and where they stand."""
    rows = table[(table["by"] == "place") & table["layer"].notna()]
    traces = _by_layer(rows, ("changed", "ci_low", "ci_high"))
    question = ANALYSES["minimal_pairs"].question
    figure = figure_of(traces, question, x="layer", y="share of experts not shared with the twin", height=520)
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    return legend_below(figure.update_xaxes(type="category"))


def pair_accuracy(table: pd.DataFrame) -> go.Figure:
    """How often held-out pairs of `minimal_pairs` are told apart, by layer and where the tokens stand; 0.5 is chance."""
    rows = table[(table["by"] == "place") & table["layer"].notna() & table["accuracy"].notna()]
    traces = _by_layer(rows, ("accuracy", "accuracy_low", "accuracy_high"))
    title = "Does routing at the same words tell which operation the problem needs?"
    figure = figure_of(traces, title, x="layer", y="share of held-out pairs told", height=520)
    figure.add_hline(y=0.5, line={"color": MUTED, "dash": "dash"}, annotation_text="chance")
    return legend_below(figure.update_xaxes(type="category"))


def wrong_step_dots(table: pd.DataFrame) -> go.Figure:
    """Effects of `first_wrong_step` by measure and layer, with 95 % intervals; at 0 wrong steps are like right ones."""
    traces = []
    for place, (name, rows) in enumerate(table.groupby("measure", sort=False)):
        traces.append(
            go.Scatter(
                x=["no layer" if pd.isna(layer) else str(layer) for layer in rows["layer"]],
                y=rows["effect"].to_numpy(),
                name=str(name),
                mode="markers",
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 9, "color": PALETTE[place % len(PALETTE)]},
                error_y=_errors(rows, "effect", ("ci_low", "ci_high")),
                customdata=rows["q"].to_numpy(),
                hovertemplate="layer %{x}<br>%{y:.3f} standard deviations, q %{customdata:.3g}<extra></extra>",
            )
        )
    question = ANALYSES["first_wrong_step"].question
    figure = figure_of(traces, question, x="layer", y="first wrong less right steps, standard deviations", height=480)
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_xaxes(type="category", categoryorder="array", categoryarray=_layers(table)).update_layout(
        scattermode="group", scattergap=0.4
    )


def located_bars(table: pd.DataFrame) -> go.Figure:
    """How often each decoder of `wrong_step_localisation` points to the first wrong step, with 95 % intervals."""
    points = go.Scatter(
        x=table["located"].to_numpy(),
        y=table["features"].to_list(),
        mode="markers",
        marker={"color": PALETTE[0], "size": 10},
        error_x=_errors(table, "located", ("ci_low", "ci_high")),
        hovertemplate="%{y}<br>%{x:.3f} of wrong solutions<extra></extra>",
    )
    question = ANALYSES["wrong_step_localisation"].question
    figure = figure_of([points], question, x="share of held-out wrong solutions located", y="", height=380)
    chance = float(table["chance"].iloc[0])
    figure.add_vline(x=chance, line={"color": MUTED, "dash": "dash"}, annotation_text="a step at random")
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True).update_layout(showlegend=False)


def _layers(table: pd.DataFrame) -> list[str]:
    """Layers in order, and what has none last."""
    return [*(str(layer) for layer in sorted(table["layer"].dropna().unique())), "no layer"]


def _by_layer(rows: pd.DataFrame, columns: tuple[str, str, str]) -> list[go.Scatter]:
    return [
        trace
        for place, (name, some) in enumerate(rows.groupby("name", sort=False))
        for trace in lines_with_intervals(
            [str(layer) for layer in some["layer"]], some, columns, str(name), PALETTE[place % len(PALETTE)]
        )
    ]


def _errors(rows: pd.DataFrame, middle: str, bounds: Sequence[str]) -> dict[str, object]:
    """Error bars of an interval."""
    low, high = (np.abs(rows[bound].to_numpy(float) - rows[middle].to_numpy(float)) for bound in bounds)
    return {"type": "data", "symmetric": False, "array": high, "arrayminus": low}
