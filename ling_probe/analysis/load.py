"""How evenly tokens spread over the experts of each layer."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64

from ling_probe import metrics, stats
from ling_probe.analysis.bundled import Bundles, count_layers
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, fold, in_order, judge_cells, percent
from ling_probe.run import Run

BLOCKS = 20
"""Blocks of sequences that a jackknife leaves out in turn."""


def expert_load(run: Run, *, segments: Sequence[str] | None = None, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Load and importance of every expert, with a bootstrap interval of the load over sequences.

    One row a layer and expert: `count` choices, `load` their share of the layer's, `importance` the share of routing weight,
    `log2_ratio` load over the even share (half a choice added to both), `ci_low` and `ci_high` the 95 % interval of `load`,
    `p` that the load is the even share (a jackknife over blocks of sequences), `q` corrected over all rows
    (Benjamini-Hochberg).

    Args:
        run: Any run.
        segments: Only tokens of these; all by default.
        draws: Bootstrap samples.
        seed: Of the bootstrap, and of how sequences are dealt to bundles and blocks.
    """
    bundles = Bundles.of(run, seed=seed)
    totals = count_layers(run, bundles.of_sequence, segments=segments, weights=True)
    counts, received = totals.counts, totals.weights
    blocks = _blocks(counts, seed)
    weights = bundles.weights(draws=draws, seed=seed)
    tables = []
    for row, layer in enumerate(run.spec.routed_layers):
        total = counts[:, row].sum(axis=0)
        low, high = stats.percentile_interval(metrics.load_share(weights @ counts[:, row]))
        columns = {
            "layer": layer,
            "expert": np.arange(len(total)),
            "count": total.astype(np.int64),
            "load": metrics.load_share(total),
            "importance": metrics.load_share(received[row]),
            "log2_ratio": metrics.log2_load_ratio(total),
            "ci_low": low,
            "ci_high": high,
            "p": _uneven(total, blocks[:, row]),
        }
        tables.append(pd.DataFrame(columns))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(q=stats.benjamini_hochberg(table["p"].to_numpy()), seed=seed)


def load_balance(run: Run, *, segments: Sequence[str] | None = None, seed: int = 0) -> pd.DataFrame:
    """Balance of every layer, beside what a perfectly balanced router shows after as many tokens (`metrics.balance_floor`).

    One row a layer, over all sequences and, where there are several, over those of each `family`: `tokens`, `sequences`,
    `entropy` (of its maximum) and `entropy_floor`, `effective_experts`, `gini` with its 95 % interval (`ci_low`, `ci_high`: a
    jackknife over blocks of sequences) and `gini_floor`, `max_vio` and `max_vio_floor`, `balancedness` (mean over largest
    load), `cv`, `dead` (never chosen), `rare` (below a tenth of the even share, dead ones included).

    Args:
        run: Any run.
        segments: Only tokens of these; all by default.
        seed: Of the simulated floor, and of how sequences are dealt to blocks.
    """
    bundles = Bundles.of(run, seed=seed)
    counts = count_layers(run, bundles.of_sequence, segments=segments).counts
    tables = [_balance(run, counts[mine], seed).assign(family=name, sequences=n) for name, n, mine in bundles.parts()]
    table = pd.concat(tables, ignore_index=True).assign(seed=seed)
    return table[["layer", "family", "tokens", "sequences", *table.columns.drop(["layer", "family", "tokens", "sequences"])]]


def _balance(run: Run, counts: Float64[np.ndarray, "U M E"], seed: int) -> pd.DataFrame:
    spec, total, blocks = run.spec, counts.sum(axis=0), _blocks(counts, seed)
    tokens = total.sum(axis=-1).astype(np.int64) // spec.top_k
    floor = metrics.balance_floor(
        spec.n_experts, spec.top_k, int(tokens[0]), n_groups=spec.n_groups, topk_groups=spec.topk_groups, seed=seed
    )
    low, high, _ = stats.jackknife_interval(metrics.gini(total), metrics.gini(total - blocks))
    return pd.DataFrame(
        {
            "layer": spec.routed_layers,
            "tokens": tokens,
            "entropy": metrics.load_entropy(total),
            "entropy_floor": floor.entropy,
            "effective_experts": metrics.effective_experts(total),
            "gini": metrics.gini(total),
            "ci_low": low,
            "ci_high": high,
            "gini_floor": floor.gini,
            "max_vio": metrics.max_vio(total),
            "max_vio_floor": floor.max_vio,
            "balancedness": metrics.balancedness(total),
            "cv": metrics.load_variation(total),
            "dead": metrics.dead_experts(total),
            "rare": metrics.rare_experts(total),
        }
    )


def _blocks(counts: Float64[np.ndarray, "U M E"], seed: int) -> Float64[np.ndarray, "J M E"]:
    block = stats.bundles(len(counts), most=BLOCKS, seed=seed)
    return np.stack([counts[block == each].sum(axis=0) for each in range(block.max() + 1)])


def _uneven(total: Float64[np.ndarray, " E"], blocks: Float64[np.ndarray, "J E"]) -> Float64[np.ndarray, " E"]:
    """P of each expert's load against the even share."""
    even = 1 / len(total)
    _, _, p = stats.jackknife_interval(metrics.load_share(total) - even, metrics.load_share(total - blocks) - even)
    return p


def most_uneven_first(table: pd.DataFrame) -> pd.DataFrame:
    """By distance from the even share."""
    return table.iloc[np.argsort(-table["log2_ratio"].abs().to_numpy(), kind="stable")]


LEAST_UNEVEN = 0.5
"""A load nearer the even share than this part of it is as good as even."""


def _load_finding(table: pd.DataFrame) -> Finding:
    most, least = table.iloc[int(np.argmax(table["load"]))], table.iloc[int(np.argmin(table["load"]))]
    even = 1 / table["expert"].nunique()
    off = int((table["q"] < DISCOVERY).sum())
    cells = table.assign(ci_low=table["ci_low"] / even - 1, ci_high=table["ci_high"] / even - 1)
    return Finding(
        sentence=(
            f"{off:,} of {len(table):,} experts do more or less than the even share (q below 0.05). Layer {most['layer']:.0f}, "
            f"expert {most['expert']:.0f} does the most, {fold(most['log2_ratio'])} times the even "
            f"share ({percent(most['load'])} of its layer's choices, 95 % interval {percent(most['ci_low'])} to "
            f"{percent(most['ci_high'])}); "
            f"layer {least['layer']:.0f}, expert {least['expert']:.0f} the least, {fold(least['log2_ratio'])} times."
        ),
        verdict=judge_cells(cells, least=LEAST_UNEVEN),
        rung=1 if off else 0,
        effect=float(most["load"]) / even,
        unit="times the even share",
        ci_low=float(most["ci_low"]) / even,
        ci_high=float(most["ci_high"]) / even,
        q=float(most["q"]),
    )


def _balance_finding(table: pd.DataFrame) -> Finding:
    whole = table[table["family"] == "all"]
    most, least = whole.iloc[int(np.argmax(whole["gini"]))], whole.iloc[int(np.argmin(whole["gini"]))]
    families = table[table["family"] != "all"]
    worst = families.iloc[int(np.argmax(families["gini"]))] if len(families) else None
    above = int((whole["ci_low"] > whole["gini_floor"]).sum())
    return Finding(
        sentence=(
            f"{above} of {len(whole)} layers are less even than a router without preference would be. "
            f"Layer {most['layer']} is the least even (Gini {most['gini']:.3f}, 95 % interval {most['ci_low']:.3f} to "
            f"{most['ci_high']:.3f}; without preference {most['gini_floor']:.3f}) and layer {least['layer']} the most "
            f"({least['gini']:.3f}). Over all layers {whole['dead'].sum()} experts are dead and {whole['rare'].sum()} rare."
            + (f" Of a single family, {worst['family']} is the least even ({worst['gini']:.3f})." if worst is not None else "")
        ),
        verdict=_above_floor(whole),
        rung=1 if above else 0,
        effect=float(most["gini"] - most["gini_floor"]),
        unit="Gini above the floor",
        ci_low=float(most["ci_low"] - most["gini_floor"]),
        ci_high=float(most["ci_high"] - most["gini_floor"]),
    )


LEAST_GINI = 0.05
"""Gini above its floor below which a layer is as good as balanced."""


def _above_floor(table: pd.DataFrame) -> Verdict:
    """Over all layers: most of them must lie above their floor, or none by much."""
    if (table["ci_low"] > table["gini_floor"]).mean() > 0.5:
        return Verdict.SUPPORTED
    near = table["ci_high"] < table["gini_floor"] + LEAST_GINI
    return Verdict.NOT_SUPPORTED if near.all() else Verdict.CANNOT_TELL


EXPERT_LOAD = Analysis(
    function=expert_load,
    question="How much work does each expert do?",
    claim="Some experts do more than the even share.",
    method=(
        "Share of all (token, slot) choices over the even share, log2, prompts included; intervals from a bootstrap over "
        "sequences, p from a jackknife over blocks of them, corrected over all experts (Benjamini-Hochberg)."
    ),
    order=most_uneven_first,
    finding=_load_finding,
)
LOAD_BALANCE = Analysis(
    function=load_balance,
    question="How evenly is the work spread over the experts of a layer?",
    claim="Most layers are less even than a router without preference would leave them.",
    method=(
        "Gini coefficient and maximal violation of the load, over all sequences and each family. Null: a simulated router "
        "without any preference, limited to groups as the model's is, after as many independent tokens; interval of the Gini "
        "from a jackknife over blocks of sequences."
    ),
    order=in_order,
    finding=_balance_finding,
)
