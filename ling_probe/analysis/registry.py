"""Every analysis by name, and the index of what they found."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from ling_probe.analysis.affinity import EXPERT_AFFINITY
from ling_probe.analysis.agreement import ROUTE_AGREEMENT
from ling_probe.analysis.causal_effects import CAUSAL_EFFECTS_OF_ROUTING
from ling_probe.analysis.choice_reasons import CHOICE_REASONS
from ling_probe.analysis.churn import ROUTING_CHURN
from ling_probe.analysis.clusters import EXPERT_CLUSTERS
from ling_probe.analysis.coactivation import COACTIVATION
from ling_probe.analysis.committee import COMMITTEE
from ling_probe.analysis.confidence import ROUTER_CONFIDENCE
from ling_probe.analysis.coverage import COVERAGE
from ling_probe.analysis.decoding import LABEL_DECODING
from ling_probe.analysis.enrichment import ENRICHMENT
from ling_probe.analysis.expert_reasons import EXPERT_REASONS
from ling_probe.analysis.information import ROUTING_INFORMATION
from ling_probe.analysis.load import EXPERT_LOAD, LOAD_BALANCE
from ling_probe.analysis.load_shift import LOAD_SHIFT
from ling_probe.analysis.overlap import TOKEN_OVERLAP
from ling_probe.analysis.prediction import ROUTING_PREDICTION
from ling_probe.analysis.question import Analysis, Finding, Verdict
from ling_probe.analysis.repeats import REPEAT_CHOICE
from ling_probe.analysis.risk import RISK_DIFFERENCE
from ling_probe.analysis.rollout import PROMPT_ROLLOUT
from ling_probe.analysis.saturation import ROUTER_SATURATION
from ling_probe.analysis.segment_routing import SEGMENT_ROUTING
from ling_probe.analysis.similarity import STEP_SIMILARITY
from ling_probe.analysis.solutions import ANSWER_PREDICTION
from ling_probe.analysis.specialisation import CORRECTNESS_SPECIALISATION, FAMILY_SPECIALISATION, LABEL_SPECIALISATION
from ling_probe.analysis.transition import LAYER_TRANSITION
from ling_probe.analysis.usage_similarity import USAGE_SIMILARITY
from ling_probe.analysis.vocabulary import VOCABULARY_SPECIALISATION
from ling_probe.analysis.weight_concentration import WEIGHT_CONCENTRATION
from ling_probe.errors import UsageError
from ling_probe.run import Run

ANALYSES: dict[str, Analysis] = {
    each.name: each
    for each in (
        LABEL_SPECIALISATION,
        FAMILY_SPECIALISATION,
        STEP_SIMILARITY,
        CORRECTNESS_SPECIALISATION,
        RISK_DIFFERENCE,
        ROUTING_INFORMATION,
        LABEL_DECODING,
        ROUTING_PREDICTION,
        VOCABULARY_SPECIALISATION,
        TOKEN_OVERLAP,
        ENRICHMENT,
        EXPERT_LOAD,
        LOAD_BALANCE,
        COVERAGE,
        WEIGHT_CONCENTRATION,
        CHOICE_REASONS,
        EXPERT_REASONS,
        ROUTER_CONFIDENCE,
        REPEAT_CHOICE,
        SEGMENT_ROUTING,
        EXPERT_AFFINITY,
        COMMITTEE,
        USAGE_SIMILARITY,
        COACTIVATION,
        EXPERT_CLUSTERS,
        ANSWER_PREDICTION,
        CAUSAL_EFFECTS_OF_ROUTING,
        ROUTING_CHURN,
        PROMPT_ROLLOUT,
        LAYER_TRANSITION,
        ROUTE_AGREEMENT,
        ROUTER_SATURATION,
        LOAD_SHIFT,
    )
}
"""Every analysis by name, in the order a report tells them."""

SINGLE = tuple(name for name, each in ANALYSES.items() if not each.compares)
"""Those that ask about one run."""


def answers(run: Run, names: Sequence[str], *, against: Sequence[Run] = ()) -> Iterator[tuple[str, pd.DataFrame | UsageError]]:
    """Each analysis with its table, or the refusal that says why these runs cannot answer it.

    Args:
        run: The run asked about.
        names: Of analyses.
        against: Runs that comparisons compare it with.

    Raises:
        UsageError: An analysis does not exist.
    """
    if unknown := [name for name in names if name not in ANALYSES]:
        raise UsageError(f'no analysis "{unknown[0]}"; these there are: {", ".join(ANALYSES)}')
    for name in names:
        analysis = ANALYSES[name]
        try:
            yield name, analysis.function([run, *against] if analysis.compares else run)
        except UsageError as error:
            yield name, error


def finding(name: str, answer: pd.DataFrame | UsageError) -> Finding:
    """What an answer comes to; for a refusal, its reason."""
    if isinstance(answer, UsageError):
        return Finding(sentence=f"Not applicable: {answer}.", verdict=Verdict.NOT_APPLICABLE)
    return ANALYSES[name].finding(answer)


def findings_index(findings: Mapping[str, Finding]) -> pd.DataFrame:
    """What was asked and found, one row an analysis.

    Columns: `analysis`, `question`, `claim`, `finding` (a sentence), `effect` in `unit` with its 95 % interval (`ci_low`,
    `ci_high`), corrected p (`q`), `token_effect` (the same measure where token identity alone decides), `verdict` on the
    claim, and `rung` of the evidence.

    Args:
        findings: By analysis name.
    """
    return pd.DataFrame(
        [
            {
                "analysis": name,
                "question": ANALYSES[name].question,
                "claim": ANALYSES[name].claim,
                "finding": found.sentence,
                **{column: getattr(found, column) for column in ("effect", "unit", "ci_low", "ci_high", "q", "token_effect")},
                "verdict": found.verdict.value,
                "rung": found.rung,
            }
            for name, found in findings.items()
        ]
    ).astype({"rung": "Int64"})
