"""Whether steps need the experts they prefer: what a causal study of this run's model found (`ling-probe intervene`)."""

import pandas as pd

from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, judge_cells
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.run.folder import CAUSAL_EFFECTS

LEAST_EFFECT = 0.05
"""Nats a token below which an effect beyond matched experts is not worth having."""
TRANSPLANT = "route_as"


def causal_effects(run: Run) -> pd.DataFrame:
    """Effects of changed experts on each kind of step, beside those of matched experts of the same layers and like load.

    One row a label, kind of change, dose and measure, as `causal.intervene` documents them. `effect`, `control` and `excess`
    are rises of the loss in nats a token, and of the measures solved and steps_right changes of a share in what the model
    writes itself; `excess_low` and `excess_high` the 95 % interval of the excess over problems.

    Raises:
        UsageError: The run's folder holds no causal study.
    """
    path = run.folder / CAUSAL_EFFECTS
    if not path.is_file():
        raise UsageError("no causal study in this run; make one with ling-probe intervene MODEL BENCHMARK --run RUN")
    return pd.read_parquet(path)


def deciding(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that decide: of changed experts the selectivity, of transplants the loss in the step itself."""
    transplant = table["kind"] == TRANSPLANT
    return table[((table["measure"] == "own") & transplant) | ((table["measure"] == "selectivity") & ~transplant)]


def _deciding_first(table: pd.DataFrame) -> pd.DataFrame:
    first = deciding(table).sort_values("excess_low", ascending=False, kind="stable")
    return pd.concat([first, table.drop(first.index)])


def _finding(table: pd.DataFrame) -> Finding:
    rows = deciding(table).assign(ci_low=lambda rows: rows["excess_low"], ci_high=lambda rows: rows["excess_high"])
    found = rows[(rows["q"] < DISCOVERY) & (rows["ci_low"] > 0)]
    best = (rows if found.empty else found).nlargest(1, "excess_low").iloc[0]
    what = (
        f"giving {best['label']} steps the experts that the same tokens chose in other steps, not in steps of their kind, by "
        "the loss in these steps"
        if best["kind"] == TRANSPLANT
        else f"the change ({best['kind']}, dose {best['dose']:g}) of the experts that {best['label']} steps prefer, by its "
        "selectivity"
    )
    return Finding(
        sentence=(
            f"{len(found)} of {len(rows)} changes harm their own steps, beyond what the same change to matched experts does (q "
            "below 0.05; by selectivity, the rise of the loss in these steps minus that in the others of the same problems). "
            f"The surest: {what}, {best['excess']:.3f} nats a token (95 % interval {best['excess_low']:.3f} to "
            f"{best['excess_high']:.3f}).{_dose_response(rows, best)}{_solved(table, best)}"
        ),
        verdict=judge_cells(rows.assign(q=rows["q"].where(rows["ci_low"] > 0, 1.0)), least=LEAST_EFFECT),
        rung=5 if len(found) else 1,
        effect=float(best["excess"]),
        unit="nats a token",
        ci_low=float(best["excess_low"]),
        ci_high=float(best["excess_high"]),
        q=float(best["q"]),
    )


def _dose_response(rows: pd.DataFrame, best: pd.Series) -> str:
    """How the excess goes with the dose, where there are several."""
    like = rows[(rows["label"] == best["label"]) & (rows["kind"] == best["kind"])].sort_values("dose")
    if len(like) < 2:
        return ""
    doses = ", ".join(f"{row.dose:g}: {row.excess:.3f}" for row in like.itertuples())
    return f" By dose, {doses}."


def _solved(table: pd.DataFrame, best: pd.Series) -> str:
    """What becomes of the answers that the model writes itself under the same change."""
    same = (table["label"] == best["label"]) & (table["kind"] == best["kind"]) & (table["dose"] == best["dose"])
    rows = table[same & (table["measure"] == "solved")]
    return "".join(
        f" Where the model writes the solution itself ({row.problems:g} problems), the share of right answers changes by "
        f"{100 * row.effect:.1f} points (95 % interval {100 * row.ci_low:.1f} to {100 * row.ci_high:.1f}; exact p "
        f"{row.p_unchanged:.2g}), and under {row.draws:g} matched changes by {100 * row.control:.1f}."
        for row in rows.itertuples()
    )


CAUSAL_EFFECTS_OF_ROUTING = Analysis(
    function=causal_effects,
    question="Do steps need the experts they prefer?",
    claim="What is routed in a kind of step matters for that step more than the same change to like experts.",
    method=(
        "Rise of the loss on given solutions under the change, in steps of the label minus in other steps of the same "
        "problems, less that of the same change to experts of the same layers and like load; p is the rank among such draws. "
        "For transplants: the loss with experts that the same tokens chose in other steps minus in steps of their kind, p from "
        "sign flips by problem. Corrected by Benjamini-Hochberg; intervals from a bootstrap over problems."
    ),
    order=_deciding_first,
    finding=_finding,
)
