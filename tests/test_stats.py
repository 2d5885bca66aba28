import doctest

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
