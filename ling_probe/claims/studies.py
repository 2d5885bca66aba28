"""From a study of the model, or of its configuration, to a part of a claim."""

from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float64

from ling_probe.analysis.causal_effects import LEAST_EFFECT, deciding
from ling_probe.analysis.question import DISCOVERY, judge_gain, percent
from ling_probe.claims.claim import WEAKEST_FIRST, ClaimVerdict, Part
from ling_probe.claims.evidence import RETESTED
from ling_probe.claims.parts import Asked, Judged, found, judge_below
from ling_probe.run import Run

LEAST_LOSS = 0.01
"""Part of the model's own loss below which a change of the loss is nothing."""
LEAST_EXCESS = 0.01
"""Nats a token that a change must surely cost a step beyond matched experts."""
LEAST_GAIN = 0.02
"""Share of answers by which an adaptation must help for it to be worth having."""


def doubled_experts(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """FLOPs a token with twice the experts over those as it is, beside the parameters; from `cost`."""
    once, twice = (table[table["experts"] == n].iloc[0] for n in (run.spec.n_experts, 2 * run.spec.n_experts))
    flops, parameters = (float(twice[name] / once[name]) for name in ("flops", "parameters"))
    routers = 2 * run.spec.d_model * run.spec.n_experts * run.spec.n_rows
    exact = int(twice["flops"] - once["flops"]) == routers
    return asked.answered(
        ClaimVerdict.HOLDS if exact and flops < parameters else ClaimVerdict.FAILS,
        f"With {2 * run.spec.n_experts} experts for {run.spec.n_experts} a layer the model has {parameters:.2f} times the "
        f"parameters and {flops:.4f} times the FLOPs a token ({int(once['flops']):,} to {int(twice['flops']):,}, counted): "
        f"the routers' rows alone, 2·D·E·M = {routers:,}.",
        effect=flops - 1, unit="share of FLOPs a token added by doubling the experts", rung=0, n=1, n_of="configurations",
    )  # fmt: skip


def same_loss(condition: str, *, named: str, harm_alone: bool = False) -> Judged:
    """Rise of the loss under a condition, which must be nothing; or, `harm_alone`, must not be a fall.

    What is left out may have been of use: the claim that it costs nothing is refuted only where the loss falls without it.
    """

    def judged(asked: Asked, table: pd.DataFrame, _run: Run) -> Part:
        rows = overall(table)
        if condition not in set(rows["condition"]):
            return asked.untested(f"the study has no condition {condition}; {RETESTED}")
        row, least = rows[rows["condition"] == condition].iloc[0], _least_loss(rows)
        low, high = float(row["increase_low"]), float(row["increase_high"])
        sides = [judge_below(-high, -low, least), *([] if harm_alone else [judge_below(low, high, least)])]
        return asked.answered(
            min(sides, key=WEAKEST_FIRST.index),
            f"{named} changes the loss on {row['problems']:,} given solutions by {row['loss_increase']:+.4g} nats a token (95 "
            "% "
            f"interval {low:+.4g} to {high:+.4g}); less than {least:.2g}, a hundredth of it, is nothing.",
            effect=row["loss_increase"], unit="nats a token", ci_low=low, ci_high=high, rung=1, n=int(row["problems"]),
        )  # fmt: skip

    return judged


def _least_loss(rows: pd.DataFrame) -> float:
    return LEAST_LOSS * float(rows.loc[rows["condition"] == "true", "loss"].iloc[0])


def worth_having(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """As the causal study finds; an excess that is sure but next to nothing is not enough."""
    part = found(asked, table, run)
    rows = deciding(table)
    sure = rows[(rows["q"] < DISCOVERY) & (rows["excess_low"] > LEAST_EXCESS)]
    small = (rows["excess_high"] < LEAST_EFFECT).mean() >= 0.95
    verdict = ClaimVerdict.HOLDS if len(sure) else ClaimVerdict.FAILS if small else ClaimVerdict.CANNOT_TELL
    reason = (
        f"{len(sure)} of {len(rows)} changes have an excess that surely reaches {LEAST_EXCESS:g} nats a token. {part.reason}"
    )
    return replace(part, verdict=verdict, reason=reason, rung=5 if len(sure) else 1)


def every_slot(asked: Asked, table: pd.DataFrame, _run: Run) -> Part:
    """Rise of the loss without the expert of each rank of weight; the rank with the weakest verdict decides."""
    rows = overall(table)
    slots = rows[rows["condition"].str.startswith("without rank ")]
    if slots.empty:
        return asked.untested(f"the study left no slot out; {RETESTED}")
    least = _least_loss(rows)
    bounds = zip(slots["increase_low"], slots["increase_high"], strict=True)
    verdicts = [ClaimVerdict.of(judge_gain(low, high, least=least)) for low, high in bounds]
    weakest = min(
        range(len(slots)), key=lambda place: (WEAKEST_FIRST.index(verdicts[place]), slots["loss_increase"].iloc[place])
    )
    row = slots.iloc[weakest]
    low, high = float(row["increase_low"]), float(row["increase_high"])
    listed = ", ".join(f"{name.rsplit(' ', 1)[1]}: {rise:+.4g}" for name, rise in zip(
        slots["condition"], slots["loss_increase"], strict=True
    ))  # fmt: skip
    return asked.answered(
        verdicts[weakest],
        f"Without the expert of one rank of weight, everywhere, the loss changes in nats a token by {listed}. It turns on "
        f"{row['condition'].removeprefix('without ')} (95 % interval {low:+.4g} to {high:+.4g}).",
        effect=row["loss_increase"], unit="nats a token, weakest rank", ci_low=low, ci_high=high, rung=1,
        n=int(row["problems"]),
    )  # fmt: skip


def fewer_experts(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """Rise of the loss with K - 1 experts, and the best of all numbers tried; shown, decides nothing."""
    rows = overall(table)
    sweep = rows[rows["condition"].str.startswith("k=")].assign(k=lambda rows: rows["condition"].str[2:].astype(int))
    fewer = sweep[sweep["k"] == run.spec.top_k - 1]
    if fewer.empty:
        return asked.untested(f"the study did not try fewer experts; {RETESTED}")
    row, best = fewer.iloc[0], sweep.iloc[int(np.argmin(sweep["loss"]))]
    low, high = float(row["increase_low"]), float(row["increase_high"])
    return asked.answered(
        judge_below(low, high, _least_loss(rows)),
        f"With {row['k']} experts for {run.spec.top_k} the loss changes by {row['loss_increase']:+.4g} nats a token (95 % "
        "interval "
        f"{low:+.4g} to {high:+.4g}); of {len(sweep)} numbers tried {best['k']} has the lowest loss ({best['loss']:.4g}).",
        effect=row["loss_increase"], unit="nats a token", ci_low=low, ci_high=high, rung=1, n=int(row["problems"]),
    )  # fmt: skip


def busiest_excluded(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """Rise of the loss without each layer's busiest experts, beside that without as many others."""
    rows = overall(table)
    busiest, others = (rows[rows["condition"].str.startswith(name)] for name in ("without busiest", "without others"))
    if busiest.empty or others.empty:
        return asked.untested(f"the study excluded no experts; {RETESTED}")
    row, mean = busiest.iloc[0], float(others["loss_increase"].mean())
    low, high = float(row["increase_low"]) - mean, float(row["increase_high"]) - mean
    return asked.answered(
        judge_below(low, high, _least_loss(rows)),
        f"Without the {run.spec.top_k} busiest experts of every layer the loss rises by {row['loss_increase']:.4g} nats a "
        f"token, without as many others by {mean:.4g} (mean of {len(others)} draws, {others['loss_increase'].min():.4g} to "
        f"{others['loss_increase'].max():.4g}).",
        effect=float(row["loss_increase"]) - mean, unit="nats a token beyond other experts", ci_low=low, ci_high=high, rung=1,
        n=int(row["problems"]),
    )  # fmt: skip


def adapted_answers(asked: Asked, table: pd.DataFrame, _run: Run) -> Part:
    """Share of right answers on the task adapted to, after less before."""
    if (tuned := table["tuned"].iloc[0]) != "router":
        return asked.untested(f"this adaptation tuned {tuned}, not the router alone; adapt with --tune router")
    task, before, after, low, high = _before_and_after(table)[0]
    return asked.answered(
        ClaimVerdict.of(judge_gain(low, high, least=LEAST_GAIN)),
        f"On {task} the answers right went from {percent(before)} to {percent(after)}, {100 * (after - before):+.1f} points "
        "(95 % "
        f"interval {100 * low:+.1f} to {100 * high:+.1f}, as of two samples), by the routers alone.",
        effect=after - before, unit="share of answers right", ci_low=low, ci_high=high, rung=4,
        n=int(table["problems"].iloc[0]),
    )  # fmt: skip


def other_tasks_kept(asked: Asked, table: pd.DataFrame, _run: Run) -> Part:
    """The task that lost most answers, of those not adapted to."""
    others = _before_and_after(table)[1:]
    if not others:
        return asked.untested("no other task was judged; adapt with --judge")
    task, before, after, low, high = min(others, key=lambda each: each[2] - each[1])
    return asked.answered(
        judge_below(-high, -low, LEAST_GAIN),
        f"Of {len(others)} tasks it was not adapted to, {task} changed for the worse most: {percent(before)} to "
        f"{percent(after)}, "
        f"{100 * (after - before):+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}).",
        effect=after - before, unit="share of answers right", ci_low=low, ci_high=high, rung=1,
        n=int(table.loc[table["task"] == task, "problems"].iloc[0]),
    )  # fmt: skip


def overall(table: pd.DataFrame) -> pd.DataFrame:
    """Rows over all problems: those of "all", or of the one family there is."""
    return table[table["family"] == "all"] if (table["family"] == "all").any() else table


def newcombe_interval(one: Float64[np.ndarray, "3"], other: Float64[np.ndarray, "3"]) -> tuple[float, float]:
    """Interval of the second share less the first, from each with its Wilson bounds (Newcombe 1998, method 10)."""
    (p, low, high), (q, q_low, q_high) = one, other
    below, above = np.hypot(q - q_low, high - p), np.hypot(q_high - q, p - low)
    return float(q - p - below), float(q - p + above)


def _before_and_after(table: pd.DataFrame) -> list[tuple[str, float, float, float, float]]:
    """Of each task in turn: its name, both shares, and the interval of their difference."""
    found = []
    for task, rows in table.groupby("task", sort=False):
        sides = [rows[rows["when"] == when][["share", "ci_low", "ci_high"]] for when in ("before", "after")]
        if all(len(side) == 1 for side in sides):
            one, other = (side.iloc[0].to_numpy(dtype=float) for side in sides)
            found.append((str(task), float(one[0]), float(other[0]), *newcombe_interval(one, other)))
    return found
