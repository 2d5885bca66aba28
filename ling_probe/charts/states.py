"""Routing states along a problem, what they go with, and what paths and boundaries made of them tell."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import GRID, MUTED, PALETTE, SYMBOLS, escape, figure_of, grid, heatmap, row_height, styled


def agreement_dots(table: pd.DataFrame) -> go.Figure:
    """Agreement of states with labels in `routing_states`, with 95 % intervals; at 0 shuffled labels agree as well."""
    dots = _dots(table, "agreement", table["source"].to_list(), PALETTE[0], "states")
    figure = figure_of(
        [dots],
        ANALYSES["routing_states"].question,
        x="information above shuffled labels, over what there could be",
        y="",
        height=320,
    )
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(autorange="reversed", type="category").update_layout(showlegend=False)


def boundary_dots(table: pd.DataFrame) -> go.Figure:
    """F1 of `step_boundaries` by what tells them, with 95 % intervals, beside what shifted boundaries give."""
    chance = go.Scatter(
        x=table["chance_f1"].to_numpy(),
        y=table["source"].to_list(),
        name="shifted round their problem",
        mode="markers",
        marker={"color": MUTED, "size": 10, "symbol": "line-ns-open"},
        hovertemplate="%{y}<br>F1 by chance %{x:.3f}<extra></extra>",
    )
    dots = [_dots(table, "f1", table["source"].to_list(), PALETTE[0], "found"), chance]
    figure = figure_of(dots, ANALYSES["step_boundaries"].question, x="F1 on held-out problems", y="", height=380)
    return figure.update_yaxes(autorange="reversed", type="category").update_xaxes(range=[-0.02, 1.05])


def alignment_dots(table: pd.DataFrame) -> go.Figure:
    """Correlations of `path_alignment`, with 95 % intervals; at 0 paths know nothing of operations."""
    traces = []
    for place, (path, rows) in enumerate(table.groupby("path", sort=False)):
        names = [f"{path} of {source}" for source in rows["source"]]
        traces.append(_dots(rows, "correlation", names, PALETTE[place], f"paths of {path}", SYMBOLS[place]))
    axis = "correlation of path distance with distance of operations"
    figure = figure_of(traces, ANALYSES["path_alignment"].question, x=axis, y="", height=400)
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(autorange="reversed", type="category")


def order_heatmap(table: pd.DataFrame) -> go.Figure:
    """Log2 ratios of `state_transitions`: which state follows which more often than shares make it."""
    cells = grid(table, "before", "after", "log2_ratio")
    hover = "state %{y}, then %{x}<br>log2 ratio to shares %{z:.2f}"
    heat = heatmap(cells.rename(columns=str), "when a state ends", hover)
    title = ANALYSES["state_transitions"].question
    figure = figure_of([heat], title, x="state after", y="state before", height=row_height(len(cells) + 3))
    return figure.update_yaxes(autorange="reversed", type="category").update_xaxes(type="category")


def order_sankey(table: pd.DataFrame, *, least: float = 0.1) -> go.Figure:
    """Where states go when they end, in `state_transitions`: links as thick as the changes are many.

    Args:
        table: Of `state_transitions`.
        least: Chances to go there below this are left out.
    """
    shown = table[(table["leaving"] >= least) & (table["count"] > 0)]
    states = sorted(table["before"].unique())
    names = [f"state {state}" for state in states]
    links = {
        "source": shown["before"].to_numpy(),
        "target": shown["after"].to_numpy() + len(states),
        "value": shown["count"].to_numpy(),
        "color": [_faint(state) for state in shown["before"]],
        "customdata": shown[["leaving", "expected_leaving"]].to_numpy(),
        "hovertemplate": (
            "%{source.label} to %{target.label}: %{value} times<br>%{customdata[0]:.0%} of its ends, by shares "
            "%{customdata[1]:.0%}<extra></extra>"
        ),
    }
    nodes = {"label": names * 2, "color": [state_colour(state) for state in states] * 2, "pad": 12, "thickness": 16}
    figure = styled(go.Figure(go.Sankey(node=nodes, link=links)), ANALYSES["state_transitions"].question, height=420)
    return figure.update_layout(showlegend=False)


def state_heatmap(table: pd.DataFrame) -> go.Figure:
    """Labels by states in `state_profiles`: how much more often tokens of a label's steps stand in a state than all do."""
    kind = "label" if (table["kind"] == "label").any() else "family"
    rows = table[table["kind"] == kind]
    cells = grid(rows, "name", "state", "log2_ratio")
    cells.index = pd.Index([escape(str(name)) for name in cells.index])
    heat = heatmap(
        cells.rename(columns=str), "log2 ratio", f"{kind} %{{y}}, state %{{x}}<br>log2 ratio to all tokens %{{z:.2f}}"
    )
    figure = figure_of([heat], ANALYSES["state_profiles"].question, x="state", y="", height=row_height(len(cells)))
    return figure.update_xaxes(type="category").update_yaxes(type="category", autorange="reversed")


def share_bars(table: pd.DataFrame) -> go.Figure:
    """Shares of states in right and wrong solutions, of `state_answers`, with 95 % intervals."""
    traces = [
        go.Bar(
            x=[f"state {state}" for state in rows["state"]],
            y=rows["share"].to_numpy(),
            name=f"{answer} answers",
            marker={"color": PALETTE[place]},
            error_y=_reach(rows, "share"),
            hovertemplate=f"{answer}<br>%{{x}}: %{{y:.1%}} of the tokens<extra></extra>",
        )
        for place, (answer, rows) in enumerate(table.groupby("answer"))
    ]
    title = "Do wrong solutions pass through other states?"
    return figure_of(traces, title, x="", y="share of tokens", height=360).update_layout(barmode="group")


def timeline(
    tokens: pd.DataFrame, steps: pd.DataFrame, boundaries: pd.DataFrame, lines: Sequence[str] = ("loss",)
) -> go.Figure:
    """Steps, routing states, boundaries and lines of one problem, over its tokens.

    Args:
        tokens: A row a token: `position`, `text`, `state`, and a column for each of `lines`.
        steps: A row a step: `label`, `start`, `stop` (positions), `place` of the label among the problem's.
        boundaries: A row a boundary: `position` and `found` ("annotated", "by routing", "by tokens alone").
        lines: Columns of `tokens` to draw, each named with its unit.
    """
    figure = make_subplots(
        rows=1 + len(lines), shared_xaxes=True, vertical_spacing=0.05, row_heights=[2.0, *([1.0] * len(lines))]
    )
    for trace in (*_step_bars(steps), _state_row(tokens), *_marks(boundaries)):
        figure.add_trace(trace, row=1, col=1)
    for place, name in enumerate(lines):
        figure.add_trace(_line(tokens, name, place), row=place + 2, col=1)
        figure.update_yaxes(title=name, row=place + 2, col=1)
    figure = styled(figure, "Which states does routing pass through, and where does it change?", height=260 + 130 * len(lines))
    figure.update_xaxes(title="position", row=1 + len(lines), col=1)
    # On an axis of names a heatmap must have a row for each of them.
    figure.update_yaxes(tickvals=list(range(len(_ROWS))), ticktext=_ROWS, range=[len(_ROWS) - 0.4, -0.6], row=1, col=1)
    return figure.update_layout(barmode="overlay", showlegend=False, hovermode="closest")


_FOUND = ("annotated", "by routing", "by tokens alone")
_ROWS = ("steps", "states", *_FOUND)


def state_colour(state: int) -> str:
    """Colour of a state on every figure."""
    return PALETTE[state % len(PALETTE)]


def _faint(state: int) -> str:
    red, green, blue = (int(state_colour(state)[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.4)"


def _step_bars(steps: pd.DataFrame) -> list[go.Bar]:
    bars = []
    for row in steps.to_dict("records"):
        label, start, stop = escape(str(row["label"])), row["start"], row["stop"]
        bars.append(
            go.Bar(
                x=[stop - start],
                base=[start - 0.5],
                y=[_ROWS.index("steps")],
                width=0.8,
                orientation="h",
                text=[label],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                marker={"color": PALETTE[row["place"] % len(PALETTE)], "line": {"color": "white", "width": 1}},
                hovertemplate=f"step {row['step'] + 1}: {label}<br>positions {start} to {stop - 1}<extra></extra>",
            )
        )
    return bars


def _state_row(tokens: pd.DataFrame) -> go.Heatmap:
    n = len(PALETTE)
    edges = [place / n for place in range(n + 1)]
    scale = [(edge, colour) for place, colour in enumerate(PALETTE) for edge in edges[place : place + 2]]
    return go.Heatmap(
        z=(tokens["state"] % n).to_numpy()[None],
        x=tokens["position"].to_numpy(),
        y=[_ROWS.index("states")],
        dy=0.8,
        zmin=-0.5,
        zmax=n - 0.5,
        colorscale=scale,
        showscale=False,
        text=[[escape(text) for text in tokens["text"]]],
        customdata=tokens["state"].to_numpy()[None],
        hovertemplate="position %{x}: %{text}<br>state %{customdata}<extra></extra>",
    )


def _marks(boundaries: pd.DataFrame) -> list[go.Scatter]:
    return [
        go.Scatter(
            x=rows["position"].to_numpy() - 0.5,
            y=[_ROWS.index(name)] * len(rows),
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 16, "line": {"width": 3}, "color": PALETTE[0] if place == 1 else MUTED},
            hovertemplate=f"{name}: a step begins at position %{{customdata}}<extra></extra>",
            customdata=rows["position"].to_numpy(),
        )
        for place, name in enumerate(_FOUND)
        for rows in (boundaries[boundaries["found"] == name],)
    ]


def _line(tokens: pd.DataFrame, name: str, place: int) -> go.Scatter:
    return go.Scatter(
        x=tokens["position"].to_numpy(),
        y=tokens[name].to_numpy(np.float32),
        mode="lines",
        line={"color": PALETTE[place], "width": 1.5},
        hovertemplate=f"position %{{x}}<br>{name} %{{y:.3f}}<extra></extra>",
    )


def attribution_map(table: pd.DataFrame) -> go.Figure:
    """What each layer's experts added to the logits of what was written, by step, of `step_view.attribution_by_layer`."""
    cells = table.set_index("layer")
    heat = go.Heatmap(
        z=cells.to_numpy(np.float32),
        x=list(cells.columns),
        y=[str(layer) for layer in cells.index],
        colorscale="RdBu_r",
        zmid=0,
        colorbar={"title": "logits"},
        hovertemplate="layer %{y}, %{x}<br>%{z:.3f} logits<extra></extra>",
    )
    title = "What did experts add directly to what was written?"
    return figure_of([heat], title, x="", y="layer", height=row_height(len(cells))).update_xaxes(
        gridcolor=GRID, type="category"
    )


def _reach(rows: pd.DataFrame, column: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": (rows["ci_high"] - rows[column]).to_numpy(),
        "arrayminus": (rows[column] - rows["ci_low"]).to_numpy(),
    }


def _dots(rows: pd.DataFrame, column: str, names: Sequence[str], colour: str, name: str, symbol: str = "circle") -> go.Scatter:
    return go.Scatter(
        x=rows[column].to_numpy(),
        y=list(names),
        name=name,
        mode="markers",
        marker={"color": colour, "size": 10, "symbol": symbol},
        error_x=_reach(rows, column),
        hovertemplate="%{y}<br>%{x:.3f}<extra></extra>",
    )
