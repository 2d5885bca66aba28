import doctest
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score
from synthetic import Effects, Planted, synthetic_spec, synthetic_traces

from ling_probe import metrics, stats
from ling_probe.analysis import (
    ANALYSES,
    coactivation,
    expert_clusters,
    expert_load,
    family_specialisation,
    label_specialisation,
    load_balance,
    registry,
    script_main,
    specialisation,
    sure_effect,
    surest_first,
)
from ling_probe.analysis.classified import classified_families, classified_steps, expected_choices
from ling_probe.analysis.coactivation import quasi_independent
from ling_probe.errors import UsageError
from ling_probe.run import Run

DEPENDENT = Effects(token=1.0, step=0.5, sequence=0.5)
"""Tokens of a step, of a sequence and of an id route alike: what a test must see through."""
SCRIPTS = Path(__file__).parent.parent / "analyses"


def trace_run(folder, traces) -> Run:
    run = Run.create(folder, spec=traces[0].spec, model={}, benchmark={}, options={})
    run.append(traces)
    return run


def all_tokens(run) -> np.ndarray:
    return np.concatenate([batch.expert_ids for batch in run.batches()])


def row(table, **named) -> pd.Series:
    for column, value in named.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory):
    spec = synthetic_spec()
    plants = (Planted(2, 5, "multiply", 3.0), Planted(3, 9, "deduction", 2.0))
    traces = synthetic_traces(spec, 60, rng=np.random.default_rng(4), planted=plants, effects=DEPENDENT)
    return trace_run(tmp_path_factory.mktemp("planted") / "run", traces)


def test_doctests_hold():
    assert doctest.testmod(registry).failed == 0


def test_load_counts_every_choice(make_run):
    run = make_run()
    table, ids = expert_load(run), all_tokens(run)
    for place, layer in enumerate(run.spec.routed_layers):
        rows = table[table["layer"] == layer]
        assert rows["count"].tolist() == np.bincount(ids[:, place].ravel(), minlength=16).tolist()
        assert rows[["load", "importance"]].sum().tolist() == pytest.approx([1, 1])
        assert ((rows["ci_low"] <= rows["load"]) & (rows["load"] <= rows["ci_high"])).all()


def test_importance_is_the_share_of_weight(make_run):
    run = make_run()
    batches = list(run.batches(layers=[2], weights=True))
    weight = sum(batch.weights[batch.expert_ids == 3].sum() for batch in batches)
    total = sum(batch.weights.sum() for batch in batches)
    assert row(expert_load(run), layer=2, expert=3)["importance"] == pytest.approx(weight / total)


def test_load_of_segments_adds_up(make_run):
    run = make_run()
    parts = [expert_load(run, segments=[name])["count"] for name in ("prompt", "reasoning", "answer", "special")]
    assert sum(parts).tolist() == expert_load(run)["count"].tolist()
    with pytest.raises(UsageError, match='no segment "thoughts"; these there are: prompt, reasoning'):
        expert_load(run, segments=["thoughts"])


def test_parts_do_not_matter(make_run):
    whole, split = make_run(parts=1), make_run(parts=4)
    pd.testing.assert_frame_equal(expert_load(whole), expert_load(split))
    pd.testing.assert_frame_equal(label_specialisation(whole, permutations=19), label_specialisation(split, permutations=19))
    pd.testing.assert_frame_equal(coactivation(whole), coactivation(split))


def test_balance_stands_beside_its_floor(make_run):
    run = make_run(40)
    table, ids = load_balance(run), all_tokens(run)
    first = np.bincount(ids[:, 0].ravel(), minlength=16)
    assert table["family"].tolist() == ["all"] * 3 + ["arithmetic"] * 3 + ["causal"] * 3 + ["deduction"] * 3
    assert table.groupby("family")["tokens"].first().drop("all").sum() == len(ids)
    table = table[table["family"] == "all"]
    assert table["tokens"].tolist() == [len(ids)] * 3
    assert table["gini"].iloc[0] == pytest.approx(metrics.gini(first))
    assert table["max_vio"].iloc[0] == pytest.approx(metrics.max_vio(first))
    floor = metrics.balance_floor(16, 4, len(ids), n_groups=4, topk_groups=2)
    assert table["gini_floor"].tolist() == [floor.gini] * 3
    assert (table["gini"] > 3 * table["gini_floor"]).all(), "the synthetic router has a bias and is not balanced"


def test_a_planted_label_is_found(planted_run):
    table = label_specialisation(planted_run)
    found = row(table, layer=2, expert=5, label="multiply")
    assert found["q"] < 0.05
    assert 0 < found["ci_low"] < found["log2_ratio"] < found["ci_high"]
    best = surest_first(table).iloc[0]
    assert (best["layer"], best["expert"], best["label"]) == (2, 5, "multiply")
    others = row(table, layer=2, expert=5, label="divide")
    assert others["log2_ratio"] < 0, "where labels compete inside a problem, the others avoid it"
    other_layers = table[table["layer"] == 1]
    assert (other_layers["q"] > 0.05).all()


def test_a_planted_family_is_found(planted_run):
    table = family_specialisation(planted_run)
    found = row(table, layer=3, expert=9, family="deduction")
    assert found["q"] < 0.05
    assert found["ci_low"] > 0
    assert (table[table["layer"] == 1]["q"] > 0.05).all()


def test_the_effect_is_what_was_planted(tmp_path):
    """The same traces without the plant tell how often the expert would have been chosen."""
    spec, counts = synthetic_spec(), []
    for boost in (2.0, 0.0):
        plant = Planted(1, 7, "add", boost)
        traces = synthetic_traces(spec, 150, rng=np.random.default_rng(8), planted=plant, effects=DEPENDENT)
        run = trace_run(tmp_path / f"run-{boost}", traces)
        table = label_specialisation(run, permutations=19)
        steps, chosen = classified_steps(run), 0
        for batch in run.batches(layers=[1]):
            inside = np.array([*steps.codes, -1])[steps.owner(batch)] == steps.names.index("add")
            chosen += (batch.expert_ids[inside] == 7).sum()
        counts.append((chosen, row(table, layer=1, expert=7, label="add")))
    (with_plant, planted), (without, null) = counts
    assert planted["log2_ratio"] == pytest.approx(np.log2(with_plant / without), abs=0.15)
    assert planted["ci_low"] <= np.log2(with_plant / without) <= planted["ci_high"]
    assert null["ci_low"] < 0 < null["ci_high"]


def test_false_positives_come_at_the_stated_rate(make_run):
    """Dependent tokens, no effect: 5 % of tests reject, and few runs have any discovery."""
    labels, families, discoveries = [], [], []
    for seed in range(12):
        run = make_run(30, seed=seed, effects=DEPENDENT)
        table = label_specialisation(run, permutations=199, draws=20, seed=seed)
        labels.append((table["p"] <= 0.05).mean())
        discoveries.append((table["q"] < 0.05).any())
        families.append((family_specialisation(run, permutations=199, draws=20, seed=seed)["p"] <= 0.05).mean())
    assert 0.03 < np.mean(labels) < 0.07
    assert 0.025 < np.mean(families) < 0.075
    assert np.mean(discoveries) <= 0.2


def test_what_only_the_words_explain_is_not_called_meaning(tmp_path):
    """Half the problems use words of one label alone, and routing follows words alone: large raw preferences, no adjusted."""
    traces = []
    for confounded in (True, False):
        effects = Effects(token=2.0, confounded=confounded)
        some = synthetic_traces(synthetic_spec(), 40, rng=np.random.default_rng(0), effects=effects)
        traces += [replace(trace, sequence_id=f"{trace.sequence_id}-{confounded}") for trace in some]
    table = label_specialisation(trace_run(tmp_path / "run", traces), permutations=199)
    assert ((table["overlap"] > 0.1) & (table["overlap"] < 0.7)).all()
    assert table["raw_log2_ratio"].abs().median() > 1.5 * table["log2_ratio"].abs().median()
    assert table["raw_log2_ratio"].abs().max() > 1
    assert (table["p"] <= 0.05).mean() < 0.06
    assert not (table["q"] < 0.05).any()


def test_a_label_its_words_give_away_is_not_tested(make_run):
    table = label_specialisation(make_run(60, effects=Effects(token=2.0, confounded=True)), permutations=19)
    assert (table["overlap"] < 0.1).all()
    assert table[["log2_ratio", "ci_low", "ci_high", "p", "q"]].isna().all(axis=None)
    assert (table["raw_log2_ratio"].abs() > 0.8).mean() > 0.2


def test_families_that_differ_in_words_alone_do_not_differ(make_run):
    labels = {"arithmetic": ("add", "multiply"), "deduction": ("premise", "negation")}
    run = make_run(40, effects=Effects(token=2.0, confounded=True), labels=labels)
    table = family_specialisation(run, permutations=199)
    assert (table["raw_log2_ratio"].abs() > 0.2).mean() > 0.2
    assert (table["p"] <= 0.05).mean() < 0.08


def test_tables_repeat_with_their_seed_and_say_it(planted_run):
    first, again = (label_specialisation(planted_run, permutations=49, draws=50, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)
    other = label_specialisation(planted_run, permutations=49, draws=50, seed=4)
    assert (first["p"] != other["p"]).any()
    assert set(first["seed"]) == {3}


def test_a_p_near_the_floor_of_permutations_comes_from_moments(planted_run):
    table = label_specialisation(planted_run, permutations=99, draws=20)
    assert set(table["permutations"]) == {0, 99}
    assert (table["p"][table["permutations"] == 99] >= 0.1).all()
    found = row(table, layer=2, expert=5, label="multiply")
    assert found["permutations"] == 0
    assert found["p"] < 1e-4
    assert found["q"] < 0.05


def test_moments_say_what_permutations_say_where_those_are_too_dear(planted_run, monkeypatch):
    for analysis in (label_specialisation, family_specialisation):
        drawn = analysis(planted_run, draws=20)
        monkeypatch.setattr(specialisation, "DRAWN", 0)
        told = analysis(planted_run, draws=20)
        monkeypatch.undo()
        assert (told["permutations"] == 0).all()
        both = drawn["p"] > 0.02
        assert np.median(np.abs(np.log2(told["p"][both] / drawn["p"][both]))) < 0.15
        assert np.corrcoef(told["p"][both], drawn["p"][both])[0, 1] > 0.98


def test_expected_choices_add_up(planted_run):
    """Within a problem, and over all families, observed and expected agree: the null is centred on 0."""
    steps = classified_steps(planted_run)
    choices = expected_choices(planted_run, 2, steps)
    for sequence in range(5):
        inside = steps.sequence == sequence
        assert choices.expected[inside].sum(axis=0) == pytest.approx(choices.observed[inside].sum(axis=0), abs=1e-9)
    assert choices.observed.sum() == 4 * sum((batch.step >= 0).sum() for batch in planted_run.batches(layers=[]))
    families = expected_choices(planted_run, 2, classified_families(planted_run))
    assert families.expected.sum(axis=0) == pytest.approx(families.observed.sum(axis=0))


def test_group_limited_choice_is_no_company(make_run):
    """Even random scores in 8 groups: independence would call it lift 1.39 inside groups and 0.81 across them."""
    spec = synthetic_spec(n_experts=64, n_groups=8, topk_groups=4, top_k=8, routed_layers=(1,))
    run = make_run(150, spec=spec)
    table, tokens = coactivation(run), len(all_tokens(run))
    load = expert_load(run).set_index("expert")["count"]
    naive = table["count"] / (load[table["expert"]].to_numpy() * load[table["other"]].to_numpy() / tokens)
    same = (table["expert"] // 8 == table["other"] // 8).to_numpy()
    assert naive[same].mean() > 1.2
    assert naive[~same].mean() < 0.95
    assert abs(np.average(table["lift"][same], weights=table["expected"][same])) < 0.02
    assert abs(np.average(table["lift"][~same], weights=table["expected"][~same])) < 0.02
    assert 0.03 < (table["p"].dropna() <= 0.05).mean() < 0.07
    assert not (table["q"] < 0.05).any()


def test_expected_company_adds_up_to_the_observed(make_run):
    table = coactivation(make_run(30), layers=[2])
    assert set(table["layer"]) == {2}
    assert table["expected"].sum() == pytest.approx(table["count"].sum())


@pytest.mark.parametrize("groups", [(4, 2), (1, 1)])
def test_experts_that_like_the_same_steps_are_company(make_run, groups):
    spec = synthetic_spec(n_groups=groups[0], topk_groups=groups[1])
    run = make_run(90, spec=spec, planted=(Planted(2, 4, "premise", 3.0), Planted(2, 6, "premise", 3.0)))
    found = row(coactivation(run), layer=2, expert=4, other=6)
    assert found["lift"] > 0.2
    assert found["ci_low"] > 0
    assert found["q"] < 0.05


def test_quasi_independence_keeps_the_row_sums_of_a_table_it_made():
    factors = np.array([0.5, 1.0, 2.0, 3.0, 0.0])
    table = np.outer(factors, factors)
    np.fill_diagonal(table, 0)
    assert quasi_independent(table.sum(axis=1)) == pytest.approx(table, abs=1e-6)
    assert quasi_independent(np.array([3.0, 3.0])) == pytest.approx(np.array([[0, 3], [3, 0]]))
    assert not quasi_independent(np.zeros(3)).any()


def test_planted_kinds_of_expert_are_clusters(make_run):
    kinds = {"multiply": range(5), "premise": range(5, 10), "abduce": range(10, 15)}
    plants = tuple(Planted(layer, e, label, 3.0) for layer in (1, 2, 3) for label, some in kinds.items() for e in some)
    table = expert_clusters(make_run(90, spec=synthetic_spec(n_groups=1, topk_groups=1), planted=plants))
    truth = table["expert"].clip(upper=14) // 5
    kept = table["expert"] < 15
    assert adjusted_rand_score(truth[kept], table["cluster"][kept]) > 0.8
    assert table["stability"].iloc[0] > 0.7
    assert table["mean_silhouette"].iloc[0] > table["silhouette_floor"].iloc[0] + 0.2
    sizes = table["cluster"].value_counts()
    assert sizes.sort_index().is_monotonic_decreasing


def test_clusters_of_noise_are_no_better_than_their_floor_and_do_not_come_back(make_run):
    table = expert_clusters(make_run(40))
    assert table["stability"].iloc[0] < 0.5
    assert table["mean_silhouette"].iloc[0] < table["silhouette_floor"].iloc[0] + 0.15


def test_a_run_without_steps_or_families_says_so(make_run):
    plain = make_run(labels={"text": ("other",)}, n_steps=(0, 0))
    for analysis in (label_specialisation, expert_clusters):
        with pytest.raises(UsageError, match="no step labels in this run"):
            analysis(plain)
    with pytest.raises(UsageError, match=r"one family only in this run \(text\); comparing needs two"):
        family_specialisation(plain)
    assert len(expert_load(plain)) == 48


def test_an_empty_run_and_a_senseless_number_are_refused(make_run):
    for analysis in (expert_load, load_balance, coactivation, family_specialisation):
        with pytest.raises(UsageError, match="holds no sequences yet"):
            analysis(make_run(0))
    with pytest.raises(UsageError, match="0 permutations and 1000 bootstrap draws: both must be at least 1"):
        label_specialisation(make_run(), permutations=0)


def test_one_sequence_gives_no_p_for_company(make_run):
    table = coactivation(make_run(1))
    assert table["p"].isna().all()
    assert table["q"].isna().all()


def test_rows_to_read_first():
    table = pd.DataFrame({"ci_low": [0.1, 2.0, -3.0, -1.0], "ci_high": [0.5, 3.0, -1.0, 1.0], "q": [0.01, 0.5, 0.01, np.nan]})
    assert surest_first(table).index.tolist() == [0, 2, 1, 3]
    assert sure_effect(table).tolist() == [0.1, 2.0, 1.0, 0.0]
    assert (stats.benjamini_hochberg(np.array([np.nan])) < 0.05).sum() == 0


def test_every_analysis_has_a_script_and_every_script_an_analysis(planted_run, capsys, monkeypatch):
    assert {path.stem for path in SCRIPTS.glob("*.py")} >= set(ANALYSES)
    monkeypatch.setattr(sys, "argv", ["expert_load.py", str(planted_run.folder), "--json"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPTS / "expert_load.py"), run_name="__main__")
    assert left.value.code == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 48
    assert abs(rows[0]["log2_ratio"]) == max(abs(each["log2_ratio"]) for each in rows)


def test_a_script_prints_a_table_or_one_line_of_error(planted_run, capsys, tmp_path):
    assert script_main("load_balance", [str(planted_run.folder), "--rows", "2"]) == 0
    assert "2 of 12 rows" in capsys.readouterr().out
    assert script_main("load_balance", [str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "nowhere" in captured.err
