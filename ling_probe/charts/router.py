"""What the router does: why it chose, how surely, and how its choices hang together."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, SYMBOLS, escape, figure_of, grid, legend_below, row_height, styled

REASON_COLOURS = {"affinity": PALETTE[0], "bias": PALETTE[4], "groups": PALETTE[3], "both": PALETTE[1]}


def reason_bars(table: pd.DataFrame) -> go.Figure:
    """Shares of `choice_reasons` by layer, stacked; the line is at one half."""
    whole = table[table["kind"] == "all"]
    bars = [
        go.Bar(
            x=_layers(rows),
            y=rows["share"].to_numpy(),
            name=reason,
            marker={"color": colour},
            customdata=rows[["ci_low", "ci_high", "weight_share"]].to_numpy(),
            hovertemplate=(
                f"layer %{{x}}, {reason}<br>%{{y:.1%}} of choices (%{{customdata[0]:.1%}} to %{{customdata[1]:.1%}})"
                "<br>%{customdata[2]:.1%} of the weight<extra></extra>"
            ),
        )
        for reason, colour in REASON_COLOURS.items()
        for rows in [whole[whole["reason"] == reason]]
    ]
    figure = figure_of(bars, ANALYSES["choice_reasons"].question, x="layer", y="share of choices", height=420)
    figure.update_layout(barmode="stack").update_xaxes(type="category").update_yaxes(tickformat=".0%", range=[0, 1])
    return figure.add_hline(y=0.5, line={"color": MUTED, "dash": "dash"})


def bias_scatter(table: pd.DataFrame) -> go.Figure:
    """Experts of `expert_reasons` by affinity and bias; colour is how often the bias decides, area is load."""
    points = go.Scatter(
        x=table["affinity"].to_numpy(),
        y=table["bias"].to_numpy(),
        mode="markers",
        name="an expert",
        marker={
            "color": table["by_bias"].to_numpy(),
            "colorscale": "Cividis",
            "cmin": 0,
            "cmax": 1,
            "colorbar": {"title": "decided<br>by bias", "tickformat": ".0%"},
            "size": table["load"].to_numpy(),
            "sizemode": "area",
            "sizeref": 0.02,
            "sizemin": 2,
            "opacity": 0.8,
        },
        customdata=table[["layer", "expert", "load", "by_bias", "by_groups"]].to_numpy(),
        hovertemplate=(
            "layer %{customdata[0]}, expert %{customdata[1]}<br>mean score %{x:.4f}, bias %{y:.4f}<br>"
            "%{customdata[2]:.2f} times the even load<br>%{customdata[3]:.1%} of its choices need the bias, "
            "%{customdata[4]:.1%} the group limit<extra></extra>"
        ),
    )
    title = ANALYSES["expert_reasons"].question
    figure = figure_of([points], title, x="affinity (mean score over all tokens)", y="bias", height=480)
    return figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"}).update_layout(showlegend=False)


CONFIDENCE = {
    "entropy": "entropy (of its maximum)",
    "top_share": "share of the best",
    "margin": "margin (score)",
    "experts_90": "experts for 90 %",
}


def confidence_lines(table: pd.DataFrame) -> go.Figure:
    """The measures of `router_confidence` by layer, over all tokens, with their intervals."""
    whole = table[table["kind"] == "all"]
    figure = make_subplots(rows=2, cols=2, shared_xaxes=True, vertical_spacing=0.1, horizontal_spacing=0.12)
    for place, (measure, title) in enumerate(CONFIDENCE.items()):
        rows, where = whole[whole["measure"] == measure], {"row": 1 + place // 2, "col": 1 + place % 2}
        for trace in _line(rows, "value", title, 0, interval=True):
            figure.add_trace(trace.update(showlegend=False), **where)
        figure.update_yaxes(title=title, **where)
    figure.update_xaxes(title="layer", row=2).update_xaxes(type="category")
    return styled(figure, ANALYSES["router_confidence"].question, height=480)


def confidence_heatmap(table: pd.DataFrame) -> go.Figure:
    """Entropy of `router_confidence` by layer and kind of step, beyond the words; what is not significant is blank."""
    rows = table[(table["measure"] == "entropy") & (table["kind"] == "label")]
    cells = grid(rows.assign(beyond_words=rows["beyond_words"].where(rows["q"] < 0.05)), "name", "layer", "beyond_words")
    heat = go.Heatmap(
        z=cells.to_numpy(),
        x=[str(layer) for layer in cells.columns],
        y=[escape(name) for name in cells.index],
        zmid=0,
        colorscale="RdBu_r",
        colorbar={"title": "entropy<br>beyond<br>words"},
        hovertemplate="layer %{x}, %{y}<br>entropy %{z:+.4f} of its maximum, beyond the words<extra></extra>",
        hoverongaps=False,
    )
    figure = figure_of(
        [heat], "Where is the router less sure than the words make it?", x="layer", y="step", height=row_height(len(cells))
    )
    return figure.update_xaxes(type="category")


def confidence_figures(table: pd.DataFrame) -> Sequence[go.Figure]:
    """Lines by layer, and where there are step labels, the heatmap."""
    return [confidence_lines(table), *([confidence_heatmap(table)] if (table["kind"] == "label").any() else [])]


def repeat_lines(table: pd.DataFrame) -> go.Figure:
    """Repeats of `repeat_choice` by layer beside their chance."""
    whole = table[table["family"] == "all"]
    names = {"first": "same first choice", "any": "of the K experts"}
    traces = []
    for place, (choice, name) in enumerate(names.items()):
        rows = whole[whole["choice"] == choice]
        traces += _line(rows, "repeat", name, place)
        traces += _line(rows, "expected", f"{name}, tokens in any order (chance)", place, dash="dash")
    title = ANALYSES["repeat_choice"].question
    figure = figure_of(traces, title, x="layer", y="chosen again by the next token", height=420)
    return legend_below(figure.update_xaxes(type="category").update_yaxes(tickformat=".0%", rangemode="tozero"))


def stretch_lines(table: pd.DataFrame) -> go.Figure:
    """F1 of `segment_routing` by layer for each length of stretch, beside shuffled tokens."""
    traces = []
    for place, (length, rows) in enumerate(table.groupby("length")):
        traces += _line(rows, "f1", f"{length} tokens", place)
        traces += _line(rows, "shuffled", f"{length} tokens, shuffled (chance)", place, dash="dash")
    title = ANALYSES["segment_routing"].question
    figure = figure_of(traces, title, x="layer", y="F1 of the best fixed set", height=420)
    return legend_below(figure.update_xaxes(type="category").update_yaxes(rangemode="tozero"))


def committee_lines(table: pd.DataFrame) -> go.Figure:
    """Jaccard index of `committee` by layer for each phase and kind of domain, with its marks."""
    layers = table.drop_duplicates(["phase", "kind", "layer"])
    traces = []
    for place, ((phase, kind), rows) in enumerate(layers.groupby(["phase", "kind"], sort=False)):
        name = f"{phase}, {kind}"
        traces += _line(rows, "jaccard", name, place, interval=True)
        traces += _line(rows, "halves", f"{name}: two halves of one", place, dash="dot")
    chance = layers.drop_duplicates("layer")
    line = {"color": MUTED, "dash": "dash"}
    traces.append(go.Scatter(x=_layers(chance), y=chance["chance"].to_numpy(), mode="lines", name="random (chance)", line=line))
    title = ANALYSES["committee"].question
    figure = figure_of(traces, title, x="layer", y="overlap of the leading experts (Jaccard)", height=460)
    return legend_below(figure.update_xaxes(type="category").update_yaxes(range=[0, 1.02]))


def affinity_lines(sizes: pd.DataFrame) -> go.Figure:
    """Sizes of `affinity_sets` by layer and family for a fifth of the weight, beside equal use."""
    fifth = sizes[sizes["share"] == 0.2]
    traces = [
        trace
        for place, (family, rows) in enumerate(fifth.groupby("family"))
        for trace in _line(rows, "experts", escape(str(family)) or "all", place)
    ]
    even = fifth.drop_duplicates("layer")
    line = {"color": MUTED, "dash": "dash"}
    traces.append(go.Scatter(x=_layers(even), y=even["even"].to_numpy(), mode="lines", name="equal use (chance)", line=line))
    title = ANALYSES["expert_affinity"].question
    figure = figure_of(traces, title, x="layer", y="experts with a fifth of the weight", height=420)
    return figure.update_xaxes(type="category").update_yaxes(rangemode="tozero")


def _layers(rows: pd.DataFrame) -> list[str]:
    return [str(layer) for layer in rows["layer"]]


def _line(
    rows: pd.DataFrame, column: str, name: str, place: int, *, dash: str = "solid", interval: bool = False
) -> list[go.Scatter]:
    """A line over layers, and if asked its intervals."""
    look: Mapping[str, str] = {"color": PALETTE[place % len(PALETTE)], "dash": dash}
    solid, layers = dash == "solid", _layers(rows)
    marker = {"symbol": SYMBOLS[place % len(SYMBOLS)]}
    mode = "lines+markers" if solid else "lines"
    line = go.Scatter(x=layers, y=rows[column].to_numpy(), mode=mode, name=name, line=look, marker=marker)
    if not interval:
        return [line]
    ends = zip(layers, rows["ci_low"], rows["ci_high"], strict=True)
    points = [point for layer, low, high in ends for point in ((layer, low), (layer, high), (layer, None))]
    bars = go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="lines",
        name="95 % interval",
        line={"color": look["color"], "width": 4},
        opacity=0.4,
        showlegend=False,
        hoverinfo="skip",
    )
    return [line, bars]
