"""What routing is like in the first wrong step of a solution, set beside the right steps before it.

1. Measure every step (`step_measures`), less what the same words have in the same third of solutions of the family.
2. Fit on right steps how a measure changes along a solution and with the length of a step, inside problems, and take it out: the
   first wrong step always stands after those it is compared with.
3. Compare the first wrong step with the right steps before it in the same problem.

Null: any of these steps could have been the wrong one; exact moments of the permutation inside each problem.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer

from ling_probe import stats
from ling_probe.analysis.classified import Classified, classified_steps
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, judge_cells, surest_first
from ling_probe.analysis.sample import interval_text, numbered, resampled_interval
from ling_probe.analysis.step_measures import step_measures
from ling_probe.errors import UsageError
from ling_probe.run import Run

LEAST_PROBLEMS = 10
LEAST_EFFECT = 0.2
"""Standard deviations of right steps: a difference below it is small (Cohen)."""


def first_wrong_step(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How the first wrong step of a solution differs from the right steps before it, beyond words, place and length.

    One row a `measure` and layer (none for the loss): `effect` in standard deviations of right steps within their problems, above
    0 where the wrong step has more of it, with its 95 % bootstrap interval over problems (`ci_low`, `ci_high`); `p` two-sided,
    from exact moments of which step of a problem is the wrong one, `q` corrected over all rows (Benjamini-Hochberg); `raw` is
    the difference as measured, nothing taken out, in standard deviations of its own. `problems` with right steps before the
    first wrong one, which are `steps`. Measures: next-token `loss`; share of the weight at the heaviest expert (`top weight`);
    how seldom the same word chooses these experts (`surprise`); how seldom the step before did (`departure`); of runs with
    logits also `router entropy` and `router margin`.

    Args:
        run: A run whose steps are known to be right or wrong.
        draws: Bootstrap samples.
        seed: Of the samples.

    Raises:
        UsageError: Fewer than ten problems have right steps before a first wrong one.
    """
    judged = judged_steps(run)
    steps = classified_steps(run)
    measures = step_measures(run, steps)
    rows = []
    for column, (name, layer) in enumerate(measures.names):
        beyond = _without_trend(measures.beyond[:, column], judged, steps)
        compared = _compared(beyond, judged, draws, seed)
        if compared:
            raw = _compared(measures.raw[:, column], judged, 2, seed).get("effect", np.nan)
            rows.append({"measure": name, "layer": layer, **compared, "raw": raw})
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

    @property
    def compared(self) -> Bool[np.ndarray, " O"]:
        """First wrong steps with right ones before them, and these."""
        known = self.wrong | self.right
        return known & np.isin(self.problem, self.problem[self.wrong & (self.step > 0)])


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


def _without_trend(values: Float64[np.ndarray, " O"], judged: Judged, steps: Classified) -> Float64[np.ndarray, " O"]:
    """Values less their trend along solutions and with the length of steps, as right steps of the same problem have it."""
    place = judged.step / np.maximum(judged.n_steps - 1, 1)
    length = np.log(np.maximum(steps.n_tokens, 1))
    design = np.column_stack([judged.step == 0, judged.step, place, place**2, length, length**2]).astype(float)
    learnt = judged.right & np.isfinite(values)
    centred = _centred(np.column_stack([design, np.where(learnt, values, 0.0)]), judged.problem, learnt)
    slope = np.linalg.lstsq(centred[:, :-1], centred[:, -1], rcond=1e-8)[0]
    return values - design @ slope


def _centred(
    values: Float64[np.ndarray, "O n"], problem: Integer[np.ndarray, " O"], kept: Bool[np.ndarray, " O"]
) -> Float64[np.ndarray, "k n"]:
    """The rows kept, less the mean of their problem."""
    owner = numbered(problem[kept]) if kept.any() else problem[kept]
    count = np.maximum(np.bincount(owner), 1)
    means = np.column_stack([np.bincount(owner, weights=column) / count for column in values[kept].T])
    return values[kept] - means[owner]


def _compared(values: Float64[np.ndarray, " O"], judged: Judged, draws: int, seed: int) -> dict[str, float]:
    """First wrong steps beside the right ones before; nothing where fewer than `LEAST_PROBLEMS` have both."""
    known = judged.compared & np.isfinite(values)
    both = np.intersect1d(judged.problem[known & judged.wrong], judged.problem[known & judged.right])
    known &= np.isin(judged.problem, both)
    if len(both) < LEAST_PROBLEMS:
        return {}
    wrong, problem = judged.wrong[known], numbered(judged.problem[known])
    centred = _centred(values[:, None], judged.problem, known)[:, 0]
    before = np.bincount(problem[~wrong])
    spread = np.sqrt((_centred(values[:, None], judged.problem, known & judged.right) ** 2).sum() / max((before - 1).sum(), 1))
    if not spread > 0:
        return {}
    # A step less the mean of its k companions is (k + 1) / k times the step less the mean of all.
    deviation, weight = centred[wrong] / spread, before / (before + 1)
    weights = stats.bootstrap_weights(len(both), draws=draws, seed=seed)
    low, high = resampled_interval((weights @ deviation) / (weights @ weight), len(both))
    p = stats.shuffle_moments(values[known, None], wrong.astype(np.int64), blocks=problem).of(1).p()
    told = {"effect": deviation.sum() / weight.sum(), "ci_low": float(low), "ci_high": float(high), "p": float(p[0])}
    return {**told, "problems": len(both), "steps": int((~wrong).sum())}


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
            f"In {int(row['problems'])} problems the first wrong step was set beside the right ones before it, beyond words, "
            f"place and length: {found} of {len(routed)} measures of routing differ (q below 0.05). The surest of each, in "
            f"standard deviations: {', '.join(_sentences(table))}. The surest of all is {row['measure']} in layer "
            f"{row['layer']}, {row['effect']:+.2f} ({interval_text(row['ci_low'], row['ci_high'], '+.2f')}; {row['raw']:+.2f} with "
            "nothing taken out)."
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
    question="Is a first wrong step routed otherwise than the right steps before it?",
    claim="Routing in the first wrong step differs from the right steps before it, beyond words, place and length.",
    method=(
        "Means over a step of how sure, spread, unusual and changed its routing is, less those of the same words and the trend "
        "of right steps with place and length. Null: which step of a problem is the wrong one (exact moments); p corrected over "
        "measures and layers (Benjamini-Hochberg); intervals from a bootstrap over problems."
    ),
    order=surest_first,
    finding=_finding,
)
