"""What is claimed of Ling 2.0's routing, tested on one run: statements in, verdicts out, from findings that are there already.

1. Ask the analyses that claims rest on (`SOURCES`), and read the studies kept in the run's folder.       `evidence`
2. Turn each table into a part: a statement, a verdict, the numbers.                              `parts`, `studies`
3. Give every claim the verdict of the weakest part that decides.                             `catalogue`, `claim`

Nothing is computed here that an analysis or a study computes; no model is loaded.
"""

from collections.abc import Mapping
from pathlib import Path

from ling_probe.analysis.asking import Answer
from ling_probe.analysis.registry import ANALYSES
from ling_probe.claims.catalogue import QUESTIONS
from ling_probe.claims.claim import RULE, Claim, ClaimVerdict, Part, counted
from ling_probe.claims.evidence import ADAPTATION, COST, JUDGED, REROUTING, kept_evidence
from ling_probe.claims.page import write_claims
from ling_probe.run import Run

SOURCES = tuple(name for name in ANALYSES if any(part.source == name for each in QUESTIONS for part in each.asked))
"""Analyses that claims rest on."""


def claims(run: Run, answers: Mapping[str, Answer], *, adapted: Path | None = None) -> list[Claim]:
    """Every claim made of Ling 2.0's routing, with what this run says about it.

    Args:
        run: Any run. Studies of its model are read from its folder.
        answers: Tables and refusals by name: those of `SOURCES`, from `analysis.answers`, and of `COST`. What is left out
            counts as not tested; names that no claim rests on are passed over.
        adapted: Folder of an adaptation of the run's model.
    """
    told = {**kept_evidence(run, adapted=adapted), **answers}
    return [question.claim(number, run, told) for number, question in enumerate(QUESTIONS, start=1)]


claim_table = claims
"""The same, by the name that a report calls it."""

__all__ = [
    "ADAPTATION", "COST", "JUDGED", "QUESTIONS", "REROUTING", "RULE", "SOURCES", "Claim", "ClaimVerdict", "Part",
    "claim_table", "claims", "counted", "kept_evidence", "write_claims",
]  # fmt: skip
