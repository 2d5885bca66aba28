"""Whether a token chooses the experts that the token before it chose.

The null is exact: were the tokens of a sequence in any order, two neighbours would be any two of its tokens. With n tokens of
which n_e chose expert e, a pair shares

    sum_e n_e (n_e - 1) / (n (n - 1))

choices on average. The tokens, their choices, the load of the sequence and the group limit are kept; their order is not.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.bundled import Bundles
from ling_probe.analysis.counting import segment_mask
from ling_probe.analysis.question import Analysis, Finding, in_order, judge, layer_means, percent
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.spec import ModelSpec

CHOICES = ("first", "any")


def repeat_choice(run: Run, *, segments: Sequence[str] | None = None, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How often the next token chooses the same expert again, beside the same tokens in any order.

    One row a layer, `family` ("all" first) and `choice`: "first" compares the experts of largest weight of two neighbours,
    "any" is the share of a token's K experts that the next one chooses too. `repeat` is that rate, `expected` its mean over all
    orders of the tokens of each sequence, `lift` their ratio with a 95 % interval (`ci_low`, `ci_high`: a bootstrap over
    bundles of sequences), `uniform` the rate of experts drawn evenly; `pairs` of neighbours and `sequences` counted.

    Args:
        run: Any run.
        segments: Only tokens of these; all by default.
        draws: Bootstrap samples.
        seed: Of the bootstrap, and of how sequences are dealt to bundles.

    Raises:
        UsageError: No two tokens that count follow each other.
    """
    bundles = Bundles.of(run, seed=seed)
    totals = _totals(run, bundles.of_sequence, segments)
    if not totals[..., -1].any():
        raise UsageError("no two tokens of these segments follow each other in this run")
    drawn = bundles.weights(draws=draws, seed=seed)
    parts = [("all", int(bundles.n_sequences.sum()), np.ones(len(totals), dtype=bool))]
    if len(bundles.families) > 1:
        parts += [(name, int(bundles.n_sequences[code]), bundles.family == code) for code, name in enumerate(bundles.families)]
    tables = [
        _rows(run.spec, totals[mine], drawn[:, mine]).assign(family=name, sequences=count)
        for name, count, mine in bundles.parts()
        if totals[mine][..., -1].any()
    ]
    table = pd.concat(tables, ignore_index=True).assign(seed=seed)
    return table[["layer", "family", "choice", *table.columns.drop(["layer", "family", "choice"])]]


def _totals(run: Run, bundle_of: Integer[np.ndarray, " S"], segments: Sequence[str] | None) -> Float64[np.ndarray, "U M 5"]:
    """By bundle and layer: repeats and their expectation, of the first choice and of any, and pairs."""
    spec, n_bundles = run.spec, int(bundle_of.max()) + 1
    totals = np.zeros((n_bundles, spec.n_rows, 5))
    for batch in run.batches(weights=True):
        assert batch.weights is not None
        counted = np.flatnonzero(segment_mask(batch, segments))
        sequences, local = np.unique(batch.sequence[counted], return_inverse=True)
        position = batch.position[counted]
        follows = (local[1:] == local[:-1]) & (position[1:] == position[:-1] + 1)
        for row in range(spec.n_rows):
            ids, weights = batch.expert_ids[counted, row], batch.weights[counted, row]
            first = np.take_along_axis(ids, weights.argmax(axis=-1)[:, None], axis=-1)
            columns = [*_repeats(first, local, follows, spec), *_repeats(ids, local, follows, spec)]
            pairs = np.bincount(local[1:][follows], minlength=len(sequences))
            np.add.at(totals[:, row], bundle_of[sequences], np.column_stack([*columns, pairs]))
    return totals


def _repeats(
    ids: Integer[np.ndarray, "N k"], local: Integer[np.ndarray, " N"], follows: np.ndarray, spec: ModelSpec
) -> tuple[Float64[np.ndarray, " s"], Float64[np.ndarray, " s"]]:
    """Of each sequence: shared choices of neighbours, each token's counting 1 in all, and how many to expect."""
    n_local, k = int(local.max()) + 1 if len(local) else 0, ids.shape[1]
    # Slot by slot over contiguous bytes: comparing [N K K] at once takes ten times as long.
    slots, shared = np.ascontiguousarray(ids.T), np.zeros(len(follows), dtype=np.uint8)
    for mine in slots:
        for next_one in slots:
            shared += mine[:-1] == next_one[1:]
    seen = np.bincount(local[1:], weights=shared * follows, minlength=n_local) / k
    cells = (local * spec.n_experts)[:, None] + ids
    counts = np.bincount(cells.ravel(), minlength=n_local * spec.n_experts).reshape(n_local, spec.n_experts)
    tokens = counts.sum(axis=-1) / k
    pairs = np.bincount(local[1:], weights=follows, minlength=n_local)
    alike = (counts * (counts - 1)).sum(axis=-1) / np.maximum(tokens * (tokens - 1), 1)
    return seen, pairs * alike / k


def _rows(spec: ModelSpec, totals: Float64[np.ndarray, "U M 5"], drawn: Float64[np.ndarray, "B U"]) -> pd.DataFrame:
    total, tables = totals.sum(axis=0), []
    replicates = np.tensordot(drawn, totals, axes=1)
    for place, choice in enumerate(CHOICES):
        seen, expected = 2 * place, 2 * place + 1
        low, high = stats.percentile_interval(replicates[..., seen] / np.maximum(replicates[..., expected], 1e-9))
        columns = {
            "layer": spec.routed_layers,
            "choice": choice,
            "repeat": total[:, seen] / total[:, -1],
            "expected": total[:, expected] / total[:, -1],
            "uniform": (1 if choice == "first" else spec.top_k) / spec.n_experts,
            "lift": total[:, seen] / np.maximum(total[:, expected], 1e-9),
            "ci_low": low,
            "ci_high": high,
            "pairs": total[:, -1].astype(np.int64),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables).sort_values(["layer", "choice"], key=_first_first, kind="stable", ignore_index=True)


def _first_first(column: pd.Series) -> pd.Series:
    return column.map(CHOICES.index) if column.name == "choice" else column


LEAST_LIFT = 0.1
"""Repeats more or less than expected by a smaller part are not worth having."""


def _finding(table: pd.DataFrame) -> Finding:
    whole = table[table["family"] == "all"]
    first, either = (whole[whole["choice"] == choice] for choice in CHOICES)
    lift, low, high = layer_means(first, "lift", "ci_low", "ci_high")
    seen, expected = (percent(first[name].mean()) for name in ("repeat", "expected"))
    most, least = (first.iloc[int(place)] for place in (np.argmax(first["lift"]), np.argmin(first["lift"])))
    return Finding(
        sentence=(
            f"The next token has the same first choice in {seen} of pairs, {lift:.2f} times (95 % interval {low:.2f} to "
            f"{high:.2f}) what the same tokens in any order would ({expected}); from {least['lift']:.2f} times in layer "
            f"{least['layer']} to {most['lift']:.2f} in layer {most['layer']}. It chooses {percent(either['repeat'].mean())} "
            f"of a token's experts again, {either['lift'].mean():.2f} times the expected."
        ),
        verdict=judge(low - 1, high - 1, least=LEAST_LIFT),
        rung=1,
        effect=lift,
        unit="times the expected",
        ci_low=low,
        ci_high=high,
    )


REPEAT_CHOICE = Analysis(
    function=repeat_choice,
    question="Does a token choose the experts of the token before it?",
    claim="Neighbouring tokens share their first choice more, or less, often than tokens of the same sequence do.",
    method=(
        "Rate at which the expert of largest weight, or any of the K, is chosen again by the next token. Null: the mean over "
        "all orders of the tokens of each sequence, exact, which keeps load and groups; that neighbouring words are alike is "
        "not taken out. Intervals from a bootstrap over sequences, averaged over layers."
    ),
    order=in_order,
    finding=_finding,
)
