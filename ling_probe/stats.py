"""How sure we are: intervals over sequences, permutation tests, correction for many tests.

Tokens of one sequence are not independent, so the unit of every interval and test is the sequence or a whole reasoning step,
never the token. Every random draw takes its seed from the caller.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64, Integer, Real
from scipy import stats


def bootstrap_weights(n_clusters: int, *, draws: int = 1000, seed: int = 0) -> Float64[np.ndarray, "B S"]:
    """How often each cluster is drawn in each bootstrap sample; every row sums to `n_clusters`.

    Multiply by totals per cluster, ``weights @ totals``, and a statistic of the totals has its bootstrap distribution.
    """
    return np.random.default_rng(seed).multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=draws).astype(float)


def percentile_interval(
    replicates: Float64[np.ndarray, "B *rest"], *, level: float = 0.95
) -> tuple[Float64[np.ndarray, "*rest"], Float64[np.ndarray, "*rest"]]:
    """Bounds between which the middle `level` of the replicates lies.

    >>> [round(float(bound), 6) for bound in percentile_interval(np.arange(101.0), level=0.9)]
    [5.0, 95.0]
    """
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(low), np.asarray(high)


def wilson_interval(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion; NaN without trials.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if trials == 0:
        return np.nan, np.nan
    found = stats.binomtest(successes, trials).proportion_ci(confidence_level=level, method="wilson")
    return float(found.low), float(found.high)


def benjamini_hochberg(p: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Smallest false discovery rate at which each test counts as a discovery; NaN stays NaN and is no test.

    >>> benjamini_hochberg(np.array([0.01, 0.02, np.nan, 0.9])).round(3).tolist()
    [0.03, 0.03, nan, 0.9]
    """
    tested = ~np.isnan(p)
    q = np.full(p.shape, np.nan)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested])
    return q


def permutation_p(exceeding: Integer[np.ndarray, "*rest"], permutations: int) -> Float64[np.ndarray, "*rest"]:
    """P value from how many permutations were at least as extreme: (1 + exceeding) / (1 + permutations), so never 0.

    >>> permutation_p(np.array([0, 99]), 99)
    array([0.01, 1.  ])
    """
    return (1 + exceeding) / (1 + permutations)


def permute_labels(
    labels: Integer[np.ndarray, " N"],
    *,
    blocks: Integer[np.ndarray, " N"] | None = None,
    draws: int,
    seed: int | Sequence[int],
) -> Integer[np.ndarray, "B N"]:
    """Shuffle labels, `draws` times; with `blocks`, only among items of the same block.

    For steps the items are whole steps and the blocks are the problems; for families the items are sequences, without blocks.
    """
    rng = np.random.default_rng(seed)
    block = np.zeros(len(labels), dtype=np.int64) if blocks is None else blocks
    home = np.argsort(block, kind="stable")
    shuffled = np.empty((draws, len(labels)), dtype=labels.dtype)
    for draw in range(draws):
        shuffled[draw, home] = labels[np.lexsort((rng.random(len(labels)), block))]
    return shuffled


def count_exceeding(
    values: Float64[np.ndarray, "N C"], inside: Bool[np.ndarray, " N"], permuted: Bool[np.ndarray, "B N"]
) -> Integer[np.ndarray, " C"]:
    """Count permutations whose sum of `values` over the items inside is at least as far from 0 as the observed sum.

    Both sides count, so the null distribution should be centred on 0. All cells share a permutation; memory holds a slice of
    permutations by cells. Costs B·N·C multiplications.
    """
    # The same sum in another order differs by rounding; a tie must count as at least as extreme.
    observed = np.abs(values[inside].sum(axis=0)) - 1e-9 * np.abs(values).sum(axis=0)
    exceeding = np.zeros(values.shape[1], dtype=np.int64)
    for some in np.array_split(permuted, -(-len(permuted) // 128)):
        exceeding += (np.abs(some.astype(float) @ values) >= observed).sum(axis=0)
    return exceeding


def jackknife_interval(
    estimate: Float64[np.ndarray, "*rest"],
    left_out: Float64[np.ndarray, "J *rest"],
    *,
    level: float = 0.95,
) -> tuple[Float64[np.ndarray, "*rest"], Float64[np.ndarray, "*rest"], Float64[np.ndarray, "*rest"]]:
    """Lower bound, upper bound and two-sided p value against 0, from estimates that each leave out one of J equal blocks.

    Student's t with J - 1 degrees of freedom (Efron & Tibshirani 1993, ch. 11). An estimate that no block changes has no
    spread to judge it by: its p is NaN. So is everything with fewer than two blocks.
    """
    n = len(left_out)
    if n < 2:
        nothing = np.full(estimate.shape, np.nan)
        return nothing, nothing, nothing
    spread = np.sqrt((n - 1) / n * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
    spread = np.where(spread > 0, spread, np.nan)
    reach = stats.t.ppf((1 + level) / 2, n - 1) * spread
    p = 2 * stats.t.sf(np.abs(estimate) / spread, n - 1)
    return estimate - reach, estimate + reach, p


def sequence_blocks(n_sequences: int, *, blocks: int = 20) -> Integer[np.ndarray, " S"]:
    """Deal sequences in turn to at most `blocks` blocks of nearly equal size.

    >>> sequence_blocks(5, blocks=2).tolist()
    [0, 1, 0, 1, 0]
    """
    return np.arange(n_sequences) % max(1, min(blocks, n_sequences))


def log2_ratio(observed: Real[np.ndarray, "*rest"], expected: Real[np.ndarray, "*rest"]) -> Float64[np.ndarray, "*rest"]:
    """Effect size log2((observed + 1/2) / (expected + 1/2)); a negative expectation counts as 0.

    >>> log2_ratio(np.array([7.5, 0.5]), np.array([1.5, 0.5])).tolist()
    [2.0, 0.0]
    """
    return np.log2((observed + 0.5) / (np.maximum(expected, 0.0) + 0.5))


def bundles(n_sequences: int, *, most: int = 400, seed: int = 0) -> Integer[np.ndarray, " S"]:
    """Deal sequences at random to at most `most` bundles of nearly equal size, the units that are then resampled.

    A bundle of independent sequences is as good a unit as one sequence (its totals are independent of the others'), and the
    totals of a run of any length then fit into memory. Up to `most` sequences, each is its own.

    >>> bundles(3).tolist(), np.bincount(bundles(1000)).max().item()
    ([0, 1, 2], 3)
    """
    if n_sequences <= most:
        return np.arange(n_sequences)
    return np.random.default_rng(seed).permutation(np.arange(n_sequences) % most)


def count_flipped(values: Float64[np.ndarray, "U *rest"], *, draws: int = 9999, seed: int = 0) -> Integer[np.ndarray, "*rest"]:
    """Count draws of a random sign for each unit whose signed sum is at least as far from 0 as the sum itself.

    A sign-flip test: where two conditions may be exchanged within a unit, its difference is as likely to have either sign. All
    cells share the signs; a slice of draws is held at a time.
    """
    flat = values.reshape(len(values), -1).astype(np.float32)
    observed = np.abs(flat.sum(axis=0)) - 1e-5 * np.abs(flat).sum(axis=0)
    exceeding = np.zeros(flat.shape[1], dtype=np.int64)
    for signs in random_signs(len(values), draws=draws, seed=seed):
        exceeding += (np.abs(signs @ flat) >= observed).sum(axis=0)
    return exceeding.reshape(values.shape[1:])


def random_signs(n_units: int, *, draws: int, seed: int = 0) -> Iterator[Float32[np.ndarray, "b U"]]:
    """Random signs for every unit, a slice of the draws at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, draws, 256):
        yield (2 * rng.integers(0, 2, (min(256, draws - start), n_units), dtype=np.int8) - 1).astype(np.float32)
