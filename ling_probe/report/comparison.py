"""What a comparison says first: which runs, how well each answers, and how far they choose alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ling_probe.analysis.comparable import run_names
from ling_probe.errors import UsageError
from ling_probe.report.headline import headline
from ling_probe.run import Run
from ling_probe.shown import records

AGREEMENT = ("against", "layer", "tokens", "agreement", "ci_low", "ci_high", "chance", "token_agreement", "beyond_token",
             "beyond_low", "beyond_high", "decisions_differ")  # fmt: skip


def told_comparison(runs: Sequence[Run], tables: Mapping[str, pd.DataFrame | UsageError]) -> dict[str, Any]:
    """The runs, paired answers and agreement by layer, as plain values.

    Args:
        runs: The one asked about, then those it is compared with.
        tables: Tables by analysis name; `accuracy_difference` and `route_agreement` are read.
    """
    heads = [headline(run, {}) for run in runs]
    kept = ("model", "benchmark", "state", "sequences", "tokens", "steps")
    told = [
        {"name": name, **{each: head[each] for each in kept}, "interventions": len(head["interventions"])}
        for name, head in zip(run_names(runs), heads, strict=True)
    ]
    answers, agreement = tables.get("accuracy_difference"), tables.get("route_agreement")
    return {
        "runs": told,
        "answers": records(answers) if isinstance(answers, pd.DataFrame) else [],
        "agreement": _by_layer(agreement) if isinstance(agreement, pd.DataFrame) else [],
    }


def _by_layer(table: pd.DataFrame) -> list[dict[str, Any]]:
    return records(table[table["margin"] == "all"][list(AGREEMENT)])
