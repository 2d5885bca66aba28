"""How much of the work the busier experts of a layer do: Lorenz curves of the load."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64

from ling_probe import metrics, stats
from ling_probe.analysis.bundled import Bundles, count_layers
from ling_probe.analysis.question import Analysis, Finding, in_order, judge_gain, layer_means, percent
from ling_probe.analysis.router import recorded_bias
from ling_probe.run import Run

BLOCKS = 20
"""Blocks of sequences that a jackknife leaves out in turn."""


def load_curve(run: Run, *, segments: Sequence[str] | None = None, seed: int = 0) -> pd.DataFrame:
    """Lorenz curve of every layer: what share of the choices the least loaded experts have, beside balanced routers.

    One row a layer, expert and, over all sequences ("all") and where there are several, `family`. Experts stand in the order
    of their load, the least loaded first: `rank` counts from 1, `experts` is the share of the experts up to this one, `share`
    that of the choices they have together, `floor_low` and `floor_high` the range of 95 % of perfectly balanced routers after
    as many tokens. `count` choices, `load` their share of the layer's, `log2_ratio` load over the even share (half a choice
    added to both); `load_low` and `load_high` are the range of 95 % of the experts of balanced routers. Per layer, the same in
    all its rows: `busy_share`, the share of the choices that the busier half of the experts has, its 95 % interval (`ci_low`,
    `ci_high`: a jackknife over blocks of sequences) and `busy_floor`, the mean of the balanced routers.

    Args:
        run: Any run.
        segments: Only tokens of these; all by default.
        seed: Of the simulated routers, and of how sequences are dealt to blocks.

    Raises:
        UsageError: The run has no sequences.
    """
    bundles = Bundles.of(run, most=400, seed=seed)
    counts = count_layers(run, bundles.of_sequence, segments=segments).counts
    tables = [_curves(run, counts[mine], seed).assign(family=name) for name, _, mine in bundles.parts()]
    table = pd.concat(tables, ignore_index=True).assign(seed=seed)
    front = ["layer", "family", "rank", "expert"]
    return table[[*front, *table.columns.drop(front)]]


def _curves(run: Run, counts: Float64[np.ndarray, "U M E"], seed: int) -> pd.DataFrame:
    spec, total = run.spec, counts.sum(axis=0)
    block = stats.bundles(len(counts), most=BLOCKS, seed=seed)
    blocks = np.stack([counts[block == each].sum(axis=0) for each in range(block.max() + 1)])
    busy = metrics.busy_share(total)
    low, high, _ = stats.jackknife_interval(busy, metrics.busy_share(total - blocks))
    tokens = int(total[0].sum()) // spec.top_k
    balanced = metrics.balanced_loads(
        spec.n_experts, spec.top_k, max(tokens, 1), n_groups=spec.n_groups, topk_groups=spec.topk_groups, seed=seed
    )
    floor = stats.percentile_interval(metrics.lorenz_curve(balanced))
    load_low, load_high = stats.percentile_interval(balanced.ravel())
    return pd.concat(
        [
            _layer(each).assign(
                layer=layer, floor_low=floor[0], floor_high=floor[1], busy_share=busy[row], ci_low=low[row], ci_high=high[row]
            )
            for row, (layer, each) in enumerate(zip(spec.routed_layers, total, strict=True))
        ]
    ).assign(load_low=load_low, load_high=load_high, busy_floor=metrics.busy_share(balanced).mean())


def _layer(counts: Float64[np.ndarray, " E"]) -> pd.DataFrame:
    order, rank = np.argsort(counts, kind="stable"), np.arange(1, len(counts) + 1)
    return pd.DataFrame(
        {
            "rank": rank,
            "expert": order,
            "experts": rank / len(counts),
            "share": metrics.lorenz_curve(counts),
            "count": counts[order].astype(np.int64),
            "load": metrics.load_share(counts)[order],
            "log2_ratio": metrics.log2_load_ratio(counts)[order],
        }
    )


def idle_experts(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of a `load_curve` whose expert was chosen less than a tenth as often as the even share; `dead` ones never."""
    even = table.groupby(["layer", "family"])["count"].transform("mean")
    rows = table[table["count"] < metrics.RARE * even]
    shown = rows[["layer", "expert", "count", "load"]].assign(dead=rows["count"] == 0)
    return shown.sort_values(["count", "layer", "expert"], kind="stable", ignore_index=True)


def beyond_balanced(table: pd.DataFrame) -> tuple[int, float, float]:
    """How many experts of a `load_curve` do more or less than 95 % of balanced routers' experts, and that range.

    The range is in times the even share.
    """
    n_experts = int(table["expert"].max()) + 1
    outside = (table["load"] < table["load_low"]) | (table["load"] > table["load_high"])
    return int(outside.sum()), float(table["load_low"].iloc[0]) * n_experts, float(table["load_high"].iloc[0]) * n_experts


def loads_with_bias(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """A `load_curve` of one family with each expert's `bias` and, by layer, the `rank_correlation` of bias and load (Spearman).

    It is NaN in a layer whose biases are one.

    Raises:
        UsageError: The manifest does not know the bias.
    """
    bias = recorded_bias(run)
    rows = table.assign(bias=[bias[layer][expert] for layer, expert in zip(table["layer"], table["expert"], strict=True)])
    columns = ["layer", "expert", "load", "log2_ratio", "bias"]
    ranks = rows.groupby("layer")[["load", "bias"]].rank()
    correlation = {layer: each["load"].corr(each["bias"]) for layer, each in ranks.groupby(rows["layer"])}
    return rows[columns].assign(rank_correlation=rows["layer"].map(correlation))


LEAST_GAIN = 0.03
"""Share of the choices, beyond a balanced router's, below which the busier half is as good as half."""


def _finding(table: pd.DataFrame) -> Finding:
    layers = table[table["family"] == "all"].drop_duplicates("layer")
    floor = float(layers["busy_floor"].mean())
    busy, low, high = layer_means(layers, "busy_share", "ci_low", "ci_high")
    most = layers.iloc[int(np.argmax(layers["busy_share"]))]
    return Finding(
        sentence=(
            f"The busier half of a layer's experts does {percent(busy)} of the work on average over layers (95 % interval "
            f"{percent(low)} to {percent(high)}), where balanced routers would leave it {percent(floor)}; the most in layer "
            f"{most['layer']}, {percent(most['busy_share'])}."
        ),
        verdict=judge_gain(low - floor, high - floor, least=LEAST_GAIN),
        rung=1,
        effect=busy - floor,
        unit="share of the choices beyond balanced",
        ci_low=low - floor,
        ci_high=high - floor,
    )


LOAD_CURVE = Analysis(
    function=load_curve,
    question="How much of the work do the busier experts do?",
    claim="The busier half of a layer's experts does more of the work than balanced routers would leave it.",
    method=(
        "Lorenz curve: share of a layer's choices by share of its experts, the least loaded first. Null: simulated routers "
        "without preference, limited to groups as the model's is, after as many tokens; interval from a jackknife over blocks "
        "of sequences, averaged over layers."
    ),
    order=in_order,
    finding=_finding,
)
