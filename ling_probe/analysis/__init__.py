"""Questions about a run: one question a file, one public function each, run in, tidy table out.

Experts are named by the columns `layer` and `expert`. Each function raises `UsageError` where a run cannot answer it.
"""

from ling_probe.analysis.causal_effects import causal_effects
from ling_probe.analysis.clusters import expert_clusters
from ling_probe.analysis.coactivation import coactivation
from ling_probe.analysis.load import expert_load, load_balance
from ling_probe.analysis.question import Analysis, Finding, Verdict, sure_effect, surest_first
from ling_probe.analysis.registry import ANALYSES, SINGLE, answers, finding, findings_index
from ling_probe.analysis.script import script_main
from ling_probe.analysis.similarity import step_similarity
from ling_probe.analysis.solutions import answer_prediction
from ling_probe.analysis.specialisation import family_specialisation, label_specialisation

__all__ = [
    "ANALYSES",
    "SINGLE",
    "Analysis",
    "Finding",
    "Verdict",
    "answer_prediction",
    "answers",
    "causal_effects",
    "coactivation",
    "expert_clusters",
    "expert_load",
    "family_specialisation",
    "finding",
    "findings_index",
    "label_specialisation",
    "load_balance",
    "script_main",
    "step_similarity",
    "sure_effect",
    "surest_first",
]
