"""What the bias does to each expert: whom it brings in, whom it keeps out, and whether it works against affinity."""

import numpy as np
import pandas as pd
from jaxtyping import Float64
from scipy import sparse
from scipy import stats as distributions

from ling_probe import metrics, routing, stats
from ling_probe.analysis.bundled import Bundles
from ling_probe.analysis.question import Analysis, Finding, judge, layer_means, percent
from ling_probe.analysis.router import RouterBatch, router_batches, router_bias
from ling_probe.run import Run

BLOCKS = 20
"""Blocks of sequences that a jackknife leaves out in turn."""
MEASURES = ("tokens", "affinity", "chosen", "by_bias", "by_groups", "kept_out", "stepped_aside")


def expert_reasons(run: Run, *, seed: int = 0) -> pd.DataFrame:
    """How often each expert owes being chosen, or not being chosen, to the bias and to the group limit.

    One row a layer and expert: its `bias`, `affinity` (mean score over all tokens), `count` of tokens that chose it, `load`
    over the even share, `by_bias` and `by_groups` (the share of its choices that need the bias, or the group limit),
    `ci_low` and `ci_high` the 95 % interval of `by_bias`; `kept_out` and `stepped_aside` are the tokens that would choose it
    without the bias, or without the group limit, and do not, for each that does. Of the layer: `rank_correlation` of bias and
    affinity over its experts (Spearman), with its interval `rank_low` to `rank_high`. Intervals are a jackknife over blocks
    of sequences. Tokens whose stored logits give another choice than the recorded one are left out.

    Args:
        run: A run captured with `--keep logits`.
        seed: Of how sequences are dealt to blocks.

    Raises:
        UsageError: The run kept no logits, or its routing was changed.
    """
    block_of, biases = Bundles.of(run, most=BLOCKS, seed=seed).of_sequence, router_bias(run)
    tables = []
    for layer, bias in biases.items():
        blocks = np.zeros((int(block_of.max()) + 1, len(MEASURES), run.spec.n_experts))
        for batch in router_batches(run, layer, bias):
            block = block_of[batch.tokens.sequence]
            rows = sparse.csr_array((batch.agrees.astype(float), (block, np.arange(len(block)))), (len(blocks), len(block)))
            blocks += np.stack([rows @ values for values in _measures(batch)], axis=1)
        tables.append(_layer_table(blocks, bias).assign(layer=layer))
    table = pd.concat(tables, ignore_index=True).assign(seed=seed)
    return table[["layer", *table.columns.drop("layer")]]


def _measures(batch: RouterBatch) -> list[Float64[np.ndarray, "N E"]]:
    without_bias = routing.chosen(batch.scores, batch.spec)
    without_groups = routing.chosen(batch.choice, routing.ungrouped(batch.spec))
    here = batch.recorded
    flags = (here & ~without_bias, here & ~without_groups, without_bias & ~here, without_groups & ~here)
    return [np.ones(batch.scores.shape), batch.scores, here.astype(float), *(flag.astype(float) for flag in flags)]


def _layer_table(blocks: Float64[np.ndarray, "J P E"], bias: Float64[np.ndarray, " E"]) -> pd.DataFrame:
    total = blocks.sum(axis=0)
    left_out = total - blocks
    low, high, _ = stats.jackknife_interval(_by_bias(total), _by_bias(left_out))
    rank = _rank_correlation(bias, total)
    ranks = np.array([_rank_correlation(bias, each) for each in left_out])
    rank_low, rank_high, _ = stats.jackknife_interval(np.array(rank), ranks)
    if len(ranks) > 1 and np.ptp(ranks) == 0:
        rank_low = rank_high = np.array(rank)  # The order is the same whatever is left out.
    _, _, count, _, groups, kept_out, aside = total
    often = np.where(count > 0, count, np.nan)
    return pd.DataFrame(
        {
            "expert": np.arange(len(bias)),
            "bias": bias,
            "affinity": _affinity(total),
            "count": count.astype(np.int64),
            "load": metrics.load_share(count) * len(bias),
            "by_bias": _by_bias(total),
            "ci_low": np.maximum(low, 0.0),
            "ci_high": np.minimum(high, 1.0),
            "by_groups": groups / often,
            "kept_out": kept_out / often,
            "stepped_aside": aside / often,
            "rank_correlation": rank,
            "rank_low": float(rank_low),
            "rank_high": float(rank_high),
        }
    )


def _affinity(total: Float64[np.ndarray, "P E"]) -> Float64[np.ndarray, " E"]:
    return total[1] / np.maximum(total[0], 1.0)


def _rank_correlation(bias: Float64[np.ndarray, " E"], total: Float64[np.ndarray, "P E"]) -> float:
    """NaN where all biases are one."""
    if np.ptp(bias) == 0 or np.ptp(_affinity(total)) == 0:
        return float("nan")
    return float(distributions.spearmanr(bias, _affinity(total)).statistic)


def _by_bias(total: Float64[np.ndarray, "*rows P E"]) -> Float64[np.ndarray, "*rows E"]:
    chosen = total[..., 2, :]
    return total[..., 3, :] / np.where(chosen > 0, chosen, np.nan)


def most_by_bias_first(table: pd.DataFrame) -> pd.DataFrame:
    """By the share of choices that need the bias; experts that are never chosen last."""
    return table.iloc[np.argsort(-table["by_bias"].fillna(-1).to_numpy(), kind="stable")]


LEAST_CORRELATION = 0.2
"""Rank correlation below which bias and affinity are as good as unrelated."""


def _finding(table: pd.DataFrame) -> Finding:
    top, layers = most_by_bias_first(table).iloc[0], table.groupby("layer", sort=False).first()
    low, rank, high = layer_means(layers, "rank_low", "rank_correlation", "rank_high")
    against = int((layers["rank_high"] < 0).sum())
    return Finding(
        sentence=(
            f"The bias is higher where affinity is lower in {against} of {len(layers)} layers (mean rank correlation "
            f"{rank:.2f}, 95 % interval {low:.2f} to {high:.2f}). Layer {top['layer']:.0f}, expert {top['expert']:.0f} owes "
            f"the bias most: {percent(top['by_bias'])} of its {top['count']:,.0f} choices would not be made without it."
        ),
        verdict=judge(low, high, least=LEAST_CORRELATION),
        rung=1,
        effect=rank,
        unit="rank correlation",
        ci_low=low,
        ci_high=high,
    )


EXPERT_REASONS = Analysis(
    function=expert_reasons,
    question="Which experts owe their work to the bias?",
    claim="The bias of an expert and its affinity to the tokens are related.",
    method=(
        "Recorded choices that the rule would not make without the bias, by expert; rank correlation of bias and mean score "
        "over the experts of a layer; intervals from a jackknife over blocks of sequences, averaged over layers."
    ),
    order=most_by_bias_first,
    finding=_finding,
)
