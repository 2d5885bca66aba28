"""How evenly tokens spread over the experts of each layer."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Integer

from ling_probe import metrics, stats
from ling_probe.analysis.counting import count_choices, require_sequences, sequence_owner, sum_weights
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
