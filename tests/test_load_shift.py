"""Loads of two runs, or two sides of one, against each other."""

from dataclasses import replace

import numpy as np
import pytest
from pairs import plain_traces, rerouted, write_run
from synthetic import Effects, Planted

from ling_probe import metrics, stats
from ling_probe.analysis import ANALYSES, Verdict, load_shift
from ling_probe.analysis.contrast import LoadContrast, count_layers
from ling_probe.analysis.counting import segment_mask

PLANTS = tuple(Planted(2, 5, family, 2.0) for family in ("arithmetic", "deduction", "causal"))
DEPENDENT = Effects(token=1.0, step=0.5, sequence=0.5)


def pair(tmp_path, one, other):
    return [write_run(tmp_path / f"run-{place}", traces, parts=2) for place, traces in enumerate((one, other))]


def apart(traces):
    return [replace(trace, sequence_id=f"else-{trace.sequence_id}") for trace in traces]


def test_shares_are_those_of_counting(tmp_path):
    traces = plain_traces(20)
    moved = rerouted(traces)[:12]
    table = load_shift(pair(tmp_path, traces, moved), draws=50, flips=99)
    for row, layer in enumerate((1, 2, 3)):
        counts = [
            np.bincount(np.concatenate([trace.expert_ids[:, row].ravel() for trace in some]), minlength=16)
            for some in (traces[:12], moved)
        ]
        mine = table[table["layer"] == layer]
        assert mine["share"].to_numpy() == pytest.approx(counts[0] / counts[0].sum())
        assert mine["share_against"].to_numpy() == pytest.approx(counts[1] / counts[1].sum())
        log2 = np.log2((counts[0] + 0.5) / (counts[1] + 0.5))
        assert mine["log2_ratio"].to_numpy() == pytest.approx(log2, abs=1e-9)
        raw = metrics.jensen_shannon(*(each / each.sum() for each in counts))
        assert 0 < mine["divergence"].iloc[0] < raw
        assert mine["divergence_low"].iloc[0] < mine["divergence"].iloc[0] < mine["divergence_high"].iloc[0]
    assert set(table["sequences"]) == {12}
    assert table["paired"].all()


@pytest.mark.parametrize("shared", [True, False])
def test_a_planted_shift_is_found(tmp_path, shared):
    one = plain_traces(60, planted=PLANTS, effects=DEPENDENT)
    other = plain_traces(60, effects=DEPENDENT)
    table = load_shift(pair(tmp_path, one, other if shared else apart(other)))
    best = ANALYSES["load_shift"].order(table).iloc[0]
    assert (best["layer"], best["expert"]) == (2, 5)
    assert best["q"] < 0.05
    assert 0 < best["ci_low"] < best["log2_ratio"] < best["ci_high"]
    finding = ANALYSES["load_shift"].finding(table)
    assert finding.verdict is Verdict.SUPPORTED
    assert ("compared with itself" in finding.sentence) is shared
    if shared:
        assert best["divergence_low"] > 0
        assert (table[table["layer"] != 2]["p"] == 1).all(), "the other layers of these traces are the same"


def test_a_shift_that_is_there_and_small_does_not_support_the_claim(tmp_path):
    traces = plain_traces(300, labels={"text": ("add",)})
    table = load_shift(pair(tmp_path, traces, rerouted(traces, share=0.03)))
    assert (table["q"] < 0.05).any()
    finding = ANALYSES["load_shift"].finding(table)
    assert finding.verdict is Verdict.NOT_SUPPORTED
    assert finding.rung == 1
    assert abs(finding.effect) < 0.3


def test_a_found_shift_that_may_be_large_cannot_be_told(tmp_path):
    traces = plain_traces(12)
    table = load_shift(pair(tmp_path, traces, traces), draws=20, flips=99)
    table.loc[5, ["log2_ratio", "ci_low", "ci_high", "q"]] = 0.5, 0.2, 0.9, 0.01
    finding = ANALYSES["load_shift"].finding
    assert finding(table).verdict is Verdict.CANNOT_TELL
    table.loc[5, "ci_high"] = 0.55
    assert finding(table).verdict is Verdict.NOT_SUPPORTED
    table.loc[5, ["ci_low", "ci_high"]] = 0.6, 1.2
    assert finding(table).verdict is Verdict.SUPPORTED


@pytest.mark.parametrize("shared", [True, False])
def test_no_shift_is_found_at_the_stated_rate(tmp_path, shared):
    """Tokens, sequences and problems that depend on each other, and two draws of the same router."""
    rates, discoveries, divergences = [], [], []
    for seed in range(25):
        if shared:
            one = plain_traces(24, seed=seed, effects=DEPENDENT)
            both = [rerouted(one, seed=each, by_token=1.0) for each in (2 * seed + 100, 2 * seed + 101)]
        else:
            traces = plain_traces(48, seed=seed, effects=DEPENDENT)
            both = [traces[:24], traces[24:]]
        table = load_shift(pair(tmp_path / f"{seed}", *both), draws=50, flips=399, seed=seed)
        rates.append((table["p"] <= 0.05).mean())
        discoveries.append((table["q"] < 0.05).any())
        divergences += table.drop_duplicates("layer")["divergence"].tolist()
    assert 0.03 < np.mean(rates) < 0.075
    assert np.mean(discoveries) <= 0.16
    assert abs(np.mean(divergences)) < 0.25 * np.std(divergences) + 1e-4, "without its bias a divergence is 0 on average"


def test_differences_add_up_and_signs_are_fair():
    rng = np.random.default_rng(0)
    contrast = LoadContrast(rng.poisson(5, (30, 8)), rng.poisson(9, (30, 8)))
    one, other = contrast.shares
    assert contrast.differences.sum(axis=0) == pytest.approx(one - other)
    assert contrast.differences.sum(axis=1) == pytest.approx(0, abs=1e-12)


def test_sign_flips_follow_their_exact_law():
    """Of four units all sixteen patterns of signs are equally likely; the sum of all is reached by two."""
    values = np.array([[1.0], [2.0], [4.0], [8.0]])
    exceeding = stats.count_flipped(values, draws=8000)
    assert exceeding.item() / 8000 == pytest.approx(2 / 16, abs=0.012)
    signs = np.concatenate(list(stats.random_signs(3, draws=600)))
    assert signs.shape == (600, 3)
    assert set(np.unique(signs)) == {-1.0, 1.0}


def test_a_ratio_interval_covers_the_truth(tmp_path):
    """Two halves of one population: the true ratio is 1."""
    covered = []
    for seed in range(12):
        traces = plain_traces(60, seed=seed, effects=Effects(sequence=1.0))
        table = load_shift(pair(tmp_path / f"{seed}", traces[:30], traces[30:]), draws=300, flips=9, seed=seed)
        covered.append(((table["ci_low"] <= 0) & (table["ci_high"] >= 0)).mean())
    assert 0.88 < np.mean(covered) < 0.98


def test_all_layers_in_one_pass_count_as_layer_by_layer(make_run):
    run = make_run(12, parts=3)
    counts = count_layers(run, lambda batch: np.where(segment_mask(batch, ["reasoning"]), batch.sequence, -1), 12)
    for row in range(3):
        slow = np.zeros((12, 16), int)
        for batch in run.batches():
            mine = batch.segment == 1
            np.add.at(slow, (batch.sequence[mine, None], batch.expert_ids[mine, row]), 1)
        assert counts[row].tolist() == slow.tolist()


def test_divergence_closed_forms():
    assert metrics.jensen_shannon(np.array([0.5, 0.5, 0]), np.array([0, 0.5, 0.5])) == pytest.approx(0.5)
    same = np.random.default_rng(0).dirichlet(np.ones(9), 4)
    assert metrics.jensen_shannon(same, same) == pytest.approx(np.zeros(4), abs=1e-12)
