"""Which way tokens go through the layers."""

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from ling_probe.charts.style import FOLDS, effect_dots, styled

OTHERS = -1
ENDS = (("layer", "expert"), ("next_layer", "next_expert"))
GREY, UNSURE, NODE = "rgba(128,128,128,0.16)", "rgba(128,128,128,0.38)", "rgba(110,110,110,1)"
LEAST_NAMED = 0.015
"""Share of the tokens below which an expert's name would lie on its neighbours'."""
SCALE = sample_colorscale("RdBu_r", list(np.linspace(0.1, 0.9, 9)))
"""Without its ends, which are too dark to be told apart on black."""
_STRONG = 2.0
"""Log2 lift of the full colour."""


def path_sankey(flows: pd.DataFrame, title: str) -> go.Figure:
    """Flows of `path_view.drawn_flows`: as wide as their share, coloured by their lift over independent layers.

    Pale grey are the others; a darker grey flow is drawn whose lift is not surely above or below 1.
    """
    ends = [(flows[layer], flows[expert]) for layer, expert in ENDS]
    names = [list(map(_name, layer, expert)) for layer, expert in ends]
    nodes = _places(ends)
    place = {_name(layer, expert): number for number, (layer, expert) in enumerate(nodes)}
    sankey = go.Sankey(
        arrangement="snap",
        node={
            "label": [_label(*node, flows) for node in nodes],
            "customdata": [_name(*node) for node in nodes],
            "color": [UNSURE if expert == OTHERS else NODE for _, expert in nodes],
            "pad": 9,
            "thickness": 12,
            "line": {"width": 0},
            "hovertemplate": "%{customdata}: %{value:.2%} of the tokens<extra></extra>",
        },
        link={
            "source": [place[name] for name in names[0]],
            "target": [place[name] for name in names[1]],
            "value": flows["share"].to_numpy(),
            "color": _colours(flows),
            "customdata": _told(flows),
            "hovertemplate": "%{source.customdata} to %{target.customdata}: %{value:.2%}%{customdata}<extra></extra>",
        },
    )
    figure = styled(go.Figure([sankey, _scale()]), title, height=560)
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return figure.update_layout(showlegend=False, margin={"l": 5, "r": 5, "b": 20})


def difference_dots(table: pd.DataFrame, *, one: str, other: str, top: int = 20) -> go.Figure:
    """The first rows of a `path_view.difference_table`: share in one set less that in the other, with 95 % intervals.

    Args:
        table: The differences.
        one: What the first set is called; already escaped.
        other: What the second is called.
        top: Rows shown.
    """
    rows = table.head(top)
    starts, ends = (map(_name, rows[layer], rows[expert]) for layer, expert in ENDS)
    names = [f"{start} → {end}" for start, end in zip(starts, ends, strict=True)]
    hover = [f"{share:.2%} against {against:.2%}" for share, against in zip(rows["share"], rows["other_share"], strict=True)]
    figure = effect_dots(rows.assign(effect=rows["difference"]), names, hover=hover, x=f"← {other} · {one} →")
    return figure.update_xaxes(tickformat="+.1%")


def _places(ends: list[tuple[pd.Series, pd.Series]]) -> list[tuple[int, int]]:
    return sorted({(int(layer), int(expert)) for side in ends for layer, expert in zip(*side, strict=True)})


def _label(layer: int, expert: int, flows: pd.DataFrame) -> str:
    """The name of an expert that is high enough to write on."""
    if expert == OTHERS:
        return "others"
    ends = (
        flows["layer"].eq(layer) & flows["expert"].eq(expert),
        flows["next_layer"].eq(layer) & flows["next_expert"].eq(expert),
    )
    return _name(layer, expert) if any(flows.loc[end, "share"].sum() >= LEAST_NAMED for end in ends) else ""


def _name(layer: int, expert: int) -> str:
    return f"L{int(layer)}·{'others' if expert == OTHERS else f'E{int(expert)}'}"


def _colours(flows: pd.DataFrame) -> list[str]:
    lift = flows["log2_lift"].to_numpy()
    sure = (flows["lift_low"] > 0) | (flows["lift_high"] < 0)
    scaled = np.clip((np.nan_to_num(lift) + _STRONG) / (2 * _STRONG), 0, 1)
    strong = [colour.replace("rgb", "rgba").replace(")", ", 0.5)") for colour in sample_colorscale(SCALE, scaled)]
    other = (flows["expert"] == OTHERS) | (flows["next_expert"] == OTHERS)
    return [GREY if grey else colour if known else UNSURE for grey, known, colour in zip(other, sure, strong, strict=True)]


def _told(flows: pd.DataFrame) -> list[str]:
    return [_interval(row) + _independent(row) for row in flows.to_dict("records")]


def _interval(row: dict[Hashable, Any]) -> str:
    return "" if pd.isna(row["ci_low"]) else f" (95 % interval {row['ci_low']:.2%} to {row['ci_high']:.2%})"


def _independent(row: dict[Hashable, Any]) -> str:
    if pd.isna(row["expected"]):
        return ""
    sure = "" if pd.isna(row["lift_low"]) else f" ({row['lift_low']:+.2f} to {row['lift_high']:+.2f})"
    return f"<br>{row['expected']:.2%} if the layers were independent, log2 lift {row['log2_lift']:+.2f}{sure}"


def _scale() -> go.Scatter:
    """A Sankey has no colour bar of its own."""
    bar = {"title": {"text": "over independent layers", "side": "top"}, **FOLDS, "thickness": 10, "len": 0.6}
    bar |= {"orientation": "h", "y": -0.02, "yanchor": "top"}
    shown = {"colorscale": SCALE, "cmin": -_STRONG, "cmax": _STRONG, "color": [0], "showscale": True, "colorbar": bar}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=shown, hoverinfo="skip")
