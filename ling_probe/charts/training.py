"""How a training went."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ling_probe.charts.style import PALETTE, styled

LOSS_TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


def training_curves(log: pd.DataFrame) -> go.Figure:
    """Loss, MaxVio and bias range through training: one row a logged step, lists by routed layer as `train.jsonl` has them."""
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for place, (name, title) in enumerate((("loss", "whole text"), ("solution_loss", "solution alone"))):
        line = {"color": PALETTE[place], "width": 1}
        figure.add_scatter(x=log["step"], y=log[name], name=title, mode="lines", line=line, row=1, col=1)
    for row, name in ((2, "max_vio"), (3, "bias_range")):
        for layer, values in enumerate(zip(*log[name], strict=True), start=1):
            line = {"color": PALETTE[(layer + 1) % 8], "width": 1}
            title = f"routed layer {layer}"
            figure.add_scatter(
                x=log["step"], y=values, name=title, showlegend=row == 2, mode="lines", line=line, row=row, col=1
            )
    figure.update_yaxes(title="loss (nats)", type="log", tickvals=LOSS_TICKS, row=1, col=1).update_yaxes(
        title="MaxVio", row=2, col=1
    )
    figure.update_yaxes(title="bias range (score)", row=3, col=1).update_xaxes(title="step", row=3, col=1)
    return styled(figure, "How did loss, balance and router bias go through training?", height=760)
