"""How routing goes with reasoning steps."""

import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import ANALYSES
from ling_probe.charts.style import MUTED, PALETTE, SYMBOLS, figure_of

LEVELS = {
    "words": "what the tokens alone would make",
    "raw": "as routed",
    "token": "beyond the tokens",
    "position": "beyond tokens, same place",
    "problem": "beyond tokens, same problem",
}


def similarity_lines(table: pd.DataFrame) -> go.Figure:
    """Differences of `step_similarity` by layer and level, with 95 % intervals; at 0 labels make no difference."""
    traces = []
    for place, (level, title) in enumerate(LEVELS.items()):
        rows = table[table["level"] == level]
        traces.append(
            go.Scatter(
                x=[str(layer) for layer in rows["layer"]],
                y=rows["gap"].to_numpy(),
                name=title,
                mode="lines+markers",
                line={"color": MUTED if level == "words" else PALETTE[place], "dash": "dash" if level == "words" else "solid"},
                marker={"symbol": SYMBOLS[place], "size": 9},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (rows["ci_high"] - rows["gap"]).to_numpy(),
                    "arrayminus": (rows["gap"] - rows["ci_low"]).to_numpy(),
                },
                hovertemplate="layer %{x}<br>difference of mean cosines %{y:.3f}<extra></extra>",
            )
        )
    question = ANALYSES["step_similarity"].question
    figure = figure_of(traces, question, x="layer", y="same label minus different, mean cosine", height=460)
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dot"})
    return figure.update_xaxes(type="category")


def auroc_bars(table: pd.DataFrame) -> go.Figure:
    """What tells wrong from right solutions in `answer_prediction`, with 95 % intervals; 0.5 is chance."""
    points = go.Scatter(
        x=table["auroc"].to_numpy(),
        y=table["features"].to_list(),
        mode="markers",
        marker={"color": PALETTE[0], "size": 10},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": (table["ci_high"] - table["auroc"]).to_numpy(),
            "arrayminus": (table["auroc"] - table["ci_low"]).to_numpy(),
        },
        hovertemplate="%{y}<br>AUROC %{x:.3f}<extra></extra>",
    )
    question = ANALYSES["answer_prediction"].question
    figure = figure_of([points], question, x="AUROC on held-out solutions", y="", height=360)
    figure.add_vline(x=0.5, line={"color": MUTED, "dash": "dash"})
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True).update_layout(showlegend=False)
