"""Questions about a run: one question a file, one public function each, run in, tidy table out.

Experts are named by the columns `layer` and `expert`. Each function raises `UsageError` where a run cannot answer it.
"""

from ling_probe.analysis.clusters import expert_clusters
from ling_probe.analysis.coactivation import coactivation
from ling_probe.analysis.decoding import label_decoding
from ling_probe.analysis.enrichment import enrichment
from ling_probe.analysis.information import routing_information
from ling_probe.analysis.load import expert_load, load_balance
from ling_probe.analysis.overlap import token_overlap
from ling_probe.analysis.prediction import routing_prediction
from ling_probe.analysis.question import Analysis, Finding, Verdict, sure_effect, surest_first
from ling_probe.analysis.registry import ANALYSES, SINGLE, answers, finding, findings_index
from ling_probe.analysis.script import script_main
from ling_probe.analysis.specialisation import family_specialisation, label_specialisation
from ling_probe.analysis.vocabulary import vocabulary_specialisation

__all__ = [
    "ANALYSES",
    "SINGLE",
    "Analysis",
    "Finding",
    "Verdict",
    "answers",
    "coactivation",
    "enrichment",
    "expert_clusters",
    "expert_load",
    "family_specialisation",
    "finding",
    "findings_index",
    "label_decoding",
    "label_specialisation",
    "load_balance",
    "routing_information",
    "routing_prediction",
    "script_main",
    "sure_effect",
    "surest_first",
    "token_overlap",
    "vocabulary_specialisation",
]
