"""Why the router chose the experts it chose: their affinity to the token, the bias, or the group limit.

An expert's choice is decided by what it would not have been chosen without (`routing.reasons`): the bias that balances the
load, the limit to the best groups, both, or neither, its affinity then. What is counted are the recorded choices; the two
that they are held against are as exact as logits in 16 bits.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float64

from ling_probe import routing
from ling_probe.analysis.bundled import Cells
from ling_probe.analysis.question import Analysis, Finding, Verdict, judge_above, layer_means, overall_first, percent
from ling_probe.analysis.router import RouterBatch, router_batches, router_bias
from ling_probe.run import Run

REASONS = tuple(reason.name.lower() for reason in routing.Reason)


def choice_reasons(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """What share of the choices is decided by affinity, bias and groups, in each layer, family and kind of step.

    One row a layer, class of tokens (`kind` "all", "family" or "label", and its `name`) and `reason`: its `share` of the
    choices, the four of a class summing to 1, with the 95 % interval (`ci_low`, `ci_high`) of a bootstrap over bundles of
    sequences, and its `weight_share` of the routing weight; `tokens` and `sequences` counted. The reasons:

        affinity  neither bias nor groups are needed
        bias      without the bias the expert is not chosen, without the group limit it is
        groups    without the group limit it is not chosen, without the bias it is
        both      it is chosen without neither

    `best_scores` is the share of the chosen that are among the K best scores of all, `left_out` the share of tokens not
    counted, whose stored logits give another choice than the recorded one (near ties, in 16 bits).

    Args:
        run: A run captured with `--keep logits`.
        draws: Bootstrap samples.
        seed: Of the bootstrap, and of how sequences are dealt to bundles.

    Raises:
        UsageError: The run kept no logits, or its routing was changed.
    """
    cells, bias = Cells.of(run, seed=seed), router_bias(run)
    tables = [_layer_reasons(run, layer, bias[layer], cells, draws, seed) for layer in run.spec.routed_layers]
    return pd.concat(tables, ignore_index=True).assign(seed=seed)


def _layer_reasons(run: Run, layer: int, bias: Float64[np.ndarray, " E"], cells: Cells, draws: int, seed: int) -> pd.DataFrame:
    counted, every = cells.zeros(2 * len(REASONS) + 1), cells.zeros(1)
    for batch in router_batches(run, layer, bias):
        counted += cells.totals(batch.tokens, _shares(batch), batch.agrees)
        every += cells.totals(batch.tokens, ~batch.agrees[:, None])
    means = cells.means(counted, draws=draws, seed=seed)
    left_out = cells.means(every, draws=1, seed=seed).table(0)[["kind", "name", "value"]]
    rows = [means.table(place).assign(reason=reason) for place, reason in enumerate(REASONS)]
    table = pd.concat(rows, ignore_index=True).rename(columns={"value": "share"})
    table["weight_share"] = means.value[:, len(REASONS) : -1].T.ravel()
    table["best_scores"] = np.tile(means.value[:, -1], len(REASONS))
    table = table.merge(left_out.rename(columns={"value": "left_out"}), on=["kind", "name"], how="left").assign(layer=layer)
    table = table.sort_values(["kind", "name"], kind="stable", ignore_index=True)
    front = ["layer", "kind", "name", "reason", "share", "ci_low", "ci_high", "weight_share", "best_scores", "left_out"]
    return table[[*front, "tokens", "sequences"]]


def _shares(batch: RouterBatch) -> Float64[np.ndarray, "N P"]:
    """Of each token: the share of its experts and of its weight by reason, and the share that are among its K best scores."""
    assert batch.tokens.weights is not None
    why = routing.reasons(batch.ids, batch.scores, batch.bias, batch.spec)
    weight = batch.tokens.weights[:, 0] / batch.tokens.weights[:, 0].sum(axis=-1, keepdims=True)
    shares = [(why == reason).mean(axis=-1) for reason in routing.Reason]
    weights = [((why == reason) * weight).sum(axis=-1) for reason in routing.Reason]
    best = routing.chosen(batch.scores, routing.ungrouped(batch.spec))
    return np.column_stack([*shares, *weights, (best & batch.recorded).sum(axis=-1) / batch.spec.top_k])


MOST_LEFT_OUT = 0.05
"""Share of tokens left out above which the rest is not taken for the whole."""


def _finding(table: pd.DataFrame) -> Finding:
    whole = table[table["kind"] == "all"]
    shares = {reason: whole[whole["reason"] == reason] for reason in REASONS}
    mean = {reason: float(rows["share"].mean()) for reason, rows in shares.items()}
    affinity = shares["affinity"]
    low, high, left_out, weight, best = layer_means(affinity, "ci_low", "ci_high", "left_out", "weight_share", "best_scores")
    least = affinity.iloc[int(np.argmin(affinity["share"]))]
    return Finding(
        sentence=(
            f"{percent(mean['affinity'])} of choices follow affinity alone (95 % interval {percent(low)} to {percent(high)}) "
            f"and carry {percent(weight)} of the weight; {percent(mean['bias'])} are decided by the bias, "
            f"{percent(mean['groups'])} by the group limit and {percent(mean['both'])} by both. Fewest follow affinity in "
            f"layer {least['layer']} ({percent(least['share'])}). The best scores alone would name {percent(best)} of the "
            f"chosen experts. {percent(left_out)} of tokens are left out: their logits, in 16 bits, give another choice."
        ),
        verdict=Verdict.CANNOT_TELL if left_out > MOST_LEFT_OUT else judge_above(low, high, than=0.5),
        rung=1,
        effect=mean["affinity"],
        unit="share of choices",
        ci_low=low,
        ci_high=high,
    )


CHOICE_REASONS = Analysis(
    function=choice_reasons,
    question="Why these experts: affinity, bias or groups?",
    claim="Most choices follow the router's affinity alone.",
    method=(
        "Each recorded choice against the rule without the bias, A(s, groups), and without the group limit, A(s + bias): an "
        "expert that is missing there owes its place to what was taken away. Intervals from a bootstrap over sequences; exact "
        "for the recorded logits, so there is no null."
    ),
    order=overall_first,
    finding=_finding,
)
