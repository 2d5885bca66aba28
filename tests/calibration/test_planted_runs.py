"""What was planted is found, what was not is not, and words alone make no preference where naive tests see hundreds."""

import numpy as np
import pytest
from cases import LEVEL
from naive import step_shuffle, token_chi_square
from planted import CONFOUNDED, planted_world, power, true_effects
from worlds import World

from ling_probe.analysis import label_specialisation


@pytest.mark.slow
def test_planted_effects_are_found_and_measured():
    """A logit of 2 in 96 problems: all found, nearly nothing else, and intervals hold the truth."""
    world = planted_world(2.0, 96)
    found = power(world, true_effects(world), range(8))
    assert found.recall == 1.0
    assert found.wrong <= LEVEL
    assert abs(found.bias) < 0.05
    assert found.covered > 0.8


@pytest.mark.slow
def test_more_effect_and_more_problems_give_more_power():
    recall = [power(planted_world(boost, n), true_effects(planted_world(boost, n)), range(8)).recall
              for boost, n in ((0.5, 24), (1.0, 48), (1.0, 96))]  # fmt: skip
    assert recall[0] < 0.2 < recall[1] < recall[2] < 1.01


def test_what_words_alone_do_is_seen_by_naive_tests_and_not_by_ours():
    """Labels have their own words, words route, labels do not."""
    run = CONFOUNDED.run(0)
    tokens, steps, ours = token_chi_square(run), step_shuffle(run, permutations=199), label_specialisation(run)
    assert (tokens["p"] <= LEVEL).mean() > 0.4
    assert (tokens["q"] < LEVEL).mean() > 0.3
    assert (steps["p"] <= LEVEL).mean() > 0.25
    assert ours["p"].notna().all()
    assert (ours["p"] <= LEVEL).mean() <= LEVEL
    assert not (ours["q"] < LEVEL).any()
    assert ours["raw_log2_ratio"].abs().median() > 2 * ours["log2_ratio"].abs().median()


def test_tokens_are_not_independent():
    """The same words in every label: a chi-square over tokens still rejects three times too often, whole steps do not."""
    runs = [World(words=0.0).run(seed) for seed in range(3)]
    rates = [[(test(run)["p"] <= LEVEL).mean() for run in runs] for test in (token_chi_square, step_shuffle)]
    assert np.mean(rates[0]) > 3 * LEVEL
    assert np.mean(rates[1]) < 1.3 * LEVEL
