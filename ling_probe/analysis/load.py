"""How evenly tokens spread over the experts of each layer."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Integer

from ling_probe import metrics, stats
from ling_probe.analysis.counting import count_choices, require_sequences, sequence_owner, sum_weights
from ling_probe.analysis.question import Analysis, Finding, Verdict, fold, in_order, percent
from ling_probe.run import Run


def expert_load(run: Run, *, segments: Sequence[str] | None = None, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Load and importance of every expert, with a bootstrap interval of the load over sequences.

    One row a layer and expert: `count` choices, `load` their share of the layer's, `importance` the share of routing weight,
    `log2_ratio` load over the even share (half a choice added to both), `ci_low` and `ci_high` the 95 % interval of `load`.

    Args:
        run: Any run.
        segments: Only tokens of these; all by default.
        draws: Bootstrap samples.
        seed: Of the bootstrap.
    """
    require_sequences(run)
    weights = stats.bootstrap_weights(len(run.sequences), draws=draws, seed=seed)
    tables = []
    for layer in run.spec.routed_layers:
        counts = count_choices(run, layer, sequence_owner(segments), len(run.sequences))
        low, high = stats.percentile_interval(metrics.load_share(weights @ counts))
        total, received = counts.sum(axis=0), sum_weights(run, layer, sequence_owner(segments))
        columns = {
            "layer": layer,
            "expert": np.arange(len(total)),
            "count": total,
            "load": metrics.load_share(total),
            "importance": metrics.load_share(received),
            "log2_ratio": metrics.log2_load_ratio(total),
            "ci_low": low,
            "ci_high": high,
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def load_balance(run: Run, *, segments: Sequence[str] | None = None, seed: int = 0) -> pd.DataFrame:
    """Balance of every layer, beside what a perfectly balanced router shows after as many tokens (`metrics.balance_floor`).

    One row a layer: `tokens`, `sequences`, `entropy` (of its maximum), `effective_experts`, `gini` and `gini_floor`,
    `max_vio` and `max_vio_floor`, `cv`, `dead` (never chosen), `rare` (below a tenth of the even share, dead ones included).

    Args:
        run: Any run.
        segments: Only tokens of these; all by default.
        seed: Of the simulated floor.
    """
    require_sequences(run)
    rows = [
        _balance(run, layer, count_choices(run, layer, sequence_owner(segments), len(run.sequences)), seed)
        for layer in run.spec.routed_layers
    ]
    return pd.DataFrame(rows)


def _balance(run: Run, layer: int, counts: Integer[np.ndarray, "S E"], seed: int) -> dict[str, float]:
    spec, total = run.spec, counts.sum(axis=0)
    tokens = int(total.sum()) // spec.top_k
    floor = metrics.balance_floor(
        spec.n_experts, spec.top_k, tokens, n_groups=spec.n_groups, topk_groups=spec.topk_groups, seed=seed
    )
    return {
        "layer": layer,
        "tokens": tokens,
        "sequences": int((counts.sum(axis=1) > 0).sum()),
        "entropy": float(metrics.load_entropy(total)),
        "effective_experts": float(metrics.effective_experts(total)),
        "gini": float(metrics.gini(total)),
        "gini_floor": floor.gini,
        "max_vio": float(metrics.max_vio(total)),
        "max_vio_floor": floor.max_vio,
        "cv": float(metrics.load_variation(total)),
        "dead": int(metrics.dead_experts(total)),
        "rare": int(metrics.rare_experts(total)),
    }


def most_uneven_first(table: pd.DataFrame) -> pd.DataFrame:
    """By distance from the even share."""
    return table.iloc[np.argsort(-table["log2_ratio"].abs().to_numpy(), kind="stable")]


def _load_finding(table: pd.DataFrame) -> Finding:
    most, least = table.iloc[int(np.argmax(table["load"]))], table.iloc[int(np.argmin(table["load"]))]
    even = 1 / table["expert"].nunique()
    off = (table["ci_low"] > even) | (table["ci_high"] < even)
    return Finding(
        sentence=(
            f"Layer {most['layer']:.0f}, expert {most['expert']:.0f} does the most, {fold(most['log2_ratio'])} times the even "
            f"share ({percent(most['load'])} of its layer's choices, 95 % interval {percent(most['ci_low'])} to "
            f"{percent(most['ci_high'])}); "
            f"layer {least['layer']:.0f}, expert {least['expert']:.0f} the least, {fold(least['log2_ratio'])} times."
        ),
        verdict=Verdict.SUPPORTED if off.mean() > 2 * 0.05 else Verdict.CANNOT_TELL,
        rung=1 if off.any() else 0,
        effect=float(most["load"]) / even,
        unit="times the even share",
        ci_low=float(most["ci_low"]) / even,
        ci_high=float(most["ci_high"]) / even,
    )


def _balance_finding(table: pd.DataFrame) -> Finding:
    most, least = table.iloc[int(np.argmax(table["gini"]))], table.iloc[int(np.argmin(table["gini"]))]
    return Finding(
        sentence=(
            f"Layer {most['layer']:.0f} is the least even (Gini {most['gini']:.3f}) and layer {least['layer']:.0f} the most "
            f"({least['gini']:.3f}); a router without preference would show {most['gini_floor']:.3f}. "
            f"Over all layers {table['dead'].sum()} experts are dead and {table['rare'].sum()} rare."
        ),
        verdict=Verdict.SUPPORTED if most["gini"] > most["gini_floor"] else Verdict.CANNOT_TELL,
        rung=0,
        effect=float(most["gini"]),
        unit="Gini",
    )


EXPERT_LOAD = Analysis(
    function=expert_load,
    question="How much work does each expert do?",
    claim="Some experts do more than the even share.",
    method=(
        "Share of all (token, slot) choices over the even share, log2, prompts included; intervals from a bootstrap over "
        "sequences."
    ),
    order=most_uneven_first,
    finding=_load_finding,
)
LOAD_BALANCE = Analysis(
    function=load_balance,
    question="How evenly is the work spread over the experts of a layer?",
    claim="The load is less even than a router without preference would leave it.",
    method=(
        "Gini coefficient and maximal violation of the load. Null: a simulated router without any preference, limited to "
        "groups as the model's is, after as many independent tokens."
    ),
    order=in_order,
    finding=_balance_finding,
)
