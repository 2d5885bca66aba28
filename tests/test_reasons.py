import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import synthetic_spec
from test_routing import routers

from ling_probe.routing import (
    Reason,
    choice_scores,
    choose,
    chosen,
    flip_distance,
    kept_groups,
    margin,
    reasons,
    route,
    scores,
    ungrouped,
)

SPEC = synthetic_spec()


def mask(ids, n_experts) -> np.ndarray:
    return (ids[..., None] == np.arange(n_experts)).any(axis=-2)


@given(routers(), st.booleans())
def test_the_mask_is_the_choice_ties_included(router, tied):
    spec, logits, bias = router
    choice = choice_scores(scores(logits), bias)
    choice = np.round(choice, 1) if tied else choice
    np.testing.assert_array_equal(chosen(choice, spec), mask(choose(choice, spec), spec.n_experts))


@given(routers())
def test_reasons_are_counterfactual_choices(router):
    spec, logits, bias = router
    ids = route(logits, bias, spec).ids
    why = reasons(ids, scores(logits), bias, spec)
    for token, row in enumerate(ids.astype(int)):
        unbiased = set(route(logits[token], 0 * bias, spec).ids.tolist())
        free = set(route(logits[token], bias, ungrouped(spec)).ids.tolist())
        assert why[token].tolist() == [(e not in unbiased) + 2 * (e not in free) for e in row]
    if not bias.any():
        assert not np.isin(why, [Reason.BIAS, Reason.BOTH]).any()
    if spec.n_groups == spec.topk_groups:
        assert not np.isin(why, [Reason.GROUPS, Reason.BOTH]).any()


def test_reasons_by_hand():
    """Expert 8 is the best of all and its group is out; the bias lifts 1 above 0."""
    score = np.full(12, 0.1)
    score[[0, 1, 4, 5, 8]] = 0.6, 0.5, 0.5, 0.4, 0.85
    bias = np.zeros(12)
    bias[1] = 0.3
    spec = synthetic_spec(n_experts=12, n_groups=3, topk_groups=1, top_k=2)
    choice = choice_scores(score, bias)
    assert choose(choice, spec).tolist() == [1, 0]
    assert reasons(np.array([1, 0]), score, bias, spec).tolist() == [Reason.AFFINITY, Reason.GROUPS]
    bias[4] = bias[5] = 0.5
    assert choose(choice_scores(score, bias), spec).tolist() == [4, 5]
    assert reasons(np.array([4, 5]), score, bias, spec).tolist() == [Reason.BIAS, Reason.BIAS]
    bias[[4, 5, 8, 9]] = 0.35, 0.35, 0.0, 0.72
    assert choose(choice_scores(score, bias), ungrouped(spec)).tolist() == [4, 8]
    assert reasons(np.array([8, 9]), score, bias, spec).tolist() == [Reason.BIAS, Reason.BOTH]


def flipped_by(choice, spec, expert, amount) -> bool:
    moved = choice.copy()
    inside = expert in choose(choice, spec)
    moved[expert] += -amount if inside else amount
    return (expert in choose(moved, spec)) != inside


@settings(max_examples=60)
@given(routers())
def test_an_expert_flips_just_past_its_distance_and_not_before(router):
    spec, logits, bias = router
    choice = choice_scores(scores(logits), bias)[:3]
    distance = flip_distance(choice, spec)
    for token, expert in np.ndindex(distance.shape):
        far = distance[token, expert]
        if np.isinf(far):
            assert not flipped_by(choice[token], spec, expert, 100.0)
        else:
            assert flipped_by(choice[token], spec, expert, far + 1e-9)
            assert far < 1e-9 or not flipped_by(choice[token], spec, expert, far - 1e-9)


def test_distance_agrees_with_bisection_at_the_size_of_ling_mini():
    spec = synthetic_spec(n_experts=256, n_groups=8, topk_groups=4, top_k=8)
    rng = np.random.default_rng(0)
    choice = choice_scores(scores(rng.normal(0, 1, 256)), rng.normal(0, 0.1, 256))
    distance, kept = flip_distance(choice, spec), np.repeat(kept_groups(choice, spec), 32)
    for expert in [*choose(choice, spec)[:4], *np.flatnonzero(kept)[:8], *np.flatnonzero(~kept)[:24]]:
        low, high = 0.0, 4.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if flipped_by(choice, spec, int(expert), middle) else (middle, high)
        assert distance[expert] == pytest.approx(high, abs=1e-9)


@given(routers())
def test_margin_is_the_last_in_over_the_first_out_of_the_kept_groups(router):
    spec, logits, bias = router
    choice = choice_scores(scores(logits), bias)
    kept = np.repeat(kept_groups(choice, spec), spec.group_size, axis=-1)
    for token, found in enumerate(margin(choice, spec)):
        order = np.sort(choice[token][kept[token]])[::-1]
        assert found == (order[spec.top_k - 1] - order[spec.top_k] if len(order) > spec.top_k else np.inf)


def test_any_number_of_leading_axes():
    rng = np.random.default_rng(1)
    score, bias = scores(rng.normal(0, 1, (5, 3, 16))), rng.normal(0, 0.2, (3, 16))
    choice = choice_scores(score, bias)
    ids = choose(choice, SPEC)
    assert reasons(ids, score, bias, SPEC).shape == (5, 3, 4)
    assert margin(choice, SPEC).shape == (5, 3)
    one = flip_distance(choice[2, 1], SPEC)
    np.testing.assert_array_equal(flip_distance(choice, SPEC)[2, 1], one)
