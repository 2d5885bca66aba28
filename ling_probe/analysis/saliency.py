"""How much each expert adds when it is chosen, and how few experts add most of what a layer adds.

Saliency is the mean norm of weight times output over the tokens that chose the expert (REAP, arXiv 2510.13999). A large norm is
much written, not much achieved: what is written may cancel, or matter to nothing.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float64
from scipy.stats import rankdata

from ling_probe import stats
from ling_probe.analysis.contributions import bundled, layer_batches, require_extra, sums_by_bundle
from ling_probe.analysis.question import Analysis, Finding, Verdict, judge, percent
from ling_probe.run import Run

LEAST_CORRELATION = 0.2
"""Rank correlation with the load below which the two have nothing to do with each other."""


def expert_saliency(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean contribution of every expert over the tokens that chose it, beside its load.

    One row a layer and expert: `count` choices, `load` their share, `saliency` the mean norm of its contribution (in units of
    the residual stream) with `ci_low` and `ci_high` its 95 % bootstrap interval over bundles of sequences, `total` their sum,
    `share` of the layer's total, `rank` by saliency and `load_rank` in the layer (1 is the highest). The same for a layer:
    `experts_50` and `experts_90`, the fewest experts that add half and nine tenths of the total. The same for all rows:
    `correlation` of the ranks (Spearman, mean over layers) with `correlation_low` and `correlation_high`. Experts that were
    never chosen have no saliency.

    Args:
        run: A run captured with --keep contribution.
        draws: Bootstrap samples.
        seed: Of the bundles and samples.

    Raises:
        UsageError: The contributions were not kept.
    """
    require_extra(run, "contribution", "contribution")
    bundle, n_bundles = bundled(run, seed)
    weights = stats.bootstrap_weights(n_bundles, draws=draws, seed=seed)
    tables, correlations = [], np.zeros(draws + 1)
    for layer in run.spec.routed_layers:
        shape = (n_bundles, run.spec.n_experts)
        count, total = np.zeros(shape), np.zeros(shape)
        for batch, norms in layer_batches(run, layer, ["contribution"]):
            owner = bundle[batch.sequence]
            count += sums_by_bundle(owner, batch.expert_ids[:, 0], np.ones_like(norms), shape)
            total += sums_by_bundle(owner, batch.expert_ids[:, 0], norms, shape)
        counts, totals = (np.concatenate([side.sum(axis=0)[None], weights @ side]) for side in (count, total))
        means = np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)
        correlations += _rank_correlation(means, counts) / len(run.spec.routed_layers)
        tables.append(_layer_table(means, counts[0], totals[0]).assign(layer=layer))
    low, high = stats.percentile_interval(correlations[1:])
    table = pd.concat(tables, ignore_index=True)
    table = table.assign(correlation=correlations[0], correlation_low=float(low), correlation_high=float(high), seed=seed)
    return table[["layer", *(name for name in table.columns if name != "layer")]]


def _layer_table(
    means: Float64[np.ndarray, "B E"], count: Float64[np.ndarray, " E"], total: Float64[np.ndarray, " E"]
) -> pd.DataFrame:
    used = ~np.isnan(means[0])
    low, high = np.full((2, len(used)), np.nan)
    low[used], high[used] = np.nanquantile(means[1:, used], [0.025, 0.975], axis=0)
    carried = np.cumsum(np.sort(total)[::-1]) / max(total.sum(), 1e-12)
    return pd.DataFrame(
        {
            "expert": np.arange(len(count)),
            "count": count.astype(np.int64),
            "load": count / max(count.sum(), 1.0),
            "saliency": means[0],
            "ci_low": low,
            "ci_high": high,
            "total": total,
            "share": total / max(total.sum(), 1e-12),
            "rank": _rank(means[0]),
            "load_rank": _rank(count),
            "experts_50": int(np.searchsorted(carried, 0.5 - 1e-9)) + 1,
            "experts_90": int(np.searchsorted(carried, 0.9 - 1e-9)) + 1,
        }
    )


def _rank(values: Float64[np.ndarray, " E"]) -> Float64[np.ndarray, " E"]:
    return rankdata(-values, nan_policy="omit", method="min")


def _rank_correlation(one: Float64[np.ndarray, "B E"], two: Float64[np.ndarray, "B E"]) -> Float64[np.ndarray, " B"]:
    """Spearman's, row by row, over the experts that every row used; 0 where there is nothing to rank."""
    used = ~np.isnan(one).any(axis=0)
    ranks = [rankdata(side[:, used], axis=1) for side in (one, two)]
    first, second = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    spread = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.divide((first * second).sum(axis=1), spread, out=np.zeros(len(one)), where=spread > 0)


def most_salient_first(table: pd.DataFrame) -> pd.DataFrame:
    """By the mean contribution."""
    return table.sort_values("saliency", ascending=False, kind="stable")


def _finding(table: pd.DataFrame) -> Finding:
    row, layers = most_salient_first(table).iloc[0], table.drop_duplicates("layer")
    n_experts, effect = table["expert"].nunique(), float(row["correlation"])
    most, least = (layers.iloc[int(place(layers["experts_50"]))] for place in (np.argmin, np.argmax))
    low, high = float(row["correlation_low"]), float(row["correlation_high"])
    return Finding(
        sentence=(
            f"Expert {row['expert']:.0f} of layer {row['layer']:.0f} adds most when it is chosen, a mean norm of "
            f"{row['saliency']:.3g} (95 % interval {row['ci_low']:.3g} to {row['ci_high']:.3g}; {percent(row['load'])} of the "
            f"load, {percent(row['share'])} of what its layer adds). Half of what a layer adds comes from "
            f"{most['experts_50']:.0f} of {n_experts} experts in layer {most['layer']:.0f} and {least['experts_50']:.0f} in "
            f"layer {least['layer']:.0f}; nine tenths from {layers['experts_90'].min()} to {layers['experts_90'].max()}. "
            f"Saliency and load correlate by {effect:.2f} ({low:.2f} to {high:.2f}; Spearman, mean over layers)."
        ),
        verdict=_verdict(low, high),
        rung=1 if _verdict(low, high) is Verdict.SUPPORTED else 0,
        effect=effect,
        unit="rank correlation",
        ci_low=low,
        ci_high=high,
    )


def _verdict(low: float, high: float) -> Verdict:
    """A correlation that is surely small is none worth having, whatever its sign."""
    if max(-low, high) < LEAST_CORRELATION:
        return Verdict.NOT_SUPPORTED
    return judge(low, high, least=LEAST_CORRELATION)


EXPERT_SALIENCY = Analysis(
    function=expert_saliency,
    question="How much does each expert add when it is chosen?",
    claim="How much an expert adds when it is chosen goes with how often it is chosen.",
    method=(
        "Mean norm of weight times output over the tokens that chose it (REAP), prompts too; intervals from a bootstrap over "
        "bundles of sequences; rank correlation with the load, mean over layers."
    ),
    order=most_salient_first,
    finding=_finding,
)
