"""What steering through the routers' bias does: what trials of this run's steering vectors found (`ling-probe steer`)."""

import pandas as pd

from ling_probe import stats
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, judge_gain
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.run.folder import STEERING, STEERING_EFFECTS

LEAST_GAIN = 0.05
"""Share of answers below which a gain is not worth having; the method's paper reports up to .20."""
LEAST_LOSS = 0.05
"""The same of the loss, in nats a token, where no answers were written."""


def steering_effects(run: Run) -> pd.DataFrame:
    """Effects of steering vectors made of this run, beside those of vectors of the same values given to other experts.

    One row a vector (`toward`, `away`), strength and measure, as `steering.steer` documents them. `effect`, `control` and
    `excess` are changes: of the share of choices (moved), of the loss in nats a token (own, other, selectivity, answer), or of
    a share of what the model writes (solved, steps_right, steps_own). `q` and `q_unchanged` are corrected over all vectors.

    Raises:
        UsageError: No vector of the run was tried.
    """
    tables = [pd.read_parquet(path) for path in sorted((run.folder / STEERING).glob(f"*/{STEERING_EFFECTS}"))]
    if not tables:
        raise UsageError("no steering vector of this run was tried; try one with ling-probe steer MODEL BENCHMARK --run RUN")
    table = pd.concat(tables, ignore_index=True)
    for p, q in (("p", "q"), ("p_unchanged", "q_unchanged")):
        table[q] = table.groupby("measure")[p].transform(lambda some: stats.benjamini_hochberg(some.to_numpy(float)))
    return table


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that decide, with `gain`, `gain_low`, `gain_high` beyond drawn vectors and the `gain_q` of the effect itself.

    Solved problems where the model wrote, tested against the model as it is; else the loss that is saved in what is steered to,
    tested among drawn vectors.
    """
    solved = table[table["measure"] == "solved"]
    if len(solved):
        bounds = {"gain": "excess", "gain_low": "excess_low", "gain_high": "excess_high", "gain_q": "q_unchanged"}
        return solved.assign(**{name: solved[column] for name, column in bounds.items()}, least=LEAST_GAIN)
    own = table[table["measure"] == "own"]
    saved = {"gain": -own["excess"], "gain_low": -own["excess_high"], "gain_high": -own["excess_low"], "gain_q": own["q"]}
    return own.assign(**saved, least=LEAST_LOSS)


def _surest_first(table: pd.DataFrame) -> pd.DataFrame:
    first = gains(table).sort_values("gain_low", ascending=False, kind="stable")
    return pd.concat([table.loc[first.index], table.drop(first.index)])


def _finding(table: pd.DataFrame) -> Finding:
    rows = gains(table)
    found = rows[(rows["gain_q"] < DISCOVERY) & (rows["gain_low"] > 0)]
    best = (rows if found.empty else found).nlargest(1, "gain_low").iloc[0]
    worth = [judge_gain(low, high, least=best["least"]) for low, high in zip(rows["gain_low"], rows["gain_high"], strict=True)]
    small = all(verdict is Verdict.NOT_SUPPORTED for verdict in worth)
    verdict = Verdict.SUPPORTED if len(found) else Verdict.NOT_SUPPORTED if small else Verdict.CANNOT_TELL
    answers = best["measure"] == "solved"
    scale, unit = (100, "points of right answers") if answers else (1, "nats a token saved")
    low, high = scale * best["gain_low"], scale * best["gain_high"]
    return Finding(
        sentence=(
            f"{len(found)} of {len(rows)} vectors and strengths gain more than vectors of the same values given to other "
            f"experts of like load. The best, towards {best['toward']} and away from {best['away']} at strength "
            f"{best['strength']:g}, brings {scale * best['gain']:.2f} {unit} more than those do (95 % interval "
            f"{low:.2f} to {high:.2f}, {best['problems']} problems).{_before(best) if answers else ''}{_moved(table, best)}"
        ),
        verdict=verdict,
        rung=5 if len(found) else 1,
        effect=float(best["gain"]),
        unit="share of problems" if answers else "nats a token",
        ci_low=float(best["gain_low"]),
        ci_high=float(best["gain_high"]),
        q=float(best["gain_q"]),
    )


def _before(best: pd.Series) -> str:
    return (
        f" Against the model as it is the change is {100 * best['effect']:.2f} points (95 % interval "
        f"{100 * best['ci_low']:.2f} to {100 * best['ci_high']:.2f}, exact p {best['p_unchanged']:.2g})."
    )


def _moved(table: pd.DataFrame, best: pd.Series) -> str:
    same = (table["toward"] == best["toward"]) & (table["away"] == best["away"]) & (table["strength"] == best["strength"])
    rows = table[same & (table["measure"] == "moved")]
    return "".join(f" It moves {row.effect:.1%} of all choices, the others {row.control:.1%}." for row in rows.itertuples())


STEERING_EFFECTS_OF_VECTORS = Analysis(
    function=steering_effects,
    question="Can the model be steered through the bias of its routers?",
    claim="A vector of how two classes of text route, added to the choice scores, helps more than its values elsewhere do.",
    method=(
        "The vector is the difference of how often the same tokens choose an expert in two classes of text; times a strength "
        "it is added to the choice scores on held-out problems. Answers of greedy generation: change against the model as it "
        "is (McNemar, corrected by Benjamini-Hochberg), and the excess over vectors whose values are shuffled among experts of "
        "a layer and like load; without answers the loss, ranked among those. Intervals from a bootstrap over problems."
    ),
    order=_surest_first,
    finding=_finding,
)
