"""Which experts a token chooses together, beyond what the group limit and their load already make of it.

A group-limited router throws experts of one group together and keeps those of different groups apart, with no preference at
all: against plain independence, 256 experts in 8 groups show lifts of 1.39 and 0.81 on random scores. The null here knows the
groups:

- across two groups, given how many experts a token takes from each, which ones is independent: each expert is taken as often
  as it is among all tokens that take so many from its group;
- inside a group, a token's experts are partners in proportion to how often each is taken in company there
  (quasi-independence: a symmetric table with an empty diagonal and the observed row sums).

Without a group limit all experts are one group and only the second holds. What is left as lift is company that loads and
groups do not explain. It may well be that both experts like the same tokens: co-activation is no interaction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.counting import require_sequences, segment_mask
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, fold, fold_interval, judge_cells, surest_first
from ling_probe.run import Run
from ling_probe.spec import ModelSpec

LEAST_EXPECTED = 20.0
"""A pair expected less often is too rare to test: about one token a block."""
_SWEEPS = 200
"""Proportional fitting converges long before, unless a group has an expert that is in every pair."""


def coactivation(
    run: Run, *, layers: Sequence[int] | None = None, segments: Sequence[str] | None = None, blocks: int = 20
) -> pd.DataFrame:
    """How often two experts are chosen by the same token, against a null that knows the router's groups.

    One row a layer and pair, `expert` < `other`: `count` tokens that chose both, `expected` under the null, `lift` log2 of
    the two (half a token added to both), `ci_low` and `ci_high` its 95 % interval, `p` for the difference, both from a
    jackknife that leaves out blocks of whole sequences, `q` corrected over all tested rows (Benjamini-Hochberg). Pairs
    expected fewer than 20 times, and runs of one sequence, have no interval and no p.

    Args:
        run: Any run.
        layers: Only these; all by default.
        segments: Only tokens of these; all by default.
        blocks: Blocks of sequences for the jackknife.
    """
    require_sequences(run)
    chosen = run.spec.routed_layers if layers is None else tuple(layers)
    table = pd.concat([_layer_pairs(run, layer, segments, blocks) for layer in chosen], ignore_index=True)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    return table


@dataclass
class Company:
    """What one block of sequences tells about who is chosen with whom; adds up over blocks."""

    pairs: Float64[np.ndarray, "E E"]
    """Tokens that chose both; the diagonal is empty."""
    taken: Float64[np.ndarray, "E N"]
    """Tokens that chose the expert, by how many they took from its group (0..K)."""
    sizes: Float64[np.ndarray, "G N G N"]
    """Tokens by how many experts they took from one group and from another."""

    def without(self, parts: "Company", block: int) -> "Company":
        """All but one of the blocks that add up to this."""
        return Company(self.pairs - parts.pairs[block], self.taken - parts.taken[block], self.sizes - parts.sizes[block])


def _layer_pairs(run: Run, layer: int, segments: Sequence[str] | None, blocks: int) -> pd.DataFrame:
    parts = _company(run, layer, segments, blocks)
    total = Company(parts.pairs.sum(axis=0), parts.taken.sum(axis=0), parts.sizes.sum(axis=0))
    upper = np.triu_indices(run.spec.n_experts, 1)
    count, expected = _counts(total, run.spec)
    without = [_counts(total.without(parts, block), run.spec) for block in range(len(parts.pairs))]
    lift = stats.log2_ratio(count, expected)
    low, high, _ = stats.jackknife_interval(lift, np.stack([stats.log2_ratio(*each) for each in without]))
    # The difference, unlike the lift, is as likely to err up as down where counts are small. It is taken per choice: a total
    # shrinks with each block left out, and its jackknife would be too narrow by one block in all.
    _, _, p = stats.jackknife_interval(_excess(count, expected), np.stack([_excess(*each) for each in without]))
    tested = expected >= LEAST_EXPECTED
    return pd.DataFrame(
        {
            "layer": layer,
            "expert": upper[0],
            "other": upper[1],
            "count": count.astype(np.int64),
            "expected": expected,
            "lift": lift,
            "ci_low": np.where(tested, low, np.nan),
            "ci_high": np.where(tested, high, np.nan),
            "p": np.where(tested, p, np.nan),
        }
    )


def _excess(count: Float64[np.ndarray, " P"], expected: Float64[np.ndarray, " P"]) -> Float64[np.ndarray, " P"]:
    """Tokens that chose both beyond the expected, as a share of all pairs chosen."""
    return (count - expected) / max(count.sum(), 1.0)


def _counts(company: Company, spec: ModelSpec) -> tuple[Float64[np.ndarray, " P"], Float64[np.ndarray, " P"]]:
    """Tokens that chose both, and how many would, for each pair once."""
    upper = np.triu_indices(spec.n_experts, 1)
    return company.pairs[upper], expected_pairs(company, spec)[upper]


def _company(run: Run, layer: int, segments: Sequence[str] | None, blocks: int) -> Company:
    """Company by block, along a new first axis."""
    spec, block_of = run.spec, stats.sequence_blocks(len(run.sequences), blocks=blocks)
    n_blocks, n_sizes = block_of.max() + 1, spec.top_k + 1
    pairs = np.zeros((n_blocks, spec.n_experts, spec.n_experts))
    taken = np.zeros((n_blocks, spec.n_experts, n_sizes))
    sizes = np.zeros((n_blocks, spec.n_groups * n_sizes, spec.n_groups * n_sizes))
    for block, ids in _blocks_of_choices(run, layer, segments, block_of):
        chosen = _one_hot(ids, spec.n_experts)
        size = _group_sizes(ids, spec)
        of_size = _one_hot(size + n_sizes * np.arange(spec.n_groups), sizes.shape[-1])
        pairs[block] += (chosen.T @ chosen).toarray()
        sizes[block] += (of_size.T @ of_size).toarray()
        np.add.at(taken[block], (ids, np.take_along_axis(size, ids // spec.group_size, axis=1)), 1)
    pairs[:, np.arange(spec.n_experts), np.arange(spec.n_experts)] = 0
    return Company(pairs, taken, sizes.reshape(n_blocks, spec.n_groups, n_sizes, spec.n_groups, n_sizes))


def _blocks_of_choices(
    run: Run, layer: int, segments: Sequence[str] | None, block_of: Integer[np.ndarray, " S"]
) -> Iterator[tuple[int, Integer[np.ndarray, "N K"]]]:
    for batch in run.batches(layers=[layer]):
        counted = segment_mask(batch, segments)
        block = block_of[batch.sequence]
        for each in np.unique(block[counted]):
            yield int(each), batch.expert_ids[counted & (block == each), 0].astype(np.int64)


def _one_hot(columns: Integer[np.ndarray, "N K"], n_columns: int) -> sparse.csr_array:
    rows, width = columns.shape
    return sparse.csr_array(
        (np.ones(columns.size), columns.ravel(), np.arange(0, rows * width + 1, width)), shape=(rows, n_columns)
    )


def _group_sizes(ids: Integer[np.ndarray, "N K"], spec: ModelSpec) -> Integer[np.ndarray, "N G"]:
    """How many experts each token took from each group."""
    group = ids // spec.group_size + spec.n_groups * np.arange(len(ids))[:, None]
    return np.bincount(group.ravel(), minlength=spec.n_groups * len(ids)).reshape(len(ids), spec.n_groups)


def expected_pairs(company: Company, spec: ModelSpec) -> Float64[np.ndarray, "E E"]:
    """Tokens that would choose both experts of each pair under the group-aware null; the diagonal is empty."""
    group = np.arange(spec.n_experts) // spec.group_size
    tokens = np.einsum("gngn->gn", company.sizes)[group]
    rate = company.taken / np.maximum(tokens, 1)
    expected = np.empty_like(company.pairs)
    for one in range(spec.n_groups):
        for two in range(spec.n_groups):
            block = np.ix_(group == one, group == two)
            across = rate[group == one] @ company.sizes[one, :, two] @ rate[group == two].T
            expected[block] = across if one != two else quasi_independent(company.pairs[block].sum(axis=1))
    return expected


def quasi_independent(sums: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, "N N"]:
    """Symmetric table a_i a_j with an empty diagonal and these row sums.

    Found by proportional fitting; where no such table exists (one row above half the total), the nearest that the fit
    reaches.

    >>> quasi_independent(np.array([2.0, 2.0, 2.0])).round(6).tolist()
    [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    a = sums / np.sqrt(max(sums.sum(), 1.0))
    for _ in range(_SWEEPS):
        # The square root damps the step; without it the fit of two factors that are one swings for ever.
        found = a * (a.sum() - a)
        a = a * np.sqrt(np.divide(sums, found, out=np.zeros_like(sums), where=found > 0))
    table = np.outer(a, a)
    np.fill_diagonal(table, 0.0)
    return table


def _finding(table: pd.DataFrame) -> Finding:
    found = table[table["q"] < DISCOVERY]
    more = int((found["lift"] > 0).sum())
    tested = (
        f"Of {table['p'].count():,} tested pairs {more:,} are chosen together more often than groups and loads "
        f"explain, and {len(found) - more:,} less often (q below 0.05)"
    )
    verdict = judge_cells(table, least=LEAST_EFFECT)
    if found.empty:
        return Finding(sentence=f"{tested}.", verdict=verdict, rung=0)
    row = surest_first(found).iloc[0]
    return Finding(
        sentence=(
            f"{tested}; the surest are experts {row['expert']} and {row['other']} of layer {row['layer']}, "
            f"{fold(row['lift'])} times as often as expected (95 % interval {fold_interval(row)})."
        ),
        verdict=verdict,
        rung=1,
        effect=float(row["lift"]),
        unit="log2 lift",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
    )


LEAST_EFFECT = 0.585
"""Log2 lift below which company is not worth having: one and a half times as often."""

COACTIVATION = Analysis(
    function=coactivation,
    question="Which experts are chosen together, beyond what groups and load make of it?",
    claim="Some experts are chosen together beyond what groups and loads explain.",
    method=(
        "Tokens that chose both over the expected, log2. Null: independence given how many experts a token takes from each "
        "group, and quasi-independence inside a group; p from a jackknife over blocks of sequences, corrected over all pairs."
    ),
    order=surest_first,
    finding=_finding,
)
