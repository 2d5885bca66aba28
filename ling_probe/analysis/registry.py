"""Every analysis by name, in the order a report tells them."""

from ling_probe.analysis.accuracy import ACCURACY_DIFFERENCE
from ling_probe.analysis.affinity import EXPERT_AFFINITY
from ling_probe.analysis.agreement import ROUTE_AGREEMENT
from ling_probe.analysis.alignment import PATH_ALIGNMENT
from ling_probe.analysis.attribution import LOGIT_ATTRIBUTION
from ling_probe.analysis.boundary_prediction import STEP_BOUNDARIES
from ling_probe.analysis.carriers import LABEL_CARRIERS
from ling_probe.analysis.causal_effects import CAUSAL_EFFECTS_OF_ROUTING
from ling_probe.analysis.choice_reasons import CHOICE_REASONS
from ling_probe.analysis.churn import ROUTING_CHURN
from ling_probe.analysis.clusterings import CLUSTER_AGREEMENT
from ling_probe.analysis.clusters import EXPERT_CLUSTERS
from ling_probe.analysis.coactivation import COACTIVATION
from ling_probe.analysis.committee import COMMITTEE
from ling_probe.analysis.confidence import ROUTER_CONFIDENCE
from ling_probe.analysis.coverage import COVERAGE
from ling_probe.analysis.decoding import LABEL_DECODING
from ling_probe.analysis.enrichment import ENRICHMENT
from ling_probe.analysis.expert_predictions import EXPERT_PREDICTION
from ling_probe.analysis.expert_reasons import EXPERT_REASONS
from ling_probe.analysis.information import ROUTING_INFORMATION
from ling_probe.analysis.load import EXPERT_LOAD, LOAD_BALANCE
from ling_probe.analysis.load_curves import LOAD_CURVE
from ling_probe.analysis.load_shift import LOAD_SHIFT
from ling_probe.analysis.localisation import WRONG_STEP_LOCALISATION
from ling_probe.analysis.mistakes import FIRST_WRONG_STEP
from ling_probe.analysis.norm_rank import NORM_RANK
from ling_probe.analysis.onset import LABEL_ONSET
from ling_probe.analysis.overlap import TOKEN_OVERLAP
from ling_probe.analysis.prediction import ROUTING_PREDICTION
from ling_probe.analysis.profiles import STATE_PROFILES
from ling_probe.analysis.question import Analysis
from ling_probe.analysis.repeats import REPEAT_CHOICE
from ling_probe.analysis.risk import RISK_DIFFERENCE
from ling_probe.analysis.rollout import PROMPT_ROLLOUT
from ling_probe.analysis.saliency import EXPERT_SALIENCY
from ling_probe.analysis.saturation import ROUTER_SATURATION
from ling_probe.analysis.segment_routing import SEGMENT_ROUTING
from ling_probe.analysis.shared import SHARED_SHARE
from ling_probe.analysis.similarity import STEP_SIMILARITY
from ling_probe.analysis.solutions import ANSWER_PREDICTION
from ling_probe.analysis.specialisation import CORRECTNESS_SPECIALISATION, FAMILY_SPECIALISATION, LABEL_SPECIALISATION
from ling_probe.analysis.state_order import STATE_TRANSITIONS
from ling_probe.analysis.states import ROUTING_STATES
from ling_probe.analysis.steering_effects import STEERING_EFFECTS_OF_VECTORS
from ling_probe.analysis.super_experts import SUPER_EXPERTS
from ling_probe.analysis.transfer import OPERATION_TRANSFER
from ling_probe.analysis.transition import LAYER_TRANSITION
from ling_probe.analysis.twins import MINIMAL_PAIRS
from ling_probe.analysis.usage_similarity import USAGE_SIMILARITY
from ling_probe.analysis.vocabulary import VOCABULARY_SPECIALISATION
from ling_probe.analysis.weight_concentration import WEIGHT_CONCENTRATION

ANALYSES: dict[str, Analysis] = {
    each.name: each
    for each in (
        # what steps, families and answers have to do with it
        ROUTING_INFORMATION,
        LABEL_SPECIALISATION,
        STEP_SIMILARITY,
        LABEL_DECODING,
        LABEL_ONSET,
        LABEL_CARRIERS,
        MINIMAL_PAIRS,
        FAMILY_SPECIALISATION,
        CORRECTNESS_SPECIALISATION,
        ANSWER_PREDICTION,
        FIRST_WRONG_STEP,
        WRONG_STEP_LOCALISATION,
        RISK_DIFFERENCE,
        CAUSAL_EFFECTS_OF_ROUTING,
        STEERING_EFFECTS_OF_VECTORS,
        # what the token has to do with it
        VOCABULARY_SPECIALISATION,
        TOKEN_OVERLAP,
        ENRICHMENT,
        ROUTING_PREDICTION,
        EXPERT_PREDICTION,
        # why an expert is chosen
        CHOICE_REASONS,
        EXPERT_REASONS,
        ROUTER_CONFIDENCE,
        # how work is spread
        EXPERT_LOAD,
        LOAD_BALANCE,
        LOAD_CURVE,
        COVERAGE,
        COMMITTEE,
        EXPERT_AFFINITY,
        WEIGHT_CONCENTRATION,
        USAGE_SIMILARITY,
        # how routing moves along the text
        REPEAT_CHOICE,
        SEGMENT_ROUTING,
        ROUTING_CHURN,
        PROMPT_ROLLOUT,
        LAYER_TRANSITION,
        # which states routing passes through
        ROUTING_STATES,
        STATE_PROFILES,
        STATE_TRANSITIONS,
        STEP_BOUNDARIES,
        PATH_ALIGNMENT,
        # how experts go together
        COACTIVATION,
        EXPERT_CLUSTERS,
        CLUSTER_AGREEMENT,
        # what experts add
        EXPERT_SALIENCY,
        SUPER_EXPERTS,
        NORM_RANK,
        SHARED_SHARE,
        LOGIT_ATTRIBUTION,
        # how runs differ
        ACCURACY_DIFFERENCE,
        ROUTER_SATURATION,
        ROUTE_AGREEMENT,
        LOAD_SHIFT,
        OPERATION_TRANSFER,
    )
}
"""Every analysis by name, in the order a report tells them."""

SINGLE = tuple(name for name, each in ANALYSES.items() if not each.compares)
"""Those that ask about one run."""
