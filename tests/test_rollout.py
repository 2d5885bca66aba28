"""Prompt against completion."""

from dataclasses import replace

import numpy as np
import pytest
from pairs import plain_traces, rerouted, write_run
from synthetic import Effects, synthetic_spec

from ling_probe import metrics
from ling_probe.analysis import ANALYSES, Verdict, prompt_rollout
from ling_probe.analysis.rollout import measure_sides
from ling_probe.errors import UsageError

SMALL = synthetic_spec(vocab_size=10)


def in_completions(traces, *, layer_row=1):
    """Completion tokens that take m experts of the first group take its first m."""
    found = []
    for trace in traces:
        ids = trace.expert_ids.copy()
        for t in np.flatnonzero(np.isin(trace.segment, (1, 2))):
            first = np.flatnonzero(ids[t, layer_row] < 4)
            ids[t, layer_row, first] = np.arange(len(first))
        found.append(replace(trace, expert_ids=ids))
    return found


def slow_shares(traces, row):
    """Loads of prompt and completion, plain and at equal tokens of each sequence."""
    plain, equal, weight = np.zeros((2, 16)), np.zeros((2, 16)), 0.0
    for trace in traces:
        side = np.select([trace.segment == 0, trace.segment <= 2], [0, 1], -1)
        for token in set(trace.token_ids[side >= 0].tolist()):
            places = [np.flatnonzero((trace.token_ids == token) & (side == each)) for each in (0, 1)]
            n = [len(each) for each in places]
            common = n[0] * n[1] / sum(n)
            weight += common
            for each in (0, 1):
                counts = np.bincount(trace.expert_ids[places[each], row].ravel(), minlength=16)
                plain[each] += counts
                equal[each] += counts * common / max(n[each], 1)
    return plain, equal, weight


def test_loads_are_those_of_counting(tmp_path):
    traces = plain_traces(15, spec=SMALL)
    run = write_run(tmp_path / "run", traces, parts=3)
    sides, table = measure_sides(run, np.arange(15) % 4), prompt_rollout(run, draws=50)
    most = sum(a * b / (a + b) for t in traces for a, b in [((t.segment == 0).sum(), np.isin(t.segment, (1, 2)).sum())])
    for row in range(3):
        plain, equal, weight = slow_shares(traces, row)
        assert sides.plain[row].sum(axis=1) == pytest.approx(plain)
        assert sides.equal[row].sum(axis=1) == pytest.approx(equal)
        assert sides.equal[row].sum(axis=2)[0] == pytest.approx(sides.equal[row].sum(axis=2)[1]), "in every bundle, as much"
        found = table.iloc[row]
        assert found["divergence"] < metrics.jensen_shannon(*(side / side.sum() for side in equal))
        assert found["overlap"] == pytest.approx(weight / most)
        assert (found["prompt_tokens"], found["completion_tokens"]) == tuple(plain.sum(axis=1) / 4)


def test_a_planted_side_is_found(tmp_path):
    traces = in_completions(plain_traces(60, spec=SMALL, effects=Effects(token=1.0, sequence=0.5)))
    table = prompt_rollout(write_run(tmp_path / "run", traces))
    planted, other = table.iloc[1], table.iloc[[0, 2]]
    assert planted["q"] < 0.05
    assert planted["ci_low"] > 0.01
    assert planted["ci_low"] < planted["divergence"] < planted["ci_high"]
    assert (other["divergence"] < planted["divergence"] / 3).all()
    assert ANALYSES["prompt_rollout"].finding(table).verdict is Verdict.SUPPORTED


def test_no_difference_is_found_at_the_stated_rate(tmp_path):
    p, net, discoveries = [], [], []
    for seed in range(30):
        traces = plain_traces(24, seed=seed, spec=SMALL, effects=Effects(token=1.0, sequence=0.5))
        table = prompt_rollout(write_run(tmp_path / f"{seed}", traces), draws=50, seed=seed)
        p += table["p"].tolist()
        net += table["divergence"].tolist()
        discoveries.append((table["q"] < 0.05).any())
    assert 0.0 < np.mean(np.array(p) <= 0.1) < 0.2
    assert np.mean(np.array(p) <= 0.5) > 0.3
    assert np.mean(discoveries) <= 0.14
    assert abs(np.mean(net)) < 0.5 * np.std(net), "without its bias a divergence is 0 on average"


def test_what_only_the_words_explain_is_none_of_the_side(tmp_path):
    """Prompts and completions with words of their own beside common ones, routing by words alone."""
    p, raw, equal = [], [], []
    for seed in range(12):
        traces = []
        for trace in plain_traces(60, seed=seed, spec=synthetic_spec(vocab_size=16)):
            ids = trace.token_ids.copy()
            ids[(trace.segment == 0) & (ids > 8)] = 1
            ids[(trace.segment > 0) & (ids <= 4)] = 9
            traces.append(replace(trace, token_ids=ids))
        run = write_run(tmp_path / f"{seed}", rerouted(traces, seed=seed + 500, by_token=3.0))
        table = prompt_rollout(run, draws=200, seed=seed)
        assert (table["overlap"] < 0.6).all()
        p, raw, equal = p + table["p"].tolist(), raw + table["raw_low"].tolist(), equal + table["divergence"].tolist()
    assert np.mean(raw) > 0.01
    assert abs(np.mean(equal)) < 0.1 * np.mean(raw)
    assert np.mean(np.array(p) <= 0.05) < 0.14


def test_too_few_common_words_are_not_tested(tmp_path):
    traces = []
    for trace in plain_traces(20):
        ids = trace.token_ids.copy()
        ids[trace.segment == 0] = 1 + ids[trace.segment == 0] % 5
        ids[trace.segment > 0] = 10 + ids[trace.segment > 0] % 5
        traces.append(replace(trace, token_ids=ids))
    table = prompt_rollout(write_run(tmp_path / "run", traces))
    assert (table["overlap"] == 0).all()
    assert table[["divergence", "ci_low", "ci_high", "p", "q"]].isna().all(axis=None)
    finding = ANALYSES["prompt_rollout"].finding(table)
    assert finding.verdict is Verdict.CANNOT_TELL
    assert "share too few words" in finding.sentence


@pytest.mark.parametrize(("segment", "missing"), [(0, "completions"), (1, "prompts")])
def test_a_run_of_one_side_is_refused(tmp_path, segment, missing):
    traces = [
        replace(trace, segment=np.full(trace.n_tokens, segment, np.uint8), step=np.full(trace.n_tokens, -1, np.int16), steps=())
        for trace in plain_traces(4)
    ]
    with pytest.raises(UsageError, match=f"has no tokens of {missing}"):
        prompt_rollout(write_run(tmp_path / "run", traces))
