"""How differently two classes of text choose an expert."""

from collections.abc import Hashable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES, surest_first
from ling_probe.charts.specialisation import P_AXIS, SMALLEST_P
from ling_probe.charts.style import MUTED, PALETTE, SYMBOLS, escape, figure_of, intervals


def risk_bars(table: pd.DataFrame, *, top: int = 12) -> go.Figure:
    """The surest rows of `risk_difference`, with 95 % intervals."""
    rows = surest_first(table.dropna(subset="p")).head(top)
    names = [f"L{row['layer']} E{row['expert']} · {_pair(row['a'], row['b'])}" for row in rows.to_dict("records")]
    found = ["q < 0.05" if q < 0.05 else "not significant" for q in rows["q"]]
    difference = go.Scatter(
        x=rows["risk_difference"].to_numpy(),
        y=names,
        mode="markers",
        name="difference (grey: not significant)",
        marker={"color": [PALETTE[0] if each == "q < 0.05" else MUTED for each in found], "size": 10},
        customdata=np.stack([rows[name].map("{:.3g}".format) for name in ("share_a", "share_b", "q")], axis=1),
        hovertemplate="%{y}<br>%{customdata[0]} against %{customdata[1]} of tokens, q %{customdata[2]}<extra></extra>",
    )
    x = "difference of the shares of tokens that choose the expert"
    figure = figure_of(
        [intervals(rows, names), difference], ANALYSES["risk_difference"].question, x=x, y="", height=140 + 28 * len(rows)
    )
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True).update_xaxes(tickformat=".1%")


def token_test(table: pd.DataFrame, *, most: int = 4000) -> go.Figure:
    """P of a test over tokens against p of the test over sequences, both cut off at `SMALLEST_P`.

    On the dashed diagonal both say the same. Of longer tables the `most` rows of smallest `token_p` are drawn.
    """
    drawn = table.dropna(subset="p").nsmallest(most, "token_p")
    traces = [
        go.Scatter(
            x=rows["p"].clip(SMALLEST_P).to_numpy(),
            y=rows["token_p"].clip(SMALLEST_P).to_numpy(),
            customdata=rows[["layer", "expert", "p", "token_p"]].to_numpy(float),
            mode="markers",
            name=_pair(a, b),
            marker={"color": PALETTE[place % 8], "symbol": SYMBOLS[place % 8], "size": 6, "opacity": 0.7},
            hovertemplate=(
                "layer %{customdata[0]}, expert %{customdata[1]}"
                "<br>p %{customdata[2]:.2g} over sequences, %{customdata[3]:.2g} over tokens"
            ),
        )
        for place, ((a, b), rows) in enumerate(drawn.groupby(["a", "b"]))
    ]
    title = "What does a test over tokens make of it?"
    figure = figure_of(traces, title, x="p, sequences as units", y="p, tokens as if independent", height=460)
    figure.add_shape(type="line", x0=SMALLEST_P, y0=SMALLEST_P, x1=1, y1=1, line={"color": MUTED, "dash": "dash"})
    return figure.update_xaxes(**P_AXIS).update_yaxes(**P_AXIS)


def _pair(a: Hashable, b: Hashable) -> str:
    return f"{escape(str(a))} − {escape(str(b))}"
