"""Questions about a run: one question a file, one public function each, run in, tidy table out.

Experts are named by the columns `layer` and `expert`. Each function raises `UsageError` where a run cannot answer it.
"""

from ling_probe.analysis.agreement import route_agreement
from ling_probe.analysis.churn import routing_churn
from ling_probe.analysis.clusters import expert_clusters
from ling_probe.analysis.coactivation import coactivation
from ling_probe.analysis.load import expert_load, load_balance
from ling_probe.analysis.load_shift import load_shift
from ling_probe.analysis.question import Analysis, Finding, Verdict, sure_effect, surest_first
from ling_probe.analysis.registry import ANALYSES, SINGLE, answers, finding, findings_index
from ling_probe.analysis.rollout import prompt_rollout
from ling_probe.analysis.saturation import router_saturation
from ling_probe.analysis.script import script_main
from ling_probe.analysis.specialisation import family_specialisation, label_specialisation
from ling_probe.analysis.transition import layer_transition

__all__ = [
    "ANALYSES",
    "SINGLE",
    "Analysis",
    "Finding",
    "Verdict",
    "answers",
    "coactivation",
    "expert_clusters",
    "expert_load",
    "family_specialisation",
    "finding",
    "findings_index",
    "label_specialisation",
    "layer_transition",
    "load_balance",
    "load_shift",
    "prompt_rollout",
    "route_agreement",
    "router_saturation",
    "routing_churn",
    "script_main",
    "sure_effect",
    "surest_first",
]
