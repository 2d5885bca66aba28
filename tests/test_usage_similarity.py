"""Overlap of the experts that sequences use, and what it has to do with their hidden states."""

import doctest
import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from synthetic import Effects, synthetic_run, synthetic_spec, synthetic_traces

from ling_probe import charts
from ling_probe.activations import ActivationSpec
from ling_probe.analysis import ANALYSES, Verdict, finding, usage_similarity
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.trace import Activation

module = sys.modules[usage_similarity.__module__]
FAST = {"draws": 200, "permutations": 99}


def vector_run(folder, n=24, *, names=("router:1", "router:2", "router:3"), vectors=None, every=1, seed=0, **options):
    """A run whose vectors are, unless told otherwise, one random direction a sequence, and noise."""
    spec, rng, wanted = synthetic_spec(), np.random.default_rng(seed), ActivationSpec(names=names)
    run = Run.create(folder, spec=spec, model={}, benchmark={}, options={"activations": wanted.to_dict()})
    traces = []
    for trace in synthetic_traces(spec, n, rng=rng, **options):
        positions = np.arange(0, trace.n_tokens, every, dtype=np.int32)
        given = vectors(trace) if vectors else rng.normal(size=spec.d_model) + rng.normal(size=(trace.n_tokens, spec.d_model))
        kept = given[positions].astype(np.float32)
        traces.append(
            replace(trace, activations={name: Activation(positions, lambda kept=kept: kept) for name in wanted.names})
        )
    for some in (traces[: n // 3], traces[n // 3 :]):
        run.append(some)
    return run


def used(run, layer, position=lambda _: True):
    """Experts that each sequence ever chose in a layer."""
    found = {}
    for batch in run.batches(layers=[layer]):
        for sequence, place, ids in zip(batch.sequence, batch.position, batch.expert_ids[:, 0], strict=True):
            if position(place):
                found.setdefault(int(sequence), set()).update(ids.tolist())
    return [found[sequence] for sequence in sorted(found)]


def overlaps(sets):
    return [len(one & other) / len(one | other) for one, other in itertools.combinations(sets, 2)]


def test_doctests_hold():
    assert doctest.testmod(module).failed == 0


def test_overlap_is_that_of_plain_sets(make_run):
    """With all that was used, so that nothing is a matter of ties."""
    run = make_run(11, parts=3, step_tokens=(1, 2), n_steps=(1, 3), effects=Effects(sequence=2.0))
    table = usage_similarity(run, share=1.0, **FAST)
    for row in table.itertuples():
        sets = used(run, row.layer)
        assert row.jaccard == pytest.approx(np.mean(overlaps(sets)))
        assert row.set_size == pytest.approx(np.mean([len(each) for each in sets]))
        assert row.jaccard < 0.99


def test_a_set_is_the_fewest_most_used_experts_that_hold_the_share():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.exponential(3.0, (200, 16)))
    for row, chosen in zip(counts, module.top_sets(counts, 0.8, rng), strict=True):
        assert row[chosen].sum() >= 0.8 * row.sum() > row[chosen].sum() - row[chosen].min()
        assert row[chosen].min() >= row[~chosen].max()
    assert not module.top_sets(np.zeros((1, 4), int), 0.8, rng).any()
    ties = module.top_sets(np.ones((4000, 10), int), 0.8, rng)
    assert (ties.sum(axis=1) == 8).all()
    np.testing.assert_allclose(ties.mean(axis=0), 0.8, atol=0.03)


def test_random_sets_overlap_by_chance():
    rng, size = np.random.default_rng(1), np.array([5, 9, 12, 20, 9])
    draws = [[set(rng.permutation(32)[:each].tolist()) for each in size] for _ in range(2000)]
    expected = np.mean([np.mean(overlaps(sets)) for sets in draws])
    assert module._random_overlap(size, 32) == pytest.approx(expected, abs=0.01)


def test_pairs_of_resampled_sequences_count_as_often_as_both_were_drawn():
    rng = np.random.default_rng(2)
    values = rng.random((6, 6))
    values = np.triu(values, 1) + np.triu(values, 1).T
    drawn = rng.integers(6, size=6)
    weights = np.bincount(drawn, minlength=6)[None].astype(float)
    pairs = [(one, other) for one, other in itertools.combinations(drawn, 2) if one != other]
    assert module._pair_mean(weights, values)[0] == pytest.approx(np.mean([values[pair] for pair in pairs]))
    second = rng.random((6, 6))
    second = np.triu(second, 1) + np.triu(second, 1).T
    expected = np.corrcoef([values[pair] for pair in pairs], [second[pair] for pair in pairs])[0, 1]
    assert module._correlation(weights, values, second)[0] == pytest.approx(expected)


def test_sequences_that_route_by_themselves_are_found(make_run):
    run = make_run(40, effects=Effects(sequence=1.0))
    table = usage_similarity(run, **FAST)
    assert (table["ci_high"] < 0).all()
    assert (table["beyond_high"] < 0).all()
    assert (table["chance"] < table["pooled"]).all()
    told = finding("usage_similarity", table)
    assert (told.verdict, told.rung) == (Verdict.SUPPORTED, 2)
    assert told.effect == pytest.approx(table["difference"].mean())
    assert "needs vectors: --keep activations --activations router:LAYERS" in told.sentence


def test_words_that_route_by_themselves_are_all_there_is_to_it(make_run):
    """Each family has words of its own, and the words route: sequences differ, and not beyond their words."""
    excluded = []
    for seed in range(12):
        run = make_run(45, effects=Effects(token=2.0, confounded=True), step_tokens=(8, 12), seed=seed)
        table = usage_similarity(run, **FAST, seed=seed)
        assert table["ci_high"].mean() < 0
        excluded += list((table["beyond_low"] > 0) | (table["beyond_high"] < 0))
    assert np.mean(excluded) < 0.2


def test_one_load_for_all_is_not_taken_for_a_difference(make_run):
    excluded = []
    for seed in range(30):
        table = usage_similarity(make_run(24, seed=seed), draws=200, seed=seed)
        excluded += list((table["ci_low"] > 0) | (table["ci_high"] < 0))
    assert 0 < np.mean(excluded) < 0.12


def test_correlation_is_spearmans_over_pairs_of_the_tokens_that_have_vectors(tmp_path):
    run = vector_run(tmp_path / "run", 15, every=4, step_tokens=(1, 2), effects=Effects(sequence=2.0))
    table = usage_similarity(run, share=1.0, **FAST)
    for row in table.itertuples():
        pieces = list(run.activations(f"router:{row.layer}"))
        sequence = np.concatenate([piece.sequence for piece in pieces])
        vectors = np.concatenate([piece.vectors for piece in pieces]).astype(float)
        means = [vectors[sequence == each].mean(axis=0) for each in range(15)]
        cosines = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for one, other in itertools.combinations(means, 2)]
        expected = spearmanr(overlaps(used(run, row.layer, lambda place: place % 4 == 0)), cosines).statistic
        assert row.site == f"router:{row.layer}"
        assert row.correlation == pytest.approx(expected)
        assert row.correlation_low < row.correlation < row.correlation_high


def test_hidden_states_that_go_with_usage_are_found_beyond_families(tmp_path):
    def loads(trace):
        return np.tile(np.bincount(trace.expert_ids[:, 1].ravel(), minlength=16)[:8] - 10.0, (trace.n_tokens, 1))

    run = vector_run(tmp_path / "run", 45, vectors=loads, effects=Effects(sequence=1.0))
    table = usage_similarity(run, **FAST).set_index("layer")
    assert table.loc[2, "q"] < 0.05
    assert table.loc[2, "correlation_low"] > table.loc[2, "family_correlation"]
    told = finding("usage_similarity", table.reset_index())
    assert f"hidden states is {table['correlation'].mean():.2f} (mean of 3 layers" in told.sentence


def test_hidden_states_that_only_tell_families_apart_do_not_count(tmp_path):
    """Families have words and vectors of their own: usage and vectors correlate, and not inside a family."""
    p, correlation, rng = [], [], np.random.default_rng(0)
    for seed in range(12):
        centre = {name: rng.normal(size=8) for name in ("arithmetic", "deduction", "causal")}
        run = vector_run(
            tmp_path / f"{seed}", 30, effects=Effects(token=4.0, confounded=True), step_tokens=(8, 12), seed=seed,
            vectors=lambda trace, centre=centre: centre[trace.family] + np.tile(0.3 * rng.normal(size=8), (trace.n_tokens, 1)),
        )  # fmt: skip
        table = usage_similarity(run, draws=50, permutations=99, seed=seed)
        p += table["p"].tolist()
        correlation.append(table["correlation"].mean())
    assert np.mean(correlation) > 0.1
    assert np.mean(np.array(p) < 0.1) < 0.3
    assert np.median(p) > 0.2


def test_mantel_of_a_matrix_with_itself_and_without_freedom():
    values = module.pair_ranks(np.random.default_rng(0).random((7, 7)))
    found, null = module.mantel(values, values, blocks=np.zeros(7, int), permutations=50, seed=0)
    assert found == pytest.approx(1)
    assert null.max() < 1
    _, fixed = module.mantel(values, values, blocks=np.arange(7), permutations=50, seed=0)
    assert fixed.tolist() == pytest.approx([1] * 50)


@pytest.mark.parametrize(
    ("names", "sites"),
    [
        (("router:2", "residual:0-3"), ["residual:0", "router:2", "residual:2"]),
        (("residual:3",), ["", "", "residual:3"]),
        (("expert:2.1",), ["", "", ""]),
    ],
)
def test_the_nearest_vectors_that_were_kept_stand_for_what_a_router_sees(tmp_path, names, sites):
    table = usage_similarity(vector_run(tmp_path / "run", 9, names=names), draws=20, permutations=9)
    assert table["site"].tolist() == sites
    assert table["correlation"].notna().tolist() == [bool(site) for site in sites]


def test_parts_and_the_number_of_layers_read_together_do_not_matter(make_run, monkeypatch):
    whole = usage_similarity(make_run(20, parts=1), **FAST)
    monkeypatch.setattr(module, "_HELD", 1)
    assert whole.equals(usage_similarity(make_run(20, parts=4), **FAST))


def test_sequences_are_drawn_and_segments_chosen(make_run):
    run = make_run(30)
    table = usage_similarity(run, most=12, segments=["answer"], **FAST)
    assert table["sequences"].tolist() == [12] * 3
    with pytest.raises(UsageError, match="has 0 sequences with tokens there; pairs to compare need 3"):
        usage_similarity(run, segments=["template"])
    with pytest.raises(UsageError, match="has 2 sequences with tokens"):
        usage_similarity(make_run(2))
    with pytest.raises(UsageError, match="holds no sequences"):
        usage_similarity(make_run(0))


def test_the_figures_draw_what_the_table_holds(tmp_path):
    question = ANALYSES["usage_similarity"].question
    table = usage_similarity(vector_run(tmp_path / "run", 12), **FAST)
    overlap, correlation = charts.FIGURES["usage_similarity"](table, synthetic_spec())
    assert [list(line.y) for line in overlap.data] == [
        table[name].tolist() for name in ("jaccard", "pooled", "token", "chance")
    ]
    assert list(correlation.data[1].y) == table["correlation"].tolist()
    assert list(correlation.data[0].y[:3]) == [*table.loc[0, ["correlation_low", "correlation_high"]], None]
    for figure in (overlap, correlation):
        assert figure.layout.title.text == question
        assert figure.layout.xaxis.title.text == "layer"
    assert len(charts.FIGURES["usage_similarity"](usage_similarity(synthetic_run(tmp_path / "plain"), **FAST), None)) == 1
