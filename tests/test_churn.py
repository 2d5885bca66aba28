"""Routing from token to token, and across step boundaries."""

import numpy as np
import pytest
from synthetic import Effects, synthetic_spec, synthetic_traces

from ling_probe.analysis import ANALYSES, Verdict, churn, routing_churn
from ling_probe.analysis.churn import LAGS
from ling_probe.run import Run

WORDS = Effects(token=1.0, sequence=0.5)
"""Routing follows the token and the sequence, and knows nothing of steps."""
STEPS = Effects(token=1.0, sequence=0.5, step=1.0)


def traces_of(n, *, seed=0, **options):
    spec = synthetic_spec(vocab_size=12)
    return synthetic_traces(spec, n, rng=np.random.default_rng(seed), labels={"text": ("add", "multiply")}, **options)


def written(folder, traces) -> Run:
    run = Run.create(folder, spec=traces[0].spec, model={}, benchmark={}, options={})
    for places in np.array_split(np.arange(len(traces)), min(3, len(traces))):
        run.append([traces[place] for place in places])
    return run


def changed(one, other) -> float:
    return 1 - len(set(one.tolist()) & set(other.tolist())) / len(one)


def test_churn_is_what_counting_sets_gives(tmp_path):
    traces = traces_of(10)
    table = routing_churn(written(tmp_path / "run", traces), draws=50, flips=99)
    for row in range(3):
        every, inside, across = [], [], []
        for trace in traces:
            for t in range(trace.n_tokens - 1):
                each = changed(trace.expert_ids[t, row], trace.expert_ids[t + 1, row])
                every.append(each)
                if min(trace.step[t], trace.step[t + 1]) >= 0:
                    (inside if trace.step[t] == trace.step[t + 1] else across).append(each)
        found = table.iloc[row]
        assert found["churn"] == pytest.approx(np.mean(every))
        assert (found["inside"], found["boundary"]) == pytest.approx((np.mean(inside), np.mean(across)))
        assert found["pairs"] == len(every)
        assert found["churn_low"] < found["churn"] < found["churn_high"]


def test_random_order_is_what_all_pairs_of_a_sequence_give(tmp_path):
    """Exact law: neighbours of a shuffled sequence are any two of its tokens."""
    traces = traces_of(120, effects=STEPS)
    table = routing_churn(written(tmp_path / "run", traces), draws=50, flips=99)
    for row in range(3):
        total, pairs = 0.0, 0
        for trace in traces:
            n = trace.n_tokens
            load = np.bincount(trace.expert_ids[:, row].ravel(), minlength=16)
            alike = ((load**2).sum() - load.sum()) / (n * (n - 1) * 4)
            total, pairs = total + (n - 1) * (1 - alike), pairs + n - 1
        assert table["shuffled"].iloc[row] == pytest.approx(total / pairs, abs=0.008)


def test_the_boundary_effect_is_the_matched_difference(tmp_path):
    traces = traces_of(12, effects=STEPS)
    table = routing_churn(written(tmp_path / "run", traces), draws=50, flips=99)
    for row in range(3):
        seen = {}
        for trace in traces:
            for lag in LAGS:
                for t in range(trace.n_tokens - lag):
                    if min(trace.step[t], trace.step[t + lag]) < 0:
                        continue
                    key = (trace.token_ids[t], trace.token_ids[t + lag], lag)
                    across = int(trace.step[t] != trace.step[t + lag])
                    each = changed(trace.expert_ids[t, row], trace.expert_ids[t + lag, row])
                    seen.setdefault(key, ([], []))[across].append(each)
        both = [sides for sides in seen.values() if all(sides)]
        weight = np.array([len(a) * len(b) / (len(a) + len(b)) for a, b in both])
        effect = np.average([np.mean(across) - np.mean(inside) for inside, across in both], weights=weight)
        assert table["boundary_effect"].iloc[row] == pytest.approx(effect)
        n_inside, n_across = (sum(len(sides[place]) for sides in seen.values()) for place in (0, 1))
        assert table["overlap"].iloc[row] == pytest.approx(weight.sum() * (n_inside + n_across) / (n_inside * n_across))


def test_steps_that_route_alike_are_found(tmp_path):
    table = routing_churn(written(tmp_path / "run", traces_of(60, effects=STEPS)))
    assert (table["ci_low"] > 0.02).all()
    assert (table["q"] < 0.05).all()
    assert (table["near_low"] > 0).all(), "neighbours are of one step, tokens in random order are not"
    finding = ANALYSES["routing_churn"].finding(table)
    assert finding.verdict is Verdict.SUPPORTED
    assert finding.rung == 3


def test_without_steps_in_routing_boundaries_are_like_any_place(tmp_path):
    """Where a boundary test cannot fail it says nothing: here it must not reject more than it says."""
    p, discoveries = [], []
    for seed in range(30):
        table = routing_churn(written(tmp_path / f"{seed}", traces_of(24, seed=seed, effects=WORDS)), draws=50, flips=399)
        p += table["p"].tolist()
        discoveries.append((table["q"] < 0.05).any())
    assert np.mean(np.array(p) <= 0.05) < 0.1
    assert np.mean(np.array(p) <= 0.5) > 0.25
    assert np.mean(discoveries) <= 0.14


def test_words_of_a_step_alone_are_no_boundary_effect(tmp_path):
    """Each label has its own words and routing follows words: churn is higher at boundaries, but not at equal words."""
    effects = Effects(token=3.0, confounded=True)
    found = routing_churn(written(tmp_path / "run", traces_of(150, effects=effects)))
    assert (found["boundary"] > found["inside"]).sum() >= 2
    assert not ((found["q"] < 0.05) & (found["ci_low"] > 0)).any()


def test_a_run_without_steps_has_churn_and_no_boundaries(tmp_path):
    table = routing_churn(written(tmp_path / "run", traces_of(6, n_steps=(0, 0))))
    assert table["churn"].notna().all()
    assert table[["boundary", "boundary_effect", "ci_low", "p", "q"]].isna().all(axis=None)
    finding = ANALYSES["routing_churn"].finding(table)
    assert finding.verdict is Verdict.CANNOT_TELL
    assert "cannot be told" in finding.sentence


def test_too_few_equal_pairs_are_not_tested(tmp_path, monkeypatch):
    run = written(tmp_path / "run", traces_of(20))
    overlap = routing_churn(run, draws=50, flips=99)["overlap"].iloc[0]
    assert 0.1 < overlap < 1
    monkeypatch.setattr(churn, "LEAST_OVERLAP", overlap + 0.01)
    table = routing_churn(run, draws=50, flips=99)
    assert table[["boundary_effect", "p"]].isna().all(axis=None)
    assert f"{100 * overlap:.2f} % of the pairs of words" in ANALYSES["routing_churn"].finding(table).sentence


def test_one_sequence_and_one_step_do_not_break_it(tmp_path):
    table = routing_churn(written(tmp_path / "run", traces_of(1, n_steps=(1, 1))))
    assert table["churn"].between(0, 1).all()
    assert table["boundary_effect"].isna().all()
