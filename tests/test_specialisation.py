"""Specialisation against slow plain re-computations, and on runs whose effects and answers are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import Effects, Planted, synthetic_spec, synthetic_traces

from ling_probe import stats
from ling_probe.analysis import (
    adjusted,
    correctness_specialisation,
    family_specialisation,
    finding,
    held_out,
    label_specialisation,
    risk_difference,
    specialisation,
    surest_picked,
)
from ling_probe.analysis.adjusted import Design
from ling_probe.analysis.classified import classified_answers, classified_families, classified_steps
from ling_probe.errors import UsageError
from ling_probe.run import Run

DEPENDENT = Effects(token=1.0, step=0.5, sequence=0.5)


def run_of(folder, traces, parts=1) -> Run:
    run = Run.create(folder, spec=traces[0].spec, model={}, benchmark={}, options={})
    for places in np.array_split(np.arange(len(traces)), parts):
        run.append([traces[place] for place in places])
    return run


def traces_of(n=60, seed=4, planted=None, effects=DEPENDENT, **options):
    spec = synthetic_spec()
    return synthetic_traces(spec, n, rng=np.random.default_rng(seed), planted=planted, effects=effects, **options)


def wrong_like(traces, layer=2, expert=5, chance=0.4, seed=0):
    """The traces with new answers: the more of its tokens choose the expert, the likelier it is wrong."""
    rng = np.random.default_rng(seed)
    rate = np.array([(trace.expert_ids[:, trace.spec.row(layer)] == expert).any(axis=1).mean() for trace in traces])
    wrong = rate + rng.normal(0, rate.std() / 2, len(rate)) > np.quantile(rate, 1 - chance)
    return [replace(trace, correct=not bad) for trace, bad in zip(traces, wrong, strict=True)]


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory):
    plants = (Planted(2, 5, "multiply", 3.0), Planted(3, 9, "deduction", 2.0))
    return run_of(tmp_path_factory.mktemp("planted") / "run", traces_of(120, planted=plants), parts=3)


def frame(run, classified) -> pd.DataFrame:
    """Every counted token of layer 2, one row a token: owner, class, family, word, half and unit."""
    design, rows = Design.of(run, classified, 0), []
    for batch in run.batches(layers=[2]):
        owner = classified.owner(batch)
        rows += [
            {"owner": o, "word": int(token), "ids": set(ids.tolist())}
            for o, token, ids in zip(owner, batch.token_id, batch.expert_ids[:, 0], strict=True)
            if o >= 0
        ]
    found = pd.DataFrame(rows)
    for name, values in (("code", classified.codes), ("stratum", classified.stratum), ("half", design.half)):
        found[name] = values[found["owner"]]
    found["sequence"] = classified.sequence[found["owner"]]
    return found


def slow_ratio(tokens, code, expert) -> float:
    """The effect word by word: rates inside and outside, weighted n·m/(n+m) in each stratum."""
    sums = np.zeros(4)
    for _, some in tokens.groupby(["stratum", "word"]):
        inside = some["code"] == code
        n, m = inside.sum(), (~inside).sum()
        chosen = np.array([expert in ids for ids in some["ids"]])
        share_in, share_out = m / (n + m), n / (n + m)
        sums += [chosen[inside].sum() * share_in, n * share_in, chosen[~inside].sum() * share_out, m * share_out]
    a, n, b, m = sums + 0.5
    return float(np.log2(a / n / (b / m)))


@pytest.mark.parametrize("kind", ["label", "family", "answer"])
def test_effects_are_those_of_a_word_by_word_count(planted_run, kind):
    analysis, classify = {
        "label": (label_specialisation, classified_steps),
        "family": (family_specialisation, classified_families),
        "answer": (correctness_specialisation, classified_answers),
    }[kind]
    table, classified = analysis(planted_run, permutations=19, draws=19), classify(planted_run)
    tokens = frame(planted_run, classified)
    for code, name in enumerate(classified.names):
        for expert in (5, 11):
            rows = table[(table["layer"] == 2) & (table["expert"] == expert) & (table[kind] == name)]
            if kind == "answer" and name == "right":
                assert rows.empty
                continue
            row = rows.iloc[0]
            assert row["log2_ratio"] == pytest.approx(slow_ratio(tokens, code, expert), abs=1e-4)
            mine = tokens[tokens["code"] == code]
            assert row["tokens"] == len(mine)
            chosen = [expert in ids for ids in mine["ids"]]
            assert row["share_in"] == pytest.approx(np.sum(chosen) / (4 * len(mine)))
            for half, column in ((0, "picked_log2_ratio"), (1, "held_out_log2_ratio")):
                if not np.isnan(row[column]):
                    assert row[column] == pytest.approx(slow_ratio(tokens[tokens["half"] == half], code, expert), abs=1e-4)


def test_the_null_is_that_of_residuals_computed_one_by_one(planted_run, monkeypatch):
    """Observed minus word rates minus the problem's share, in plain pandas; its moments give the table's p."""
    monkeypatch.setattr(specialisation, "DRAWN", 0)
    table, classified = label_specialisation(planted_run, draws=19), classified_steps(planted_run)
    tokens = frame(planted_run, classified)
    tokens["chosen"] = [5.0 * (5 in ids) / 5 for ids in tokens["ids"]]
    tokens["residual"] = tokens["chosen"] - tokens.groupby(["stratum", "word"])["chosen"].transform("mean")
    steps = tokens.groupby("owner").agg(residual=("residual", "sum"), n=("word", "size"), sequence=("sequence", "first"))
    whole = steps.groupby("sequence")[["residual", "n"]].transform("sum")
    values = (steps["residual"] - whole["residual"] * steps["n"] / whole["n"]).to_numpy()[:, None]
    null = stats.shuffle_moments(values, classified.codes, blocks=classified.sequence)
    for code, name in enumerate(classified.names):
        row = table[(table["layer"] == 2) & (table["expert"] == 5) & (table["label"] == name)].iloc[0]
        assert row["p"] == pytest.approx(null.p()[code, 0], rel=2e-3)


def test_groups_of_layers_change_nothing(planted_run, monkeypatch):
    whole = label_specialisation(planted_run, permutations=19, draws=19)
    monkeypatch.setattr(adjusted, "MEMORY", 1)
    pd.testing.assert_frame_equal(label_specialisation(planted_run, permutations=19, draws=19), whole)


def test_what_was_planted_is_picked_on_one_half_and_holds_on_the_other(planted_run):
    for table, column, name, layer, expert in (
        (label_specialisation(planted_run), "label", "multiply", 2, 5),
        (family_specialisation(planted_run), "family", "deduction", 3, 9),
    ):
        best = surest_picked(table).iloc[0]
        assert (best["layer"], best["expert"], best[column]) == (layer, expert, name)
        assert best["replicated"]
        assert held_out(table.loc[[best.name]])["log2_ratio"].item() == best["held_out_log2_ratio"]
        told = finding(f"{column}_specialisation", table)
        assert told.rung == 4
        assert told.effect == best["held_out_log2_ratio"]
        assert "picked on one half of the problems hold on the other" in told.sentence


def test_moments_alone_reject_at_the_stated_rate(make_run, monkeypatch):
    """Dependent tokens, no effect, nothing drawn: 5 % of tests reject, and few runs have any discovery."""
    monkeypatch.setattr(specialisation, "DRAWN", 0)
    rejected, discoveries = [], []
    for seed in range(12):
        run = make_run(30, seed=seed, effects=DEPENDENT)
        tables = [analysis(run, draws=5, seed=seed) for analysis in (label_specialisation, family_specialisation)]
        rejected.append([(table["p"] <= 0.05).mean() for table in tables])
        discoveries.append(any((table["q"] < 0.05).any() for table in tables))
    assert np.mean(rejected, axis=0) == pytest.approx([0.05, 0.05], abs=0.025)
    assert np.mean(discoveries) <= 0.2


def test_noise_is_hardly_picked_and_does_not_replicate(make_run):
    picked = replicated = 0
    for seed in range(8):
        table = label_specialisation(make_run(40, seed=seed, effects=DEPENDENT), permutations=1, draws=50, seed=seed)
        picked += (table["picked_q"] < 0.05).any()
        replicated += table["replicated"].sum()
        assert (finding("label_specialisation", table).rung or 0) < 4
    assert picked <= 2
    assert replicated == 0


def test_held_out_effects_are_not_inflated_by_the_picking(make_run):
    """Weak true effects, picked by luck: where they were picked they look larger than on the other half."""
    plants = tuple(Planted(layer, expert, "add", 1.0) for layer in (1, 2, 3) for expert in range(0, 16, 2))
    gaps = []
    for seed in range(3):
        table = surest_picked(
            label_specialisation(make_run(80, seed=seed, planted=plants), permutations=1, draws=50, seed=seed)
        )
        gaps += (table["picked_log2_ratio"].abs() - np.sign(table["picked_log2_ratio"]) * table["held_out_log2_ratio"]).tolist()
    assert len(gaps) > 10
    assert np.mean(gaps) > 0


def test_experts_of_wrong_solutions_are_found_and_chance_is_not(tmp_path):
    table = correctness_specialisation(run_of(tmp_path / "wrong", wrong_like(traces_of(120))))
    best = table.sort_values("p").iloc[0]
    assert (best["layer"], best["expert"], best["answer"]) == (2, 5, "wrong")
    assert best["q"] < 0.05
    assert best["ci_low"] > 0
    rejected = []
    for seed in range(8):
        noise = correctness_specialisation(run_of(tmp_path / f"noise-{seed}", traces_of(40, seed)), permutations=199, draws=20)
        rejected.append((noise["p"] <= 0.05).mean())
    assert np.mean(rejected) < 0.09


def test_families_answered_wrong_more_often_do_not_make_experts_of_wrong_solutions(tmp_path):
    """One family is mostly wrong and has an expert of its own; inside families answers are chance."""
    traces = traces_of(120, planted=Planted(3, 9, "deduction", 3.0))
    rng = np.random.default_rng(1)
    traces = [replace(each, correct=bool(rng.random() < (0.15 if each.family == "deduction" else 0.85))) for each in traces]
    run = run_of(tmp_path / "run", traces)
    adjusted_row = correctness_specialisation(run).set_index(["layer", "expert"]).loc[(3, 9)]
    assert adjusted_row["p"] > 0.01
    assert abs(adjusted_row["log2_ratio"]) < 0.4
    risk = risk_difference(run).set_index(["a", "b", "layer", "expert"])
    assert risk.loc[("wrong", "right", 3, 9), "p"] > 0.01
    assert risk.loc[("causal", "deduction", 3, 9), "q"] < 0.001


def test_answers_all_alike_cannot_be_compared(tmp_path):
    traces = [replace(each, correct=each.family != "causal") for each in traces_of(12)]
    run = run_of(tmp_path / "run", traces)
    with pytest.raises(
        UsageError, match=r"no family of this run has both right and wrong answers \(8 right and 4 wrong answers"
    ):
        correctness_specialisation(run)
    assert set(risk_difference(run, draws=10)["a"]) == {"arithmetic", "causal"}
    alone = run_of(tmp_path / "alone", [replace(each, correct=None) for each in traces if each.family == "causal"])
    with pytest.raises(UsageError, match=r"one family only \(causal\), without both right and wrong answers"):
        risk_difference(alone)
    with pytest.raises(UsageError, match='no family "dance" in this run; these there are: arithmetic, causal, deduction'):
        risk_difference(run, of=["dance"])


def test_risk_difference_by_counting_tokens(planted_run):
    table = risk_difference(planted_run, draws=200)
    tokens = frame(planted_run, classified_families(planted_run))
    names = classified_families(planted_run).names
    chosen = np.array([9 in ids for ids in tokens["ids"]])
    share = {name: chosen[tokens["code"] == code].mean() for code, name in enumerate(names)}
    rows = table[(table["layer"] == 2) & (table["expert"] == 9) & (table["a"] != "wrong")]
    assert len(rows) == 3
    for row in rows.itertuples():
        assert row.risk_difference == pytest.approx(share[row.a] - share[row.b], abs=1e-6)
        assert (row.share_a, row.share_b) == (pytest.approx(share[row.a], abs=1e-6), pytest.approx(share[row.b], abs=1e-6))
        assert row.ci_low < row.risk_difference < row.ci_high
        both = tokens["code"].isin([names.index(row.a), names.index(row.b)])
        by_sequence = tokens[both].assign(beyond=chosen[both] - chosen[both].mean()).groupby("sequence")
        found = stats.shuffle_moments(
            by_sequence["beyond"].sum().to_numpy()[:, None], (by_sequence["code"].first() != names.index(row.a)).to_numpy(int)
        )
        assert row.p == pytest.approx(found.p()[0, 0], rel=1e-3)


def test_wrong_against_right_is_compared_inside_families(planted_run):
    table = risk_difference(planted_run, draws=20)
    row = table[(table["a"] == "wrong") & (table["layer"] == 2) & (table["expert"] == 5)].iloc[0]
    tokens = frame(planted_run, classified_answers(planted_run))
    chosen, total, difference = np.array([5 in ids for ids in tokens["ids"]]), 0.0, 0.0
    for _, some in tokens.groupby("stratum"):
        wrong = some["code"] == 1
        weight = wrong.sum() * (~wrong).sum() / len(some)
        total += weight
        difference += weight * (chosen[some.index[wrong]].mean() - chosen[some.index[~wrong]].mean())
    assert row["risk_difference"] == pytest.approx(difference / total, abs=1e-6)


def test_tokens_as_units_find_too_much_and_sequences_do_not(make_run):
    """Nothing differs between answers; tokens of a sequence route alike."""
    of_tokens, of_sequences = [], []
    for seed in range(10):
        run = make_run(40, seed=seed, effects=Effects(sequence=1.0))
        table = risk_difference(run, draws=10, seed=seed)
        table = table[table["a"] == "wrong"]
        of_tokens.append((table["token_p"] <= 0.05).mean())
        of_sequences.append((table["p"] <= 0.05).mean())
    assert np.mean(of_tokens) > 0.3
    assert 0.01 < np.mean(of_sequences) < 0.09


def test_log_odds_by_the_papers_formula(planted_run):
    table = family_specialisation(planted_run, permutations=1, draws=10)
    some = table[table["layer"] == 3].assign(count=lambda t: t["share_in"] * t["tokens"] * 4)
    total = some.groupby("expert")["count"].sum()
    for row in some[some["expert"] == 9].itertuples():
        prior = 160 * total[9] / total.sum()
        n, rest = row.tokens * 4, total.sum() - row.tokens * 4
        mine, theirs = row.count + prior, total[9] - row.count + prior
        delta = np.log(mine / (n + 160 - mine)) - np.log(theirs / (rest + 160 - theirs))
        assert row.log_odds_z == pytest.approx(delta / np.sqrt(1 / mine + 1 / theirs), rel=1e-6)
        assert row.token_share == pytest.approx(row.count / row.tokens)
    assert set(table["even_share"]) == {0.25}
    best = table.sort_values("log_odds_z").iloc[-1]
    assert (best["layer"], best["expert"], best["family"]) == (3, 9, "deduction")


def test_a_run_of_two_sequences_is_answered_without_a_discovery(tmp_path):
    table = family_specialisation(run_of(tmp_path / "run", traces_of(2)), draws=20)
    assert not (table["q"] < 0.05).any()
    assert not table["replicated"].any()


def test_an_expert_that_is_hardly_ever_chosen_is_not_tested(make_run, monkeypatch):
    """Choices at all of some hundreds: where the bar is put among them, those below it have no p, here or in either half."""
    run = make_run(24)
    classified, layer = classified_steps(run), run.spec.routed_layers[0]
    tokens = np.concatenate([batch.expert_ids[classified.owner(batch) >= 0, 0].ravel() for batch in run.batches()])
    chosen = np.bincount(tokens, minlength=run.spec.n_experts)
    bar = int(np.median(chosen))
    monkeypatch.setattr("ling_probe.analysis.specialisation.LEAST_CHOICES", bar)
    table = label_specialisation(run, permutations=19, draws=19)
    rows = table[(table["layer"] == layer) & (table["overlap"] >= 0.1)]
    rare = chosen[rows["expert"]] < bar
    assert rare.any()
    assert rows.loc[rare, ["p", "q", "picked_q", "held_out_q"]].isna().all(axis=None)
    assert rows.loc[~rare, "p"].notna().all()
