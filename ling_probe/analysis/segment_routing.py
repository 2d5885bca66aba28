"""Whether a few experts, held fixed, would serve a stretch of tokens: what caching or offloading experts could count on.

For each stretch of m tokens (Liang et al. 2025, arXiv 2505.16056, call it segment routing best performance):

1. count how often its tokens choose each expert, n_e;
2. take as the fixed set all experts with n_e at or above a threshold;
3. score the set by F1 = 2 sum_{e in set} n_e / (m |set| + m K): what it holds of the choices, and what of it is used;
4. keep the best threshold.

The best set is found on the very tokens it serves, so F1 is high by chance alone. The control is the same sequence with its
tokens in another order: load and groups are the same, and what a stretch has in common is gone.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.counting import require_sequences, segment_mask
from ling_probe.analysis.question import Analysis, Finding, in_order, judge, layer_means
from ling_probe.errors import UsageError
from ling_probe.run import Run

LENGTHS = (4, 16, 64)
"""Tokens of a stretch."""
SAMPLE = 400
"""Most sequences that are read; a run of more is sampled."""


def segment_routing(
    run: Run,
    *,
    segments: Sequence[str] | None = None,
    sample: int = SAMPLE,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How well the best fixed set of experts serves a stretch of tokens, beside the same tokens in another order.

    One row a layer and `length` of the stretch (4, 16 and 64 tokens; those that no sequence is long enough for are left out):
    `f1` of the best fixed set of each stretch, its mean, `shuffled` the same with the tokens of each sequence shuffled,
    `excess` their difference with its 95 % interval (`ci_low`, `ci_high`: a bootstrap over sequences); `stretches` and
    `sequences` counted. A run of more than `sample` sequences is sampled at random.

    Args:
        run: Any run.
        segments: Only tokens of these; all by default.
        sample: Most sequences read.
        draws: Bootstrap samples.
        seed: Of the sample, the shuffles and the bootstrap.

    Raises:
        UsageError: No sequence has as many tokens of these segments as the shortest stretch.
    """
    require_sequences(run)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(run.sequences))[:sample])
    unit = np.full(len(run.sequences), -1)
    unit[chosen] = np.arange(len(chosen))
    totals = np.zeros((len(chosen), len(LENGTHS), run.spec.n_rows, 3))
    for batch in run.batches():
        counted = np.flatnonzero(segment_mask(batch, segments) & (unit[batch.sequence] >= 0))
        owner = unit[batch.sequence[counted]]
        for place, length in enumerate(LENGTHS):
            rows, owners = _stretches(owner, length)
            # Only tokens of whole stretches: what is left over, the end of a sequence, is routed in its own way.
            mixed = rows.ravel()[np.lexsort((rng.random(rows.size), np.repeat(owners, length)))].reshape(rows.shape)
            for row in range(run.spec.n_rows if len(rows) else 0):
                ids = batch.expert_ids[counted, row]
                scores = [best_set_f1(ids[order].reshape(len(rows), -1), length) for order in (rows, mixed)]
                np.add.at(totals[:, place, row], owners, np.column_stack([*scores, np.ones(len(rows))]))
    return _table(run, totals, stats.bootstrap_weights(len(chosen), draws=draws, seed=seed)).assign(seed=seed)


def _stretches(owner: Integer[np.ndarray, " N"], length: int) -> tuple[Integer[np.ndarray, "R m"], Integer[np.ndarray, " R"]]:
    """Rows of each whole stretch of tokens, and whose it is; owners stand together, and what is left over is not used."""
    _, first, size = np.unique(owner, return_index=True, return_counts=True)
    starts = [begin + length * np.arange(count // length) for begin, count in zip(first, size, strict=True)]
    rows = np.concatenate([np.empty(0, dtype=np.int64), *starts])[:, None] + np.arange(length)
    return rows, owner[rows[:, 0]] if len(rows) else rows[:, 0]


def best_set_f1(ids: Integer[np.ndarray, "R n"], length: int) -> Float64[np.ndarray, " R"]:
    """F1 of the best fixed set of experts for each row, which holds the choices of `length` tokens.

    Two tokens that choose experts 0 and 1, and 0 and 2: the set {0} holds 2 of 4 choices and is used by both, F1 2/3; all three
    hold all, and half of their places are used, F1 4/5.

    >>> best_set_f1(np.array([[0, 1, 0, 2]]), 2)
    array([0.8])
    """
    ordered = np.sort(ids, axis=-1)
    n_rows, n = ordered.shape
    new = np.ones(ordered.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = np.maximum.accumulate(np.where(new, np.arange(n), 0), axis=-1)
    times = np.arange(n) - start + length * np.arange(n_rows)[:, None]
    # at_least[r, c] experts are chosen more than c times in row r.
    at_least = np.bincount(times.ravel(), minlength=n_rows * length).reshape(n_rows, length)
    size = at_least
    further = np.cumsum(at_least[:, ::-1], axis=-1)[:, ::-1] - at_least
    held = at_least * np.arange(1, length + 1) + further
    return (2 * held / (size * length + n)).max(axis=-1)


def _table(run: Run, totals: Float64[np.ndarray, "S m M 3"], weights: Float64[np.ndarray, "B S"]) -> pd.DataFrame:
    tables = []
    for place, length in enumerate(LENGTHS):
        total = totals[:, place].sum(axis=0)
        if not total[0, -1]:
            continue
        drawn = np.tensordot(weights, totals[:, place], axes=1)
        excess = (drawn[..., 0] - drawn[..., 1]) / np.maximum(drawn[..., 2], 1)
        low, high = stats.percentile_interval(excess)
        columns = {
            "layer": run.spec.routed_layers,
            "length": length,
            "f1": total[:, 0] / total[:, 2],
            "shuffled": total[:, 1] / total[:, 2],
            "excess": (total[:, 0] - total[:, 1]) / total[:, 2],
            "ci_low": low,
            "ci_high": high,
            "stretches": total[:, 2].astype(np.int64),
            "sequences": int((totals[:, place, 0, 2] > 0).sum()),
        }
        tables.append(pd.DataFrame(columns))
    if not tables:
        raise UsageError(f"no sequence of this run has {LENGTHS[0]} tokens of these segments")
    return pd.concat(tables).sort_values(["layer", "length"], kind="stable", ignore_index=True)


LEAST_EXCESS = 0.02
"""F1 above the control below which a stretch has nothing in common worth having."""


def _finding(table: pd.DataFrame) -> Finding:
    length = sorted(table["length"].unique())[min(1, table["length"].nunique() - 1)]
    rows = table[table["length"] == length]
    excess, low, high = layer_means(rows, "excess", "ci_low", "ci_high")
    most = rows.iloc[int(np.argmax(rows["excess"]))]
    return Finding(
        sentence=(
            f"The best fixed set of experts serves {length} tokens with F1 {rows['f1'].mean():.3f}, and the same tokens in "
            f"another order with {rows['shuffled'].mean():.3f}: {excess:+.3f} (95 % interval {low:+.3f} to {high:+.3f}) comes "
            f"of their standing together, most in layer {most['layer']:.0f} ({most['excess']:+.3f})."
        ),
        verdict=judge(low, high, least=LEAST_EXCESS),
        rung=1,
        effect=excess,
        unit="F1",
        ci_low=low,
        ci_high=high,
    )


SEGMENT_ROUTING = Analysis(
    function=segment_routing,
    question="Would a fixed set of experts serve a stretch of tokens?",
    claim="Tokens that stand together share more, or fewer, experts than the tokens of their sequence do.",
    method=(
        "F1 of the best fixed set of experts for each stretch of tokens. Null: the same with the tokens of each sequence "
        "shuffled once, which keeps load and groups; intervals from a bootstrap over sequences, averaged over layers."
    ),
    order=in_order,
    finding=_finding,
)
