"""What the words decide, and what routing knows beyond them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES, surest_first
from ling_probe.charts.style import MUTED, PALETTE, SYMBOLS, escape, figure_of, intervals


def vocabulary_lines(table: pd.DataFrame) -> go.Figure:
    """Share of an id's tokens that choose its favourite expert, by layer, for the token itself and the next one."""
    names = {"input": "the token itself", "next": "the token that follows"}
    traces = [
        trace
        for place, (of, rows) in enumerate(table.groupby("of", sort=False))
        for trace in (
            _line(rows, "share", ("ci_low", "ci_high"), names[str(of)], place),
            _chance(rows, "chance", f"chance for {names[str(of)]} (ids dealt at random)", place),
        )
    ]
    return _by_layer(traces, "vocabulary_specialisation", "share at the favourite expert")


def overlap_lines(table: pd.DataFrame) -> go.Figure:
    """Mean Jaccard index by layer for each kind of pair, over independent routing with the layer's loads."""
    traces = [
        _line(rows, "jaccard", ("ci_low", "ci_high"), str(pair), place)
        for place, (pair, rows) in enumerate(table.groupby("pair", sort=False))
    ]
    rows = table.drop_duplicates("layer")
    chance = _chance(rows, "chance", "chance (independent routing, same loads)", None)
    return _by_layer([*traces, chance], "token_overlap", "mean Jaccard index")


def enrichment_dots(table: pd.DataFrame, *, top: int = 15) -> go.Figure:
    """The surest (expert, token) pairs of `enrichment` on held-out sequences; the dotted line is the best of noise."""
    rows = surest_first(table[table["kind"] == "token"].dropna(subset="p")).head(top)
    names = [f"L{row['layer']} E{row['expert']} · {escape(repr(row['name']))}" for row in rows.to_dict("records")]
    values = (("pmi", "on held-out sequences", "circle"), ("pmi_found", "where it was found", "diamond-open"))
    dots = [
        go.Scatter(
            x=rows[column].to_numpy(np.float32),
            y=names,
            mode="markers",
            name=name,
            marker={"color": PALETTE[place], "symbol": symbol, "size": 9},
            hovertemplate="%{y}<br>PMI %{x:.2f} bits<extra></extra>",
        )
        for place, (column, name, symbol) in enumerate(values)
    ]
    title = ANALYSES["enrichment"].question
    figure = figure_of([intervals(rows, names), *dots], title, x="PMI, bits", y="", height=160 + 26 * len(rows))
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    if len(rows):
        noise = float(rows["best_of_noise"].max())
        figure.add_vline(x=noise, line={"color": MUTED, "dash": "dot"}, annotation_text="best of noise")
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True)


def information_lines(table: pd.DataFrame) -> go.Figure:
    """Bits about the first label of `routing_information`, by layer, for everything that is given."""
    rows = table[(table["about"] == table["about"].iloc[0]) & table["layer"].notna()]
    traces = [
        _line(some, "bits", ("ci_low", "ci_high"), f"given {given}", place)
        for place, (given, some) in enumerate(rows.groupby("given", sort=False))
    ]
    figure = _by_layer(traces, "routing_information", f"bits about the {rows['about'].iloc[0]}, per token")
    return figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})


def decoding_bars(table: pd.DataFrame) -> go.Figure:
    """Bits gained over guessing, by description and class of text; a dotted line ends what there is to gain."""
    traces = [
        go.Bar(
            x=rows["features"].to_numpy(),
            y=rows["bits"].to_numpy(),
            name=f"step's {about}",
            marker={"color": PALETTE[place]},
            error_y=_reach(rows, "bits", ("ci_low", "ci_high")),
            customdata=rows[["accuracy", "gain"]].to_numpy(),
            hovertemplate="%{x}<br>%{y:.3f} bits, %{customdata[1]:+.3f} over text<br>accuracy %{customdata[0]:.3f}",
        )
        for place, (about, rows) in enumerate(table.groupby("about", sort=False))
    ]
    title = ANALYSES["label_decoding"].question
    figure = figure_of(traces, title, x="told from", y="bits per step over guessing", height=420)
    for place, entropy in enumerate(table.drop_duplicates("about")["entropy"]):
        figure.add_hline(y=float(entropy), line={"color": PALETTE[place], "dash": "dot"})
    return figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})


def prediction_lines(table: pd.DataFrame) -> go.Figure:
    """Recall of the chosen experts by layer, for everything that is known; load alone is chance."""
    traces = [
        _chance(rows, "recall", "chance (load alone)", None)
        if known == "load"
        else _line(rows, "recall", ("recall_low", "recall_high"), str(known), place)
        for place, (known, rows) in enumerate(table.groupby("known", sort=False))
    ]
    return _by_layer(traces, "routing_prediction", "recall of the chosen experts")


def _line(rows: pd.DataFrame, value: str, bounds: tuple[str, str], name: str, place: int) -> go.Scatter:
    return go.Scatter(
        x=[str(layer) for layer in rows["layer"]],
        y=rows[value].to_numpy(),
        error_y=_reach(rows, value, bounds),
        mode="lines+markers",
        name=escape(name),
        line={"color": PALETTE[place % 8]},
        marker={"symbol": SYMBOLS[(place + place // 8) % 8], "size": 8},
        hovertemplate="layer %{x}<br>%{y:.3f}",
    )


def _chance(rows: pd.DataFrame, value: str, name: str, place: int | None) -> go.Scatter:
    return go.Scatter(
        x=[str(layer) for layer in rows["layer"]],
        y=rows[value].to_numpy(),
        mode="lines",
        name=name,
        line={"color": MUTED if place is None else PALETTE[place], "dash": "dash"},
    )


def _reach(rows: pd.DataFrame, value: str, bounds: tuple[str, str]) -> dict[str, object]:
    """Error bars from the bounds of an interval."""
    low, high = bounds
    return {
        "type": "data",
        "symmetric": False,
        "array": (rows[high] - rows[value]).to_numpy(),
        "arrayminus": (rows[value] - rows[low]).to_numpy(),
        "thickness": 1,
    }


def _by_layer(traces: Sequence[go.Scatter], analysis: str, y: str) -> go.Figure:
    """Lines over layers, named below, for they are many."""
    figure = figure_of(traces, ANALYSES[analysis].question, x="layer", y=y, height=500)
    figure.update_layout(legend={"yanchor": "top", "y": -0.22})
    return figure.update_xaxes(type="category").update_yaxes(rangemode="tozero")
