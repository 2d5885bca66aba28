import math

import numpy as np
import pytest
import synthetic
from synthetic import Effects, synthetic_run, synthetic_spec
from test_analysis import all_tokens, row

from ling_probe import metrics
from ling_probe.analysis import ANALYSES, Verdict, coverage, expert_load, load_balance, weight_concentration
from ling_probe.analysis.coverage import SHARES
from ling_probe.errors import UsageError


@pytest.fixture
def balanced(monkeypatch):
    """Routers without a bias of their own: every expert is as likely as any other. Their floor is simulated more coarsely."""
    monkeypatch.setattr(metrics, "_SIMULATED_VALUES", 2**21)
    monkeypatch.setattr(synthetic._World, "draw_bias", staticmethod(lambda spec, _: np.zeros((spec.n_rows, spec.n_experts))))


def slow_experts_needed(counts, share):
    """By walking down the sorted loads."""
    loads, held = sorted((count / sum(counts) for count in counts), reverse=True), 0.0
    for place, load in enumerate(loads):
        if held + load >= share - 1e-12:
            return place + (share - held) / load
        held += load
    return math.nan


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99, 1.0])
def test_experts_needed_is_the_walk_down_the_loads(share):
    counts = np.random.default_rng(0).integers(0, 50, (20, 16))
    counts[0] = 0, 7, *[0] * 14
    expected = [slow_experts_needed(each.tolist(), share) for each in counts]
    np.testing.assert_allclose(metrics.experts_needed(counts, share), expected)


def test_balancedness_is_mean_over_largest():
    assert metrics.balancedness(np.array([4, 2, 2, 0])) == 0.5


def test_coverage_of_a_run_and_of_its_sequences(make_run):
    run = make_run(12)
    table, (batch, *rest) = coverage(run), run.batches()
    counts = np.bincount(all_tokens(run)[:, 1].ravel(), minlength=16)
    sequences = [
        np.bincount(each.expert_ids[each.sequence == number, 1].ravel(), minlength=16)
        for each in (batch, *rest)
        for number in np.unique(each.sequence)
    ]
    for share in SHARES:
        whole = row(table, layer=2, scope="run", share=share)
        assert whole["experts"] == pytest.approx(slow_experts_needed(counts.tolist(), share))
        single = row(table, layer=2, scope="sequence", share=share)
        assert single["experts"] == pytest.approx(np.mean([slow_experts_needed(each.tolist(), share) for each in sequences]))
        assert single["sequences"] == 12
    assert (table["ci_low"] < table["experts"]).all()
    assert (table["experts"] < table["ci_high"]).all()


def test_the_floor_of_coverage_is_what_a_balanced_router_shows(tmp_path, balanced):
    """Over many small runs the mean is the floor, in the run and in a sequence, and most intervals hold it."""
    tables = [coverage(synthetic_run(tmp_path / str(seed), 30, seed=seed)) for seed in range(12)]
    inside = []
    for scope in ("run", "sequence"):
        rows = [table[(table["scope"] == scope) & (table["share"] == 0.5)] for table in tables]
        experts, floor = (np.mean([each[name] for each in rows]) for name in ("experts", "floor"))
        assert experts == pytest.approx(floor, rel=0.01)
        inside += [((each["ci_low"] < each["floor"]) & (each["floor"] < each["ci_high"])).mean() for each in rows]
    assert np.mean(inside) > 0.85
    verdicts = [ANALYSES["coverage"].finding(table).verdict for table in tables]
    assert Verdict.SUPPORTED not in verdicts


def test_skewed_work_is_covered_by_few(make_run):
    run = make_run(40, effects=Effects(token=2.0, sequence=1.0))
    found = ANALYSES["coverage"].finding(coverage(run))
    assert found.verdict is Verdict.SUPPORTED
    assert found.effect > 0.05
    with pytest.raises(UsageError, match="no tokens of these segments in this run"):
        coverage(run, segments=["template"])


def test_loads_of_a_balanced_router_differ_at_the_stated_rate(tmp_path, balanced):
    p, found = [], []
    for seed in range(12):
        table = expert_load(synthetic_run(tmp_path / str(seed), 60, seed=seed, effects=Effects(sequence=0.3)), draws=20)
        p += table["p"].tolist()
        found.append((table["q"] < 0.05).any())
    assert 0.02 < (np.array(p) <= 0.05).mean() < 0.09
    assert np.mean(found) <= 0.25


def test_balance_of_a_balanced_router_is_not_called_uneven(tmp_path, balanced):
    verdicts = [
        ANALYSES["load_balance"].finding(load_balance(synthetic_run(tmp_path / str(seed), 40, seed=seed))).verdict
        for seed in range(10)
    ]
    assert verdicts.count(Verdict.SUPPORTED) <= 1


def test_an_uneven_load_is_found(make_run):
    run = make_run(40)
    load, balance = expert_load(run), load_balance(run)
    assert ANALYSES["expert_load"].finding(load).verdict is Verdict.SUPPORTED
    assert ANALYSES["load_balance"].finding(balance).verdict is Verdict.SUPPORTED
    assert (balance["ci_low"] < balance["gini"]).all()
    assert balance["balancedness"].tolist() == pytest.approx((1 / (1 + balance["max_vio"])).tolist())


def test_weights_are_ranked_by_weight_and_not_by_slot(make_run):
    run = make_run(9, effects=Effects(token=0.5))
    table = weight_concentration(run, draws=20)
    weights = np.concatenate([batch.weights for batch in run.batches(weights=True)])
    assert (weights.argmax(axis=-1) != 0).any(), "in some choice the first slot has not the largest weight"
    ordered = -np.sort(-weights[:, 2], axis=-1) / run.spec.scale
    rows = table[(table["layer"] == 3) & (table["kind"] == "all")]
    assert rows["rank"].tolist() == [1, 2, 3, 4]
    assert rows["share"].tolist() == pytest.approx(ordered.mean(axis=0).tolist())
    assert rows["cumulative"].tolist() == pytest.approx(ordered.mean(axis=0).cumsum().tolist())
    assert rows["cumulative"].iloc[-1] == pytest.approx(1, abs=1e-3)
    families = run.sequences["family"].to_numpy()
    batches = list(run.batches(layers=[3], weights=True))
    causal = np.concatenate([batch.weights[families[batch.sequence] == "causal", 0] for batch in batches])
    first = row(table, layer=3, kind="family", name="causal", rank=1)
    assert first["share"] == pytest.approx(causal.max(axis=-1).mean() / run.spec.scale)
    assert first["tokens"] == len(causal)
    label = table[(table["kind"] == "label") & (table["name"] == "premise")]
    assert label["tokens"].iloc[0] == sum(
        len(span) and span["stop"] - span["start"] for _, span in run.steps.iterrows() if span["label"] == "premise"
    )


def test_one_expert_outweighs_the_rest_or_does_not(make_run):
    flat = ANALYSES["weight_concentration"].finding(weight_concentration(make_run(20)))
    assert flat.verdict is Verdict.NOT_SUPPORTED
    steep = weight_concentration(make_run(20, effects=Effects(token=6.0), spec=synthetic_spec(top_k=2)))
    assert ANALYSES["weight_concentration"].finding(steep).verdict is Verdict.SUPPORTED


def test_one_sequence_has_no_interval(make_run):
    table = weight_concentration(make_run(1), draws=20)
    assert table["share"].notna().all()
    assert table[["ci_low", "ci_high"]].isna().all(axis=None)
    assert coverage(make_run(1))[["ci_low", "ci_high"]].isna().all(axis=None)
