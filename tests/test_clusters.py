"""Clusters of experts by view: planted kinds are found, noise is none, and views that agree are told from those that do not."""

import doctest

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_samples
from synthetic import Effects, Planted, synthetic_spec

from ling_probe import stats
from ling_probe.analysis import ANALYSES, Verdict, agreement, cluster_agreement, clusters, expert_clusters, views
from ling_probe.analysis.clusterings import rand_indices
from ling_probe.analysis.clusters import best_clusters, clusterings, silhouettes
from ling_probe.analysis.views import coactivation_points, profile_points
from ling_probe.errors import UsageError
from ling_probe.run import EXPERTS
from ling_probe.run.experts import write_experts

KINDS = {"multiply": range(5), "premise": range(5, 10), "abduce": range(10, 15)}
PLANTS = tuple(Planted(layer, e, label, 3.0) for layer in (1, 2, 3) for label, some in KINDS.items() for e in some)
UNGROUPED = synthetic_spec(n_groups=1, topk_groups=1)


def truth(table):
    """Planted kind of each expert; the last one has none and is left out."""
    kept = table["expert"] < 15
    return table["expert"][kept] // 5, table["cluster"][kept]


def with_vectors(run, gate, output):
    run.keep_experts({"gate": gate.astype(np.float16), "output": output.astype(np.float16)})
    return run


def blobs(rng, *, spread):
    """Vectors [M E D] in three kinds like those of `PLANTS`, the last expert by itself."""
    centres = rng.normal(size=(4, 64))
    return centres[np.arange(16) // 5] + spread * rng.normal(size=(3, 16, 64))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    from synthetic import synthetic_run

    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("planted") / "run"
    run = synthetic_run(folder, 90, spec=UNGROUPED, planted=PLANTS, finish=False)
    # An output is a line: half of the signs are turned round.
    output = blobs(rng, spread=0.4) * rng.choice([-1, 1], size=(3, 16, 1))
    return with_vectors(run, blobs(rng, spread=0.4), output)


@pytest.fixture(scope="module")
def planted_table(planted):
    return expert_clusters(planted)


def test_doctests_hold():
    assert all(doctest.testmod(module).failed == 0 for module in (clusters, views, agreement))


@pytest.mark.parametrize("view", ["profile", "coactivation", "gate", "output"])
def test_planted_kinds_are_clusters_in_every_view(planted_table, view):
    table = planted_table[planted_table["view"] == view]
    for layer in (1, 2, 3):
        here = table[(table["scope"] == "one layer") & (table["layer"] == layer)]
        assert adjusted_rand_score(*truth(here)) > 0.7
        assert here["stability"].iloc[0] > 0.8
    over_all = table[table["scope"] == "all layers"]
    assert over_all.empty == (view == "coactivation"), "experts of two layers keep no company"
    if view != "coactivation":
        assert adjusted_rand_score(*truth(over_all)) > 0.8
        assert over_all["kinds"].all()
        assert over_all["cluster"].value_counts().sort_index().is_monotonic_decreasing


def test_the_finding_says_which_views_have_kinds(planted_table):
    found = ANALYSES["expert_clusters"].finding(planted_table)
    assert found.verdict is Verdict.SUPPORTED
    assert "profile 4 of 4" in found.sentence
    assert "cannot show" not in found.sentence
    part = ANALYSES["expert_clusters"].finding(planted_table[planted_table["view"] == "profile"])
    assert "This run cannot show coactivation and gate and output." in part.sentence


def test_noise_is_no_kind_of_expert(make_run):
    """Tokens that route alike by step, sequence and word, but no kind of step that any expert prefers."""
    p, kinds = [], 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        run = make_run(50, seed=seed, effects=Effects(token=1.0, step=0.5, sequence=0.5), finish=False)
        with_vectors(run, rng.normal(size=(3, 16, 64)), rng.normal(size=(3, 16, 64)))
        table = expert_clusters(run, seed=seed)
        each = clusterings(table)
        p += each["p"].tolist()
        kinds += int(each["kinds"].sum())
        assert ANALYSES["expert_clusters"].finding(table).verdict is not Verdict.SUPPORTED
    assert len(p) == 3 * (3 * 4 + 3)
    assert np.mean(np.array(p) <= 0.05) < 0.15
    assert kinds == 0


def test_one_long_cloud_is_cut_into_parts_and_not_called_kinds():
    """k-means finds two clusters with a high silhouette in a line; one cloud of the same spread has as high a one."""
    points = np.random.default_rng(0).normal(size=(200, 4)) * [5, 1, 1, 1]
    _, found = best_clusters(points, 0)
    clouds = [best_clusters(cloud, 0)[1].mean() for cloud in clusters._clouds(points, 0)]
    assert found.mean() > 0.4
    assert found.mean() < np.mean(clouds) + 0.05
    assert np.std([cloud.std(axis=0) for cloud in clusters._clouds(points, 0)], axis=0).max() < 0.5
    for cloud in clusters._clouds(points, 0):
        assert cloud.mean(axis=0) == pytest.approx(points.mean(axis=0), abs=1.2)
        assert cloud.std(axis=0) == pytest.approx(points.std(axis=0), rel=0.3)


def test_silhouettes_are_those_of_scikit_learn():
    rng = np.random.default_rng(2)
    points = rng.normal(size=(60, 5)) + 100
    several = [rng.integers(0, k, 60) for k in (2, 3, 5)] + [np.arange(60) // 59]
    for clustering, found in zip(several, silhouettes(points, several), strict=True):
        assert found == pytest.approx(silhouette_samples(points, clustering), abs=1e-4)


def test_profiles_are_ratios_over_their_jackknife_error(make_run):
    run = make_run(12, labels={"arithmetic": ("add", "multiply")})
    (layer, *_) = profile_points(run, 2, 0)
    steps, sequences = run.steps, len(run.sequences)
    first = steps.groupby("sequence").head(1).index.to_numpy()
    observed, expected = np.zeros((2, sequences, 2, 16))
    (batch,) = [joined(run)]
    label = np.unique(steps["label"], return_inverse=True)[1]
    inside = (batch["step"] >= 0) & (batch["segment"] == 1)
    rates = {
        word: np.bincount(batch["ids"][inside & (batch["word"] == word)].ravel(), minlength=16)
        / (inside & (batch["word"] == word)).sum()
        for word in np.unique(batch["word"][inside])
    }
    for token in np.flatnonzero(inside):
        sequence = batch["sequence"][token]
        code = label[first[sequence] + batch["step"][token]]
        observed[sequence, code, batch["ids"][token]] += 1
        expected[sequence, code] += rates[batch["word"][token]]

    def ratio(kept):
        return np.log2((observed[kept].sum(axis=0) + views.PRIOR) / (expected[kept].sum(axis=0) + views.PRIOR))

    left_out = np.stack([ratio(np.arange(sequences) != each) for each in range(sequences)])
    error = np.sqrt((sequences - 1) / sequences * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
    assert layer.found == pytest.approx((ratio(slice(None)) / error).T, rel=1e-4)


def joined(run):
    """All tokens of a run in its first routed layer, as plain arrays."""
    batches = list(run.batches(layers=[1]))
    return {
        "step": np.concatenate([batch.step for batch in batches]),
        "segment": np.concatenate([batch.segment for batch in batches]),
        "word": np.concatenate([batch.token_id for batch in batches]),
        "sequence": np.concatenate([batch.sequence for batch in batches]),
        "ids": np.concatenate([batch.expert_ids[:, 0] for batch in batches]),
    }


def test_parts_and_layers_at_a_time_do_not_matter(make_run, monkeypatch):
    one = [points.found for points in profile_points(make_run(20, parts=1), 1, 0)]
    monkeypatch.setattr(views, "_CELLS", 1)
    other = [points.found for points in profile_points(make_run(20, parts=5), 1, 0)]
    for here, there in zip(one, other, strict=True):
        assert here == pytest.approx(there, rel=1e-4)


def test_company_puts_companions_together(make_run):
    together = (Planted(2, 4, "premise", 3.0), Planted(2, 6, "premise", 3.0))
    run = make_run(90, spec=UNGROUPED, planted=together)
    points = next(each for each in coactivation_points(run, 0, 0) if each.layers == (2,)).found
    distance = np.linalg.norm(points[4] - points, axis=1)
    assert np.argsort(distance)[1] == 6


@pytest.mark.parametrize(("view", "reason"), [
    ("gate", "holds no expert weights; capture it anew from a model loaded whole"),
    ("profile", "no step labels in this run"),
    ("taste", 'no view "taste" of experts; these there are: profile, coactivation, gate, output'),
])  # fmt: skip
def test_a_view_that_the_run_lacks_is_refused_by_name_alone(make_run, view, reason):
    plain = make_run(12, labels={"text": ("other",)}, n_steps=(0, 0))
    with pytest.raises(UsageError, match=reason):
        expert_clusters(plain, views=[view])
    assert set(expert_clusters(plain)["view"]) == {"coactivation"}


def test_a_run_of_one_sequence_or_two_experts_has_no_clusters(make_run):
    with pytest.raises(UsageError, match="one sequence only; whether clusters come back needs two at least"):
        expert_clusters(make_run(1))
    few = synthetic_spec(n_experts=2, n_groups=1, topk_groups=1, top_k=1)
    with pytest.raises(UsageError, match="too few experts to cluster by coactivation"):
        expert_clusters(make_run(9, spec=few), views=["coactivation"])


def test_tables_repeat_with_their_seed(make_run):
    run = make_run(20)
    first, again = (expert_clusters(run, views=["profile"], draws=2, seed=3) for _ in range(2))
    assert first.equals(again)


def test_rand_indices_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    one, two = rng.integers(0, 3, 40), rng.integers(0, 4, 40)
    orders = stats.permute_labels(np.arange(40), draws=5, seed=0)
    first, others = rand_indices(one, two, orders)
    expected = [adjusted_rand_score(one, two[order]) for order in orders]
    assert [first, *others] == pytest.approx(expected)


def test_views_of_the_same_kinds_agree(planted):
    table = cluster_agreement(planted, permutations=199)
    assert len(table) == 3 * 6 + 3
    assert (table["ari"] - table["ari_null"] > 0.5).all()
    assert (table["q"] < 0.05).all()
    assert ANALYSES["cluster_agreement"].finding(table).verdict is Verdict.SUPPORTED


def test_agreement_of_unrelated_views_is_chance(make_run):
    p = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        run = make_run(20, seed=seed, finish=False)
        table = cluster_agreement(with_vectors(run, *rng.normal(size=(2, 3, 16, 64))), permutations=99, seed=seed)
        p += table["p"].tolist()
        assert abs((table["ari"] - table["ari_null"]).mean()) < 0.08
    assert np.mean(np.array(p) <= 0.05) < 0.1


def test_what_router_groups_alone_have_in_common_is_no_agreement(make_run):
    """Both weights follow the groups: far from chance by dealing anyhow, nothing beyond groups."""
    rng = np.random.default_rng(0)
    run = make_run(12, finish=False)
    centres = rng.normal(size=(2, 4, 64))
    vectors = [each[np.arange(16) // 4] + 0.3 * rng.normal(size=(3, 16, 64)) for each in centres]
    table = cluster_agreement(with_vectors(run, *vectors), views=["gate", "output"], permutations=199)
    both = table[(table["other"] == "output") & (table["scope"] == "one layer")]
    assert (both["ari"] > 0.9).all()
    assert (both["ari"] - both["ari_null"]).abs().max() < 1e-9
    grouped = table[table["other"] == "router group"]
    assert (grouped["q"] < 0.05).all()


def test_one_view_without_groups_has_nothing_to_agree_with(make_run):
    with pytest.raises(UsageError, match="one view of experts only in this run, and no router groups"):
        cluster_agreement(make_run(9, spec=UNGROUPED), views=["coactivation"])


def test_vectors_are_kept_verified_and_replaced(make_run, tmp_path):
    run = make_run(9, finish=False)
    with pytest.raises(UsageError, match="holds no expert weights"):
        run.expert_vectors()
    vectors = {name: np.full((3, 16, 8), value, np.float16) for name, value in (("gate", 1), ("output", 2))}
    run.keep_experts(vectors)
    assert all((run.expert_vectors()[name] == each).all() for name, each in vectors.items())
    assert run.manifest.files[EXPERTS] == write_experts(vectors, tmp_path)
    assert run.verify() == []
