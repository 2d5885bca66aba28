"""What a steering vector does, by its strength."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ling_probe.charts.causal import CONTROL, EFFECT
from ling_probe.charts.style import MUTED, PALETTE, escape, lines_with_intervals, styled

MEASURES = {
    "moved": ("share of choices moved", ".1%"),
    "own": ("loss where it is steered to, nats", ".3g"),
    "other": ("loss elsewhere, nats", ".3g"),
    "solved": ("share solved", ".1%"),
    "steps_right": ("share of steps right", ".1%"),
    "steps_own": ("share of steps of the label", ".1%"),
}
"""What is drawn, each with what its axis says and its ticks."""


def steering_figures(table: pd.DataFrame) -> list[go.Figure]:
    """One figure a vector of `steering_effects`."""
    return [steering_curves(rows) for _, rows in table.groupby(["toward", "away"], sort=False)]


def steering_curves(table: pd.DataFrame) -> go.Figure:
    """Changes by strength of one vector, over the band of vectors of the same values given to other experts."""
    shown = [name for name in MEASURES if (table["measure"] == name).any()]
    titles = [MEASURES[name][0] for name in shown]
    columns = 3 if len(shown) > 4 else 2
    lines = -(-len(shown) // columns)
    figure = make_subplots(rows=lines, cols=columns, subplot_titles=titles, vertical_spacing=0.22, horizontal_spacing=0.09)
    for place, measure in enumerate(shown):
        rows = table[table["measure"] == measure].sort_values("strength")
        where = {"row": place // columns + 1, "col": place % columns + 1}
        for names, name, colour in ((CONTROL, "same values, other experts", MUTED), (EFFECT, "the vector", PALETTE[0])):
            strengths = [f"{strength:g}" for strength in rows["strength"]]
            band, line = lines_with_intervals(strengths, rows, names, name, colour)
            figure.add_trace(band, **where)
            figure.add_trace(line.update(showlegend=place == 0), **where)
        figure.update_yaxes(tickformat=MEASURES[measure][1], **where)
        figure.update_xaxes(title="strength" if place >= len(shown) - columns else "", type="linear", **where)
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    first = table.iloc[0]
    title = f"What does steering towards {escape(str(first['toward']))}, away from {escape(str(first['away']))}, change?"
    return styled(figure, title, height=130 + 250 * lines).update_layout(margin_t=110, legend_y=1.09, title_y=0.98)
