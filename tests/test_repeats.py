import doctest
import sys
from itertools import combinations, pairwise, permutations

import numpy as np
import pandas as pd
import pytest
from synthetic import Effects, Planted, synthetic_run, synthetic_spec
from test_analysis import row

from ling_probe.analysis import (
    ANALYSES,
    Verdict,
    affinity_sets,
    committee,
    expert_affinity,
    repeat_choice,
    segment_routing,
)
from ling_probe.analysis.committee import random_jaccard
from ling_probe.analysis.segment_routing import best_set_f1
from ling_probe.errors import UsageError


def sequences(run, place):
    """Ids and weights of each sequence in one layer."""
    for batch in run.batches(weights=True):
        for number in np.unique(batch.sequence):
            mine = batch.sequence == number
            yield batch.expert_ids[mine, place].astype(int), batch.weights[mine, place]


def shared(one, other):
    return len(set(one.tolist()) & set(other.tolist()))


def test_repeats_and_their_mean_over_all_orders(make_run):
    run = make_run(6, n_steps=(1, 2), step_tokens=(1, 2))
    table = repeat_choice(run, draws=20)
    for choice in ("first", "any"):
        seen = expected = pairs = 0
        for ids, weights in sequences(run, 1):
            sets = ids if choice == "any" else np.take_along_axis(ids, weights.argmax(axis=1)[:, None], axis=1)
            seen += sum(shared(*two) for two in pairwise(sets)) / sets.shape[1]
            every = [shared(one, other) for one, other in permutations(sets, 2)]
            expected += (len(ids) - 1) * np.mean(every) / sets.shape[1]
            pairs += len(ids) - 1
        found = row(table, layer=2, family="all", choice=choice)
        assert found["repeat"] == pytest.approx(seen / pairs)
        assert found["expected"] == pytest.approx(expected / pairs)
        assert found["lift"] == pytest.approx(seen / expected)
        assert found["pairs"] == pairs


def test_neighbours_in_a_segment_stand_beside_each_other_in_the_sequence(make_run):
    run = make_run(6)
    found = row(repeat_choice(run, segments=["prompt", "answer"], draws=20), layer=1, family="all", choice="any")
    prompts = sum((batch.segment == 0).sum() - len(np.unique(batch.sequence)) for batch in run.batches(layers=[]))
    assert found["pairs"] == prompts + 2 * 6, "no pair reaches from the prompt over the reasoning to the answer"
    with pytest.raises(UsageError, match="no two tokens of these segments follow each other"):
        repeat_choice(run, segments=["special"])
    with pytest.raises(UsageError, match="no two tokens of these segments follow each other"):
        repeat_choice(run, segments=["template"])


def test_tokens_of_a_step_that_route_alike_repeat(make_run):
    table = repeat_choice(make_run(40, effects=Effects(step=1.5)))
    found = ANALYSES["repeat_choice"].finding(table)
    assert found.verdict is Verdict.SUPPORTED
    assert found.ci_low > 1.2
    stretches = segment_routing(make_run(40, effects=Effects(step=1.5)))
    assert ANALYSES["segment_routing"].finding(stretches).verdict is Verdict.SUPPORTED
    assert (stretches[stretches["length"] == 4]["ci_low"] > 0.02).all()


def test_repeats_of_independent_tokens_are_chance_whatever_the_load(tmp_path):
    """Tokens of a sequence route alike, in no order: intervals hold 1 (repeats) and 0 (stretches) nineteen times in twenty."""
    repeats, stretches = [], []
    for seed in range(15):
        run = synthetic_run(tmp_path / str(seed), 60, seed=seed, effects=Effects(sequence=1.0))
        table = repeat_choice(run, seed=seed)
        table = table[table["family"] == "all"]
        repeats += ((table["ci_low"] < 1) & (table["ci_high"] > 1)).tolist()
        table = segment_routing(run, seed=seed)
        stretches += ((table["ci_low"] < 0) & (table["ci_high"] > 0)).tolist()
    assert 0.85 < np.mean(repeats) <= 1
    assert 0.85 < np.mean(stretches) <= 1


def test_the_best_set_is_the_best_of_all_sets():
    rng = np.random.default_rng(0)
    for length in (1, 2, 4):
        ids = np.stack([np.concatenate([rng.permutation(6)[:3] for _ in range(length)]) for _ in range(8)])
        for found, one in zip(best_set_f1(ids, length), ids, strict=True):
            counts = np.bincount(one, minlength=6)
            sets = [some for size in range(1, 7) for some in combinations(range(6), size)]
            assert found == pytest.approx(max(2 * counts[[*some]].sum() / (length * len(some) + len(one)) for some in sets))


def test_stretches_are_whole_and_of_one_sequence(make_run):
    run = make_run(9)
    table = segment_routing(run, draws=20)
    found = row(table, layer=2, length=4)
    f1 = [
        best_set_f1(ids[start : start + 4].reshape(1, -1), 4)[0]
        for ids, _ in sequences(run, 1)
        for start in range(0, len(ids) - 3, 4)
    ]
    assert found["stretches"] == len(f1)
    assert found["f1"] == pytest.approx(np.mean(f1))
    assert found["sequences"] == 9
    assert row(segment_routing(run, sample=4, draws=20), layer=2, length=4)["sequences"] == 4
    with pytest.raises(UsageError, match="no sequence of this run has 4 tokens of these segments"):
        segment_routing(run, segments=["special"])


def test_affinity_is_the_mean_over_sequences_of_the_mean_over_tokens(make_run):
    run = make_run(12)
    table = expert_affinity(run, segments=["reasoning", "answer"])
    families, gate, token = run.sequences["family"].to_numpy(), [], []
    for batch in run.batches(weights=True):
        for number in np.unique(batch.sequence):
            mine = (batch.sequence == number) & np.isin(batch.segment, [1, 2])
            if families[number] == "causal":
                here = batch.expert_ids[mine, 1, :, None] == np.arange(16)
                gate.append((here * batch.weights[mine, 1, :, None]).sum(axis=(0, 1)) / mine.sum() / 2.5)
                token.append(here.sum(axis=(0, 1)) / mine.sum() / 4)
    rows = table[(table["layer"] == 2) & (table["family"] == "causal")].sort_values("expert")
    np.testing.assert_allclose(rows["gate"], np.mean(gate, axis=0), rtol=1e-6)
    np.testing.assert_allclose(rows["token"], np.mean(token, axis=0), rtol=1e-6)
    sums = table.groupby(["layer", "family"])[["gate", "token"]].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-3)


def test_sets_are_the_smallest_of_their_own_layer(make_run):
    table = expert_affinity(make_run(12))
    sizes = affinity_sets(table)
    for (layer, family), rows in table.groupby(["layer", "family"]):
        gate = np.sort(rows["gate"])[::-1]
        for share in (0.1, 0.2, 0.5):
            smallest = next(n for n in range(1, 17) if gate[:n].sum() >= share)
            assert row(sizes, layer=layer, family=family, share=share)["experts"] == smallest
        assert rows.sort_values("rank")["gate"].is_monotonic_decreasing
    assert sizes.groupby("share")["even"].first().to_dict() == {0.1: 2, 0.2: 4, 0.5: 8}


def test_a_family_that_leans_on_an_expert_is_found_and_others_are_not(make_run, tmp_path):
    table = expert_affinity(make_run(60, planted=Planted(3, 9, "deduction", 2.0)))
    found = row(table, layer=3, expert=9, family="deduction")
    assert found["q"] < 0.05
    assert found["ci_low"] > 0.5
    assert ANALYSES["expert_affinity"].finding(table).verdict is Verdict.SUPPORTED
    p = [
        p
        for seed in range(10)
        for p in expert_affinity(synthetic_run(tmp_path / str(seed), 60, seed=seed, effects=Effects(sequence=0.5)))["p"]
    ]
    assert 0.02 < (np.array(p) <= 0.05).mean() < 0.08


def test_one_family_has_affinities_and_nothing_to_compare_with(make_run):
    run = make_run(12, labels={"text": ("add", "divide")})
    table = expert_affinity(run)
    assert table[["log2_ratio", "p", "q"]].isna().all(axis=None)
    found = ANALYSES["expert_affinity"].finding(table)
    assert found.verdict is Verdict.CANNOT_TELL
    assert "one family only" in found.sentence
    assert set(committee(run, draws=10)["kind"]) == {"label"}
    with pytest.raises(UsageError, match="no tokens of these segments in this run"):
        expert_affinity(run, segments=["template"])


@pytest.mark.parametrize("name", ["committee", "segment_routing", "question"])
def test_doctests_hold(name):
    found = doctest.testmod(sys.modules[f"ling_probe.analysis.{name}"])
    assert found.attempted > 0
    assert found.failed == 0


def test_random_committees_share_what_they_should():
    rng = np.random.default_rng(0)
    drawn = [set(rng.permutation(32)[:4]) for _ in range(8000)]
    found = np.mean([len(one & other) / len(one | other) for one, other in zip(drawn[::2], drawn[1::2], strict=True)])
    assert random_jaccard(32, 4) == pytest.approx(found, abs=0.005)


def test_committees_are_those_of_most_weight(make_run):
    run = make_run(30, labels={"one": ("add",), "two": ("add",), "three": ("add",)})
    table = committee(run, draws=20)
    families, leaders = run.sequences["family"].to_numpy(), {}
    for family in ("one", "two", "three"):
        total = np.zeros(16)
        for batch in run.batches(weights=True):
            mine = (families[batch.sequence] == family) & (batch.segment == 0)
            np.add.at(total, batch.expert_ids[mine, 2].ravel(), batch.weights[mine, 2].ravel())
        leaders[family] = np.argsort(-total)[:4].tolist()
    rows = table[(table["phase"] == "prompt") & (table["layer"] == 3)].set_index("expert")
    for expert in range(16):
        places = [1 + each.index(expert) if expert in each else 5 for each in leaders.values()]
        if min(places) < 5:
            assert rows["presence"][expert] == pytest.approx(np.mean(np.array(places) < 5))
            assert rows["mean_rank"][expert] == pytest.approx(np.mean(places))
            assert rows["rank_variance"][expert] == pytest.approx(np.var(places))
    pairs = [len({*one} & {*two}) / len({*one} | {*two}) for one, two in combinations(leaders.values(), 2)]
    assert rows["jaccard"].iloc[0] == pytest.approx(np.mean(pairs))
    best = rows[["mean_rank", "rank_variance"]]
    for expert, (mean, variance) in best.iterrows():
        beaten = ((best["mean_rank"] <= mean) & (best["rank_variance"] <= variance)).sum() > (
            (best["mean_rank"] == mean) & (best["rank_variance"] == variance)
        ).sum()
        assert rows["pareto"][expert] == (not beaten)


def test_one_committee_stands_or_each_family_has_its_own(make_run):
    everywhere = tuple(
        Planted(layer, expert, family, 5.0) for layer in (1, 2, 3) for expert in (0, 1, 2, 3) for family in "abc"
    )
    labels = dict.fromkeys("abc", ("add",))
    same = ANALYSES["committee"].finding(committee(make_run(60, planted=everywhere, labels=labels)))
    assert same.verdict is Verdict.SUPPORTED
    assert same.effect == pytest.approx(1)
    own = tuple(
        Planted(layer, 4 * place + expert, family, 5.0)
        for layer in (1, 2, 3)
        for expert in range(4)
        for place, family in enumerate("abc")
    )
    table = committee(make_run(60, planted=own, labels=labels))
    found = ANALYSES["committee"].finding(table)
    assert found.verdict is Verdict.NOT_SUPPORTED
    assert found.effect == pytest.approx(0)
    assert (table["halves"] > 0.9).all()


def test_committees_need_two_domains(make_run):
    with pytest.raises(UsageError, match="one family and no two kinds of step in this run"):
        committee(make_run(9, labels={"text": ("other",)}, n_steps=(0, 0)))
    with pytest.raises(UsageError, match="holds no sequences yet"):
        committee(make_run(0))


def test_tables_repeat_with_their_seed(make_run):
    run = make_run(12)
    for analysis in (repeat_choice, segment_routing, expert_affinity, committee):
        pd.testing.assert_frame_equal(analysis(run, seed=3), analysis(run, seed=3))
        assert set(analysis(run, seed=3)["seed"]) == {3}


def test_a_short_run_has_only_the_stretches_it_can(make_run):
    table = segment_routing(make_run(9, n_steps=(1, 1), step_tokens=(2, 3), spec=synthetic_spec(routed_layers=(1,))))
    assert table["length"].tolist() == [4]
