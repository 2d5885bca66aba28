"""What a change tried on one prompt moved."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ling_probe.charts.style import escape, figure_of, grid, row_height


def moved_heatmap(choices: pd.DataFrame) -> go.Figure:
    """Layers by tokens of `laboratory.Outcome.choices`: the share of a token's choices that are others under the change."""
    cells = grid(choices, "layer", "position", "moved")
    told = choices.assign(
        shown=[
            f"{escape(repr(row.token))}, {row.segment}<br>{_named(row.experts)} → {_named(row.new_experts)}"
            for row in choices.itertuples()
        ]
    )
    heat = go.Heatmap(
        z=cells.to_numpy(np.float32),
        x=cells.columns.to_numpy(),
        y=[str(layer) for layer in cells.index],
        customdata=grid(told, "layer", "position", "shown").to_numpy(),
        zmin=0,
        zmax=1,
        colorscale="Blues",
        colorbar={"title": "moved", "tickformat": ".0%", "thickness": 12},
        hovertemplate="layer %{y}, position %{x}: %{customdata}<br>%{z:.0%} moved<extra></extra>",
    )
    title = "Which choices does the change move?"
    height = row_height(len(cells))
    return figure_of([heat], title, x="position in prompt and old text", y="layer", height=height).update_yaxes(
        type="category", autorange="reversed"
    )


def _named(experts: Any) -> str:
    return " ".join(map(str, experts))
