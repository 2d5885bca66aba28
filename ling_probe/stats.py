"""How sure we are: intervals over sequences, permutation tests, correction for many tests.

Tokens of one sequence are not independent, so the unit of every interval and test is the sequence or a whole reasoning step,
never the token. Every random draw takes its seed from the caller.

Three nulls, by what may be exchanged: labels over the items of a block (`ShuffleSums`, `permute_labels`), signs of differences
(`sign_flip_p`), and where marks stand along a sequence (`shift_moments`). The first and the last know the exact mean,
variance and skewness of a sum without drawing anything (`NullMoments`), for any number of cells, in a run of any length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Integer, Real
from scipy import sparse, special, stats


def bootstrap_weights(n_clusters: int, *, draws: int = 1000, seed: int = 0) -> Float64[np.ndarray, "B S"]:
    """How often each cluster is drawn in each bootstrap sample; every row sums to `n_clusters`.

    Multiply by totals per cluster, ``weights @ totals``, and a statistic of the totals has its bootstrap distribution.
    """
    return np.random.default_rng(seed).multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=draws).astype(float)


def percentile_interval(
    replicates: Float[np.ndarray, "B *rest"], *, level: float = 0.95
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Bounds between which the middle `level` of the replicates lies, in between interpolated.

    >>> [round(float(bound), 6) for bound in percentile_interval(np.arange(101.0), level=0.9)]
    [5.0, 95.0]
    """
    # np.quantile selects along the slow axis; sorting rows that lie together takes half the time.
    ordered = np.sort(np.ascontiguousarray(np.moveaxis(replicates, 0, -1)), axis=-1)
    last = len(replicates) - 1
    places = [last * (1 - level) / 2, last * (1 + level) / 2]
    low, high = (_between(ordered[..., int(place)], ordered[..., min(int(place) + 1, last)], place % 1) for place in places)
    return low, high


def _between(low: Float[np.ndarray, "*rest"], high: Float[np.ndarray, "*rest"], part: float) -> Float[np.ndarray, "*rest"]:
    return np.asarray(low + part * (high - low))


def wilson_interval(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion; NaN without trials.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if trials == 0:
        return np.nan, np.nan
    found = stats.binomtest(successes, trials).proportion_ci(confidence_level=level, method="wilson")
    return float(found.low), float(found.high)


def mcnemar_p(lost: int, gained: int) -> float:
    """Exact two-sided p of paired outcomes that changed, if either change were as likely; 1 where nothing changed.

    >>> mcnemar_p(8, 1)
    0.0390625
    """
    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def paired_interval(lost: int, gained: int, n: int) -> tuple[float, float]:
    """95 % interval of the change of a share, from n paired outcomes of which so many changed (Agresti and Min 2005).

    Unlike a bootstrap's it does not shrink to a point where nothing changed.

    >>> [round(bound, 3) for bound in paired_interval(0, 0, 20)]
    [-0.089, 0.089]
    """
    b, c, n_more = lost + 0.5, gained + 0.5, n + 2
    half = stats.norm.ppf(0.975) * np.sqrt(b + c - (c - b) ** 2 / n_more) / n_more
    return float((c - b) / n_more - half), float((c - b) / n_more + half)


def rank_p(value: float, others: Float64[np.ndarray, " D"], *, side: int = 0) -> float:
    """P of a value among others that it is exchangeable with if the claim is false; it counts among them.

    Args:
        value: What was seen.
        others: The same of matched conditions.
        side: 1 for high values, -1 for low ones, 0 for those far from the mean of all.

    >>> rank_p(3.0, np.array([1.0, 2.0, 3.0]), side=1), rank_p(9.0, np.array([1.0, 2.0, 3.0]))
    (0.5, 0.25)
    """
    every = np.append(others, value)
    far = np.abs(every - every.mean()) if side == 0 else side * every
    # The same sum in another order differs by rounding; a tie must count as at least as far.
    return float((far >= far[-1] - 1e-12 * np.abs(far).max()).mean())


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


def halves(strata: Integer[np.ndarray, " N"], *, seed: int = 0) -> Integer[np.ndarray, " N"]:
    """Deal items at random to halves 0 and 1, every stratum as evenly as it goes: to choose on one, to measure on the other.

    >>> np.bincount(halves(np.array([0, 0, 0, 0, 1, 1]))).tolist()
    [3, 3]
    """
    order = np.lexsort((np.random.default_rng(seed).random(len(strata)), strata))
    half = np.empty(len(strata), dtype=np.int64)
    half[order] = np.arange(len(strata)) % 2
    return half


@dataclass(frozen=True)
class NullMoments:
    """Where sums lie among those that chance would make, cell by cell; moments of independent parts add up."""

    deviation: Float64[np.ndarray, "*rest"]
    """The observed sum minus its mean under the null."""
    variance: Float64[np.ndarray, "*rest"]
    third: Float64[np.ndarray, "*rest"]
    """Third central moment."""
    log_arrangements: Float64[np.ndarray, "*same"]
    """Natural log of how many arrangements the null has; broadcasts with the others."""

    def __add__(self, other: "NullMoments") -> "NullMoments":
        return NullMoments(
            self.deviation + other.deviation,
            self.variance + other.variance,
            self.third + other.third,
            self.log_arrangements + other.log_arrangements,
        )

    def of(self, place: int) -> "NullMoments":
        """Those of one place of the first axis."""
        return NullMoments(self.deviation[place], self.variance[place], self.third[place], self.log_arrangements[place])

    def p(self, *, least: float = 0.0) -> Float64[np.ndarray, "*rest"]:
        """Two-sided p: the chance of a sum at least as far from its mean, by the Pearson type III law with these moments.

        An approximation without the floor that drawn permutations have, never below one over the number of arrangements.
        Against a hundred thousand real permutations of skewed counts of which a hundred or more are not 0: within a tenth down
        to p = 0.01, then too large (careful), at 0.0005 by half in the median; where ten are not 0, up to 2.5 times too small.
        NaN, no test, where every arrangement gives the same sum.

        Args:
            least: Variance up to which a cell counts as constant; above what rounding leaves of equal sums.
        """
        spread = np.sqrt(np.where(self.variance > least, self.variance, np.nan))
        far, skew = np.abs(self.deviation) / spread, self.third / spread**3
        with np.errstate(invalid="ignore"):
            p = stats.pearson3.sf(far, skew) + stats.pearson3.cdf(-far, skew)
        return np.clip(p, np.maximum(np.exp(-self.log_arrangements), np.finfo(float).tiny), 1.0)


@dataclass(frozen=True)
class ShuffleSums:
    """What the law of a label's sum under a shuffle inside blocks follows from: A labels, G blocks, C cells.

    Sums of parts of a run add up where their blocks are the same ones; where every part holds whole blocks, add `moments`.
    """

    inside: Float64[np.ndarray, "A C"]
    """Sum of the values of the items that carry the label."""
    powers: Float64[np.ndarray, "3 G C"]
    """Sums of the values, their squares and their cubes by block."""
    counts: Float64[np.ndarray, "A G"]
    """Items of each block that carry each label."""

    @classmethod
    def of(
        cls,
        values: Float[np.ndarray, "N C"],
        labels: Integer[np.ndarray, " N"],
        *,
        blocks: Integer[np.ndarray, " N"] | None = None,
        n_labels: int,
        n_blocks: int = 1,
    ) -> "ShuffleSums":
        """Sums over items with their values, label and block; without `blocks`, all are in one."""
        block = np.zeros_like(labels) if blocks is None else blocks
        by_label, by_block = (_sums_by(of, n, values.dtype) for of, n in ((labels, n_labels), (block, n_blocks)))
        squares = values * values
        powers = np.stack([by_block @ power for power in (values, squares, squares * values)]).astype(float)
        counts = np.bincount(labels * n_blocks + block, minlength=n_labels * n_blocks).reshape(n_labels, n_blocks).astype(float)
        return cls((by_label @ values).astype(float), powers, counts)

    def __add__(self, other: "ShuffleSums") -> "ShuffleSums":
        return ShuffleSums(self.inside + other.inside, self.powers + other.powers, self.counts + other.counts)

    def moments(self) -> NullMoments:
        """Exact moments of each label's sum when labels are shuffled among the items of their block (sampling without return).

        For m of n items with the label and values v of mean u: mean m·u, variance m(n-m)/(n(n-1))·Σ(v-u)², third central
        moment m(n-m)(n-2m)/(n(n-1)(n-2))·Σ(v-u)³. Blocks are shuffled independently, so theirs add.
        """
        m, n = self.counts, np.maximum(self.counts.sum(axis=0), 1)
        first, second, cubes = self.powers
        mean = first / n[:, None]
        squared = second - first * mean
        cubed = cubes - 3 * mean * second + 2 * first * mean**2
        pairs = m * (n - m) / (n * np.maximum(n - 1, 1))
        return NullMoments(
            self.inside - m @ mean,
            pairs @ squared,
            (pairs * (n - 2 * m) / np.maximum(n - 2, 1)) @ cubed,
            _log_choices(n, m).sum(axis=1, keepdims=True),
        )


def _sums_by(owner: Integer[np.ndarray, " N"], n: int, dtype: np.dtype) -> sparse.csr_array:
    return sparse.csr_array((np.ones(len(owner), dtype), (owner, np.arange(len(owner)))), shape=(n, len(owner)))


def _log_choices(n: Float64[np.ndarray, "*rest"], m: Float64[np.ndarray, "*more"]) -> Float64[np.ndarray, "*more"]:
    """Log of the number of ways to choose m of n."""
    return special.gammaln(n + 1) - special.gammaln(m + 1) - special.gammaln(n - m + 1)


def shuffle_moments(
    values: Float[np.ndarray, "N C"], labels: Integer[np.ndarray, " N"], *, blocks: Integer[np.ndarray, " N"] | None = None
) -> NullMoments:
    """Moments [A C] of each label's sum of values when the labels 0 to A-1 are shuffled, inside `blocks` if there are any.

    >>> found = shuffle_moments(np.array([[1.0], [2.0], [3.0], [6.0]]), np.array([0, 0, 1, 1]))
    >>> found.deviation.ravel().tolist(), found.variance.ravel().round(3).tolist()
    ([-3.0, 3.0], [4.667, 4.667])
    """
    block = None if blocks is None else np.unique(blocks, return_inverse=True)[1]
    n_blocks = 1 if block is None else int(block.max()) + 1
    return ShuffleSums.of(values, labels, blocks=block, n_labels=int(labels.max()) + 1, n_blocks=n_blocks).moments()


def shift_moments(values: Float[np.ndarray, "T C"], marks: Real[np.ndarray, "T A"]) -> NullMoments:
    """Moments [A C] of the sum of values at the marks of one sequence when all marks move along it together, round the end.

    Every shift of a circle is as likely as any other, so neighbours stay neighbours and runs of a label keep their length.
    Exact, over all T shifts; sequences are independent, so add their moments up. Costs T log T for each mark and cell.

    >>> found = shift_moments(np.array([[0.0], [0.0], [3.0]]), np.array([[0], [0], [1]]))
    >>> found.deviation.item(), found.variance.round(6).item()
    (2.0, 2.0)
    """
    length = len(values)
    turned = np.fft.rfft(marks.astype(float), axis=0).conj()[:, :, None] * np.fft.rfft(values, axis=0)[:, None, :]
    sums = np.fft.irfft(turned, length, axis=0)
    around = sums - sums.mean(axis=0)
    return NullMoments(around[0], (around**2).mean(axis=0), (around**3).mean(axis=0), np.full((1, 1), np.log(length)))


def sign_flip_p(
    differences: Float64[np.ndarray, "S C"], *, flips: int = 1999, seed: int | Sequence[int] = 0
) -> Float64[np.ndarray, " C"]:
    """Two-sided p of the sum of paired differences, when each of S pairs could as well have come the other way round.

    Of `flips` random sign patterns. Fewer than ten as extreme make too coarse a p; then it is that of a normal law with the
    exact variance, whose tail no sum of random signs exceeds more than 3.2 times (Bentkus & Dzindzalieta 2015). NaN where all
    differences are 0.
    """
    rng = np.random.default_rng(seed)
    observed, scale = np.abs(differences.sum(axis=0)), np.sqrt((differences**2).sum(axis=0))
    exceeding = np.zeros(differences.shape[1], dtype=np.int64)
    for size in _slices(flips):
        signs = rng.integers(0, 2, (size, len(differences))) * 2.0 - 1.0
        exceeding += (np.abs(signs @ differences) >= observed - 1e-9 * scale).sum(axis=0)
    spread = np.where(scale > 0, scale, np.nan)
    tail = np.maximum(2 * stats.norm.sf(observed / spread), 2.0 ** (1 - len(differences)))
    return np.where(scale > 0, finer_p(exceeding, flips, tail), np.nan)


COARSE = 10
"""With fewer permutations as extreme as what was seen, their share says little of a small p."""


def finer_p(
    exceeding: Integer[np.ndarray, "*rest"], permutations: int, tail: Float64[np.ndarray, "*rest"]
) -> Float64[np.ndarray, "*rest"]:
    """P values of drawn permutations, and near their floor those of a law for the tail.

    >>> finer_p(np.array([2, 99]), 999, np.array([1e-5, 0.2]))
    array([1.e-05, 1.e-01])
    """
    return np.where(exceeding < COARSE, tail, permutation_p(exceeding, permutations))


def _slices(draws: int, size: int = 128) -> list[int]:
    return [min(size, draws - start) for start in range(0, draws, size)]


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
