"""What routing is like in the first wrong step of a solution, set beside the right steps before it.

1. Measure every step (`step_measures`), less what the same words have in the same third of solutions of the family.
2. Take off the mean of the steps before it in its problem, all right so far: what is left is a change, whatever the problem.
3. Compare first wrong steps with steps of the same number in problems of the same family that are right up to and with this
   step, at equal length and place in the solution (a regression inside these groups takes both out).

A first wrong step always comes after right ones, and the later the likelier; beside steps of the same number that makes no
difference. Null: of the problems right so far, any could have gone wrong at this step; exact moments of the permutation inside
each group, as in a test of survival (Mantel 1966).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.classified import Classified, classified_steps, families
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, judge_cells, surest_first
from ling_probe.analysis.sample import interval_text, numbered, resampled_interval
from ling_probe.analysis.step_measures import step_measures
from ling_probe.errors import UsageError
from ling_probe.run import Run

LEAST_PROBLEMS = 10
LEAST_EFFECT = 0.2
"""Standard deviations of right steps: a difference below it is small (Cohen)."""


def first_wrong_step(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How a first wrong step departs from the steps before it, beside right steps of the same number, words and length.

    One row a `measure` and layer (none for the loss): `effect` in standard deviations of right steps of the same number, above
    0 where wrong steps have more of it, with its 95 % bootstrap interval over problems (`ci_low`, `ci_high`); `p` two-sided,
    from exact moments of which problem goes wrong at a step, `q` corrected over all rows (Benjamini-Hochberg); `raw` is the
    same with words, length and place in it. `wrong` first wrong steps were compared with `right` ones.

    Measures: next-token `loss`; share of the weight at the heaviest expert (`top weight`); how seldom the same word chooses
    these experts (`surprise`); how seldom the step before did (`departure`); of runs with logits also `router entropy` and
    `router margin`.

    Args:
        run: A run whose steps are known to be right or wrong.
        draws: Bootstrap samples.
        seed: Of the samples.

    Raises:
        UsageError: Fewer than ten problems have right steps before a first wrong one and others to compare with.
    """
    judged, steps = judged_steps(run), classified_steps(run)
    measures = step_measures(run, steps)
    group = numbered(families(run)[1][judged.problem], judged.step)
    weights = stats.bootstrap_weights(len(run.sequences), draws=draws, seed=seed)
    rows = []
    for column, (name, layer) in enumerate(measures.names):
        change = [_change(each[:, column], judged) for each in (measures.beyond, measures.raw)]
        beyond = _without_length(change[0], judged, group, steps)
        compared = _compared(beyond, judged, group, weights)
        if compared:
            raw = _compared(change[1], judged, group, weights[:2]).get("effect", np.nan)
            rows.append({"measure": name, "layer": layer, **compared, "raw": raw})
    if not rows:
        raise UsageError(
            f"no {LEAST_PROBLEMS} first wrong steps of this run have right steps of the same number and family to compare with"
        )
    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    return table.assign(seed=seed)


@dataclass(frozen=True, eq=False)
class Judged:
    """Steps of a run, and which count."""

    problem: Integer[np.ndarray, " O"]
    """Sequence of each step."""
    step: Integer[np.ndarray, " O"]
    wrong: Bool[np.ndarray, " O"]
    """The first wrong step of its problem, all before it right."""
    right: Bool[np.ndarray, " O"]
    """Right, with no step before it that is wrong or unknown."""
    n_steps: Integer[np.ndarray, " O"]
    """Of its problem."""


def judged_steps(run: Run, *, least: int = LEAST_PROBLEMS) -> Judged:
    """Which steps are right up to the first wrong one.

    Raises:
        UsageError: Fewer than `least` problems have right steps before a first wrong one.
    """
    table = run.steps
    problem, step = table["sequence"].to_numpy(), table["step"].to_numpy()
    right = table["correct"].fillna(value=False).to_numpy(dtype=bool)
    wrong = ~table["correct"].fillna(value=True).to_numpy(dtype=bool)
    first = np.searchsorted(problem, problem)
    failed = np.concatenate([[0], np.cumsum(~right)])
    so_far = failed[np.arange(len(problem))] - failed[first] == 0 if len(problem) else right
    n_steps = np.bincount(problem)[problem] if len(problem) else step
    judged = Judged(problem, step, wrong & so_far, right & so_far, n_steps)
    found = int((judged.wrong & (step > 0)).sum())
    if found < least:
        raise UsageError(
            f"{found} problems of this run have right steps before a first wrong one, {least} are needed; steps are judged in "
            "stepbench with --generate, and in benchmarks that mark them"
        )
    return judged


def _change(values: Float64[np.ndarray, " O"], judged: Judged) -> Float64[np.ndarray, " O"]:
    """Each step's value less the mean of those before it in its problem; NaN where there is none or it does not count."""
    known = np.isfinite(values)
    first = np.searchsorted(judged.problem, judged.problem)
    sums, count = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(known, values, 0.0), known))
    here = np.arange(len(values))
    before = count[here] - count[first]
    mean = (sums[here] - sums[first]) / np.where(before > 0, before, np.nan)
    return np.where(judged.wrong | judged.right, values - mean, np.nan)


def _without_length(
    values: Float64[np.ndarray, " O"], judged: Judged, group: Integer[np.ndarray, " O"], steps: Classified
) -> Float64[np.ndarray, " O"]:
    """Values less what the length of a step and its place in the whole solution make of them in a group."""
    place, length = (judged.step + 1) / judged.n_steps, np.log(np.maximum(steps.n_tokens, 1))
    design = np.column_stack([place == 1, place, place**2, length, length**2]).astype(float)
    # On wrong steps too: what is fitted without them leaves them farther off than right ones, with nothing to find.
    learnt = np.isfinite(values)
    if not learnt.any():
        return values
    centred = _centred(np.column_stack([design, np.nan_to_num(values)]), group, learnt)
    return values - design @ np.linalg.lstsq(centred[:, :-1], centred[:, -1], rcond=1e-8)[0]


def _centred(
    values: Float64[np.ndarray, "O n"], group: Integer[np.ndarray, " O"], kept: Bool[np.ndarray, " O"]
) -> Float64[np.ndarray, "k n"]:
    """The rows kept, less the mean of their group."""
    owner = numbered(group[kept])
    count = np.bincount(owner)
    means = np.column_stack([np.bincount(owner, weights=column) / count for column in values[kept].T])
    return values[kept] - means[owner]


def _compared(
    values: Float64[np.ndarray, " O"], judged: Judged, group: Integer[np.ndarray, " O"], weights: Float64[np.ndarray, "B S"]
) -> dict[str, float]:
    """First wrong steps beside right ones of their group; nothing where fewer than `LEAST_PROBLEMS` have any."""
    known = np.isfinite(values)
    both = np.intersect1d(group[known & judged.wrong], group[known & judged.right])
    known &= np.isin(group, both)
    if (known & judged.wrong).sum() < LEAST_PROBLEMS:
        return {}
    right, wrong = known & judged.right, judged.wrong[known]
    inside = _centred(values[:, None], group, right)
    spread = np.sqrt((inside**2).sum() / max(len(inside) - len(both), 1))
    if not spread > 0:
        return {}
    owner, scaled = numbered(group[known]), values[known] / spread
    every = np.concatenate([np.ones((1, weights.shape[1])), weights])
    effect = _difference(scaled, wrong, judged.problem[known], owner, every)
    low, high = resampled_interval(effect[1:], len(np.unique(judged.problem[known])))
    p = stats.shuffle_moments(scaled[:, None], wrong.astype(np.int64), blocks=owner).of(1).p()
    told = {"effect": float(effect[0]), "ci_low": float(low), "ci_high": float(high), "p": float(p[0])}
    return {**told, "wrong": int(wrong.sum()), "right": int((~wrong).sum())}


def _difference(
    values: Float64[np.ndarray, " n"],
    wrong: Bool[np.ndarray, " n"],
    problem: Integer[np.ndarray, " n"],
    group: Integer[np.ndarray, " n"],
    every: Float64[np.ndarray, "B S"],
) -> Float64[np.ndarray, " B"]:
    """Mean difference inside groups, each weighing n_w n_r / (n_w + n_r); problems count as often as told."""
    shape = (every.shape[1], int(group.max()) + 1)
    sums = []
    for side in (wrong, ~wrong):
        cells = [
            sparse.csr_array((each[side], (problem[side], group[side])), shape=shape) for each in (values, np.ones(len(values)))
        ]
        sums.append([every @ each for each in cells])
    (bad, n_bad), (good, n_good) = sums
    weight = n_bad * n_good / np.maximum(n_bad + n_good, 1)
    difference = bad / np.maximum(n_bad, 1) - good / np.maximum(n_good, 1)
    total = weight.sum(axis=1)
    return (weight * difference).sum(axis=1) / np.where(total > 0, total, np.nan)


def _sentences(table: pd.DataFrame) -> Iterator[str]:
    """The surest row of each measure."""
    for name, rows in table.groupby("measure", sort=False):
        row = surest_first(rows).iloc[0]
        at = "" if pd.isna(row["layer"]) else f" (layer {row['layer']})"
        yield f"{name}{at} {row['effect']:+.2f}"


def _finding(table: pd.DataFrame) -> Finding:
    routed = table[table["layer"].notna()]
    routed = routed.assign(q=stats.benjamini_hochberg(routed["p"].to_numpy()))
    row, found = surest_first(routed).iloc[0], int((routed["q"] < DISCOVERY).sum())
    verdict = judge_cells(routed, least=LEAST_EFFECT)
    return Finding(
        sentence=(
            f"{int(row['wrong'])} first wrong steps were set beside {int(row['right']):,} right ones of the same number, "
            f"family, words, length and place, each less the steps before it: {found} of {len(routed)} measures of routing "
            f"differ (q below 0.05). The surest of each, in standard deviations: {', '.join(_sentences(table))}. The surest of "
            f"all is {row['measure']} in layer {row['layer']}, {row['effect']:+.2f} "
            f"({interval_text(row['ci_low'], row['ci_high'], '+.2f')}; {row['raw']:+.2f} with words and length in it)."
        ),
        verdict=verdict,
        rung=3 if verdict is Verdict.SUPPORTED else 0,
        effect=float(row["effect"]),
        unit="standard deviations of right steps",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
        token_effect=float(row["raw"] - row["effect"]),
    )


FIRST_WRONG_STEP = Analysis(
    function=first_wrong_step,
    question="Is a first wrong step routed otherwise than right steps?",
    claim="Routing departs from the steps before it in first wrong steps as it does not in right ones like them.",
    method=(
        "Means over a step of how sure, spread, unusual and changed its routing is, less those of the same words and of the "
        "steps before it, beside right steps of the same family, number, length and place. Null: which of the problems right "
        "so far goes wrong at a step (exact moments); p corrected over measures and layers (Benjamini-Hochberg); intervals "
        "from a bootstrap over problems."
    ),
    order=surest_first,
    finding=_finding,
)
