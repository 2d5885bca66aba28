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

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.counting import require_sequences, segment_mask
from ling_probe.analysis.question import (
    DISCOVERY,
    Analysis,
    Finding,
    Verdict,
    fold,
    fold_interval,
    judge_cells,
    sure_effect,
    surest_first,
)
from ling_probe.run import Run
from ling_probe.spec import ModelSpec

LEAST_EXPECTED = 20.0
"""A pair expected less often is too rare to test: about one token a block."""
_SWEEPS = 200
"""Most steps of proportional fitting, which converges long before, unless a group has an expert that is in every pair."""
_CELLS = 2**24
"""Counts of pairs held at a time, by block and layer."""
_CONVERGED = 1e-9
"""Relative change of a factor at which the fit is done."""


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
    block_of = stats.sequence_blocks(len(run.sequences), blocks=blocks)
    found = company_by_layer(run, chosen, block_of, segments)
    table = pd.concat([_layer_pairs(layer, company, run.spec) for layer, company in found], ignore_index=True)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    return table


@dataclass
class Company:
    """What blocks of sequences tell about who is chosen with whom; adds up over blocks, the axis B."""

    pairs: Float64[np.ndarray, "B E E"]
    """Tokens that chose both; the diagonal is empty."""
    taken: Float64[np.ndarray, "B E N"]
    """Tokens that chose the expert, by how many they took from its group (0..K)."""
    sizes: Float64[np.ndarray, "B G N G N"]
    """Tokens by how many experts they took from one group and from another; both at least one, and the groups different."""

    def weighted(self, weights: Float64[np.ndarray, "C B"]) -> "Company":
        """Sums of blocks, each counted as often as a row of weights says."""
        return Company(*(np.tensordot(weights, each, axes=1) for each in (self.pairs, self.taken, self.sizes)))

    def with_totals(self) -> "Company":
        """All blocks together, then all but each one of them."""
        n_blocks = len(self.pairs)
        return self.weighted(np.concatenate([np.ones((1, n_blocks)), 1 - np.eye(n_blocks)]))


def _layer_pairs(layer: int, blocks: Company, spec: ModelSpec) -> pd.DataFrame:
    company = blocks.with_totals()
    one, two = np.triu_indices(spec.n_experts, 1)
    count, expected = company.pairs[:, one, two], expected_pairs(company, spec)[:, one, two]
    lift, difference = stats.log2_ratio(count, expected), (count - expected) / np.maximum(count.sum(axis=1, keepdims=True), 1)
    low, high, _ = stats.jackknife_interval(lift[0], lift[1:])
    # The difference, unlike the lift, is as likely to err up as down where counts are small. It is taken per choice: a total
    # shrinks with each block left out, and its jackknife would be too narrow by one block in all.
    _, _, p = stats.jackknife_interval(difference[0], difference[1:])
    tested = expected[0] >= LEAST_EXPECTED
    return pd.DataFrame(
        {
            "layer": layer,
            "expert": one,
            "other": two,
            "count": count[0].astype(np.int64),
            "expected": expected[0],
            "lift": lift[0],
            "ci_low": np.where(tested, low, np.nan),
            "ci_high": np.where(tested, high, np.nan),
            "p": np.where(tested, p, np.nan),
        }
    )


def company_by_layer(
    run: Run, layers: Sequence[int], block_of: Integer[np.ndarray, " S"], segments: Sequence[str] | None = None
) -> Iterator[tuple[int, Company]]:
    """Each layer with its company by block of sequences; as many layers are counted at a time as memory allows."""
    n_blocks = int(block_of.max()) + 1
    at_a_time = max(1, _CELLS // (n_blocks * run.spec.n_experts**2))
    for first in range(0, len(layers), at_a_time):
        some = layers[first : first + at_a_time]
        counts = [_Counts.none(run.spec, n_blocks) for _ in some]
        for block, ids in _blocks_of_choices(run, some, segments, block_of):
            for place, of_layer in enumerate(counts):
                of_layer.add(block, ids[place])
        for layer in some:
            yield layer, counts.pop(0).company()


@dataclass
class _Counts:
    """Company as it is counted, in whole numbers."""

    spec: ModelSpec
    pairs: Integer[np.ndarray, "B E E"]
    taken: Integer[np.ndarray, "B X"]
    sizes: Integer[np.ndarray, "B Y Y"]
    """Pairs of slots by (group, number taken from it)."""

    @classmethod
    def none(cls, spec: ModelSpec, n_blocks: int) -> Self:
        n_sizes, n_experts = spec.top_k + 1, spec.n_experts
        shapes = ((n_experts, n_experts), (n_experts * n_sizes,), (spec.n_groups * n_sizes,) * 2)
        return cls(spec, *(np.zeros((n_blocks, *shape), dtype=np.int64) for shape in shapes))

    def add(self, block: int, ids: Integer[np.ndarray, "K N"]) -> None:
        """Count the choices of some tokens of one block."""
        group, n_sizes = ids // self.spec.group_size, self.spec.top_k + 1
        size = _taken_from_its_group(group)
        self.pairs[block] += _slot_pairs(ids, self.spec.n_experts)
        self.taken[block] += np.bincount((ids * n_sizes + size).ravel(), minlength=self.taken.shape[1])
        self.sizes[block] += _slot_pairs(group * n_sizes + size, self.sizes.shape[1])

    def company(self) -> Company:
        n_groups, n_sizes = self.spec.n_groups, self.spec.top_k + 1
        # A token that takes n and m experts from two groups shows n m pairs of slots.
        number = np.maximum(np.arange(n_sizes), 1)
        sizes = self.sizes.reshape(-1, n_groups, n_sizes, n_groups, n_sizes) / np.multiply.outer(number, number)[:, None]
        return Company(self.pairs.astype(float), self.taken.reshape(*self.pairs.shape[:2], n_sizes).astype(float), sizes)


def _blocks_of_choices(
    run: Run, layers: Sequence[int], segments: Sequence[str] | None, block_of: Integer[np.ndarray, " S"]
) -> Iterator[tuple[int, Integer[np.ndarray, "M K N"]]]:
    for batch in run.batches(layers=layers):
        counted = np.flatnonzero(segment_mask(batch, segments))
        block = block_of[batch.sequence[counted]]
        order = np.argsort(block, kind="stable")
        ids = batch.expert_ids[counted[order]].transpose(1, 2, 0)
        edges = np.flatnonzero(np.diff(block[order], prepend=-1))
        for start, stop in itertools.pairwise([*edges, len(order)]):
            yield int(block[order[start]]), ids[:, :, start:stop].astype(np.int64, order="C")


def _taken_from_its_group(group: Integer[np.ndarray, "K N"]) -> Integer[np.ndarray, "K N"]:
    """How many experts the token took from the group of each of its experts."""
    small = group.astype(np.min_scalar_type(int(group.max(initial=0))))
    size = np.ones(group.shape, dtype=np.min_scalar_type(len(group)))
    for slot in range(len(group) - 1):
        same = small[slot] == small[slot + 1 :]
        size[slot] += same.sum(axis=0, dtype=size.dtype)
        size[slot + 1 :] += same
    return size.astype(np.int64)


def _slot_pairs(columns: Integer[np.ndarray, "K N"], n_columns: int) -> Integer[np.ndarray, "C C"]:
    """How often two slots of a token hold these two columns; symmetric."""
    scaled = columns * n_columns
    cells = np.concatenate([scaled[slot] + columns[slot + 1 :] for slot in range(len(columns))])
    found = np.bincount(cells.ravel(), minlength=n_columns**2).reshape(n_columns, n_columns)
    return found + found.T


def expected_pairs(company: Company, spec: ModelSpec) -> Float64[np.ndarray, "B E E"]:
    """Tokens that would choose both experts of each pair under the group-aware null; the diagonal is empty."""
    shape = (len(company.pairs), spec.n_groups, spec.group_size, spec.n_groups, spec.group_size)
    taken = company.taken.reshape(*shape[:3], -1)
    # Tokens that take n experts from a group are counted n times over its experts.
    tokens = taken.sum(axis=2) / np.maximum(np.arange(taken.shape[-1]), 1)
    rate = taken / np.maximum(tokens, 1)[:, :, None]
    across = rate[:, :, None] @ company.sizes.transpose(0, 1, 3, 2, 4) @ rate[:, None].swapaxes(-1, -2)
    inside = np.arange(spec.n_groups)
    own = company.pairs.reshape(shape)[:, inside, :, inside].sum(axis=-1)
    across[:, inside, inside] = quasi_independent(own).swapaxes(0, 1)
    return across.swapaxes(2, 3).reshape(company.pairs.shape)


def quasi_independent(sums: Float64[np.ndarray, "*rest N"]) -> Float64[np.ndarray, "*rest N N"]:
    """Symmetric table a_i a_j with an empty diagonal and these row sums; one table for each place on the other axes.

    Found by proportional fitting; where no such table exists (one row above half the total), the nearest that the fit
    reaches.

    >>> quasi_independent(np.array([2.0, 2.0, 2.0])).round(6).tolist()
    [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    a = sums / np.sqrt(np.maximum(sums.sum(axis=-1, keepdims=True), 1.0))
    for _ in range(_SWEEPS):
        # The square root damps the step; without it the fit of two factors that are one swings for ever.
        found = a * (a.sum(axis=-1, keepdims=True) - a)
        step = np.sqrt(np.divide(sums, found, out=np.zeros_like(sums), where=found > 0))
        a = a * step
        if (np.abs(step - 1) < _CONVERGED)[sums > 0].all():
            break
    return a[..., None] * a[..., None, :] * (1 - np.eye(sums.shape[-1]))


def _finding(table: pd.DataFrame) -> Finding:
    found = table[table["q"] < DISCOVERY]
    more, far = int((found["lift"] > 0).sum()), int((sure_effect(found) > LEAST_EFFECT).sum())
    tested = (
        f"Of {table['p'].count():,} tested pairs {more:,} are chosen together more often than groups and loads "
        f"explain, and {len(found) - more:,} less often (q below 0.05), {far:,} of them surely by half or more"
    )
    verdict = judge_cells(table, least=LEAST_EFFECT)
    # Under uneven loads the null is not exact: a lift must be larger than what that makes.
    verdict = Verdict.CANNOT_TELL if verdict is Verdict.SUPPORTED and not far else verdict
    if found.empty:
        return Finding(sentence=f"{tested}.", verdict=verdict, rung=0)
    row = surest_first(found).iloc[0]
    return Finding(
        sentence=(
            f"{tested}; the surest are experts {row['expert']:.0f} and {row['other']:.0f} of layer {row['layer']:.0f}, "
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
"""Log2 lift below which company is not worth having: one and a half times as often. Uneven loads alone make up to 0.2."""

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
