"""Questions about a run: one question a file, one public function each, run in, tidy table out.

Experts are named by the columns `layer` and `expert`. Each function raises `UsageError` where a run cannot answer it.
"""

from ling_probe.analysis.accuracy import accuracy_difference
from ling_probe.analysis.affinity import affinity_sets, expert_affinity
from ling_probe.analysis.agreement import route_agreement
from ling_probe.analysis.alignment import path_alignment
from ling_probe.analysis.asking import answers, finding, findings_index
from ling_probe.analysis.attribution import logit_attribution
from ling_probe.analysis.boundary_prediction import step_boundaries
from ling_probe.analysis.carriers import label_carriers
from ling_probe.analysis.causal_effects import causal_effects
from ling_probe.analysis.choice_reasons import choice_reasons
from ling_probe.analysis.churn import routing_churn
from ling_probe.analysis.clusterings import cluster_agreement
from ling_probe.analysis.clusters import expert_clusters
from ling_probe.analysis.coactivation import coactivation
from ling_probe.analysis.committee import committee
from ling_probe.analysis.confidence import router_confidence
from ling_probe.analysis.coverage import coverage
from ling_probe.analysis.decoding import label_decoding
from ling_probe.analysis.enrichment import enrichment
from ling_probe.analysis.expert_predictions import expert_prediction
from ling_probe.analysis.expert_reasons import expert_reasons
from ling_probe.analysis.hidden import fit_states
from ling_probe.analysis.information import routing_information
from ling_probe.analysis.kept import answer_once, kept_answers
from ling_probe.analysis.load import expert_load, load_balance
from ling_probe.analysis.load_curves import load_curve
from ling_probe.analysis.load_shift import load_shift
from ling_probe.analysis.localisation import wrong_step_localisation
from ling_probe.analysis.mistakes import first_wrong_step
from ling_probe.analysis.norm_rank import norm_rank
from ling_probe.analysis.onset import label_onset
from ling_probe.analysis.overlap import token_overlap
from ling_probe.analysis.prediction import routing_prediction
from ling_probe.analysis.profiles import state_profiles
from ling_probe.analysis.question import Analysis, Finding, Verdict, sure_effect, surest_first
from ling_probe.analysis.registry import ANALYSES, SINGLE
from ling_probe.analysis.repeats import repeat_choice
from ling_probe.analysis.risk import risk_difference
from ling_probe.analysis.rollout import prompt_rollout
from ling_probe.analysis.saliency import expert_saliency
from ling_probe.analysis.saturation import router_saturation
from ling_probe.analysis.script import script_main
from ling_probe.analysis.segment_routing import segment_routing
from ling_probe.analysis.shared import shared_share
from ling_probe.analysis.similarity import step_similarity
from ling_probe.analysis.solutions import answer_prediction
from ling_probe.analysis.specialisation import (
    correctness_specialisation,
    family_specialisation,
    held_out,
    label_specialisation,
    surest_picked,
)
from ling_probe.analysis.state_order import state_transitions
from ling_probe.analysis.states import routing_states
from ling_probe.analysis.steering_effects import steering_effects
from ling_probe.analysis.super_experts import super_experts
from ling_probe.analysis.token_reasons import token_experts, token_reasons
from ling_probe.analysis.transfer import operation_transfer
from ling_probe.analysis.transition import layer_transition
from ling_probe.analysis.twins import minimal_pairs
from ling_probe.analysis.usage_similarity import usage_similarity
from ling_probe.analysis.vocabulary import vocabulary_specialisation
from ling_probe.analysis.weight_concentration import weight_concentration

__all__ = [
    "ANALYSES",
    "SINGLE",
    "Analysis",
    "Finding",
    "Verdict",
    "accuracy_difference",
    "affinity_sets",
    "answer_once",
    "answer_prediction",
    "answers",
    "causal_effects",
    "choice_reasons",
    "cluster_agreement",
    "coactivation",
    "committee",
    "correctness_specialisation",
    "coverage",
    "enrichment",
    "expert_affinity",
    "expert_clusters",
    "expert_load",
    "expert_prediction",
    "expert_reasons",
    "expert_saliency",
    "family_specialisation",
    "finding",
    "findings_index",
    "first_wrong_step",
    "fit_states",
    "held_out",
    "kept_answers",
    "label_carriers",
    "label_decoding",
    "label_onset",
    "label_specialisation",
    "layer_transition",
    "load_balance",
    "load_curve",
    "load_shift",
    "logit_attribution",
    "minimal_pairs",
    "norm_rank",
    "operation_transfer",
    "path_alignment",
    "prompt_rollout",
    "repeat_choice",
    "risk_difference",
    "route_agreement",
    "router_confidence",
    "router_saturation",
    "routing_churn",
    "routing_information",
    "routing_prediction",
    "routing_states",
    "script_main",
    "segment_routing",
    "shared_share",
    "state_profiles",
    "state_transitions",
    "steering_effects",
    "step_boundaries",
    "step_similarity",
    "super_experts",
    "sure_effect",
    "surest_first",
    "surest_picked",
    "token_experts",
    "token_overlap",
    "token_reasons",
    "usage_similarity",
    "vocabulary_specialisation",
    "weight_concentration",
    "wrong_step_localisation",
]
