import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from synthetic import Effects, Planted, synthetic_run, synthetic_spec, synthetic_traces
from test_analysis import DEPENDENT, row

from ling_probe.analysis import (
    ANALYSES,
    Verdict,
    choice_reasons,
    expert_load,
    expert_reasons,
    router_confidence,
    token_experts,
    token_reasons,
)
from ling_probe.analysis.choice_reasons import REASONS
from ling_probe.errors import UsageError
from ling_probe.interventions import exclude
from ling_probe.routing import choice_scores, choose, chosen, flip_distance, kept_groups, route, scores, ungrouped
from ling_probe.run import Run


def keep_logits(tmp_path, n=30, name="run", **options):
    return synthetic_run(tmp_path / name, n, keep=("logits",), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return keep_logits(tmp_path_factory.mktemp("reasons"), 12, effects=Effects(sequence=0.5))


def layer_tokens(run, layer):
    """Ids, weights, logits, family and label of every token of a layer whose logits give the recorded set."""
    steps, families = run.steps.set_index(["sequence", "step"])["label"], run.sequences["family"].to_numpy()
    bias = np.array(run.manifest.model["expert_bias"][str(layer)])
    for batch in run.batches(layers=[layer], weights=True, columns=["logits"]):
        for place, logits in enumerate(batch.extra["logits"][:, 0].astype(float)):
            ids, sequence, step = batch.expert_ids[place, 0].tolist(), batch.sequence[place], batch.step[place]
            if set(route(logits, bias, run.spec).ids.tolist()) == set(ids):
                label = steps.get((sequence, step)) if step >= 0 else None
                yield ids, batch.weights[place, 0], logits, bias, families[sequence], label


def slow_reasons(run, layer):
    rows = []
    for ids, weights, logits, bias, family, label in layer_tokens(run, layer):
        unbiased = set(route(logits, 0 * bias, run.spec).ids.tolist())
        free = set(route(logits, bias, ungrouped(run.spec)).ids.tolist())
        best = set(np.argsort(-logits, kind="stable")[: run.spec.top_k].tolist())
        for expert, weight in zip(ids, weights, strict=True):
            reason = REASONS[(expert not in unbiased) + 2 * (expert not in free)]
            rows.append((family, label, expert, reason, weight, expert in best))
    return pd.DataFrame(rows, columns=["family", "label", "expert", "reason", "weight", "best"])


def test_shares_are_those_of_counterfactual_choices(run):
    table = choice_reasons(run, draws=10)
    for layer in run.spec.routed_layers:
        slow = slow_reasons(run, layer)
        for kind, name, rows in [
            ("all", "all", slow),
            ("family", "causal", slow[slow["family"] == "causal"]),
            ("label", "premise", slow[slow["label"] == "premise"]),
        ]:
            for reason in REASONS:
                found = row(table, layer=layer, kind=kind, name=name, reason=reason)
                mine = rows[rows["reason"] == reason]
                assert found["share"] == pytest.approx(len(mine) / len(rows))
                assert found["weight_share"] == pytest.approx(mine["weight"].sum() / rows["weight"].sum(), abs=1e-3)
                assert found["best_scores"] == pytest.approx(rows["best"].mean())
                assert found["tokens"] == len(rows) / run.spec.top_k


def test_the_reasons_of_a_class_sum_to_one_and_lie_in_their_intervals(run):
    table = choice_reasons(run)
    sums = table.groupby(["layer", "kind", "name"])[["share", "weight_share"]].sum()
    np.testing.assert_allclose(sums, 1)
    assert ((table["ci_low"] <= table["share"]) & (table["share"] <= table["ci_high"])).all()
    assert set(table["kind"]) == {"all", "family", "label"}
    assert row(table, layer=1, kind="all", name="all", reason="bias")["sequences"] == 12


def test_the_interval_is_that_of_a_ratio_over_sequences(tmp_path):
    run = keep_logits(tmp_path, 90, effects=Effects(sequence=1.0), labels={"text": ("other",)})
    found = row(choice_reasons(run, draws=4000), layer=1, kind="all", name="all", reason="affinity")
    table = pd.concat([token_reasons(run, each).assign(sequence=each) for each in range(90)])
    table = table[(table["layer"] == 1) & (table["reason"] != "unknown")]
    counts = table.groupby("sequence")["reason"].agg([lambda each: (each == "affinity").sum(), "size"]).to_numpy()
    residual = counts[:, 0] - found["share"] * counts[:, 1]
    error = np.sqrt((residual**2).sum()) / counts[:, 1].sum()
    assert (found["ci_high"] - found["ci_low"]) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_without_groups_nothing_is_due_to_them(tmp_path):
    run = keep_logits(tmp_path, 9, spec=synthetic_spec(n_groups=1, topk_groups=1))
    table = choice_reasons(run, draws=10)
    assert (table[table["reason"].isin(["groups", "both"])]["share"] == 0).all()
    assert (table[table["reason"] == "bias"]["share"] > 0).any()


def test_a_choice_the_logits_do_not_give_is_left_out_and_counted(tmp_path):
    spec = synthetic_spec()
    (trace,) = synthetic_traces(spec, 1, rng=np.random.default_rng(0), keep=("logits",))
    run = synthetic_run(tmp_path / "run", 0, keep=("logits",), finish=False)
    bias, ids = np.array(run.manifest.model["expert_bias"]["2"]), trace.expert_ids.copy()
    choice = choice_scores(scores(trace.extras["logits"][5, 1].astype(float)), bias)
    kept = np.repeat(kept_groups(choice, spec), spec.group_size)
    ids[5, 1, 3] = next(e for e in np.argsort(-choice) if kept[e] and e not in ids[5, 1])
    run.append([dataclasses.replace(trace, expert_ids=ids)])
    left_out = choice_reasons(run, draws=10).groupby(["layer", "kind"])["left_out"].first()
    assert left_out[1, "all"] == 0
    assert left_out[2, "all"] == pytest.approx(1 / trace.n_tokens)
    tokens = token_reasons(run, 0)
    assert (tokens[tokens["reason"] == "unknown"][["position", "layer"]].drop_duplicates().to_numpy() == [[5, 2]]).all()


def test_the_rows_of_a_token_are_its_recorded_choice_and_its_distance(run):
    tokens = token_reasons(run, 7)
    batches = [batch for batch in run.batches(weights=True, columns=["logits"]) if (batch.sequence == 7).any()]
    mine = np.flatnonzero(batches[0].sequence == 7)
    np.testing.assert_array_equal(tokens["expert"], batches[0].expert_ids[mine].ravel())
    np.testing.assert_array_equal(tokens["weight"].to_numpy(), batches[0].weights[mine].ravel())
    assert tokens["position"].max() + 1 == len(mine)
    one = tokens[(tokens["position"] == 3) & (tokens["layer"] == 2)]
    logits = batches[0].extra["logits"][mine[3], 1].astype(float)
    choice = choice_scores(scores(logits), np.array(run.manifest.model["expert_bias"]["2"]))
    np.testing.assert_allclose(one["distance"], flip_distance(choice, run.spec)[one["expert"]])
    np.testing.assert_allclose(one["score"] + one["bias"], choice[one["expert"]])


def test_what_an_expert_needs_is_told_for_every_expert_of_a_token(run):
    table, tokens = token_experts(run, 7, 3), token_reasons(run, 7).query("position == 3")
    assert len(table) == 48
    for layer, rows in table.groupby("layer"):
        bias = np.array(run.manifest.model["expert_bias"][str(layer)])
        mine = tokens[tokens["layer"] == layer].set_index("expert")
        assert set(rows["expert"][rows["chosen"]]) == set(mine.index)
        assert rows.groupby("group")["kept"].first().sum() == 2
        far = rows.set_index("expert")["distance"]
        assert far[mine.index].tolist() == mine["distance"].tolist()
        outside = rows[~rows["chosen"]].set_index("expert")
        for expert, distance in outside["distance"].items():
            moved = rows["score"].to_numpy() + bias
            moved[expert] += distance + 1e-9
            assert expert in choose(moved, run.spec)
            moved[expert] -= 2e-9
            assert expert not in choose(moved, run.spec)
    with pytest.raises(UsageError, match="no position 999 in sequence 7; it has"):
        token_experts(run, 7, 999)


def test_experts_are_counted_one_by_one(run):
    table = expert_reasons(run)
    load = expert_load(run)
    for layer in run.spec.routed_layers:
        slow, mine = slow_reasons(run, layer), table[table["layer"] == layer].set_index("expert")
        kept_out, affinity, n = np.zeros(16), np.zeros(16), 0
        for ids, _, logits, _, _, _ in layer_tokens(run, layer):
            without = chosen(scores(logits), run.spec)
            without[ids] = False
            kept_out, affinity, n = kept_out + without, affinity + scores(logits), n + 1
        for expert, rows in slow.groupby("expert"):
            assert mine["count"][expert] == len(rows)
            assert mine["by_bias"][expert] == pytest.approx(rows["reason"].isin(["bias", "both"]).mean())
            assert mine["by_groups"][expert] == pytest.approx(rows["reason"].isin(["groups", "both"]).mean())
            assert mine["kept_out"][expert] == pytest.approx(kept_out[expert] / len(rows))
        np.testing.assert_allclose(mine["affinity"], affinity / n)
        assert mine["rank_correlation"].iloc[0] == pytest.approx(spearmanr(mine["bias"], affinity).statistic)
        assert abs(mine["count"].sum() - load[load["layer"] == layer]["count"].sum()) <= 0.02 * mine["count"].sum()


def test_a_bias_that_evens_the_load_is_found_to_work_against_affinity(tmp_path):
    """Each expert's logits lean one way, and its bias the other; unrelated, the verdict must not be that they are."""
    spec = synthetic_spec(n_groups=1, topk_groups=1)
    lean = np.linspace(-1.5, 1.5, 16)
    for sign, name in ((-1, "against"), (0, "unrelated")):
        run = Run.create(tmp_path / name, spec=spec, model={}, benchmark={}, options={})
        rng, traces = np.random.default_rng(0), []
        bias = 0.2 * (sign * lean if sign else np.random.default_rng(3).permuted(lean)) * np.ones((3, 1))
        for trace in synthetic_traces(spec, 20, rng=rng, keep=("logits",)):
            logits = (trace.extras["logits"] + lean).astype(np.float16).astype(np.float32)
            routing = route(logits, bias, spec)
            change = {"expert_ids": routing.ids, "weights": routing.weights.astype(np.float32)}
            traces.append(dataclasses.replace(trace, extras={"logits": logits}, **change))
        run.append(traces)
        object.__setattr__(run.manifest, "model", {"expert_bias": {str(layer): bias[0].tolist() for layer in (1, 2, 3)}})
        found = ANALYSES["expert_reasons"].finding(expert_reasons(run))
        if sign:
            assert found.verdict is Verdict.SUPPORTED
            assert found.effect < -0.9
        else:
            assert abs(found.effect) < 0.5


def slow_confidence(logits, bias, spec):
    score = 1 / (1 + np.exp(-logits))
    share = np.sort(score / score.sum())[::-1]
    choice = score + bias
    kept = np.sort(choice[np.repeat(kept_groups(choice, spec), spec.group_size)])[::-1]
    needed = next(n for n in range(1, 17) if share[:n].sum() >= 0.9)
    return -(share * np.log(share)).sum() / np.log(16), share[0], kept[3] - kept[4], needed


def test_confidence_is_the_mean_over_tokens(run):
    table = router_confidence(run, permutations=19, draws=20)
    bias = np.array(run.manifest.model["expert_bias"]["3"])
    logits = np.concatenate([batch.extra["logits"][:, 0] for batch in run.batches(layers=[3], columns=["logits"])])
    expected = np.mean([slow_confidence(each.astype(float), bias, run.spec) for each in logits], axis=0)
    for measure, value in zip(("entropy", "top_share", "margin", "experts_90"), expected, strict=True):
        assert row(table, layer=3, kind="all", name="all", measure=measure)["value"] == pytest.approx(value)


def test_a_step_in_which_the_router_is_surer_is_found_in_its_layer(tmp_path):
    plants = tuple(Planted(2, expert, "multiply", -3.0) for expert in range(8))
    run = keep_logits(tmp_path, 60, planted=plants, effects=DEPENDENT)
    table = router_confidence(run)
    found = row(table, layer=2, kind="label", name="multiply", measure="entropy")
    assert found["q"] < 0.05
    assert found["beyond_high"] < 0
    assert (table[(table["layer"] == 1) & (table["measure"] == "entropy")]["q"].dropna() > 0.05).all()
    assert ANALYSES["router_confidence"].finding(table).verdict is Verdict.SUPPORTED


def test_what_is_beyond_the_words_of_all_kinds_of_step_adds_up_to_nothing(run):
    """Words and problems are taken out, so what one kind of step has more of the others have less of."""
    labels = router_confidence(run, permutations=19, draws=20).query("kind == 'label'")
    whole = (labels["beyond_words"] * labels["tokens"]).groupby([labels["layer"], labels["measure"]]).sum()
    np.testing.assert_allclose(whole, 0, atol=1e-6)
    assert (labels["beyond_low"] <= labels["beyond_words"]).all()
    assert (labels["beyond_words"] <= labels["beyond_high"]).all()
    assert labels["beyond_words"].abs().max() > 0.001


def test_confidence_without_effect_rejects_at_the_stated_rate(tmp_path):
    p, found = [], []
    for seed in range(12):
        run = keep_logits(tmp_path, 30, name=f"run-{seed}", seed=seed, effects=DEPENDENT)
        table = router_confidence(run, permutations=199, draws=20, seed=seed)
        p += table["p"].dropna().tolist()
        found.append((table["q"] < 0.05).any())
    assert 0.02 < (np.array(p) <= 0.05).mean() < 0.085
    assert np.mean(found) <= 0.2


def test_a_run_without_steps_has_confidence_and_nothing_to_compare(tmp_path):
    run = keep_logits(tmp_path, 9, labels={"text": ("other",)}, n_steps=(0, 0))
    table = router_confidence(run, draws=20)
    assert set(table["kind"]) == {"all"}
    found = ANALYSES["router_confidence"].finding(table)
    assert found.verdict is Verdict.CANNOT_TELL
    assert "no step labels" in found.sentence


def test_a_router_that_must_take_all_of_its_groups_has_no_margin(tmp_path):
    run = keep_logits(tmp_path, 9, spec=synthetic_spec(topk_groups=1))
    table = router_confidence(run, permutations=19, draws=20)
    margin = table[table["measure"] == "margin"]
    assert margin[["value", "ci_low", "p"]].isna().all(axis=None)
    assert table[table["measure"] == "entropy"]["value"].notna().all()


@pytest.mark.parametrize("analysis", [choice_reasons, expert_reasons, router_confidence])
def test_what_cannot_be_answered_is_refused_in_one_line(analysis, tmp_path):
    with pytest.raises(UsageError, match="no logits in this run; capture with --keep logits"):
        analysis(synthetic_run(tmp_path / "plain", 3))
    changed = keep_logits(tmp_path, 3, name="changed", interventions=(exclude(2, [5]),), planted=Planted(2, 5, "add", -99.0))
    with pytest.raises(UsageError, match=r"routing was changed in this run \(exclude\)"):
        analysis(changed)
    unknown = keep_logits(tmp_path, 3, name="unknown")
    del unknown.manifest.model["expert_bias"]["2"]
    with pytest.raises(UsageError, match="knows no expert_bias of layer 2"):
        analysis(unknown)


def test_tokens_of_a_sequence_that_is_not_there(run):
    with pytest.raises(UsageError, match="it has 12, counted from 0"):
        token_reasons(run, 12)


def test_what_is_mostly_left_out_decides_nothing(run):
    table = choice_reasons(run, draws=10)
    assert ANALYSES["choice_reasons"].finding(table.assign(left_out=0.2)).verdict is Verdict.CANNOT_TELL
    assert ANALYSES["choice_reasons"].finding(table.assign(ci_low=0.6, ci_high=0.7)).verdict is Verdict.SUPPORTED
    assert ANALYSES["choice_reasons"].finding(table.assign(ci_low=0.3, ci_high=0.4)).verdict is Verdict.NOT_SUPPORTED
