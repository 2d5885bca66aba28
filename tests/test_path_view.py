"""Flows through the layers against plain loops, planted ties and differences, and what the drawing of them adds up to."""

import numpy as np
import pandas as pd
import pytest
from synthetic import Effects, Planted, synthetic_spec

from ling_probe import path_view
from ling_probe.analysis.classified import COMPLETION
from ling_probe.errors import UsageError
from ling_probe.path_view import OTHERS, RoutedTokens, difference_table, drawn_flows, flow_table, members, outside, read_paths
from ling_probe.trace import SEGMENTS

LAYERS = (1, 2, 3)


def tokens_of(experts, sequence, *, n_experts=6):
    """Tokens with these leading experts [N M], and another expert of less weight beside each."""
    experts = np.stack([experts, (experts + 1) % n_experts], axis=2)
    weights = np.broadcast_to(np.float16([0.75, 0.25]), experts.shape)
    return RoutedTokens(np.asarray(sequence), experts.astype(np.uint8), weights, LAYERS, n_experts)


def independent(rng, *, problems=40, each=50, n_experts=6):
    return tokens_of(rng.integers(0, n_experts, (problems * each, 3)), np.repeat(np.arange(problems), each))


def plain_flows(run, layers, top):
    """Shares of the ways of all completion tokens, token by token."""
    found, n = {}, 0
    for batch in run.batches(weights=True):
        for token in range(len(batch.sequence)):
            if SEGMENTS[batch.segment[token]] not in COMPLETION:
                continue
            n += 1
            sides = []
            for layer in layers:
                row = run.spec.row(layer)
                order = np.argsort(-batch.weights[token, row], kind="stable")[:top]
                weight = batch.weights[token, row][order]
                sides.append(list(zip(batch.expert_ids[token, row][order].tolist(), weight / weight.sum(), strict=True)))
            for first, second, here in zip(sides, sides[1:], layers, strict=False):
                for expert, weight in first:
                    for following, other in second:
                        found[here, expert, following] = found.get((here, expert, following), 0) + weight * other
    return {way: share / n for way, share in found.items()}


@pytest.mark.parametrize("top", [1, 2, 4])
def test_shares_are_those_of_a_plain_loop(make_run, top):
    run = make_run(12)
    table = flow_table(read_paths(run).tokens, LAYERS, top=top)
    expected = plain_flows(run, LAYERS, top)
    assert len(table) == len(expected)
    for row in table.itertuples():
        assert row.share == pytest.approx(expected[row.layer, row.expert, row.next_expert], rel=1e-3, abs=1e-9)
    for _, rows in table.groupby("layer"):
        assert rows["share"].sum() == pytest.approx(1)
        assert rows["expected"].to_numpy() == pytest.approx(
            (
                rows.groupby("expert")["share"].transform("sum") * rows.groupby("next_expert")["share"].transform("sum")
            ).to_numpy()
        )


def test_a_lift_is_that_of_tied_layers():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 6, 4000)
    experts = np.stack([first, first, rng.integers(0, 6, 4000)], axis=1)
    table = flow_table(tokens_of(experts, np.repeat(np.arange(40), 100)), LAYERS)
    tied, free = (table[table["layer"] == layer] for layer in (1, 2))
    assert (tied["expert"] == tied["next_expert"]).all()
    assert tied["log2_lift"].to_numpy() == pytest.approx(np.log2(6), abs=0.15)
    assert (tied["lift_low"] > 2).all()
    assert len(free) == 36
    assert ((free["lift_low"] < 0) & (free["lift_high"] > 0)).mean() > 0.8


def test_independent_layers_are_rarely_called_tied():
    found = []
    for seed in range(40):
        table = flow_table(independent(np.random.default_rng(seed)), LAYERS)
        found.append(((table["lift_low"] > 0) | (table["lift_high"] < 0)).mean())
    assert 0.02 < np.mean(found) < 0.08


def test_intervals_need_problems_and_tokens():
    rng = np.random.default_rng(0)
    few = flow_table(independent(rng, problems=5), LAYERS)
    assert few[["ci_low", "ci_high", "lift_low", "lift_high"]].isna().all().all()
    rare = flow_table(independent(rng, problems=20, each=5), LAYERS)
    assert rare["ci_low"].notna().all()
    assert rare["lift_low"].isna().all()


def test_a_planted_difference_is_found_with_its_size():
    rng = np.random.default_rng(1)
    one, other = independent(rng), independent(rng)
    moved = rng.random(len(one.sequence)) < 0.3
    one.experts[moved, :2, 0] = (2, 4)
    table = difference_table(one, other, LAYERS)
    first = table.iloc[0]
    assert (first["layer"], first["expert"], first["next_expert"]) == (1, 2, 4)
    assert first["difference"] == pytest.approx(first["share"] - first["other_share"])
    assert first["ci_low"] < 0.3 * 35 / 36 < first["ci_high"]
    assert first["q"] < 1e-6
    assert "from expert 2 of layer 1 to 4 of layer 2" in path_view.told_differences(table)


def test_sets_that_differ_by_chance_alone_rarely_differ():
    calls = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        every = independent(rng)
        inside = rng.random(len(every.sequence)) < 0.4
        calls += (difference_table(every.only(inside), every.only(~inside), LAYERS)["q"] < 0.05).any()
    assert calls <= 6


def test_problems_that_route_alike_do_not_pass_for_a_difference():
    calls = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        every = independent(rng)
        alike = rng.integers(0, 6, (40, 3))[every.sequence]
        kept = rng.random(alike.shape) < 0.5
        every.experts[..., 0][kept] = alike[kept]
        inside = rng.permutation(np.arange(40) < 20)[every.sequence]
        table = difference_table(every.only(inside), every.only(~inside), LAYERS)
        calls += (table["q"] < 0.05).any()
    assert calls <= 8


def test_too_few_to_test_is_said():
    rng = np.random.default_rng(0)
    table = difference_table(independent(rng, problems=4), independent(rng, problems=4), LAYERS)
    assert table["q"].isna().all()
    assert "needs 20 tokens" in path_view.told_differences(table)


@pytest.mark.parametrize("least", [0.0, 0.005, 0.02, 0.2])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_drawn_adds_up(least, seed):
    rng = np.random.default_rng(seed)
    experts = np.minimum(rng.geometric(0.3, (3000, 3)) - 1, 11)
    table = flow_table(tokens_of(experts, np.repeat(np.arange(30), 100), n_experts=12), LAYERS)
    drawn = drawn_flows(table, least=least)
    assert (table["share"] >= least).sum() <= ((drawn["expert"] != OTHERS) & (drawn["next_expert"] != OTHERS)).sum()
    for layer, rows in drawn.groupby("layer"):
        whole = table[table["layer"] == layer]
        assert rows["share"].sum() == pytest.approx(1)
        for side in ("expert", "next_expert"):
            heights, shares = rows.groupby(side)["share"].sum(), whole.groupby(side)["share"].sum()
            shown = heights.drop(OTHERS, errors="ignore")
            assert shown.to_numpy() == pytest.approx(shares[shown.index].to_numpy())
            assert heights.get(OTHERS, 0.0) == pytest.approx(shares.drop(shown.index).sum(), abs=1e-9)


def test_only_the_largest_flows_are_drawn():
    table = flow_table(independent(np.random.default_rng(0)), LAYERS)
    drawn = drawn_flows(table, least=0.0, most=10)
    largest = set(map(tuple, table.nlargest(10, "share")[["layer", "expert", "next_expert"]].to_numpy()))
    assert largest <= set(map(tuple, drawn[["layer", "expert", "next_expert"]].to_numpy()))
    assert path_view.counted(table, 0.0, most=10) == (10, len(table))
    assert path_view.suggested_level(table) in path_view.LEVELS
    assert (table["share"] >= path_view.suggested_level(table)).sum() <= path_view.EASY


def test_sets_are_the_tokens_they_name(make_run):
    run = make_run(12)
    paths, steps = read_paths(run), run.steps
    label = paths.labels[0]
    inside = members(paths, "label", label)
    assert set(paths.tokens.sequence[inside]) == set(steps.loc[steps["label"] == label, "sequence"])
    spans = steps[steps["label"] == label]
    assert inside.sum() == (spans["stop"] - spans["start"]).sum()
    rest = outside(paths, "label", label)
    assert not (inside & rest).any()
    assert (inside | rest).sum() == (paths.label >= 0).sum()
    family = members(paths, "family", "causal")
    assert set(paths.tokens.sequence[family]) == set(np.flatnonzero(run.sequences["family"] == "causal"))
    text = paths.texts.iloc[0]
    assert members(paths, "text", text).sum() == np.unique(paths.token_id, return_counts=True)[1].max()
    assert members(paths, "all").all()
    assert not (outside(paths, "problem", "3") & (paths.tokens.sequence == 3)).any()


def test_one_problem_is_read_as_the_whole_run_is(make_run):
    run = make_run(9)
    paths = read_paths(run)
    expected, found = paths.tokens.only(paths.tokens.sequence == 4), path_view.problem_tokens(run, 4, (2, 3))
    assert found.layers == (2, 3)
    np.testing.assert_array_equal(found.experts, expected.experts[:, 1:])
    np.testing.assert_array_equal(found.weights, expected.weights[:, 1:])
    assert set(found.sequence) == {4}


def test_long_runs_and_large_sets_are_thinned_by_whole_problems(make_run, monkeypatch):
    run = make_run(30)
    paths = read_paths(run, most=200)
    whole = read_paths(run)
    assert len(paths.token_id) <= 300
    assert paths.whole == whole.whole == sum(part.tokens for part in run.manifest.parts)
    for sequence in np.unique(paths.tokens.sequence):
        assert (paths.tokens.sequence == sequence).sum() == (whole.tokens.sequence == sequence).sum()
    every = flow_table(whole.tokens, LAYERS, top=2)
    monkeypatch.setattr(path_view, "MOST_PAIRS", 2000)
    thinned = flow_table(whole.tokens, LAYERS, top=2)
    assert thinned["problems"].iloc[0] < every["problems"].iloc[0] == 30
    assert thinned["tokens"].iloc[0] * 4 <= 2500


def test_what_cannot_be_answered_is_refused(make_run):
    paths = read_paths(make_run(6))
    with pytest.raises(UsageError, match='no token of label "nothing"'):
        members(paths, "label", "nothing")
    with pytest.raises(UsageError, match="no other tokens"):
        outside(paths, "all")
    with pytest.raises(UsageError, match="a path needs a next one"):
        read_paths(make_run(3, spec=synthetic_spec(n_layers=2, routed_layers=(1,))))
    with pytest.raises(UsageError, match="holds no sequences"):
        read_paths(make_run(0))


def test_a_planted_step_takes_its_own_way(make_run):
    run = make_run(60, planted=(Planted(1, 5, "add", boost=6.0), Planted(2, 9, "add", boost=6.0)), effects=Effects(step=0.3))
    paths = read_paths(run)
    sides = paths.tokens.only(members(paths, "label", "add")), paths.tokens.only(outside(paths, "label", "add"))
    first = difference_table(*sides, LAYERS).iloc[0]
    assert (first["layer"], first["expert"], first["next_expert"]) == (1, 5, 9)
    assert first["ci_low"] > 0.3
    assert isinstance(flow_table(sides[0], LAYERS), pd.DataFrame)
