import numpy as np
import pytest
from synthetic import Effects, Planted, synthetic_run

from ling_probe.analysis import finding, prediction, routing_prediction
from ling_probe.analysis.prediction import BEFORE, BELOW, BIGRAM, LOAD, TOKEN, TOKEN_LABEL
from ling_probe.analysis.question import Verdict
from ling_probe.analysis.sample import numbered, sample_tokens, two_halves


def means(table):
    return table.groupby("known")[["recall", "saved", "saved_low", "beyond_token", "beyond_low", "loss"]].mean()


@pytest.fixture(scope="module")
def following(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prediction") / "run"
    return synthetic_run(folder, 120, effects=Effects(token=1.5), planted=Planted(2, 5, "premise", 4.0))


@pytest.fixture(scope="module")
def table(following):
    return routing_prediction(following)


def test_a_prediction_is_scored_expert_by_expert():
    rng = np.random.default_rng(0)
    predicted, chosen = rng.random((30, 8)), np.argsort(rng.random((30, 8)), axis=1)[:, :3]
    for row, (loss, recall) in enumerate(prediction._scored(predicted, chosen)):
        mine, likely = set(chosen[row].tolist()), predicted[row]
        bits = -sum(np.log2(likely[expert] if expert in mine else 1 - likely[expert]) for expert in range(8))
        assert loss == pytest.approx(bits / 3)
        assert recall == pytest.approx(len(mine & set(np.argsort(-likely)[:3].tolist())) / 3)


def test_counts_are_smoothed_towards_the_coarser_prediction(following):
    sample = sample_tokens(following)
    first = two_halves(sample.sequence)
    split = prediction._split(sample, first, ~first, 40, np.random.default_rng(0))
    assert not first[split.test].any()
    assert first[split.fitted].all()
    coarser = np.random.default_rng(1).random((40, 16))
    found = prediction._smoothed(sample, 1, split, numbered(sample.token_id), coarser)
    for row, token in enumerate(split.test):
        same = first & (sample.token_id == sample.token_id[token])
        counts = np.bincount(sample.expert_ids[same, 1].ravel(), minlength=16)
        assert found[row] == pytest.approx((counts + 4 * coarser[row]) / (same.sum() + 4))


def test_the_token_predicts_where_routing_follows_it(table):
    told = means(table)
    assert told.loc[TOKEN, "saved_low"] > 0.3
    assert told.loc[TOKEN, "recall"] > told.loc[LOAD, "recall"] + 0.2
    assert told.loc[LOAD, "saved"] == 0
    assert told.loc["position", "saved"] < 0.02
    assert abs(told.loc[BIGRAM, "beyond_token"]) < 0.05
    found = finding("routing_prediction", table)
    assert found.verdict is Verdict.CANNOT_TELL, "most pairs are new"
    assert f"{100 * table[table['known'] == BIGRAM]['seen'].iloc[0]:.2f} % pairs seen" in found.sentence


def test_what_was_seen_is_counted(following, table):
    sample = sample_tokens(following)
    first = two_halves(sample.sequence)
    pairs = list(zip(sample.token_id, sample.previous_id, strict=True))
    there = [{pair for pair, half in zip(pairs, first, strict=True) if half == side} for side in (True, False)]
    rng = np.random.default_rng(0)
    splits = [prediction._split(sample, ~half, half, 2000, rng) for half in (first, ~first)]
    share = [np.mean([pairs[row] in there[1 - side] for row in split.test]) for side, split in enumerate(splits)]
    assert table[table["known"] == BIGRAM]["seen"].tolist() == pytest.approx([np.mean(share)] * 3)
    assert (table[table["known"] == LOAD]["seen"] == 1).all()


def test_the_label_adds_in_the_layer_where_it_is_planted(tmp_path):
    labels = ("plan", "check", "conclude", "recall")
    plants = tuple(Planted(2, 3 * place, label, 4.0) for place, label in enumerate(labels))
    run = synthetic_run(tmp_path / "run", 150, labels={"talk": labels}, planted=plants)
    table = routing_prediction(run)
    rows = table[table["known"] == TOKEN_LABEL].set_index("layer")
    assert rows["beyond_low"][2] > 0.1
    assert rows["beyond_high"][[1, 3]].max() < 0.02
    assert "the step label most in layer 2: +" in finding("routing_prediction", table).sentence


def test_loss_of_the_load_is_its_entropy(tmp_path):
    table = routing_prediction(synthetic_run(tmp_path / "run", 150), tested=4000)
    sample = sample_tokens(synthetic_run(tmp_path / "again", 150))
    for place, loss in enumerate(table[table["known"] == LOAD]["loss"]):
        rate = np.bincount(sample.expert_ids[:, place].ravel(), minlength=16) / sample.n_tokens
        entropy = -(rate * np.log2(rate) + (1 - rate) * np.log2(1 - rate)).sum() / 4
        assert loss == pytest.approx(entropy, rel=0.01)


def test_experts_before_predict_where_a_sequence_routes_alike(tmp_path):
    alike, apart = (
        means(routing_prediction(synthetic_run(tmp_path / str(effect), 120, effects=Effects(sequence=effect))))
        for effect in (1.5, 0.0)
    )
    assert alike.loc[BEFORE, "saved_low"] > 0.05
    assert abs(apart.loc[BEFORE, "saved"]) < 0.05
    assert abs(apart.loc[BELOW, "saved"]) < 0.05


def test_the_first_routed_layer_has_none_before(table):
    assert set(table[table["known"] == BELOW]["layer"]) == {2, 3}


def test_a_layer_that_follows_the_one_before_is_predicted(following):
    sample = sample_tokens(following)
    copied = sample.only(np.ones(sample.n_tokens, bool))
    copied.expert_ids[:, 1] = (copied.expert_ids[:, 0] + 3) % 16
    first = two_halves(sample.sequence)
    split = prediction._split(copied, first, ~first, 200, np.random.default_rng(0))
    load = np.full(16, 0.25)
    scores = prediction._scored(prediction._regressed(copied, 1, split, load, 0, 0), copied.take(split.test, 1))
    assert scores[:, 1].mean() == 1
