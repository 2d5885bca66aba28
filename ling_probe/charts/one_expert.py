"""All experts of a model at a glance, and what one of them does."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.charts.style import PALETTE, effect_dots, escape, figure_of, grid, heatmap, row_height

COLOURED = {
    "load_log2": "load over the even share",
    "label_log2_ratio": "preference for the label it prefers most",
    "family_log2_ratio": "preference for the family it prefers most",
}
"""What `expert_map` can show, and how it is called."""


def expert_map(listed: pd.DataFrame, value: str, *, marked: tuple[int, int] | None = None) -> go.Figure:
    """Layers by experts of an `expert_view.expert_list`, coloured by one of `COLOURED`, all log2.

    On top lies an unseen point on every cell that carries (layer, expert), for Plotly tells of no click on a heatmap.

    Args:
        listed: The experts.
        value: The column.
        marked: Layer and expert to set off.
    """
    cells = grid(listed, "layer", "expert", value)
    heat = heatmap(cells, "log2", "").update(hoverinfo="skip", hovertemplate=None)
    points = go.Scattergl(
        x=listed["expert"].to_numpy(),
        y=listed["layer"].astype(str).to_numpy(),
        customdata=listed[["layer", "expert"]].to_numpy(),
        text=_lines(listed),
        mode="markers",
        marker={"symbol": "square", "size": 11, "opacity": 0},
        hovertemplate="layer %{y}, expert %{x}<br>%{text}<extra></extra>",
    )
    traces = [heat, points]
    if marked is not None:
        ring = {"symbol": "square-open", "size": 13, "color": PALETTE[1], "line": {"width": 2}}
        traces.append(go.Scatter(x=[marked[1]], y=[str(marked[0])], mode="markers", marker=ring, hoverinfo="skip"))
    figure = figure_of(traces, COLOURED[value], x="expert", y="layer", height=row_height(len(cells)))
    return figure.update_yaxes(type="category", autorange="reversed").update_layout(showlegend=False, clickmode="event+select")


def preference_dots(rows: pd.DataFrame, kind: str) -> go.Figure:
    """One expert's rows of a specialisation by label or family, at equal tokens."""
    known = rows.dropna(subset="ci_low")
    hover = [
        f"{share:.2%} of the choices there, {other:.2%} elsewhere, raw {raw:+.2f}"
        for share, other, raw in zip(known["share_in"], known["share_out"], known["raw_log2_ratio"], strict=True)
    ]
    names = [escape(str(name)) for name in known[kind]]
    return effect_dots(known.assign(effect=known["log2_ratio"]), names, hover=hover, x="at equal words, log2")


def token_dots(rows: pd.DataFrame, names: list[str]) -> go.Figure:
    """One expert's token rows of `enrichment`, found on one half of the problems and measured on the other."""
    hover = [
        f"{count:,} choices, {expected:.1f} expected" for count, expected in zip(rows["count"], rows["expected"], strict=True)
    ]
    return effect_dots(rows.assign(effect=rows["pmi"]), names, hover=hover, x="over its load, log2")


def neighbour_dots(rows: pd.DataFrame) -> go.Figure:
    """Experts chosen with one, over the group-aware null of `coactivation`."""
    names = [f"E{row.other}{' (same group)' if row.same_group else ''}" for row in rows.itertuples(index=False)]
    hover = [
        f"{count:,} tokens, {expected:,.0f} expected" for count, expected in zip(rows["count"], rows["expected"], strict=True)
    ]
    return effect_dots(rows.assign(effect=rows["lift"]), names, hover=hover, x="over groups and loads, log2")


def promoted_dots(rows: pd.DataFrame, names: list[str]) -> go.Figure:
    """Following tokens that one expert raises or lowers against its company, of `promoted_tokens`."""
    hover = [
        f"{mean:+.3f} logits itself, {others:+.3f} the others, {count:,} choices"
        for mean, others, count in zip(rows["mean"], rows["others"], rows["count"], strict=True)
    ]
    return effect_dots(rows.assign(effect=rows["beyond"]), names, hover=hover, x="beyond the others, logits")


def _lines(listed: pd.DataFrame) -> list[str]:
    texts = [f"{ratio:.2f} times the even share" for ratio in listed["load_ratio"]]
    for kind in ("label", "family"):
        if kind in listed:
            ratios = zip(listed[kind], listed[f"{kind}_log2_ratio"], strict=True)
            told = ["" if pd.isna(name) else f"<br>{escape(str(name))}: {ratio:+.2f}, log2" for name, ratio in ratios]
            texts = list(np.char.add(texts, told))
    return texts
