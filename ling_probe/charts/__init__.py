"""A table in, a Plotly figure out; no arithmetic, so a figure never shows what its table does not hold.

Every figure's title is the question it answers, axes name their unit, and the line of no effect is drawn. Colours can be told
apart with any colour vision. Labels come from benchmarks and models, so what Plotly would read as markup is escaped.
"""

from collections.abc import Callable, Sequence

import pandas as pd
import plotly.graph_objects as go

from ling_probe.analysis import surest_first
from ling_probe.analysis.affinity import affinity_sets
from ling_probe.charts.balance import (
    balance_lines,
    bias_against_load,
    coverage_curves,
    load_heatmap,
    lorenz_curves,
    weight_bars,
)
from ling_probe.charts.causal import causal_bars, causal_figures, dose_curves, written_bars
from ling_probe.charts.comparison import (
    accuracy_bars,
    agreement_lines,
    margin_lines,
    saturation_curves,
    saturation_lines,
    shift_bars,
    shift_heatmap,
)
from ling_probe.charts.contributions import (
    attribution_lines,
    attribution_scatter,
    norm_rank_lines,
    norm_strip,
    saliency_scatter,
    shared_lines,
)
from ling_probe.charts.dynamics import churn_lines, rollout_lines, transition_heatmap, transition_lines
from ling_probe.charts.experts import agreement_heatmap, cluster_map, cluster_maps, coactivation_heatmap
from ling_probe.charts.laboratory import moved_heatmap
from ling_probe.charts.one_expert import (
    COLOURED,
    expert_map,
    neighbour_dots,
    preference_dots,
    promoted_dots,
    token_dots,
)
from ling_probe.charts.operations import (
    carrier_bars,
    carrier_layers,
    located_bars,
    onset_lines,
    pair_accuracy,
    pair_lines,
    transfer_bars,
    wrong_step_dots,
)
from ling_probe.charts.paths import difference_dots, path_sankey
from ling_probe.charts.profiles import profile_heatmap
from ling_probe.charts.risk import risk_bars, token_test
from ling_probe.charts.router import (
    affinity_lines,
    bias_scatter,
    committee_lines,
    confidence_figures,
    reason_bars,
    repeat_lines,
    stretch_lines,
)
from ling_probe.charts.similarity import usage_correlation, usage_figures, usage_overlap
from ling_probe.charts.specialisation import (
    replication,
    specialisation_bars,
    specialisation_heatmap,
    specialisation_volcano,
    token_shares,
)
from ling_probe.charts.states import (
    agreement_dots,
    alignment_dots,
    attribution_map,
    boundary_dots,
    order_heatmap,
    order_sankey,
    share_bars,
    state_heatmap,
    timeline,
)
from ling_probe.charts.steering import steering_curves, steering_figures
from ling_probe.charts.steps import auroc_bars, similarity_lines
from ling_probe.charts.style import EXPORT_CONFIG, MUTED, PALETTE, escape, standalone_html
from ling_probe.charts.tokens import (
    decoding_bars,
    enrichment_dots,
    explained_scatter,
    information_lines,
    overlap_lines,
    prediction_lines,
    vocabulary_lines,
)
from ling_probe.charts.training import training_curves
from ling_probe.spec import ModelSpec


def _specialisation(table: pd.DataFrame) -> list[go.Figure]:
    picked = table["picked_log2_ratio"].notna().any()
    return [specialisation_bars(table), specialisation_volcano(table), *([replication(table)] if picked else [])]


FIGURES: dict[str, Callable[[pd.DataFrame, ModelSpec], Sequence[go.Figure]]] = {
    "step_similarity": lambda table, _: [similarity_lines(table)],
    "label_specialisation": lambda table, _: _specialisation(table),
    "family_specialisation": lambda table, _: [*_specialisation(table), token_shares(table)],
    "correctness_specialisation": lambda table, _: _specialisation(table),
    "risk_difference": lambda table, _: [risk_bars(table), token_test(table)],
    "routing_information": lambda table, _: [information_lines(table)],
    "label_decoding": lambda table, _: [decoding_bars(table)],
    "operation_transfer": lambda table, _: [transfer_bars(table)],
    "label_onset": lambda table, _: [onset_lines(table)],
    "label_carriers": lambda table, _: [carrier_bars(table), carrier_layers(table)],
    "minimal_pairs": lambda table, _: [pair_lines(table), pair_accuracy(table)],
    "first_wrong_step": lambda table, _: [wrong_step_dots(table)],
    "wrong_step_localisation": lambda table, _: [located_bars(table)],
    "routing_prediction": lambda table, _: [prediction_lines(table)],
    "expert_prediction": lambda table, _: [explained_scatter(table)],
    "vocabulary_specialisation": lambda table, _: [vocabulary_lines(table)],
    "token_overlap": lambda table, _: [overlap_lines(table)],
    "enrichment": lambda table, _: [enrichment_dots(table)],
    "expert_load": lambda table, spec: [load_heatmap(table, group_size=spec.group_size)],
    "load_balance": lambda table, _: [balance_lines(table)],
    "load_curve": lambda table, _: [lorenz_curves(table)],
    "coverage": lambda table, _: [coverage_curves(table)],
    "weight_concentration": lambda table, _: [weight_bars(table)],
    "choice_reasons": lambda table, _: [reason_bars(table)],
    "expert_reasons": lambda table, _: [bias_scatter(table)],
    "router_confidence": lambda table, _: confidence_figures(table),
    "repeat_choice": lambda table, _: [repeat_lines(table)],
    "segment_routing": lambda table, _: [stretch_lines(table)],
    "expert_affinity": lambda table, _: [affinity_lines(affinity_sets(table))],
    "committee": lambda table, _: [committee_lines(table)],
    "usage_similarity": lambda table, _: usage_figures(table),
    "coactivation": lambda table, _: [coactivation_heatmap(table, layer=int(surest_first(table)["layer"].iloc[0]))],
    "expert_clusters": lambda table, _: cluster_maps(table),
    "cluster_agreement": lambda table, _: [agreement_heatmap(table)],
    "expert_saliency": lambda table, _: [saliency_scatter(table)],
    "super_experts": lambda table, _: [norm_strip(table)],
    "norm_rank": lambda table, _: [norm_rank_lines(table)],
    "shared_share": lambda table, _: [shared_lines(table)],
    "logit_attribution": lambda table, _: [attribution_lines(table), attribution_scatter(table)],
    "answer_prediction": lambda table, _: [auroc_bars(table)],
    "routing_states": lambda table, _: [agreement_dots(table)],
    "state_profiles": lambda table, _: [state_heatmap(table)],
    "state_transitions": lambda table, _: [order_sankey(table), order_heatmap(table)],
    "step_boundaries": lambda table, _: [boundary_dots(table)],
    "path_alignment": lambda table, _: [alignment_dots(table)],
    "causal_effects": lambda table, _: causal_figures(table),
    "steering_effects": lambda table, _: steering_figures(table),
    "routing_churn": lambda table, _: [churn_lines(table)],
    "prompt_rollout": lambda table, _: [rollout_lines(table)],
    "layer_transition": lambda table, _: [
        transition_lines(table),
        transition_heatmap(table, layer=int(surest_first(table)["layer"].iloc[0])),
    ],
    "accuracy_difference": lambda table, _: [accuracy_bars(table)],
    "route_agreement": lambda table, _: [
        agreement_lines(table),
        *([margin_lines(table)] if (table["margin"] != "all").any() else []),
    ],
    "router_saturation": lambda table, _: [saturation_curves(table), saturation_lines(table)],
    "load_shift": lambda table, _: [
        *(shift_heatmap(table, against=name) for name in table["against"].unique()),
        shift_bars(table),
    ],
}
"""Figures of a report by analysis name: from its table and the model's geometry."""

__all__ = [
    "COLOURED",
    "EXPORT_CONFIG",
    "FIGURES",
    "MUTED",
    "PALETTE",
    "accuracy_bars",
    "affinity_lines",
    "agreement_dots",
    "agreement_heatmap",
    "agreement_lines",
    "alignment_dots",
    "attribution_lines",
    "attribution_map",
    "attribution_scatter",
    "auroc_bars",
    "balance_lines",
    "bias_against_load",
    "bias_scatter",
    "boundary_dots",
    "carrier_bars",
    "carrier_layers",
    "causal_bars",
    "causal_figures",
    "churn_lines",
    "cluster_map",
    "cluster_maps",
    "coactivation_heatmap",
    "committee_lines",
    "confidence_figures",
    "coverage_curves",
    "decoding_bars",
    "difference_dots",
    "dose_curves",
    "enrichment_dots",
    "escape",
    "expert_map",
    "explained_scatter",
    "information_lines",
    "load_heatmap",
    "located_bars",
    "lorenz_curves",
    "margin_lines",
    "moved_heatmap",
    "neighbour_dots",
    "norm_rank_lines",
    "norm_strip",
    "onset_lines",
    "order_heatmap",
    "order_sankey",
    "overlap_lines",
    "pair_accuracy",
    "pair_lines",
    "path_sankey",
    "prediction_lines",
    "preference_dots",
    "profile_heatmap",
    "promoted_dots",
    "reason_bars",
    "repeat_lines",
    "replication",
    "risk_bars",
    "rollout_lines",
    "saliency_scatter",
    "saturation_curves",
    "saturation_lines",
    "share_bars",
    "shared_lines",
    "shift_bars",
    "shift_heatmap",
    "similarity_lines",
    "specialisation_bars",
    "specialisation_heatmap",
    "specialisation_volcano",
    "standalone_html",
    "state_heatmap",
    "steering_curves",
    "steering_figures",
    "stretch_lines",
    "timeline",
    "token_dots",
    "token_shares",
    "token_test",
    "training_curves",
    "transfer_bars",
    "transition_heatmap",
    "transition_lines",
    "usage_correlation",
    "usage_overlap",
    "vocabulary_lines",
    "weight_bars",
    "written_bars",
    "wrong_step_dots",
]
