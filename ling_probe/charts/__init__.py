"""A table in, a Plotly figure out; no arithmetic, so a figure never shows what its table does not hold.

Every figure's title is the question it answers, axes name their unit, and the line of no effect is drawn. Colours can be told
apart with any colour vision. Labels come from benchmarks and models, so what Plotly would read as markup is escaped.
"""

from collections.abc import Callable, Sequence

import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import surest_first
from ling_probe.charts.balance import balance_lines, load_heatmap
from ling_probe.charts.causal import causal_bars
from ling_probe.charts.experts import cluster_map, coactivation_heatmap
from ling_probe.charts.specialisation import specialisation_bars, specialisation_heatmap, specialisation_volcano
from ling_probe.charts.steps import auroc_bars, similarity_lines
from ling_probe.charts.style import EXPORT_CONFIG, MUTED, PALETTE, escape
from ling_probe.charts.training import training_curves
from ling_probe.spec import ModelSpec

FIGURES: dict[str, Callable[[pd.DataFrame, ModelSpec], Sequence[go.Figure]]] = {
    "label_specialisation": lambda table, _: [specialisation_bars(table), specialisation_volcano(table)],
    "family_specialisation": lambda table, _: [specialisation_bars(table), specialisation_volcano(table)],
    "step_similarity": lambda table, _: [similarity_lines(table)],
    "expert_load": lambda table, spec: [load_heatmap(table, group_size=spec.group_size)],
    "load_balance": lambda table, _: [balance_lines(table)],
    "coactivation": lambda table, _: [coactivation_heatmap(table, layer=int(surest_first(table)["layer"].iloc[0]))],
    "expert_clusters": lambda table, _: [cluster_map(table)],
    "answer_prediction": lambda table, _: [auroc_bars(table)],
    "causal_effects": lambda table, _: [causal_bars(table)],
}
"""Figures of a report by analysis name: from its table and the model's geometry."""

__all__ = [
    "EXPORT_CONFIG",
    "FIGURES",
    "MUTED",
    "PALETTE",
    "auroc_bars",
    "balance_lines",
    "causal_bars",
    "cluster_map",
    "coactivation_heatmap",
    "escape",
    "load_heatmap",
    "similarity_lines",
    "specialisation_bars",
    "specialisation_heatmap",
    "specialisation_volcano",
    "training_curves",
]
