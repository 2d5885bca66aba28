"""Saliency, super experts, norm ranks, the shared expert's share and direct attribution, against plain loops over tokens."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from synthetic import Effects, synthetic_spec, synthetic_traces
from test_analysis import row, trace_run

from ling_probe.analysis import (
    ANALYSES,
    Verdict,
    expert_saliency,
    logit_attribution,
    norm_rank,
    shared_share,
    super_experts,
)
from ling_probe.analysis.shared import shares
from ling_probe.errors import UsageError

KEEP = ("contribution", "shared", "lens")
ADDING = [expert_saliency, super_experts, norm_rank, shared_share]


def run_with(folder, n_sequences=30, *, seed=0, effects=None, change=None, **options):
    """A run whose extras `change` makes from a trace and its synthetic ones; outputs are independent of weights."""
    rng = np.random.default_rng(seed)
    traces = []
    for number, each in enumerate(effects if isinstance(effects, list) else [effects]):
        some = synthetic_traces(synthetic_spec(), n_sequences, rng=rng, effects=each, keep=KEEP, **options)
        traces += [replace(trace, sequence_id=f"{trace.sequence_id}-{number}") for trace in some]
    changed = []
    for trace in traces:
        extras = dict(trace.extras)
        extras["contribution"] = trace.weights * rng.gamma(4, 1, trace.weights.shape)
        extras["lens"] = rng.normal(0, 1, trace.weights.shape)
        extras["lens"][-1] = np.nan
        changed.append(replace(trace, extras=extras | (change(trace, extras) if change else {})))
    return trace_run(folder, changed)


def tokens(run, layer, name):
    """Every token of a layer: sequence, position, segment, ids, weights and one extra, as stored."""
    for batch in run.batches(layers=[layer], weights=True, columns=[name]):
        extra = batch.extra[name][:, 0]
        columns = (batch.sequence, batch.position, batch.segment, batch.expert_ids[:, 0], batch.weights[:, 0], extra)
        yield from zip(*columns, strict=True)


def test_saliency_is_the_mean_contribution_of_the_tokens_that_chose(tmp_path):
    run = run_with(tmp_path / "run")
    table = expert_saliency(run, draws=50)
    for layer in (1, 3):
        found = {expert: [] for expert in range(16)}
        for *_, ids, _weights, norms in tokens(run, layer, "contribution"):
            for expert, norm in zip(ids, norms, strict=True):
                found[int(expert)].append(norm)
        rows = table[table["layer"] == layer].set_index("expert")
        means = {expert: np.mean(norms) for expert, norms in found.items()}
        assert rows["saliency"].to_dict() == pytest.approx(means, rel=1e-5)
        assert rows["count"].to_dict() == {expert: len(norms) for expert, norms in found.items()}
        totals = np.sort([np.sum(norms) for norms in found.values()])[::-1]
        assert rows["share"].sum() == pytest.approx(1)
        carried = rows["experts_50"].iloc[0]
        assert totals[:carried].sum() >= 0.5 * totals.sum() > totals[: carried - 1].sum()
        assert rows["experts_90"].iloc[0] > carried
        assert rows["rank"].idxmin() == max(means, key=means.get)
        assert ((rows["ci_low"] < rows["saliency"]) & (rows["saliency"] < rows["ci_high"])).all()
    by_layer = [spearmanr(rows["saliency"], rows["count"]).statistic for _, rows in table.groupby("layer")]
    assert table["correlation"].iloc[0] == pytest.approx(np.mean(by_layer))


def test_saliency_that_grows_with_load_is_told_from_one_that_does_not(tmp_path):
    def growing(trace, extras):
        load = np.stack([np.bincount(trace.expert_ids[:, row].ravel(), minlength=16) for row in range(3)])
        return {"contribution": extras["contribution"] * np.maximum(load[np.arange(3)[:, None], trace.expert_ids], 1) ** 2}

    finding = ANALYSES["expert_saliency"].finding
    found = finding(expert_saliency(run_with(tmp_path / "grows", 60, change=growing)))
    assert found.verdict is Verdict.SUPPORTED
    assert found.effect > 0.5
    even = run_with(tmp_path / "not", 60, change=lambda trace, extras: {"contribution": extras["contribution"] / trace.weights})
    assert finding(expert_saliency(even)).verdict is not Verdict.SUPPORTED


def super_expert(trace, extras):
    huge = np.zeros(trace.weights.shape, dtype=bool)
    huge[:, 0] = trace.expert_ids[:, 0] == 5
    return {"contribution": np.where(huge, 500 * trace.weights, extras["contribution"])}


def test_a_super_expert_is_found_and_the_largest_of_many_is_none(tmp_path):
    run = run_with(tmp_path / "super", change=super_expert)
    table = super_experts(run)
    assert table[table["stands_apart"]][["layer", "expert"]].to_numpy().tolist() == [[1, 5]]
    assert row(table, layer=1, expert=5)["max_norm"] == pytest.approx(500, rel=1e-2)
    found = ANALYSES["super_experts"].finding(table)
    assert found.verdict is Verdict.SUPPORTED
    ordinary = super_experts(run_with(tmp_path / "ordinary"))
    assert not ordinary["stands_apart"].any()
    assert ANALYSES["super_experts"].finding(ordinary).verdict is Verdict.NOT_SUPPORTED
    largest = max(
        (norm / weight, int(expert)) for *_, ids, weights, norms in tokens(run, 2, "contribution")
        for expert, weight, norm in zip(ids, weights, norms, strict=True) if weight >= 1e-3
    )  # fmt: skip
    rows = table[table["layer"] == 2]
    assert rows["max_norm"].max() == pytest.approx(largest[0], rel=1e-5)
    assert rows.loc[rows["max_norm"].idxmax(), "expert"] == largest[1]


def test_one_large_token_is_no_super_expert(tmp_path):
    def once(trace, extras):
        changed = extras["contribution"].copy()
        if trace.meta["number"] == 3:
            changed[0, 0, 0] = 900 * trace.weights[0, 0, 0]
        return {"contribution": changed}

    table = super_experts(run_with(tmp_path / "run", change=once))
    assert table["passes"].sum() == 1
    assert not table["stands_apart"].any()


def test_the_last_quarter_of_layers_has_no_super_experts(tmp_path):
    def last(trace, extras):
        huge = np.zeros(trace.weights.shape, dtype=bool)
        huge[:, 2] = trace.expert_ids[:, 2] == 5
        return {"contribution": np.where(huge, 500 * trace.weights, extras["contribution"])}

    assert not super_experts(run_with(tmp_path / "run", change=last))["passes"].any()


def test_outputs_that_do_not_know_their_weights_rank_by_chance(tmp_path):
    table = norm_rank(run_with(tmp_path / "run", 120), draws=200)
    assert table["chance"].tolist() == [0.25] * 3
    assert abs(table["mean"].iloc[0] - 0.25) < 0.02
    assert table["mean_low"].iloc[0] < 0.25 < table["mean_high"].iloc[0]
    assert (table["top_contribution"] > 0.3).all(), "the weight is part of a contribution"
    assert (table["top_contribution"] - table["dealt_contribution"]).abs().max() < 0.03
    assert ANALYSES["norm_rank"].finding(table).verdict is Verdict.NOT_SUPPORTED


def test_outputs_that_follow_their_weights_are_found_whatever_the_slots(tmp_path):
    """The largest weight is not in the first slot: slots are in the order of biased scores."""
    run = run_with(tmp_path / "run", change=lambda trace, _extras: {"contribution": trace.weights**2})
    table = norm_rank(run, draws=100)
    assert (table["top_norm"] > 0.97).all(), "but for ties of weights in 16 bits"
    assert table["tokens"].tolist() == [sum(1 for _ in tokens(run, 1, "contribution"))] * 3
    assert any(weights.argmax() != 0 for *_, weights, _norms in tokens(run, 1, "contribution"))
    assert ANALYSES["norm_rank"].finding(table).verdict is Verdict.SUPPORTED


def test_shares_hold_to_the_bounds_of_the_triangle():
    rng = np.random.default_rng(0)
    vectors, shared = rng.normal(size=(50, 3, 4, 6)), rng.normal(size=(50, 3, 6))
    norm = np.linalg.norm
    found = shares(norm(shared, axis=-1).astype(np.float32), norm(vectors, axis=-1).astype(np.float32))
    true = norm(shared, axis=-1) / (norm(shared, axis=-1) + norm(vectors.sum(axis=2), axis=-1))
    assert (found.least <= true + 1e-6).all()
    assert (true <= found.most + 1e-6).all()
    exact = shares(np.array([[3.0]], np.float32), np.array([[[3.0, 4.0]]], np.float32))
    assert [float(each[0, 0]) for each in exact] == pytest.approx([3 / 8, 3 / 10, 3 / 4])


def test_the_share_of_a_layer_is_the_mean_over_tokens(tmp_path):
    run = run_with(tmp_path / "run")
    (batches,) = [list(run.batches(columns=["shared", "contribution"]))]
    shared = np.concatenate([batch.extra["shared"] for batch in batches]).astype(float)
    routed = np.sqrt(np.concatenate([batch.extra["contribution"] for batch in batches]).astype(float) ** 2 @ np.ones(4))
    layers = shared_share(run, draws=50)
    layers = layers[layers["kind"] == "layer"]
    assert layers["share"].to_numpy() == pytest.approx((shared / (shared + routed)).mean(axis=0), rel=1e-5)
    assert ((layers["least"] < layers["share"]) & (layers["share"] < layers["most"])).all()
    assert ((layers["share_low"] < layers["share"]) & (layers["share"] < layers["share_high"])).all()


def test_a_label_that_needs_the_shared_expert_is_found(tmp_path):
    def more(trace, extras):
        inside = [any(span.start <= place < span.stop and span.label == "add" for span in trace.steps)
                  for place in range(trace.n_tokens)]  # fmt: skip
        shared = extras["shared"].copy()
        shared[np.array(inside), 1] *= 3
        return {"shared": shared}

    table = shared_share(run_with(tmp_path / "run", 60, change=more), draws=100)
    found = row(table, kind="label", name="add", layer=2)
    assert found["q"] < 0.05
    assert found["ci_low"] > 0.05
    others = table[(table["kind"] != "layer") & (table["layer"] != 2)]
    assert (others["q"] > 0.05).all()
    verdict = ANALYSES["shared_share"].finding(table)
    assert verdict.verdict is Verdict.SUPPORTED
    assert "label add in layer 2" in verdict.sentence


def test_labels_that_differ_in_words_alone_do_not_differ_in_share(tmp_path):
    """Each label has words of its own in half the problems, and the share follows the word and the problem."""
    p, difference, raw = [], [], []
    words = [Effects(confounded=confounded) for confounded in (True, False)]
    by_word = np.random.default_rng(0).gamma(3, 1, 64)
    for seed in range(10):
        problem = np.random.default_rng(seed).gamma(8, 0.125, 1000)

        def follow(trace, extras, problem=problem):
            scale = by_word[trace.token_ids] * problem[trace.meta["number"]]
            return {"shared": extras["shared"] * scale[:, None]}

        run = run_with(tmp_path / f"{seed}", 60, seed=seed, effects=words, change=follow)
        table = shared_share(run, draws=50, seed=seed)
        tested = table[(table["kind"] == "label") & (table["layer"] == 1)]
        p += tested["p"].tolist()
        difference += tested["difference"].tolist()
        raw += tested["share"].tolist()
    assert len(p) == 10 * 9
    assert 0 < np.mean(np.array(p) <= 0.05) < 0.12
    by_label = [np.reshape(each, (10, 9)).mean(axis=0) for each in (difference, raw)]
    assert np.std(by_label[0]) < 0.5 * np.std(by_label[1]), "the raw shares of labels differ by their words"


def test_attribution_is_the_mean_over_tokens_whose_next_is_of_the_completion(tmp_path):
    run = run_with(tmp_path / "run")
    table = logit_attribution(run, draws=50)
    everything = list(tokens(run, 2, "lens"))
    found, answers, ranks = ({expert: [] for expert in range(16)} for _ in range(3))
    for (sequence, _, _, ids, _, lens), (following, _, segment, *_) in itertools.pairwise(everything):
        if following != sequence or segment not in (1, 2):
            continue
        for slot, expert in enumerate(ids):
            found[int(expert)].append(lens[slot])
            ranks[int(expert)].append(1 + (lens > lens[slot]).sum())
            if segment == 2:
                answers[int(expert)].append(lens[slot])
    rows = table[table["layer"] == 2].set_index("expert")
    assert rows["count"].to_dict() == {expert: len(values) for expert, values in found.items()}
    assert rows["mean"].to_dict() == pytest.approx({expert: np.mean(values) for expert, values in found.items()}, abs=1e-6)
    assert rows["rank"].to_dict() == pytest.approx({expert: np.mean(values) for expert, values in ranks.items()}, abs=0.02)
    seen = {expert: np.mean(values) for expert, values in answers.items() if values}
    assert rows.loc[list(seen), "answer_mean"].to_dict() == pytest.approx(seen, abs=1e-6)
    assert rows["share"].sum() == pytest.approx(1)
    total, n_tokens = sum(map(sum, found.values())), sum(map(len, found.values())) / 4
    assert rows["routed"].iloc[0] == pytest.approx(total / n_tokens, rel=1e-4)


def test_experts_that_promote_and_demote_are_found_and_no_others(tmp_path):
    def planted(trace, extras):
        lens = extras["lens"].copy()
        lens[:, 0] += np.where(trace.expert_ids[:, 0] == 3, 1.0, 0) - np.where(trace.expert_ids[:, 0] == 7, 1.0, 0)
        return {"lens": lens}

    table = logit_attribution(run_with(tmp_path / "run", 60, change=planted))
    assert row(table, layer=1, expert=3)["ci_low"] > 0.5
    assert row(table, layer=1, expert=7)["ci_high"] < -0.5
    assert row(table, layer=1, expert=3)["rank"] < 2 < 3 < row(table, layer=1, expert=7)["rank"]
    others = table[~((table["layer"] == 1) & table["expert"].isin([3, 7]))]
    assert (others["p"] <= 0.05).mean() < 0.15
    assert (others["q"] < 0.05).mean() < 0.05
    found = ANALYSES["logit_attribution"].finding(table)
    assert found.verdict is Verdict.SUPPORTED
    assert "direct path alone" in found.sentence


@pytest.mark.parametrize("analysis", [*ADDING, logit_attribution])
def test_a_run_that_kept_nothing_says_what_to_keep(make_run, analysis):
    name = {shared_share: "shared", logit_attribution: "lens"}.get(analysis, "contribution")
    keep = "lens" if analysis is logit_attribution else "contribution"
    with pytest.raises(UsageError, match=rf"kept no extras, and not {name}; capture it with --keep {keep}"):
        analysis(make_run())
    with pytest.raises(UsageError, match=rf"kept residual, and not {name}"):
        analysis(make_run(keep=("residual",)))
    with pytest.raises(UsageError, match="holds no sequences yet"):
        analysis(make_run(0))


def test_prompts_alone_have_no_attribution_and_a_share_of_layers_alone(make_run):
    plain = make_run(labels={"text": ("other",)}, n_steps=(0, 0), keep=KEEP)
    assert set(shared_share(plain, draws=9)["kind"]) == {"layer"}


def test_parts_do_not_matter(make_run):
    whole, split = (make_run(12, parts=parts, keep=KEEP) for parts in (1, 4))
    for analysis in (expert_saliency, super_experts, logit_attribution):
        one, other = analysis(whole), analysis(split)
        assert one.columns.tolist() == other.columns.tolist()
        assert np.allclose(one.to_numpy(dtype=float), other.to_numpy(dtype=float), equal_nan=True)
