"""Boundaries told from routing: planted ones found, those that words alone make credited to the words."""

import numpy as np
import pandas as pd
import pytest
from synthetic import LABELS, Effects, Planted, synthetic_run

from ling_probe import segmentation
from ling_probe.analysis import ANALYSES, Verdict, step_boundaries
from ling_probe.analysis.boundary_prediction import (
    BOTH,
    DISTANCE,
    REACH,
    ROUTING,
    SOURCES,
    TOKENS,
    WORDS,
    Places,
    distance_thresholds,
    routing_distance,
)
from ling_probe.analysis.hidden import fit
from ling_probe.charts import FIGURES
from ling_probe.errors import UsageError

LONG = {"step_tokens": (8, 14), "n_steps": (4, 6)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Every step has experts of its own: routing changes where one ends, words do not."""
    folder = tmp_path_factory.mktemp("boundaries") / "planted"
    names = sorted({label for labels in LABELS.values() for label in labels})
    plants = tuple(
        Planted(layer, (3 * place + layer) % 16, name, 6.0) for place, name in enumerate(names) for layer in (1, 2, 3)
    )
    return synthetic_run(folder, 100, planted=plants, **LONG)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Words know their label, and routing the words."""
    effects = Effects(token=2.0, confounded=True)
    return synthetic_run(tmp_path_factory.mktemp("boundaries") / "alone", 100, effects=effects, **LONG)


def test_planted_boundaries_are_found_beyond_the_words(planted):
    table = step_boundaries(planted, states=6).set_index("source")
    assert table.loc[BOTH, "gain_low"] > 0.1
    assert table.loc[DISTANCE, "f1"] > table.loc[DISTANCE, "chance_f1"] + 0.2
    assert table.loc[DISTANCE, "f1"] > table.loc[TOKENS, "f1"] + 0.2
    assert table.loc[[DISTANCE, ROUTING, BOTH], "q"].max() < 0.05
    assert table.loc[WORDS, "f1"] < 0.3
    assert ANALYSES["step_boundaries"].finding(table.reset_index()).verdict is Verdict.SUPPORTED


def test_what_words_tell_is_not_credited_to_routing(alone):
    table = step_boundaries(alone, states=6).set_index("source")
    assert table.loc[BOTH, "gain_low"] < 0
    assert ANALYSES["step_boundaries"].finding(table.reset_index()).verdict is not Verdict.SUPPORTED


def test_distances_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    values, lengths = rng.normal(size=(40, 3)), [25, 1, 14]
    found, start = routing_distance(values, lengths), 0
    for length in lengths:
        own = values[start : start + length]
        plain = np.full(length, -np.inf)
        for row in range(1, length):
            plain[row] = np.linalg.norm(own[max(0, row - REACH) : row].mean(axis=0) - own[row : row + REACH].mean(axis=0))
        for row in range(length):
            near = plain[max(0, row - 2) : row + 3]
            peak = row > 0 and plain[row] == near.max()
            assert found[start + row] == (pytest.approx(plain[row]) if peak else -np.inf)
        start += length


def test_scores_are_those_of_segmentation(planted):
    fitted = fit(planted, states=4)
    table = step_boundaries(planted, fitted=fitted).set_index("source")
    places = Places.of(fitted.halves, seed=0)
    threshold = distance_thresholds(fitted)[DISTANCE]
    assert table.loc[DISTANCE, "threshold"] == threshold
    score = routing_distance(fitted.halves.values[places.rows], places.lengths)
    held, matched, marked, found, chance, pk = np.unique(places.problem[~places.learn & ~places.choose]), 0, 0, 0, 0.0, []
    for problem in held:
        here = places.problem == problem
        ours, theirs = np.flatnonzero(places.marked[here]), np.flatnonzero(score[here] >= threshold)
        matched += segmentation.matched(ours, theirs)
        marked, found = marked + len(ours), found + len(theirs)
        chance += len(ours) * len(theirs) / (here.sum() - 1)
        pk.append(segmentation.pk(ours, theirs, int(here.sum())))
    row = table.loc[DISTANCE]
    assert (row["marked"], row["found"], row["problems"]) == (marked, found, len(held))
    assert row["f1"] == pytest.approx(2 * matched / (marked + found))
    assert row["chance_f1"] == pytest.approx(2 * chance / (marked + found))
    assert row["pk"] == pytest.approx(np.mean(pk))
    steps = planted.steps
    rows = fitted.halves.sample.sequence[places.rows]
    assert places.marked.sum() == steps["sequence"].isin(rows).sum() - len(np.unique(rows))


def test_problems_that_teach_are_not_measured(planted):
    places = Places.of(fit(planted, states=2).halves, seed=0)
    groups = [set(places.problem[side].tolist()) for side in (places.learn, places.choose, ~places.learn & ~places.choose)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert all(groups)


def test_the_table_is_drawn_and_told(planted):
    table = step_boundaries(planted, states=4, draws=50, seed=2)
    assert table["source"].tolist() == list(SOURCES)
    (figure,) = FIGURES["step_boundaries"](table, planted.spec)
    np.testing.assert_array_equal(figure.data[0].x, table["f1"])
    assert ANALYSES["step_boundaries"].finding(table).sentence.endswith(".")
    pd.testing.assert_frame_equal(table, step_boundaries(planted, states=4, draws=50, seed=2))


def test_runs_without_boundaries_are_refused(make_run):
    with pytest.raises(UsageError, match="no step labels"):
        step_boundaries(make_run(14, n_steps=(0, 0)))
    with pytest.raises(UsageError, match="no boundaries to learn from"):
        step_boundaries(make_run(14, n_steps=(1, 1)), states=2)
