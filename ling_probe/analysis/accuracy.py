"""Whether a run answers more problems right than another, on the problems that both answered.

The same problems are harder or easier for both, so what counts is how often just one of the two is right: of these
discordant problems, each run would have half if neither were better (McNemar's exact test).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as distributions

from ling_probe import stats
from ling_probe.analysis.comparable import require_comparable, run_names, shared_sequences
from ling_probe.analysis.question import Analysis, Finding, in_order, judge
from ling_probe.errors import UsageError
from ling_probe.run import Run

LEAST_EFFECT = 0.05
"""Difference in the share of right answers that is worth having."""
ALL = "all"


def accuracy_difference(runs: Sequence[Run]) -> pd.DataFrame:
    """Right answers of the first run less those of each other, on the problems that both answered.

    One row a run compared with (`against`) and `family`, and over "all" where there are several: `problems` judged in both,
    `share` and `other_share` right, `difference` of the two with its 95 % interval (`ci_low`, `ci_high`; Agresti and Min 2005,
    for pairs), `only_first` and `only_other` problems that one alone got right, `p` two-sided from the exact test on these
    (McNemar), `q` corrected over all rows (Benjamini-Hochberg).

    Args:
        runs: The one asked about, then those it is compared with.

    Raises:
        UsageError: The runs cannot be compared, or no problem was judged in both.
    """
    require_comparable(runs)
    rows = [
        {"against": name, **row}
        for name, other in zip(run_names(runs)[1:], runs[1:], strict=True)
        for row in _families(runs[0], other)
    ]
    if not rows:
        raise UsageError("no problem was judged in two of these runs; capture the same problems, with answers, with both")
    table = pd.DataFrame(rows)
    return table.assign(q=stats.benjamini_hochberg(table["p"].to_numpy()))


def paired_difference(only_first: int, only_other: int, problems: int) -> tuple[float, float]:
    """95 % interval of a difference of paired shares: Wald's, with half a problem added to each of the four cells.

    >>> [round(bound, 3) for bound in paired_difference(0, 0, 100)]
    [-0.019, 0.019]
    """
    more, fewer, n = only_first + 0.5, only_other + 0.5, problems + 2
    middle = (more - fewer) / n
    half = distributions.norm.isf(0.025) * np.sqrt(more + fewer - (more - fewer) ** 2 / n) / n
    return float(max(middle - half, -1.0)), float(min(middle + half, 1.0))


def _families(first: Run, other: Run) -> Iterator[dict[str, Any]]:
    shared = shared_sequences(first, other)
    here, there = (run.sequences.iloc[rows] for run, rows in ((first, shared.rows), (other, shared.others)))
    pairs = pd.DataFrame(
        {"family": here["family"].to_numpy(), "one": here["correct"].array, "other": there["correct"].array}
    ).dropna()
    groups = [(str(family), rows) for family, rows in pairs.groupby("family")]
    for family, rows in groups + ([(ALL, pairs)] if len(groups) > 1 else []):
        one, two = rows["one"].to_numpy(dtype=bool), rows["other"].to_numpy(dtype=bool)
        only_first, only_other = int((one & ~two).sum()), int((two & ~one).sum())
        low, high = paired_difference(only_first, only_other, len(rows))
        discordant = only_first + only_other
        yield {
            "family": family,
            "problems": len(rows),
            "share": float(one.mean()),
            "other_share": float(two.mean()),
            "difference": float(one.mean() - two.mean()),
            "ci_low": low,
            "ci_high": high,
            "only_first": only_first,
            "only_other": only_other,
            "p": float(distributions.binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        }


def _finding(table: pd.DataFrame) -> Finding:
    whole = table[(table["family"] == ALL) | ~table["against"].duplicated(keep=False)]
    row = whole.iloc[int(whole["difference"].abs().to_numpy().argmax())]
    return Finding(
        sentence=(
            f"Of {row['problems']:,} problems that both answered, this run has {100 * row['share']:.1f} % right and "
            f"{row['against']} {100 * row['other_share']:.1f} %: a difference of {100 * row['difference']:+.1f} points (95 % "
            f"interval {100 * row['ci_low']:+.1f} to {100 * row['ci_high']:+.1f}); {row['only_first']:,} are right here alone, "
            f"{row['only_other']:,} there alone."
        ),
        verdict=judge(float(row["ci_low"]), float(row["ci_high"]), least=LEAST_EFFECT, q=float(row["q"])),
        rung=3 if row["q"] < 0.05 else 1,
        effect=float(row["difference"]),
        unit="share of problems",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
    )


ACCURACY_DIFFERENCE = Analysis(
    function=accuracy_difference,
    question="Does this run answer more problems right than another, or fewer?",
    claim="On the problems that both answered, the two runs differ in how many are right.",
    method=(
        "Share of right answers less that of the other run, on shared problems by family; null: of the problems that one run "
        "alone has right, each has half (McNemar's exact test), corrected over families and runs (Benjamini-Hochberg); "
        "intervals for pairs by Agresti and Min."
    ),
    order=in_order,
    finding=_finding,
    compares=True,
)
