"""Whether the expert that a token weighs most is the one that writes most.

The router weighs experts before they have computed anything. Two ranks are compared with its heaviest expert, slots by weight
and never by their stored order: that of the largest output norm, where chance is 1/K, and that of the largest contribution,
which the weight itself goes into: chance there is what the same weights make of outputs dealt anew among the token's experts.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float32, Float64

from ling_probe import stats
from ling_probe.analysis.contributions import LEAST_WEIGHT, bundled, layer_batches, require_extra
from ling_probe.analysis.question import Analysis, Finding, in_order, judge, percent
from ling_probe.run import Run

LEAST_EFFECT = 0.05
"""Share of tokens above chance below which the router's first choice says nothing about sizes."""
_NAMES = ("top_norm", "top_contribution", "dealt_contribution")


def norm_rank(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Share of tokens whose heaviest expert writes the largest output, and makes the largest contribution.

    One row a layer: `tokens`, `top_norm` (share whose heaviest expert has the
    largest output norm) with its 95 % bootstrap interval over bundles of sequences (`ci_low`, `ci_high`) and `chance` (1/K),
    `top_contribution` (share whose heaviest expert makes the largest contribution) and `dealt_contribution` (the same after
    dealing the token's outputs anew to its experts). The same for all rows: the `mean` of `top_norm` over layers with
    `mean_low` and `mean_high`. Tokens with a weight below `contributions.LEAST_WEIGHT` are left out.

    Args:
        run: A run captured with --keep contribution.
        draws: Bootstrap samples.
        seed: Of bundles, samples and deals.

    Raises:
        UsageError: The contributions were not kept.
    """
    require_extra(run, "contribution", "contribution")
    bundle, n_bundles = bundled(run, seed)
    weights = stats.bootstrap_weights(n_bundles, draws=draws, seed=seed)
    rng, rows, mean = np.random.default_rng(seed), [], np.zeros(draws + 1)
    for layer in run.spec.routed_layers:
        hits = np.zeros((n_bundles, 1 + len(_NAMES)))
        for batch, norms in layer_batches(run, layer, ["contribution"], weights=True):
            assert batch.weights is not None
            kept = (batch.weights[:, 0] >= LEAST_WEIGHT).all(axis=1)
            found = _hits(batch.weights[kept, 0], norms[kept], rng)
            np.add.at(hits, bundle[batch.sequence[kept]], np.column_stack([np.ones(len(found)), found]))
        shares = _shares(hits, weights)
        mean += shares[:, 0] / run.spec.n_rows
        rows.append(_row(layer, int(hits[:, 0].sum()), shares, run.spec.top_k))
    low, high = stats.percentile_interval(mean[1:])
    return pd.DataFrame(rows).assign(mean=mean[0], mean_low=float(low), mean_high=float(high), seed=seed)


def _hits(
    weight: Float32[np.ndarray, "N K"], contribution: Float32[np.ndarray, "N K"], rng: np.random.Generator
) -> Bool[np.ndarray, "N 3"]:
    """Whether each token's heaviest expert has the largest output, contribution, and contribution after a deal."""
    heaviest, output = weight.argmax(axis=1), contribution / weight
    dealt = rng.permuted(output, axis=1) * weight
    return np.stack([heaviest == each.argmax(axis=1) for each in (output, contribution, dealt)], axis=1)


def _shares(hits: Float64[np.ndarray, "B H"], weights: Float64[np.ndarray, "D B"]) -> Float64[np.ndarray, "D+1 3"]:
    totals = np.concatenate([hits.sum(axis=0)[None], weights @ hits])
    return totals[:, 1:] / np.maximum(totals[:, :1], 1)


def _row(layer: int, tokens: int, shares: Float64[np.ndarray, "D 3"], top_k: int) -> dict[str, Any]:
    low, high = stats.percentile_interval(shares[1:, 0])
    found = {"layer": layer, "tokens": tokens, **dict(zip(_NAMES, shares[0].tolist(), strict=True))}
    return found | {"ci_low": float(low), "ci_high": float(high), "chance": 1 / top_k}


def _finding(table: pd.DataFrame) -> Finding:
    least, most = table.iloc[int(np.argmin(table["top_norm"]))], table.iloc[int(np.argmax(table["top_norm"]))]
    chance, contribution, dealt = (float(table[name].mean()) for name in ("chance", "top_contribution", "dealt_contribution"))
    low, high = float(least["mean_low"]) - chance, float(least["mean_high"]) - chance
    return Finding(
        sentence=(
            f"The heaviest expert also has the largest output for {percent(least['mean'])} of tokens (95 % interval "
            f"{percent(least['mean_low'])} to {percent(least['mean_high'])}, mean over layers; chance {percent(chance)}), from "
            f"{percent(least['top_norm'])} in layer {least['layer']:.0f} to {percent(most['top_norm'])} in layer "
            f"{most['layer']:.0f}. It makes the largest contribution for {percent(contribution)}, where weights alone "
            f"would make it {percent(dealt)}."
        ),
        verdict=judge(low, high, least=LEAST_EFFECT),
        rung=1,
        effect=float(least["mean"]) - chance,
        unit="share of tokens above chance",
        ci_low=low,
        ci_high=high,
    )


NORM_RANK = Analysis(
    function=norm_rank,
    question="Is the expert that weighs most the one that writes most?",
    claim="Whether an expert is the heaviest of a token's goes with whether its output is the largest.",
    method=(
        "Share of tokens whose heaviest expert has the largest output norm, against 1/K; of contributions, against the same "
        "weights with the token's outputs dealt anew. Intervals from a bootstrap over bundles of sequences."
    ),
    order=in_order,
    finding=_finding,
)
