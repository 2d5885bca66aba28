"""How much of a token's routing weight its first choices carry; first by weight, not by slot."""

import numpy as np
import pandas as pd

from ling_probe.analysis.bundled import Cells
from ling_probe.analysis.question import Analysis, Finding, judge_above, layer_means, overall_first, percent
from ling_probe.run import Run


def weight_concentration(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Share of a token's weight that its first, second ... expert carries, in each layer, family and kind of step.

    One row a layer, class of tokens (`kind` "all", "family" or "label", and its `name`) and `rank` (1 has the largest weight;
    slots are in order of choice score, bias included, and say something else): `share` of the token's weight, its mean over
    tokens with a 95 % interval (`ci_low`, `ci_high`: a bootstrap over bundles of sequences), `cumulative` that of this rank and
    those before it, `even` what K equal weights give; `tokens` and `sequences` counted.

    Args:
        run: Any run.
        draws: Bootstrap samples.
        seed: Of the bootstrap, and of how sequences are dealt to bundles.
    """
    cells, k = Cells.of(run, seed=seed), run.spec.top_k
    totals = cells.zeros(run.spec.n_rows * k)
    for batch in run.batches(weights=True):
        assert batch.weights is not None
        # The weights of a choice sum to the scale, up to their 16 bits.
        ordered = np.sort(batch.weights, axis=-1)[..., ::-1]
        totals += cells.totals(batch, ordered.reshape(len(ordered), -1))
    means = cells.means(totals, draws=draws, seed=seed)
    tables = [
        means.table(row * k + rank).assign(layer=layer, rank=rank + 1)
        for row, layer in enumerate(run.spec.routed_layers)
        for rank in range(k)
    ]
    table = pd.concat(tables, ignore_index=True).rename(columns={"value": "share"})
    table = table.sort_values(["layer", "kind", "name", "rank"], kind="stable", ignore_index=True)
    table[["share", "ci_low", "ci_high"]] /= run.spec.scale
    table["cumulative"] = table.groupby(["layer", "kind", "name"])["share"].cumsum()
    columns = ["layer", "kind", "name", "rank", "share", "ci_low", "ci_high", "cumulative"]
    return table[columns].assign(even=1 / k, tokens=table["tokens"], sequences=table["sequences"], seed=seed)


def _finding(table: pd.DataFrame) -> Finding:
    whole = table[table["kind"] == "all"]
    first = whole[whole["rank"] == 1]
    share, low, high = layer_means(first, "share", "ci_low", "ci_high")
    most, least = (first.iloc[int(place)] for place in (np.argmax(first["share"]), np.argmin(first["share"])))
    last = whole.loc[whole["rank"] == whole["rank"].max(), "share"].mean()
    return Finding(
        sentence=(
            f"The expert of largest weight carries {percent(share)} of a token's weight (95 % interval {percent(low)} to "
            f"{percent(high)}; equal weights: {percent(first['even'].iloc[0])}), from {percent(least['share'])} in layer "
            f"{least['layer']} to {percent(most['share'])} in layer {most['layer']}; the one of least weight carries "
            f"{percent(last)}."
        ),
        verdict=judge_above(low, high, than=0.5),
        rung=1,
        effect=share,
        unit="share of a token's weight",
        ci_low=low,
        ci_high=high,
    )


WEIGHT_CONCENTRATION = Analysis(
    function=weight_concentration,
    question="How much weight do the first choices of a token carry?",
    claim="One expert outweighs the others of a token together.",
    method=(
        "Weights of a choice sorted by weight, each over their sum; means over tokens, intervals from a bootstrap over "
        "sequences, averaged over layers. Even is 1/K."
    ),
    order=overall_first,
    finding=_finding,
)
