import doctest
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from ling_probe import stats


def test_doctests_hold():
    assert doctest.testmod(stats).failed == 0


def test_bootstrap_resamples_whole_clusters():
    weights = stats.bootstrap_weights(30, draws=4000, seed=1)
    assert (weights.sum(axis=1) == 30).all()
    assert weights.var() == pytest.approx(1 - 1 / 30, rel=0.05)


def test_bootstrap_interval_knows_clusters():
    """Tokens of a cluster are copies: an interval over clusters is as wide as the cluster means make it, not the tokens."""
    means = np.random.default_rng(0).normal(size=100)
    replicates = stats.bootstrap_weights(100, draws=4000) @ (50 * means) / 5000
    low, high = stats.percentile_interval(replicates)
    assert high - low == pytest.approx(2 * 1.96 * means.std() / 10, rel=0.08)


def test_wilson_interval_of_nothing_is_unknown_and_of_all_stays_below_one():
    assert np.isnan(stats.wilson_interval(0, 0)).all()
    low, high = stats.wilson_interval(20, 20)
    assert high == 1
    assert low == pytest.approx(20 / (20 + 1.96**2), abs=1e-3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_benjamini_hochberg_by_its_definition(p_values):
    p = np.array(p_values)
    ordered = np.sort(p)
    rank = np.arange(1, len(p) + 1)
    by_rank = np.minimum.accumulate((ordered * len(p) / rank)[::-1])[::-1]
    assert np.sort(stats.benjamini_hochberg(p)) == pytest.approx(np.minimum(by_rank, 1))


def test_benjamini_hochberg_does_not_count_what_was_not_tested():
    assert stats.benjamini_hochberg(np.array([0.04, np.nan]))[0] == 0.04


@given(st.integers(0, 2**32 - 1), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=40)
def test_labels_stay_in_their_block(seed, items):
    blocks, labels = np.array(items).T
    shuffled = stats.permute_labels(labels, blocks=blocks, draws=7, seed=seed)
    for block in np.unique(blocks):
        inside = blocks == block
        assert (np.sort(shuffled[:, inside], axis=1) == np.sort(labels[inside])).all()


def test_shuffles_are_even_and_repeat_with_their_seed():
    labels = np.array([0, 1, 2])
    shuffled = stats.permute_labels(labels, draws=6000, seed=3)
    _, seen = np.unique(shuffled, axis=0, return_counts=True)
    assert len(seen) == 6
    assert scipy_stats.chisquare(seen).pvalue > 0.001
    assert (shuffled == stats.permute_labels(labels, draws=6000, seed=3)).all()
    assert (shuffled != stats.permute_labels(labels, draws=6000, seed=4)).any()


def test_exceedances_by_counting_them_one_by_one():
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(12, 3)), rng.integers(0, 2, 12)
    shuffled = stats.permute_labels(labels, draws=300, seed=0)
    counted = stats.count_exceeding(values, labels == 1, shuffled == 1)
    for cell in range(3):
        observed = abs(values[labels == 1, cell].sum())
        assert counted[cell] == sum(abs(values[row == 1, cell].sum()) >= observed - 1e-12 for row in shuffled)


def test_a_permutation_that_changes_nothing_is_as_extreme_as_what_was_seen():
    values = np.random.default_rng(0).normal(size=(1000, 2)) * 1e6
    inside = np.arange(1000) % 2 == 0
    assert stats.count_exceeding(values, inside, np.tile(inside, (5, 1))).tolist() == [5, 5]


def test_permutation_p_is_even_without_an_effect():
    rng, found = np.random.default_rng(2), []
    for seed in range(300):
        values, labels = rng.normal(size=(20, 1)), np.arange(20) % 2
        shuffled = stats.permute_labels(labels, draws=99, seed=seed)
        found.append(stats.permutation_p(stats.count_exceeding(values - values.mean(), labels == 1, shuffled == 1), 99)[0])
    assert scipy_stats.kstest(found, "uniform").pvalue > 0.01
    assert min(found) >= 0.01


def test_jackknife_of_a_mean_is_its_t_test():
    values = np.random.default_rng(0).normal(0.5, 1, 20)
    left_out = (values.sum() - values) / 19
    low, high, p = stats.jackknife_interval(values.mean(), left_out)
    expected = scipy_stats.ttest_1samp(values, 0)
    assert p == pytest.approx(expected.pvalue)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval()))


def test_jackknife_of_one_block_or_no_spread_knows_nothing():
    assert np.isnan(stats.jackknife_interval(np.ones(2), np.ones((1, 2)))).all()
    assert np.isnan(stats.jackknife_interval(np.ones(2), np.ones((4, 2)))[2]).all()


def test_log2_ratio_of_a_negative_expectation_counts_as_none():
    assert stats.log2_ratio(np.array(7.5), np.array(-3.0)) == 4


def test_percentile_bounds_are_numpys_quantiles():
    replicates = np.random.default_rng(0).normal(size=(333, 4, 2))
    expected = np.quantile(replicates, [0.05, 0.95], axis=0)
    assert np.array(stats.percentile_interval(replicates, level=0.9)) == pytest.approx(expected)
    assert np.array(stats.percentile_interval(replicates[:1])) == pytest.approx(np.stack([replicates[0]] * 2))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 99))
def test_halves_are_even_in_every_stratum(strata, seed):
    strata = np.array(strata)
    half = stats.halves(strata, seed=seed)
    for some in [half, *(half[strata == stratum] for stratum in np.unique(strata))]:
        assert abs((some == 0).sum() - (some == 1).sum()) <= 1
    assert (half == stats.halves(strata, seed=seed)).all()


def test_shuffle_moments_are_those_of_every_arrangement():
    rng = np.random.default_rng(1)
    values, labels = rng.exponential(size=(8, 2)), np.array([0, 1, 1, 2, 0, 0, 1, 1])
    blocks = np.array([5, 5, 5, 5, 9, 9, 9, 7])
    ways = [permutations(np.flatnonzero(blocks == block)) for block in (5, 9, 7)]
    orders = [np.concatenate(some) for some in product(*map(list, ways))]
    found = stats.shuffle_moments(values, labels, blocks=blocks)
    homes = np.concatenate([np.flatnonzero(blocks == block) for block in (5, 9, 7)])
    for label in range(3):
        sums = np.array([values[homes][labels[order] == label].sum(axis=0) for order in orders])
        around = sums - sums.mean(axis=0)
        assert found.deviation[label] == pytest.approx(values[labels == label].sum(axis=0) - sums.mean(axis=0))
        assert found.variance[label] == pytest.approx((around**2).mean(axis=0))
        assert found.third[label] == pytest.approx((around**3).mean(axis=0))
    assert np.exp(found.log_arrangements).ravel() == pytest.approx([4 * 3, 6 * 3, 4])


def test_moments_of_parts_add_up():
    rng = np.random.default_rng(2)
    values, labels, blocks = rng.normal(size=(40, 3)), np.arange(40) % 2, np.arange(40) // 8
    whole, first, second = (
        stats.shuffle_moments(values[rows], labels[rows], blocks=blocks[rows])
        for rows in (slice(None), slice(16), slice(16, None))
    )
    assert (first + second).variance == pytest.approx(whole.variance)
    assert (first + second).p() == pytest.approx(whole.p())
    sums = [stats.ShuffleSums.of(values[rows], labels[rows], n_labels=2) for rows in (slice(None), slice(9), slice(9, None))]
    assert (sums[1] + sums[2]).moments().p() == pytest.approx(sums[0].moments().p())


@pytest.mark.parametrize(("rate", "least", "most"), [(0.05, 0.35, 4.0), (0.5, 0.7, 4.0), (4.0, 0.95, 2.0)])
def test_the_law_of_moments_is_that_of_many_real_permutations(rate, least, most):
    """Skewed counts in 40 problems of 3 to 8 steps, a hundred thousand shuffles: some 10, 70 and 170 values are not 0."""
    rng = np.random.default_rng(3)
    blocks = np.repeat(np.arange(40), rng.integers(3, 9, 40))
    labels = (rng.random(len(blocks)) < 0.2).astype(np.int64)
    raw = rng.poisson(rate * rng.gamma(1, 1, (len(blocks), 1)) * np.ones(6)) * rng.choice([1, 3], (len(blocks), 6))
    mean = np.stack([np.bincount(blocks, weights=column) / np.bincount(blocks) for column in raw.T], axis=1)
    values = raw - mean[blocks]
    shuffled = np.concatenate([stats.permute_labels(labels, blocks=blocks, draws=10_000, seed=[4, k]) for k in range(10)])
    sums = np.sort(np.abs((shuffled == 1).astype(float) @ values), axis=0)[::-1]
    null = stats.shuffle_moments(values, labels, blocks=blocks)
    for exceeding in (30_000, 5_000, 1_000, 200, 50):
        far = sums[exceeding - 1]
        told = stats.NullMoments(far, null.variance[1], null.third[1], null.log_arrangements[1]).p()
        ratio = told / (sums >= far - 1e-9).mean(axis=0)
        assert least < ratio.min()
        assert ratio.max() < (1.5 if exceeding >= 1_000 else most)


def test_what_no_shuffle_changes_is_not_tested_and_few_arrangements_bound_p():
    same = stats.shuffle_moments(np.ones((6, 1)), np.array([0, 1, 0, 1, 0, 1]))
    assert np.isnan(same.p()).all()
    lone = stats.shuffle_moments(np.arange(3.0)[:, None], np.array([0, 0, 1]), blocks=np.array([0, 0, 1]))
    assert np.isnan(lone.p()).all()
    few = stats.shuffle_moments(np.array([[0.0], [0.0], [0.0], [1e9]]), np.array([0, 0, 0, 1]))
    assert few.p().ravel() == pytest.approx([0.25, 0.25])


def test_shifts_are_all_turns_of_the_marks():
    rng = np.random.default_rng(5)
    values, marks = rng.normal(size=(9, 2)), rng.integers(0, 2, (9, 3))
    sums = np.array([np.roll(marks, turn, axis=0).T @ values for turn in range(9)])
    found = stats.shift_moments(values, marks)
    around = sums - sums.mean(axis=0)
    assert found.deviation == pytest.approx(around[0])
    assert found.variance == pytest.approx((around**2).mean(axis=0))
    assert found.third == pytest.approx((around**3).mean(axis=0))


def test_shifts_see_through_values_that_drift_along_a_sequence():
    """Runs of marks over a random walk: as if tokens were independent every second test rejects, by shifts one in twenty."""
    rng, p = np.random.default_rng(6), []
    for _ in range(200):
        found = stats.NullMoments(*np.zeros((4, 1, 1)))
        for _ in range(20):
            walk = np.cumsum(rng.normal(size=(40, 1)), axis=0)
            found += stats.shift_moments(walk, np.repeat(rng.integers(0, 2, 8), 5)[:, None])
        p.append(found.p().item())
    assert 0.02 <= np.mean(np.array(p) < 0.05) < 0.09


def test_sign_flips_of_few_pairs_are_all_of_them():
    differences = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [-0.5, 0.0], [1.5, 0.0]])
    signs = np.array(list(product([-1, 1], repeat=5)))
    exact = (np.abs(signs @ differences[:, 0]) >= np.abs(differences[:, 0].sum())).mean()
    found = stats.sign_flip_p(differences, flips=20_000)
    assert found[0] == pytest.approx(exact, abs=0.01)
    assert np.isnan(found[1])


def test_sign_flips_have_no_floor_and_keep_their_rate():
    rng = np.random.default_rng(7)
    clear = stats.sign_flip_p(rng.normal(1, 1, (100, 1)), flips=199)
    assert clear < 1e-9
    assert stats.sign_flip_p(np.ones((3, 1)))[0] == pytest.approx(0.25, abs=0.05)
    null = stats.sign_flip_p(rng.standard_t(3, (60, 2000)), flips=999, seed=1)
    assert 0.04 < (null < 0.05).mean() < 0.06
    assert (null < 0.001).mean() < 0.004
