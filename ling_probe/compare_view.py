"""Two runs side by side: their answers, and one problem that both read, token by token."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from ling_probe import metrics, stats
from ling_probe.analysis.comparable import require_comparable, require_shared, same_training
from ling_probe.analysis.saturation import snapshot_step
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.token_view import token_table

SHADES = 4
"""Of tokens whose choice differs; 0 is the same choice."""


def answers_side_by_side(first: Run, other: Run) -> pd.DataFrame:
    """Correct answers of two runs by family, and over all ("all") where there is not one alone.

    One row a family: of either run (`_here`, `_there`) `judged` answers, the `share` that is correct and its 95 % Wilson
    interval (`low`, `high`). On problems that both answered and that were judged in both, `shared` of them: `only_here` and
    `only_there` correct in one run alone, and `p`, the exact two-sided test that both are as likely (McNemar).
    """
    tables = [_judged(run) for run in (first, other)]
    families = [str(name) for name in dict.fromkeys([*tables[0]["family"], *tables[1]["family"]])]
    groups = [*([("all", None)] if len(families) != 1 else []), *((name, name) for name in families)]
    return pd.DataFrame([_compared(name, family, *tables) for name, family in groups])


def _judged(run: Run) -> pd.DataFrame:
    rows = run.sequences[["sequence_id", "family", "correct"]]
    return rows[rows["correct"].notna()].astype({"family": str, "correct": bool}).set_index("sequence_id")


def _compared(name: str, family: str | None, here: pd.DataFrame, there: pd.DataFrame) -> dict[str, object]:
    one, two = (table if family is None else table[table["family"] == family] for table in (here, there))
    row: dict[str, object] = {"family": name}
    for side, table in (("here", one), ("there", two)):
        judged, correct = len(table), int(table["correct"].sum())
        low, high = stats.wilson_interval(correct, judged)
        share = correct / judged if judged else np.nan
        row |= {f"judged_{side}": judged, f"share_{side}": share, f"low_{side}": low, f"high_{side}": high}
    both = pd.DataFrame({"here": one["correct"], "there": two["correct"]}).dropna().astype(bool)
    only_here, only_there = int((both["here"] & ~both["there"]).sum()), int((~both["here"] & both["there"]).sum())
    differ = only_here + only_there
    p = float(binomtest(only_here, differ).pvalue) if differ else 1.0
    return row | {"shared": len(both), "only_here": only_here, "only_there": only_there, "p": p if len(both) else np.nan}


def is_checkpoint(final: Run, other: Run) -> bool:
    """Whether another run is of an earlier snapshot of a run's training, by its name, and read some of its problems."""
    own, step = snapshot_step(final), snapshot_step(other)
    if step is None or (own is not None and step >= own) or not same_training(final, other):
        return False
    try:
        require_comparable([final, other])
        return len(require_shared(final, other).rows) > 0
    except UsageError:
        return False


def shared_problems(first: pd.DataFrame, other: pd.DataFrame) -> list[str]:
    """Ids in both of two `problem_table`s, in the order of the first."""
    there = set(other["sequence_id"])
    return [name for name in first["sequence_id"] if name in there]


def token_overlap_table(runs: Sequence[Run], sequences: Sequence[int], *, layer: int) -> pd.DataFrame:
    """A `token_table` of one problem with what another run chose for the same tokens.

    `experts_there` are the other's K, largest weight first, `common` how many of them both chose, and `shade` 0 where the
    choice is the same, else from 1 to `SHADES`, the fewer in common the higher.

    Args:
        runs: Two.
        sequences: Row of the problem in `Run.sequences` of either.
        layer: A decoder layer.

    Raises:
        UsageError: The layer has no router, or the runs read another text in this problem.
    """
    here, there = (token_table(run, sequence, layer=layer) for run, sequence in zip(runs, sequences, strict=True))
    if here["token"].tolist() != there["token"].tolist():
        raise UsageError("the two runs read other texts in this problem, so their tokens do not compare")
    common = metrics.overlap(np.array(here["experts"].tolist()), np.array(there["experts"].tolist()))
    missing = 1 - common / runs[0].spec.top_k
    return here.assign(experts_there=there["experts"], common=common, shade=np.ceil(missing * SHADES).astype(int))
