"""Questions about a run: one question a file, one public function each, run in, tidy table out.

Experts are named by the columns `layer` and `expert`. Each function raises `UsageError` where a run cannot answer it.
"""

from ling_probe.analysis.clusterings import cluster_agreement
from ling_probe.analysis.attribution import logit_attribution
from ling_probe.analysis.causal_effects import causal_effects
from ling_probe.analysis.clusters import expert_clusters
from ling_probe.analysis.coactivation import coactivation
from ling_probe.analysis.load import expert_load, load_balance
from ling_probe.analysis.norm_rank import norm_rank
from ling_probe.analysis.question import Analysis, Finding, Verdict, sure_effect, surest_first
from ling_probe.analysis.registry import ANALYSES, SINGLE, answers, finding, findings_index
from ling_probe.analysis.saliency import expert_saliency
from ling_probe.analysis.script import script_main
from ling_probe.analysis.shared import shared_share
from ling_probe.analysis.similarity import step_similarity
from ling_probe.analysis.solutions import answer_prediction
from ling_probe.analysis.specialisation import family_specialisation, label_specialisation
from ling_probe.analysis.super_experts import super_experts

__all__ = [
    "ANALYSES",
    "SINGLE",
    "Analysis",
    "Finding",
    "Verdict",
    "answer_prediction",
    "answers",
    "causal_effects",
    "cluster_agreement",
    "coactivation",
    "expert_clusters",
    "expert_load",
    "expert_saliency",
    "family_specialisation",
    "finding",
    "findings_index",
    "label_specialisation",
    "load_balance",
    "logit_attribution",
    "norm_rank",
    "script_main",
    "shared_share",
    "step_similarity",
    "super_experts",
    "sure_effect",
    "surest_first",
]
