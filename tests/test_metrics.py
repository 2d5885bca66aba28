import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from synthetic import synthetic_spec

from ling_probe import metrics
from ling_probe.routing import choose

EVEN, ALL_ON_ONE = np.full(8, 5), np.array([40, 0, 0, 0, 0, 0, 0, 0])

counts_of_layers = arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(2, 12)), elements=st.integers(0, 1000)).filter(
    lambda counts: (counts.sum(axis=-1) > 0).all()
)


def test_doctests_hold():
    assert doctest.testmod(metrics).failed == 0


@pytest.mark.parametrize(
    ("metric", "even", "all_on_one"),
    [
        (metrics.load_entropy, 1, 0),
        (metrics.effective_experts, 8, 1),
        (metrics.gini, 0, 1 - 1 / 8),
        (metrics.max_vio, 0, 7),
        (metrics.load_variation, 0, np.sqrt(7)),
        (metrics.dead_experts, 0, 7),
        (metrics.rare_experts, 0, 7),
    ],
)
def test_extremes(metric, even, all_on_one):
    assert metric(np.stack([EVEN, ALL_ON_ONE])) == pytest.approx([even, all_on_one], abs=1e-12)


def test_gini_is_the_mean_difference_of_all_pairs():
    share = np.random.default_rng(0).dirichlet(np.ones(30))
    pairs = np.abs(share[:, None] - share).mean() / (2 * share.mean())
    assert metrics.gini(share) == pytest.approx(pairs)


@given(counts_of_layers)
def test_bounds_and_order_of_experts_does_not_matter(counts):
    n, backwards = counts.shape[-1], counts[:, ::-1]
    for metric, low, high in (
        (metrics.load_entropy, 0, 1),
        (metrics.effective_experts, 1, n),
        (metrics.gini, 0, 1 - 1 / n),
        (metrics.max_vio, 0, n - 1),
    ):
        values = metric(counts)
        assert ((values >= low - 1e-9) & (values <= high + 1e-9)).all()
        assert metric(backwards) == pytest.approx(values)


@given(counts_of_layers)
def test_shares_sum_to_one_and_scale_does_not_matter(counts):
    assert metrics.load_share(counts).sum(axis=-1) == pytest.approx(1)
    assert metrics.gini(10 * counts) == pytest.approx(metrics.gini(counts))


def test_a_layer_without_tokens_is_nan_not_zero():
    nothing = np.zeros((1, 4), dtype=int)
    for metric in (metrics.load_entropy, metrics.effective_experts, metrics.gini, metrics.max_vio, metrics.load_variation):
        assert np.isnan(metric(nothing)).all()
    assert np.isnan(metrics.balance_floor(16, 4, 0)).all()


@pytest.mark.parametrize(
    ("tokens", "gini", "max_vio"), [(64, 0.384, 2.48), (256, 0.197, 1.15), (1000, 0.098, 0.51), (65_000, 0.012, 0.06)]
)
def test_floor_of_ling_2(tokens, gini, max_vio):
    floor = metrics.balance_floor(256, 8, tokens, n_groups=8, topk_groups=4)
    assert floor.gini == pytest.approx(gini, rel=0.03)
    assert floor.max_vio == pytest.approx(max_vio, rel=0.1)


def test_floor_of_a_small_group_limited_router_matches_the_full_rule():
    """The yardstick of the routing rule, on scores without preference."""
    rng, spec = np.random.default_rng(1), synthetic_spec(n_experts=8, top_k=3)
    ids = choose(rng.random((500 * 64, 8)), spec).reshape(500, 64 * 3)
    counts = np.stack([np.bincount(each, minlength=8) for each in ids])
    floor = metrics.balance_floor(8, 3, 64, n_groups=4, topk_groups=2)
    assert floor.gini == pytest.approx(metrics.gini(counts).mean(), rel=0.06)
    assert floor.max_vio == pytest.approx(metrics.max_vio(counts).mean(), rel=0.06)
