import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import synthetic_spec

from ling_probe.routing import (
    choice_scores,
    choose,
    chosen_weights,
    compare_routing,
    kept_groups,
    route,
    router_logits,
    scores,
)

SPEC = synthetic_spec()


def slow_route(logits, bias, spec):
    """The rule for one token, spelled out with lists."""
    score = [1 / (1 + math.exp(-z)) for z in logits]
    choice = [s + b for s, b in zip(score, bias, strict=True)]
    groups = [range(g * spec.group_size, (g + 1) * spec.group_size) for g in range(spec.n_groups)]
    if spec.n_groups > 1:
        two_best = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in groups]
        kept = sorted(range(spec.n_groups), key=lambda g: (-two_best[g], g))[: spec.topk_groups]
    else:
        kept = [0]
    candidates = [e for g in kept for e in groups[g]]
    ids = sorted(candidates, key=lambda e: (-choice[e], e))[: spec.top_k]
    total = sum(score[e] for e in ids)
    return ids, [score[e] / total * spec.scale for e in ids]


@st.composite
def routers(draw):
    """A geometry, logits [T E] and a bias that changes choices."""
    n_groups, group_size = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    topk_groups = draw(st.integers(1, n_groups))
    top_k = draw(st.integers(1, topk_groups * group_size))
    spec = synthetic_spec(n_experts=n_groups * group_size, n_groups=n_groups, topk_groups=topk_groups, top_k=top_k)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0]))
    return spec, rng.normal(0, 2, (7, spec.n_experts)), rng.normal(0, spread, spec.n_experts)


@given(routers())
def test_route_is_the_rule_spelled_out(router):
    spec, logits, bias = router
    routing = route(logits, bias, spec)
    for token, (ids, weights) in enumerate(slow_route(row, bias, spec) for row in logits):
        assert routing.ids[token].tolist() == ids
        np.testing.assert_allclose(routing.weights[token], weights, rtol=1e-12)


@given(routers())
def test_choices_are_distinct_in_few_groups_and_weights_sum_to_the_scale(router):
    spec, logits, bias = router
    routing = route(logits, bias, spec)
    for ids in routing.ids.astype(int):
        assert len(set(ids)) == spec.top_k
        assert len(set(ids // spec.group_size)) <= spec.topk_groups
    np.testing.assert_allclose(routing.weights.sum(-1), spec.scale)


@given(routers(), st.integers(0, 2**32 - 1))
def test_a_choice_depends_on_its_own_token_only(router, seed):
    spec, logits, bias = router
    order = np.random.default_rng(seed).permutation(len(logits))
    np.testing.assert_array_equal(route(logits[order], bias, spec).ids, route(logits, bias, spec).ids[order])


def test_by_hand_groups_then_bias_then_unbiased_weights():
    """Expert 8 has the best score of all, and its group is out; the bias lifts 1 above 0, and weighs nothing."""
    score = np.full(12, 0.1)
    score[[0, 1, 4, 5, 8]] = 0.6, 0.5, 0.5, 0.4, 0.85
    bias = np.zeros(12)
    bias[1] = 0.3
    spec = synthetic_spec(n_experts=12, n_groups=3, topk_groups=2, top_k=3, scale=2.5)
    logits = np.log(score / (1 - score))
    # Two best of each group: 0.6 + 0.8 = 1.4, 0.5 + 0.4 = 0.9, 0.85 + 0.1 = 0.95.
    assert kept_groups(choice_scores(score, bias), spec).tolist() == [True, False, True]
    routing = route(logits, bias, spec)
    assert routing.ids.tolist() == [8, 1, 0]
    np.testing.assert_allclose(routing.weights, np.array([0.85, 0.5, 0.6]) / 1.95 * 2.5)
    assert route(logits, np.zeros(12), spec).ids.tolist() == [8, 0, 1]


def test_ties_go_to_the_lower_group_and_the_lower_id():
    assert kept_groups(np.zeros(16), SPEC).tolist() == [True, True, False, False]
    assert choose(np.zeros(16), SPEC).tolist() == [0, 1, 2, 3]
    assert choose(np.zeros((2, 3, 16)), SPEC).shape == (2, 3, 4)


def test_ties_go_to_the_lower_id_among_hundreds():
    """Sorts of short rows are stable by accident."""
    choice = np.random.default_rng(0).integers(0, 3, (50, 256)).astype(float)
    spec = synthetic_spec(n_experts=256, n_groups=1, topk_groups=1, top_k=8)
    expected = [sorted(range(256), key=lambda expert: (-row[expert], expert))[:8] for row in choice]
    assert choose(choice, spec).tolist() == expected


def test_without_groups_the_best_scores_win():
    spec = synthetic_spec(n_groups=1, topk_groups=1)
    choice = np.random.default_rng(0).normal(size=(50, 16))
    np.testing.assert_array_equal(choose(choice, spec), np.argsort(-choice, axis=-1)[:, :4])


def test_scores_at_the_ends_and_in_float32():
    assert scores(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(scores(np.array([2.0])), 1 / (1 + np.exp(-2.0)))
    assert scores(np.zeros(3, np.float32)).dtype == np.float32


def test_scores_that_vanish_give_no_nan():
    weights = chosen_weights(np.zeros(16), np.arange(4), SPEC)
    assert weights.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_router_logits_round_operands_to_float32_and_sum_in_float64():
    inputs, weight = np.array([[1 + 1e-12, 1e8, 1.0, -1e8]]), np.array([[1.0, 1.0, 1.0, 1.0]])
    assert router_logits(inputs, weight).tolist() == [[2.0]]


def test_ids_take_two_bytes_only_above_256_experts():
    assert choose(np.zeros(256), synthetic_spec(n_experts=256)).dtype == np.uint8
    assert choose(np.zeros(260), synthetic_spec(n_experts=260)).dtype == np.uint16


@pytest.fixture
def recorded():
    rng = np.random.default_rng(3)
    logits, bias = rng.normal(0, 1, (40, 3, 16)), rng.normal(0, 0.2, (3, 16))
    routing = route(logits, bias, SPEC)
    return routing.ids.copy(), routing.weights.copy(), logits, bias


def test_compare_agrees_with_itself_in_float32(recorded):
    ids, weights, logits, bias = recorded
    difference = compare_routing(ids, weights.astype(np.float32), logits.astype(np.float32), bias, SPEC)
    assert (difference.choices, difference.differ, difference.near_ties) == (120, 0, 0)
    assert 0 < difference.max_weight_error < 1e-6


def test_compare_counts_wrong_sets_wrong_order_and_ids_that_do_not_exist(recorded):
    ids, weights, logits, bias = recorded
    ids = ids.astype(np.int64)
    ids[0, 0, 0] = next(e for e in range(16) if e not in ids[0, 0])
    ids[1, 1] = ids[1, 1, ::-1]
    ids[2, 2, 3] = -1
    ids[3, 0, 3] = 16
    ids[4, 0, 3] = ids[4, 0, 2]
    difference = compare_routing(ids, weights, logits, bias, SPEC)
    assert (difference.differ, difference.near_ties) == (5, 0)


def test_compare_notices_a_router_without_bias_or_groups(recorded):
    _, _, logits, bias = recorded
    unbiased, ungrouped = route(logits, 0 * bias, SPEC), route(logits, bias, synthetic_spec(n_groups=1, topk_groups=1))
    assert compare_routing(unbiased.ids, unbiased.weights, logits, bias, SPEC).differ > 60
    assert compare_routing(ungrouped.ids, ungrouped.weights, logits, bias, SPEC).differ > 30


def test_compare_measures_weights_expert_by_expert(recorded):
    ids, weights, logits, bias = recorded
    weights[5, 1, 2] += 0.25
    assert compare_routing(ids, weights, logits, bias, SPEC).max_weight_error == pytest.approx(0.25)
    biased = choice_scores(scores(logits), bias)
    assert compare_routing(ids, chosen_weights(biased, ids, SPEC), logits, bias, SPEC).max_weight_error > 0.05
    weights[5, 1, 2] = np.nan
    assert np.isnan(compare_routing(ids, weights, logits, bias, SPEC).max_weight_error)


@pytest.mark.parametrize(("gap", "near", "differ"), [(1.9e-5, 1, 0), (2.1e-5, 0, 1)])
def test_compare_forgives_another_set_within_the_tolerance(gap, near, differ):
    spec = synthetic_spec(n_groups=1, topk_groups=1, top_k=2)
    score = np.full(16, 0.1)
    score[:3] = 0.8, 0.6 + gap, 0.6
    logits, ids = np.log(score / (1 - score))[None], np.array([[0, 2]])
    difference = compare_routing(ids, chosen_weights(scores(logits), ids, spec), logits, np.zeros(16), spec)
    assert (difference.near_ties, difference.differ, difference.max_weight_error) == (near, differ, 0.0)


@pytest.mark.parametrize(("gap", "differ"), [(0.9e-5, 0), (1.1e-5, 1)])
def test_compare_forgives_an_order_within_the_tolerance(gap, differ):
    spec = synthetic_spec(n_groups=1, topk_groups=1, top_k=2)
    score = np.full(16, 0.1)
    score[:2] = 0.6 + gap, 0.6
    logits, ids = np.log(score / (1 - score))[None], np.array([[1, 0]])
    difference = compare_routing(ids, chosen_weights(scores(logits), ids, spec), logits, np.zeros(16), spec)
    assert (difference.near_ties, difference.differ) == (0, differ)


def test_compare_forgives_another_group_within_the_tolerance():
    spec = synthetic_spec(n_experts=8, n_groups=4, topk_groups=1, top_k=2)
    score = np.array([0.1, 0.1, 0.5, 0.4 + 1e-6, 0.5, 0.4, 0.1, 0.1])
    logits, ids = np.log(score / (1 - score))[None], np.array([[4, 5]])
    weights = chosen_weights(scores(logits), ids, spec)
    assert compare_routing(ids, weights, logits, np.zeros(8), spec).near_ties == 1
    assert compare_routing(ids, weights, logits, np.zeros(8), spec, tolerance=1e-8).differ == 1


def test_compare_never_agrees_on_numbers_that_are_not(recorded):
    ids, weights, logits, bias = recorded
    logits[0, 0] = np.nan
    assert compare_routing(ids, weights, logits, bias, SPEC).differ == 1


@settings(max_examples=25)
@given(routers())
def test_compare_accepts_any_choice_made_on_scores_off_by_less_than_the_tolerance(router):
    spec, logits, bias = router
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, bias.shape) * 1e-2
    ids = route(logits, bias + noise, spec).ids
    weights = chosen_weights(scores(logits), ids, spec)
    difference = compare_routing(ids, weights, logits, bias, spec, tolerance=1e-2)
    assert difference.differ == 0
    assert difference.max_weight_error == 0.0
