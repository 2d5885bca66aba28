import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from synthetic import Planted, synthetic_run
from test_analysis import all_tokens
from test_balance import balanced  # noqa: F401

from ling_probe import charts, metrics
from ling_probe.analysis import ANALYSES, Verdict, load_balance, load_curve
from ling_probe.analysis.load_curves import beyond_balanced, idle_experts, loads_with_bias
from ling_probe.errors import UsageError


def slow_curve(counts):
    """By adding up the loads one after the other."""
    total, held = [], 0
    for count in sorted(counts):
        held += count
        total.append(held / sum(counts))
    return total


def test_the_curve_of_a_run_is_the_sum_of_its_sorted_loads(make_run):
    run = make_run(12)
    table = load_curve(run)
    for row, layer in enumerate(run.spec.routed_layers):
        counts = np.bincount(all_tokens(run)[:, row].ravel(), minlength=16)
        rows = table[(table["layer"] == layer) & (table["family"] == "all")]
        assert rows["rank"].tolist() == list(range(1, 17))
        np.testing.assert_allclose(rows["share"], slow_curve(counts.tolist()))
        assert counts[rows["expert"]].tolist() == rows["count"].tolist()
        np.testing.assert_allclose(rows["busy_share"], np.sort(counts)[8:].sum() / counts.sum())
        np.testing.assert_allclose(rows["log2_ratio"], metrics.log2_load_ratio(counts)[rows["expert"]])


def test_families_have_curves_of_their_own_and_the_gini_is_the_area(make_run):
    run = make_run(12)
    curves, balance = load_curve(run), load_balance(run)
    assert set(curves["family"]) == {"all", "arithmetic", "causal", "deduction"}
    assert curves.groupby("family")["count"].sum().drop("all").sum() == curves.groupby("family")["count"].sum()["all"]
    for (layer, family), rows in curves.groupby(["layer", "family"]):
        area = (2 * rows["share"].sum() - 1) / len(rows)
        gini = balance[(balance["layer"] == layer) & (balance["family"] == family)]["gini"].item()
        assert 1 - area == pytest.approx(gini)


def test_of_an_odd_number_of_experts_the_middle_one_counts_half():
    assert metrics.busy_share(np.array([1, 1, 1])) == pytest.approx(0.5)
    assert metrics.busy_share(np.array([6, 0, 2])) == pytest.approx(0.875)


def test_balanced_routers_lie_in_their_range(tmp_path, balanced):  # noqa: F811
    tables = [load_curve(synthetic_run(tmp_path / str(seed), 40, seed=seed)) for seed in range(8)]
    inside = [
        ((table["share"] >= table["floor_low"] - 1e-12) & (table["share"] <= table["floor_high"] + 1e-12)).mean()
        for table in tables
    ]
    assert np.mean(inside) > 0.85
    verdicts = [ANALYSES["load_curve"].finding(table).verdict for table in tables]
    assert sum(verdict is Verdict.SUPPORTED for verdict in verdicts) <= 1


def test_a_router_with_a_favourite_is_found(tmp_path):
    plants = tuple(Planted(layer, 3, family, boost=5.0) for layer in (1, 2, 3) for family in ("arithmetic", "causal"))
    found = ANALYSES["load_curve"].finding(load_curve(synthetic_run(tmp_path / "run", 40, planted=plants)))
    assert found.verdict is Verdict.SUPPORTED
    assert found.ci_low > 0.03


def test_idle_experts_are_the_dead_and_the_rare():
    counts = pd.DataFrame({"layer": 1, "family": "all", "expert": range(4), "count": [0, 60, 2, 58], "load": 0.0})
    idle = idle_experts(counts)
    assert idle[["expert", "count", "dead"]].to_dict("list") == {"expert": [0, 2], "count": [0, 2], "dead": [True, False]}


def test_experts_beyond_balanced_routers_are_counted(make_run):
    table = load_curve(make_run(30))
    rows = table[table["family"] == "all"]
    outside, low, high = beyond_balanced(rows)
    assert outside == (((rows["load"] * 16) < low) | ((rows["load"] * 16) > high)).sum() > 10
    assert low < 1 < high


def test_bias_stands_beside_the_load_with_its_rank_correlation(make_run):
    run = make_run(12)
    rows = loads_with_bias(run, load_curve(run).query("family == 'all'"))
    for layer, each in rows.groupby("layer"):
        assert each["bias"].tolist() == [run.manifest.model["expert_bias"][str(layer)][expert] for expert in each["expert"]]
        np.testing.assert_allclose(each["rank_correlation"], spearmanr(each["bias"], each["load"]).statistic)
    del run.manifest.model["expert_bias"]
    with pytest.raises(UsageError, match="knows no expert_bias"):
        loads_with_bias(run, load_curve(run))


def test_the_chart_draws_every_layer_over_the_balanced_range(make_run):
    table = load_curve(make_run(9))
    figure = charts.lorenz_curves(table, family="causal")
    assert [trace.name for trace in figure.data] == [
        "95 % of balanced routers", "perfectly even", "layer 1", "layer 2", "layer 3",
    ]  # fmt: skip
    rows = table[(table["layer"] == 2) & (table["family"] == "causal")]
    np.testing.assert_allclose(figure.data[3].y, [0, *rows["share"]])
    np.testing.assert_allclose(figure.data[0].y[1:17], rows["floor_high"])
