"""Routing states in worlds that have them, and in worlds where routing follows the tokens alone."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_mutual_info_score
from synthetic import LABELS, Effects, Planted, synthetic_run

from ling_probe.analysis import ANALYSES, Verdict, fit_states, routing_states, state_profiles, state_transitions
from ling_probe.analysis.hidden import Chain, chosen_number, fit, one_hot, smoothed
from ling_probe.analysis.sample import label_codes
from ling_probe.analysis.states import LEFT, RESAMPLED, ROUTING, TOKENS
from ling_probe.charts import FIGURES
from ling_probe.errors import UsageError

TOKENS_ALONE = Effects(token=2.0, confounded=True)
"""Labels have words of their own, and words route."""
LONG = {"step_tokens": (10, 16)}


def plants():
    """Every label moves an expert of each layer: routing has states that words do not make."""
    names = sorted({label for labels in LABELS.values() for label in labels})
    return tuple(
        Planted(layer, (3 * place + layer) % 16, label, 6.0) for place, label in enumerate(names) for layer in (1, 2, 3)
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states") / "planted"
    return synthetic_run(folder, 90, planted=plants(), effects=Effects(token=0.7), **LONG)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("states") / "alone", 90, effects=TOKENS_ALONE, **LONG)


@pytest.fixture(scope="module")
def planted_states(planted):
    return fit(planted, states=8)


def test_planted_states_are_found_beyond_the_tokens(planted):
    table = routing_states(planted, states=8).set_index("source")
    row = table.loc[ROUTING]
    assert row["ami"] > 0.6
    assert row["ami"] > row["shuffled_ami"] + 0.2
    assert row["beyond_low"] > 0.2
    assert row["q"] < 0.05
    assert abs(table.loc[RESAMPLED, "agreement"]) < 0.1
    assert table.loc[LEFT, "agreement"] == pytest.approx(row["agreement"], abs=0.15)
    found = ANALYSES["routing_states"].finding(table.reset_index())
    assert (found.verdict, found.rung) == (Verdict.SUPPORTED, 4)


def test_states_of_words_are_not_taken_for_states_of_routing(alone):
    table = routing_states(alone, states=8).set_index("source")
    assert table.loc[ROUTING, "ami"] > 0.2
    assert table.loc[ROUTING, "agreement"] == pytest.approx(table.loc[RESAMPLED, "agreement"], abs=0.1)
    assert table.loc[ROUTING, "beyond_low"] < 0
    assert abs(table.loc[LEFT, "agreement"]) < 0.05
    assert ANALYSES["routing_states"].finding(table.reset_index()).verdict is not Verdict.SUPPORTED


def test_agreement_is_that_of_scikit_learn_and_of_a_plain_shuffle(planted, planted_states):
    table = routing_states(planted, states=8, shuffles=19).set_index("source")
    halves = planted_states.halves
    labels = label_codes(planted, halves.sample)
    here = ~halves.first & (labels >= 0)
    found = adjusted_mutual_info_score(labels[here], planted_states.path[here])
    assert table.loc[ROUTING, "ami"] == pytest.approx(found, abs=1e-9)
    changed = (planted_states.path[1:] != planted_states.path[:-1])[~halves.first[1:] & halves.sample.follows[1:]]
    assert table.loc[ROUTING, "duration"] == pytest.approx(1 / changed.mean())
    assert table.loc[ROUTING, "tokens"] == here.sum()
    assert table.loc[TOKENS, "beyond_tokens"] == 0


def test_decoding_one_problem_is_decoding_it_among_others(planted, planted_states):
    sample, states = planted_states.halves.sample, planted_states.states
    for sequence in np.unique(sample.sequence)[:5]:
        here = sample.sequence == sequence
        np.testing.assert_array_equal(states.decode(sample.expert_ids[here]), planted_states.path[here])
    assert states.decode(sample.expert_ids[:0]).shape == (0,)


def test_a_chain_is_learnt_back_from_what_it_made():
    rng = np.random.default_rng(0)
    true = np.repeat(rng.integers(0, 3, 200), 20)
    values = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])[true] + rng.normal(0, 0.5, (len(true), 2))
    lengths = [400] * 10
    chain = Chain.fit(values, lengths, 3, seed=0)
    assert adjusted_mutual_info_score(true, chain.decode(values, lengths)) > 0.99
    shares = np.bincount(chain.decode(values, lengths))
    assert (np.diff(shares) <= 0).all()
    assert np.diag(chain.transition).min() > 0.9
    split = chain.log_likelihood(values, lengths)
    assert split.sum() == pytest.approx(chain._model.score(values, lengths))


def test_the_number_of_states_is_the_fewest_that_tell_as_well():
    """Where there are no states two are enough, and four that lie apart are told apart."""
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, (3000, 2))
    assert chosen_number(noise, [100] * 30, seed=0) == 2
    true = np.cumsum(rng.random(3000) < 0.02) % 4
    apart = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])[true] + noise
    assert chosen_number(apart, [100] * 30, seed=0) >= 4


def test_averages_stay_inside_their_sequence():
    values = np.random.default_rng(2).normal(size=(30, 3))
    lengths, bounds = [12, 1, 17], [0, 12, 13, 30]
    plain = [
        values[max(start, row - 4) : min(stop, row + 5)].mean(axis=0)
        for start, stop in pairwise(bounds)
        for row in range(start, stop)
    ]
    np.testing.assert_allclose(smoothed(values, lengths), plain)


def test_components_are_of_what_was_chosen(planted):
    sample = fit(planted, states=2).halves.sample
    chosen = one_hot(sample.expert_ids, sample.n_experts).toarray().reshape(-1, 3, 16)
    assert (chosen.sum(axis=-1) == 4).all()
    np.testing.assert_array_equal(np.sort(sample.expert_ids[5, 1]), np.flatnonzero(chosen[5, 1]))


def test_resampled_routing_keeps_each_id_its_own(alone):
    halves = fit(alone, states=2).halves
    drawn = halves.resampled(seed=3)
    for token in np.unique(halves.sample.token_id)[:5]:
        here = halves.sample.token_id == token
        np.testing.assert_allclose(np.sort(drawn[here], axis=0), np.sort(halves.values[here], axis=0))
    assert (drawn != halves.values).any(axis=1).mean() > 0.8


def test_profiles_count_what_stands_in_each_state(planted, planted_states):
    table = state_profiles(planted, fitted=planted_states)
    held = ~planted_states.halves.first
    path, sample = planted_states.path[held], planted_states.halves.sample.only(held)
    codes, names = label_codes(planted, sample), np.unique(planted.steps["label"])
    for row in table[table["kind"] == "label"].itertuples():
        assert row.count == ((path == row.state) & (codes == list(names).index(row.name))).sum()
    experts = table[table["kind"] == "expert"]
    for row in experts.head(8).itertuples():
        chosen = (sample.expert_ids[:, planted.spec.row(row.layer)] == row.expert).any(axis=1)
        assert row.part == pytest.approx(chosen[path == row.state].mean())
        assert row.overall == pytest.approx(chosen.mean())
    for row in table[table["kind"] == "token"].itertuples():
        assert row.name == f" w{row.token_id}"
    assert table.groupby("state")["share"].first().sum() == pytest.approx(1)
    assert ANALYSES["state_profiles"].finding(table).verdict is Verdict.SUPPORTED


def test_words_alone_give_no_state_a_label(alone):
    table = state_profiles(alone, states=8)
    labels = table[table["kind"] == "label"]
    assert labels["log2_ratio"].max() > 1
    assert (labels["p"].dropna() <= 0.05).mean() < 0.15
    assert not (labels["q"] < 0.05).any()


def test_successions_are_counted_and_compared_with_shares(planted, planted_states):
    table = state_transitions(planted, fitted=planted_states)
    held, path = ~planted_states.halves.first, planted_states.path
    plain = np.zeros((8, 8))
    for row in np.flatnonzero(held & planted_states.halves.sample.follows):
        plain[path[row - 1], path[row]] += 1
    np.testing.assert_array_equal(table["count"].to_numpy().reshape(8, 8), plain)
    share = plain.sum(axis=0) / plain.sum()
    row = table[(table["before"] == 1) & (table["after"] == 2)].iloc[0]
    expected = share[2] / (1 - share[1])
    assert row["leaving"] == pytest.approx(plain[1, 2] / (plain[1].sum() - plain[1, 1]))
    assert row["expected_leaving"] == pytest.approx(expected)
    away = plain[1].sum() - plain[1, 1]
    assert row["log2_ratio"] == pytest.approx(np.log2((plain[1, 2] + 0.5) / (away * expected + 0.5)))
    assert table.loc[table["before"] == table["after"], "p"].isna().all()


def test_the_same_seed_gives_the_same_states(planted):
    one, other = (state_transitions(planted, states=4, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("name", ["routing_states", "state_profiles", "state_transitions"])
def test_figures_and_findings_are_made(name, planted):
    table = ANALYSES[name].function(planted, states=4)
    assert FIGURES[name](table, planted.spec)
    assert ANALYSES[name].order(table).shape == table.shape
    assert ANALYSES[name].finding(table).sentence.endswith(".")


def test_what_cannot_be_answered_is_refused(make_run):
    small = make_run(9)
    with pytest.raises(UsageError, match="9 problems in this run; fitting states on half of them needs 12"):
        fit_states(small)
    with pytest.raises(UsageError, match="1 routing states asked for; there must be 2 at least"):
        fit_states(small, states=1)
    with pytest.raises(UsageError, match="no step labels"):
        routing_states(make_run(14, n_steps=(0, 0)))
    one = {"a": ("add",), "b": ("add",)}
    with pytest.raises(UsageError, match="one step label only"):
        routing_states(make_run(14, labels=one), states=2)
