"""How few experts do how much of the work, in a whole run and in a single sequence."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import metrics, stats
from ling_probe.analysis.bundled import Bundles
from ling_probe.analysis.counting import segment_mask
from ling_probe.analysis.question import Analysis, Finding, in_order, judge, layer_means
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch
from ling_probe.spec import ModelSpec

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Of the choices, that are to be covered."""
BLOCKS = 20
"""Blocks of sequences that a jackknife leaves out in turn."""
_LENGTHS = 4
"""Lengths of a sequence at which its floor is simulated; it is interpolated between."""


def coverage(run: Run, *, segments: Sequence[str] | None = None, seed: int = 0) -> pd.DataFrame:
    """How many experts of a layer, the most loaded first, cover a share of the choices, beside a balanced router.

    One row a layer, `scope` and `share`: `experts` that cover the share of all choices ("run"), or of the choices of one
    sequence by its own most loaded experts, on average ("sequence"); interpolated between two numbers of experts. `ci_low`
    and `ci_high` are the 95 % interval (a jackknife over blocks of sequences), `floor` what a perfectly balanced router needs
    after as many tokens, `tokens` of the run or, on average, of a sequence, `sequences` counted.

    Args:
        run: Any run.
        segments: Only tokens of these; all by default.
        seed: Of the simulated floor, and of how sequences are dealt to blocks.

    Raises:
        UsageError: The run has no sequences, or no tokens of these segments.
    """
    block_of = Bundles.of(run, most=BLOCKS, seed=seed).of_sequence
    tally = _tally(run, segments, block_of)
    if not tally.lengths:
        raise UsageError("no tokens of these segments in this run")
    tables = [_run_rows(run.spec, tally, seed), _sequence_rows(run.spec, tally, seed)]
    return pd.concat(tables, ignore_index=True).assign(sequences=len(tally.lengths), seed=seed)


class _Tally:
    """Counts of the run by block, and what the sequences of a block need together."""

    def __init__(self, n_blocks: int, spec: ModelSpec) -> None:
        self.counts = np.zeros((n_blocks, spec.n_rows, spec.n_experts))
        self.needed = np.zeros((n_blocks, spec.n_rows, len(SHARES)))
        self.n_sequences = np.zeros(n_blocks)
        self.lengths: list[int] = []
        """Tokens of each sequence."""

    def add(self, counts: Float64[np.ndarray, "s M E"], block: Integer[np.ndarray, " s"], top_k: int) -> None:
        """Add whole sequences."""
        for row in range(counts.shape[1]):
            needed = np.stack([metrics.experts_needed(counts[:, row], share) for share in SHARES], axis=-1)
            np.add.at(self.counts[:, row], block, counts[:, row])
            np.add.at(self.needed[:, row], block, needed)
        self.n_sequences += np.bincount(block, minlength=len(self.n_sequences))
        self.lengths += (counts[:, 0].sum(axis=-1) // top_k).astype(int).tolist()


def _tally(run: Run, segments: Sequence[str] | None, block_of: Integer[np.ndarray, " S"]) -> _Tally:
    tally = _Tally(int(block_of.max()) + 1, run.spec)
    for batch in run.batches():
        counted = np.flatnonzero(segment_mask(batch, segments))
        sequences, local = np.unique(batch.sequence[counted], return_inverse=True)
        tally.add(_sequence_counts(batch, counted, local, run.spec), block_of[sequences], run.spec.top_k)
    return tally


def _sequence_counts(
    batch: TokenBatch, rows: Integer[np.ndarray, " n"], local: Integer[np.ndarray, " n"], spec: ModelSpec
) -> Float64[np.ndarray, "s M E"]:
    n_local = int(local.max()) + 1 if len(local) else 0
    counts = np.empty((n_local, spec.n_rows, spec.n_experts))
    base = (local * spec.n_experts)[:, None]
    for row in range(spec.n_rows):
        cells = (base + batch.expert_ids[rows, row]).ravel()
        counts[:, row] = np.bincount(cells, minlength=n_local * spec.n_experts).reshape(n_local, spec.n_experts)
    return counts


def _run_rows(spec: ModelSpec, tally: _Tally, seed: int) -> pd.DataFrame:
    total = tally.counts.sum(axis=0)
    tokens = int(total[0].sum()) // spec.top_k
    loads = _balanced(spec, tokens, seed)
    tables = []
    for share in SHARES:
        experts = metrics.experts_needed(total, share)
        low, high, _ = stats.jackknife_interval(experts, metrics.experts_needed(total - tally.counts, share))
        floor = float(metrics.experts_needed(loads, share).mean())
        columns = {"layer": spec.routed_layers, "experts": experts, "ci_low": low, "ci_high": high}
        tables.append(pd.DataFrame(columns).assign(scope="run", share=share, floor=floor, tokens=float(tokens)))
    return _tidy(tables)


def _sequence_rows(spec: ModelSpec, tally: _Tally, seed: int) -> pd.DataFrame:
    total, n = tally.needed.sum(axis=0), tally.n_sequences.sum()
    experts = total / n
    left_out = (total - tally.needed) / np.maximum(n - tally.n_sequences, 1)[:, None, None]
    low, high, _ = stats.jackknife_interval(experts, left_out)
    lengths = np.array(tally.lengths)
    grid = np.unique(np.geomspace(lengths.min(), lengths.max(), _LENGTHS).round().astype(int))
    loads = [_balanced(spec, int(length), seed) for length in grid]
    tables = []
    for place, share in enumerate(SHARES):
        floors = [float(metrics.experts_needed(each, share).mean()) for each in loads]
        floor = float(np.interp(np.log(lengths), np.log(grid), floors).mean())
        columns = {"experts": experts[:, place], "ci_low": low[:, place], "ci_high": high[:, place]}
        table = pd.DataFrame({"layer": spec.routed_layers} | columns)
        tables.append(table.assign(scope="sequence", share=share, floor=floor, tokens=float(lengths.mean())))
    return _tidy(tables)


def _tidy(tables: list[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(tables).sort_values(["layer", "share"], kind="stable", ignore_index=True)
    return table[["layer", "scope", "share", "experts", "ci_low", "ci_high", "floor", "tokens"]]


def _balanced(spec: ModelSpec, tokens: int, seed: int) -> Float64[np.ndarray, "repeats E"]:
    return metrics.balanced_loads(
        spec.n_experts, spec.top_k, tokens, n_groups=spec.n_groups, topk_groups=spec.topk_groups, seed=seed
    )


LEAST_SAVING = 0.1
"""Part of the balanced router's experts below which needing fewer is not worth having."""


def _finding(table: pd.DataFrame) -> Finding:
    half = table[(table["scope"] == "run") & (table["share"] == SHARES[0])]
    single = table[(table["scope"] == "sequence") & (table["share"] == SHARES[0])]
    names = ("experts", "ci_high", "ci_low")
    saved, low, high = layer_means(1 - half[[*names]].div(half["floor"], axis=0), *names)
    fewest = half.iloc[int(np.argmin(half["experts"]))]
    return Finding(
        sentence=(
            f"Half of a layer's choices go to {half['experts'].mean():.1f} experts, where a balanced router would use "
            f"{half['floor'].mean():.1f}; the fewest are {fewest['experts']:.1f} in layer {fewest['layer']} (95 % interval "
            f"{fewest['ci_low']:.1f} to {fewest['ci_high']:.1f}). In a single sequence half go to "
            f"{single['experts'].mean():.1f} (balanced: {single['floor'].mean():.1f})."
        ),
        verdict=judge(low, high, least=LEAST_SAVING),
        rung=1,
        effect=saved,
        unit="share of a balanced router's experts saved",
        ci_low=low,
        ci_high=high,
    )


COVERAGE = Analysis(
    function=coverage,
    question="How few experts do how much of the work?",
    claim="Half of the choices go to fewer experts than a router without preference would use.",
    method=(
        "Smallest number of experts, the most loaded first, with a given share of the choices. Null: a simulated router "
        "without preference, limited to groups as the model's is, after as many tokens; intervals from a jackknife over blocks "
        "of sequences, averaged over layers."
    ),
    order=in_order,
    finding=_finding,
)
