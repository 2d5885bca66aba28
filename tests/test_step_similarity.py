from itertools import combinations

import numpy as np
import pytest
from synthetic import Effects, Planted, synthetic_run

from ling_probe import stats
from ling_probe.analysis import ANALYSES, Verdict, step_similarity
from ling_probe.analysis.classified import PLACES, classified_steps, expected_choices
from ling_probe.analysis.similarity import _Sample
from ling_probe.charts import FIGURES
from ling_probe.errors import UsageError

STICKY = Effects(token=1.0, step=0.5, sequence=0.5)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    plants = (Planted(2, 5, "multiply", 4.0), Planted(2, 9, "premise", 4.0), Planted(2, 1, "add", 4.0))
    return synthetic_run(tmp_path_factory.mktemp("similarity") / "run", 60, planted=plants, effects=STICKY)


def by_hand(run, layer, level):
    """Mean cosines of pairs of one label and of two, pair by pair."""
    steps = classified_steps(run)
    choices = expected_choices(run, layer, steps)
    profiles = {"raw": choices.observed, "words": choices.expected}.get(level, choices.observed - choices.expected)
    profiles = profiles / np.linalg.norm(profiles, axis=1, keepdims=True)
    place = run.steps["step"].to_numpy()
    found = {True: [], False: []}
    for one, other in combinations(range(len(profiles)), 2):
        same_problem = steps.sequence[one] == steps.sequence[other]
        if steps.stratum[one] // PLACES != steps.stratum[other] // PLACES or same_problem != (level == "problem"):
            continue
        if level == "position" and place[one] != place[other]:
            continue
        found[bool(steps.codes[one] == steps.codes[other])].append(profiles[one] @ profiles[other])
    return np.mean(found[True]), np.mean(found[False]), sum(map(len, found.values()))


@pytest.mark.parametrize("level", ["words", "raw", "token", "position", "problem"])
def test_means_are_those_over_all_pairs(make_run, level):
    run = make_run(24, effects=STICKY)
    table = step_similarity(run, permutations=9, draws=9).set_index(["layer", "level"])
    for layer in run.spec.routed_layers:
        row = table.loc[(layer, level)]
        same, different, pairs = by_hand(run, layer, level)
        assert (row["same"], row["different"]) == pytest.approx((same, different), abs=1e-5)
        assert row["pairs"] == pairs


def test_a_planted_preference_is_found_in_its_layer_at_every_level(planted):
    table = step_similarity(planted, draws=200)
    assert table.columns[-1] == "seed"
    at = table.set_index(["layer", "level"])
    for level in ("raw", "token", "position", "problem"):
        assert at.loc[(2, level), "q"] < 0.05
        assert at.loc[(2, level), "ci_low"] > 0
    found = ANALYSES["step_similarity"].finding(table)
    assert found.verdict is Verdict.SUPPORTED
    assert found.sentence.startswith("In layer 2 ")
    figure = FIGURES["step_similarity"](table, planted.spec)[0]
    assert figure.data[0].y.tolist() == at.xs("words", level="level")["gap"].tolist()


def test_labels_that_mean_nothing_are_not_found(make_run):
    """Routing follows tokens, steps and problems, and no label: at the strict levels about one run in twenty is rejected."""
    found = []
    for seed in range(40):
        table = step_similarity(make_run(20, seed=seed, effects=STICKY), permutations=99, draws=2, seed=seed)
        found.append(table[(table["layer"] == 1) & table["level"].isin(["position", "problem"])]["p"].to_numpy())
    rejected = (np.array(found) <= 0.05).sum(axis=0)
    assert (rejected <= 6).all()
    assert 0.3 < np.mean(found) < 0.7


def test_the_interval_covers_the_gap_of_a_large_run(make_run):
    plants = (Planted(1, 5, "multiply", 2.0), Planted(1, 9, "premise", 2.0))
    truth = step_similarity(make_run(160, seed=99, planted=plants), permutations=2, draws=2).set_index(["layer", "level"])
    covered = 0
    for seed in range(20):
        run = make_run(20, seed=seed, planted=plants)
        row = step_similarity(run, permutations=2, draws=200).set_index(["layer", "level"]).loc[(1, "raw")]
        covered += row["ci_low"] <= truth.loc[(1, "raw"), "gap"] <= row["ci_high"]
    assert covered >= 15


def test_a_large_run_is_sampled_by_whole_problems(make_run, monkeypatch):
    monkeypatch.setattr("ling_probe.analysis.similarity.STEPS", 30)
    run = make_run(40)
    steps = classified_steps(run)
    sample = _Sample.of(steps, seed=3)
    drawn = set(steps.sequence[sample.rows])
    assert 30 <= len(sample.rows) <= 36
    assert (np.isin(steps.sequence, list(drawn)) == np.isin(np.arange(len(steps.codes)), sample.rows)).all()
    assert set(step_similarity(run, permutations=2, draws=2)["steps"]) == {len(_Sample.of(steps, 0).rows)}


def test_a_run_without_steps_is_refused(make_run):
    with pytest.raises(UsageError, match="no step labels in this run"):
        step_similarity(make_run(6, n_steps=(0, 0)))
    with pytest.raises(UsageError, match='every step of this run is "other"; comparing needs two labels'):
        step_similarity(make_run(6, labels={"": ("other",)}))


def test_what_tokens_make_of_it_comes_from_the_drawn_problems(make_run, monkeypatch):
    monkeypatch.setattr("ling_probe.analysis.similarity.PROBLEMS", 12)
    run = make_run(40, effects=STICKY)
    table = step_similarity(run, permutations=2, draws=2, seed=1)
    assert table["problems"].unique().tolist() == [12]
    assert table["gap"].notna().all()


def test_levels_beyond_the_tokens_are_corrected_by_themselves(planted):
    table = step_similarity(planted, permutations=99, draws=2)
    for strict in (True, False):
        rows = table[table["level"].isin(["token", "position", "problem"]) == strict]
        assert rows["q"].to_numpy() == pytest.approx(stats.benjamini_hochberg(rows["p"].to_numpy()))
