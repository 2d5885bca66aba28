import numpy as np
import pytest
from synthetic import Effects, Planted, synthetic_run, synthetic_spec

from ling_probe.analysis import decoders, decoding, finding, label_decoding
from ling_probe.analysis.decoders import ALL, DESCRIPTIONS, POSITION, ROUTING, TEXT, TOKENS
from ling_probe.analysis.question import Verdict
from ling_probe.analysis.sample import label_codes, sample_tokens
from ling_probe.errors import UsageError

TALK = {"talk": ("plan", "check", "conclude", "recall")}
PLANTS = tuple(Planted(layer, 3 * place, label, 3.0) for layer in (1, 2, 3) for place, label in enumerate(TALK["talk"]))


def told(table, about="label"):
    return table[table["about"] == about].set_index("features")


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """Labels that routing follows, in words that any step may use."""
    return synthetic_run(tmp_path_factory.mktemp("decoding") / "run", 70, labels=TALK, planted=PLANTS)


@pytest.fixture(scope="module")
def table(routed):
    return label_decoding(routed)


def test_what_routing_alone_knows_is_gained(table):
    rows = told(table)
    assert rows.loc[ROUTING, "ci_low"] > 0.5
    assert rows.loc[TOKENS, "ci_high"] < 0.1
    assert rows.loc[ALL, "gain_low"] > 0.5
    assert rows["chance"].tolist() == [0.25] * 5
    assert rows.loc[ROUTING, "accuracy_low"] > 0.5
    found = finding("label_decoding", table)
    assert (found.verdict, found.rung, found.effect) == (Verdict.SUPPORTED, 4, rows.loc[ALL, "gain"])


def test_what_the_words_give_away_is_no_gain(tmp_path):
    table = label_decoding(synthetic_run(tmp_path / "run", 70, labels=TALK, effects=Effects(token=2.0, confounded=True)))
    rows = told(table)
    assert rows.loc[TOKENS, "bits"] > 0.9 * rows.loc[TOKENS, "entropy"]
    assert rows.loc[ROUTING, "ci_low"] > 0.3, "routing repeats the words"
    assert abs(rows.loc[ALL, "gain"]) < 0.05
    assert "Words and place leave 0." in finding("label_decoding", table).sentence


def test_labels_drawn_at_random_are_told_by_nothing(make_run):
    table = label_decoding(make_run(70, labels=TALK, effects=Effects(step=0.5)))
    assert (table["ci_low"] < 0.03).all()
    assert (table["bits"] > -0.15).all()
    assert finding("label_decoding", table).verdict is not Verdict.SUPPORTED


def test_families_are_told_where_there_are_several(make_run):
    rows = told(label_decoding(make_run(60, planted=Planted(2, 5, "causal", 4.0))), "family")
    assert rows.loc[ROUTING, "ci_low"] > 0.1
    assert rows.loc[TEXT, "gain"] <= 0


def test_folds_hold_whole_sequences_and_steps_are_drawn_by_sequence(routed):
    world = decoding._world(routed, 120, 0)
    assert 100 < len(world.sequence) <= 120
    for sequence in np.unique(world.sequence):
        assert len(set(world.fold[world.sequence == sequence])) == 1
    steps = routed.steps.groupby("sequence").size()
    assert set(np.bincount(world.sequence)) <= set(steps)


def test_descriptions_are_of_the_steps(routed):
    world, sample = decoding._world(routed, 10_000, 0), sample_tokens(routed)
    sample = sample.only(sample.step >= 0)
    assert tuple(world.features) == DESCRIPTIONS
    assert {features.shape[0] for features in world.features.values()} == {len(routed.steps)}
    labels = sorted(set(routed.steps["label"]))
    assert [labels[code] for code in world.asked["label"]] == routed.steps["label"].tolist()
    shares = np.zeros((len(routed.steps), 16))
    for step in range(len(shares)):
        row = routed.steps.iloc[step]
        here = sample.expert_ids[(sample.sequence == row["sequence"]) & (sample.step == row["step"]), 1]
        shares[step] = np.bincount(here.ravel(), minlength=16) / len(here)
    centred = np.sqrt(shares) - np.sqrt(shares).mean(axis=0)
    found = world.features[ROUTING].toarray()[:, 16:32]
    assert np.corrcoef(found.ravel(), centred.ravel())[0, 1] == pytest.approx(1, abs=1e-4)
    assert world.features[POSITION].sum(axis=1).ravel() == pytest.approx(2)
    assert (label_codes(routed, sample) >= 0).all()


def test_balanced_accuracy_by_hand(routed):
    world = decoding._world(routed, 60, 0)
    codes = world.asked["label"]
    hits = np.random.default_rng(0).random(len(codes)) < 0.5
    every = np.ones((1, int(world.sequence.max()) + 1))
    assert decoders.balanced_accuracy(hits, codes, world.sequence, every)[0] == pytest.approx(
        np.mean([hits[codes == code].mean() for code in range(4)])
    )


def test_runs_that_cannot_tell_are_refused(make_run):
    with pytest.raises(UsageError, match="one step label and one family only in this run; telling apart needs two"):
        label_decoding(make_run(10, labels={"talk": ("plan",)}))
    with pytest.raises(UsageError, match="4 problems with steps in this run; holding a fifth out needs 5"):
        label_decoding(make_run(4))
    with pytest.raises(UsageError, match="no step labels in this run"):
        label_decoding(make_run(8, n_steps=(0, 0)))


def test_few_problems_cannot_tell_and_words_that_never_return_tell_nothing(make_run):
    table = label_decoding(make_run(20, labels=TALK, spec=synthetic_spec(vocab_size=100_000)))
    assert told(table).loc[TOKENS, "bits"] < 0.05
    assert finding("label_decoding", table).verdict is Verdict.CANNOT_TELL
    assert label_decoding(make_run(8))["ci_low"].isna().all()
