"""From the experts of one layer to those of the next."""

import doctest
from dataclasses import replace

import numpy as np
import pytest
from pairs import plain_traces, rerouted, write_run
from synthetic import Effects, synthetic_spec

from ling_probe.analysis import ANALYSES, Verdict, layer_transition, transition
from ling_probe.errors import UsageError

PLAIN = synthetic_spec(n_groups=1, topk_groups=1, vocab_size=12)


def tied(traces, *, expert=2, following=9, chance=0.7):
    """Wherever layer 1 chooses an expert, layer 2 mostly takes another one in its last slot."""
    rng, found = np.random.default_rng(0), []
    for trace in traces:
        ids = trace.expert_ids.copy()
        for t in np.flatnonzero((ids[:, 0] == expert).any(axis=1) & (rng.random(trace.n_tokens) < chance)):
            if following not in ids[t, 1]:
                ids[t, 1, -1] = following
        found.append(replace(trace, expert_ids=ids))
    return found


def pairs_of(table):
    return table.drop_duplicates("layer")


def test_doctests_hold():
    assert doctest.testmod(transition).failed == 0


def test_transitions_are_those_of_counting(tmp_path):
    traces = plain_traces(12, spec=PLAIN)
    table = layer_transition(write_run(tmp_path / "run", traces, parts=3))
    slow, chosen, tokens = np.zeros((16, 16)), np.zeros(16), 0
    for trace in traces:
        tokens += trace.n_tokens
        for ids in trace.expert_ids:
            slow[np.ix_(ids[1], ids[2])] += 1
            chosen[ids[1]] += 1
    rows = table[table["layer"] == 2]
    left_out = tokens - rows["tokens"].iloc[0]
    assert 0 <= left_out < 0.4 * tokens
    counts = rows["count"].to_numpy().reshape(16, 16)
    assert (counts <= slow).all()
    assert slow.sum() - counts.sum() == 16 * left_out
    assert rows["count"].sum() == rows["expected"].sum() == 16 * rows["tokens"].iloc[0]
    assert rows["probability"].to_numpy().reshape(16, 16).sum(axis=1) == pytest.approx(np.full(16, 4.0))
    assert set(zip(table["layer"], table["next_layer"], strict=True)) == {(1, 2), (2, 3)}


def test_mutual_information_of_strangers_is_all_bias(tmp_path):
    """Closed form: layers that choose K of E at random seem to share (E - K)² / (2 N K² ln 2) bits."""
    table = layer_transition(write_run(tmp_path / "run", rerouted(plain_traces(60, spec=PLAIN))))
    for layer, rows in table.groupby("layer"):
        counts = rows["count"].to_numpy(float).reshape(16, 16)
        plug_in = transition.mutual_information(counts)
        bias = 12**2 / (2 * np.log(2) * rows["tokens"].iloc[0] * 16)
        assert plug_in == pytest.approx(bias, rel=0.3), layer
        assert abs(rows["information"].iloc[0]) < 0.4 * bias
        assert rows["beyond_low"].iloc[0] < rows["beyond_token"].iloc[0] < rows["beyond_high"].iloc[0]


def test_a_planted_transition_is_found(tmp_path):
    table = layer_transition(write_run(tmp_path / "run", tied(plain_traces(150, spec=PLAIN, effects=Effects(token=0.5)))))
    best = ANALYSES["layer_transition"].order(table).iloc[0]
    assert (best["layer"], best["expert"], best["next_expert"]) == (1, 2, 9)
    assert best["q"] < 0.05
    assert 0.5 < best["ci_low"] < best["log2_ratio"] < best["ci_high"]
    first, second = pairs_of(table)["beyond_token"]
    assert first > 4 * abs(second)
    assert "goes from expert 2 of layer 1 to 9 of layer 2" in ANALYSES["layer_transition"].finding(table).sentence


def test_what_the_token_ties_together_is_none_of_the_layers(tmp_path):
    """Both layers follow the token: they tell of each other, and nothing beyond it."""
    table = layer_transition(write_run(tmp_path / "run", rerouted(plain_traces(150, spec=PLAIN), by_token=2.0)))
    pairs = pairs_of(table)
    assert (pairs["information"] > 0.1).all()
    assert pairs["beyond_token"].abs().max() < 0.05 * pairs["information"].min()
    finding = ANALYSES["layer_transition"].finding(table)
    assert finding.verdict is Verdict.NOT_SUPPORTED
    assert finding.token_effect > 0.1


def test_no_tie_is_found_at_the_stated_rate(tmp_path):
    p, single, discoveries = [], [], []
    for seed in range(25):
        traces = rerouted(plain_traces(30, seed=seed, spec=PLAIN), seed=seed + 500, by_token=1.0)
        table = layer_transition(write_run(tmp_path / f"{seed}", traces), seed=seed)
        p += pairs_of(table)["layer_p"].tolist()
        single.append((table["p"].dropna() <= 0.05).mean())
        discoveries.append((table["q"] < 0.05).any())
    assert np.mean(np.array(p) <= 0.05) <= 0.14
    assert 0.02 < np.mean(single) < 0.08
    assert np.mean(discoveries) <= 0.16


def test_pairs_are_of_one_token_and_two_sequences():
    rng = np.random.default_rng(0)
    token_id, sequence = rng.integers(0, 6, 400), np.sort(rng.integers(0, 20, 400))
    block = sequence % 4
    one, other = transition.same_token_pairs(token_id, sequence, block, rng)
    assert len(one) > 140
    assert len(set(one) | set(other)) == 2 * len(one)
    assert (token_id[one] == token_id[other]).all()
    assert (block[one] == block[other]).all()
    assert (sequence[one] != sequence[other]).all()
    assert (np.diff(block[one]) >= 0).all()


def test_a_long_run_is_read_in_part_and_says_so(tmp_path):
    run = write_run(tmp_path / "run", plain_traces(40, spec=PLAIN))
    tokens = sum(part.tokens for part in run.manifest.parts)
    part = layer_transition(run, most_tokens=tokens // 4)
    assert 0.1 * tokens < part["tokens"].iloc[0] < 0.25 * tokens


def test_what_cannot_answer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has 1 routed layer; a transition needs a next one"):
        layer_transition(write_run(tmp_path / "one", plain_traces(3, spec=synthetic_spec(routed_layers=(2,)))))
    with pytest.raises(UsageError, match="no token that two of its sequences share"):
        layer_transition(write_run(tmp_path / "alone", plain_traces(1)))
