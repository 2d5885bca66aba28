"""Paths of problems against their operations: planted ones found, those of words alone credited to the words."""

from functools import cache

import numpy as np
import pytest
from synthetic import Effects, Planted, synthetic_run

from ling_probe.analysis import ANALYSES, Verdict, path_alignment
from ling_probe.analysis.alignment import (
    LEFT,
    PAIRS,
    ROUTING,
    STATES,
    STEPS,
    TOKENS,
    _Compared,
    _Problems,
    edit_distance,
    warped,
)
from ling_probe.analysis.hidden import fit
from ling_probe.charts import FIGURES
from ling_probe.errors import UsageError

FEW = {"a": ("add", "take"), "b": ("turn", "premise")}
SHORT = {"n_steps": (3, 3), "step_tokens": (6, 10), "labels": FEW}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    plants = tuple(
        Planted(layer, (5 * place + layer) % 16, name, 5.0)
        for place, name in enumerate(("add", "take", "turn", "premise"))
        for layer in (1, 2, 3)
    )
    return synthetic_run(tmp_path_factory.mktemp("alignment") / "planted", 80, planted=plants, **SHORT)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    effects = Effects(token=2.0, confounded=True)
    return synthetic_run(tmp_path_factory.mktemp("alignment") / "alone", 80, effects=effects, **SHORT)


def test_planted_paths_are_found_beyond_the_tokens(planted):
    table = path_alignment(planted, states=4)
    at = table.set_index(["path", "source"])
    for source in (ROUTING, LEFT, PAIRS):
        assert at.loc[(STEPS, source), "ci_low"] > 0.15
        assert at.loc[(STEPS, source), "near_low"] > 0
    assert abs(at.loc[(STEPS, TOKENS), "correlation"]) < 0.4
    assert ANALYSES["path_alignment"].finding(table).verdict is Verdict.SUPPORTED


def test_paths_of_words_are_not_taken_for_paths_of_routing(alone):
    table = path_alignment(alone, states=4)
    at = table.set_index(["path", "source"])
    assert at.loc[(STEPS, ROUTING), "ci_low"] > 0.1
    assert at.loc[(STEPS, TOKENS), "ci_low"] > 0.2
    assert at.loc[(STEPS, PAIRS), "correlation"] < 0.1
    assert ANALYSES["path_alignment"].finding(table).verdict is not Verdict.SUPPORTED


def levenshtein(one, other):
    @cache
    def cost(left, right):
        if not left or not right:
            return left + right
        replaced = cost(left - 1, right - 1) + (one[left - 1] != other[right - 1])
        return min(replaced, cost(left - 1, right) + 1, cost(left, right - 1) + 1)

    return cost(len(one), len(other))


def test_edit_distances_are_those_of_the_plain_recursion():
    rng = np.random.default_rng(0)
    sides = [[tuple(rng.integers(0, 3, rng.integers(0, 9)).tolist()) for _ in range(60)] for _ in range(2)]
    plain = [levenshtein(one, other) / max(len(one), len(other), 1) for one, other in zip(*sides, strict=True)]
    np.testing.assert_allclose(edit_distance(*sides), plain)


def warped_plainly(one, other):
    n = len(one)
    best = np.full((n + 1, n + 1), np.inf)
    best[0, 0] = 0
    for row in range(n):
        for column in range(n):
            before = min(best[row, column], best[row, column + 1], best[row + 1, column])
            best[row + 1, column + 1] = before + np.linalg.norm(one[row] - other[column])
    return best[n, n] / n


def test_warped_distances_are_those_of_one_pair_after_the_other():
    one, other = np.random.default_rng(1).normal(size=(2, 20, 5, 3))
    np.testing.assert_allclose(warped(one, other), [warped_plainly(*pair) for pair in zip(one, other, strict=True)])
    np.testing.assert_allclose(warped(one, one), 0)


def test_correlations_and_gaps_are_those_over_plain_pairs(planted):
    fitted = fit(planted, states=4)
    row = path_alignment(planted, fitted=fitted, shuffles=9, draws=9).set_index(["path", "source"]).loc[(STEPS, ROUTING)]
    problems = _Problems.of(planted, fitted, 0)
    distance = problems.step_distance(fitted.halves.values)
    blocks, pairs, same, different = {}, 0, [], []
    for one in range(len(problems.block)):
        for other in range(one):
            if problems.block[one] == problems.block[other]:
                labels = problems.labels[one], problems.labels[other]
                apart = levenshtein(*labels) / 3
                blocks.setdefault(problems.block[one], []).append((distance[one, other], apart))
                (different if apart else same).append(distance[one, other])
                pairs += 1
    centred = np.concatenate([np.array(each) - np.mean(each, axis=0) for each in blocks.values()])
    assert row["correlation"] == pytest.approx(np.corrcoef(centred.T)[0, 1], abs=1e-6)
    assert (row["pairs"], row["same_pairs"]) == (pairs, len(same))
    assert (row["same"], row["different"]) == pytest.approx((np.mean(same), np.mean(different)))
    assert row["nearer"] == pytest.approx(1 - np.mean(same) / np.mean(different))


def test_shuffles_stay_in_their_family_and_number_of_steps(planted):
    problems = _Problems.of(planted, fit(planted, states=2), 0)
    compared = _Compared(problems, 20, 9, 0)
    assert (problems.block[compared.shuffled] == problems.block).all()
    assert (compared.shuffled != np.arange(len(problems.block))).any()


def test_the_table_is_drawn_and_told(planted):
    table = path_alignment(planted, states=3, shuffles=19, draws=19)
    assert table[["path", "source"]].to_records(index=False).tolist()[-1] == (STATES, TOKENS)
    (figure,) = FIGURES["path_alignment"](table, planted.spec)
    np.testing.assert_array_equal(figure.data[0].x, table.loc[table["path"] == STEPS, "correlation"])
    assert ANALYSES["path_alignment"].finding(table).sentence.endswith(".")


def test_runs_without_pairs_to_compare_are_refused(make_run):
    with pytest.raises(UsageError, match="no step labels"):
        path_alignment(make_run(14, n_steps=(0, 0)))
    with pytest.raises(UsageError, match="no two held-out problems"):
        path_alignment(make_run(14, n_steps=(2, 2), labels={"a": ("add",), "b": ("turn",)}), states=2)
