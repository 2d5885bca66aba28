import numpy as np
import pandas as pd
import pytest

from ling_probe import charts
from ling_probe.analysis.clusters import clustering_told, clusterings, expert_clusters
from ling_probe.analysis.profile_order import ordered_profiles


@pytest.fixture
def table():
    """Two kinds of experts, every other one of a kind, in two layers."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "layer": layer,
            "expert": expert,
            "label": label,
            "log2_ratio": sign * (1.5 if expert % 2 else -1.5) + rng.normal(0, 0.1),
        }
        for layer in (1, 2)
        for expert in range(8)
        for label, sign in (("add", 1), ("take", -1), ("turn", 1))
    ]
    found = pd.DataFrame(rows)
    q = np.where(found["expert"] < 4, 0.01, 0.5)
    return found.assign(q=q, ci_low=found["log2_ratio"] - 0.2, ci_high=found["log2_ratio"] + 0.2)


def test_alike_experts_and_labels_stand_together(table):
    rows = ordered_profiles(table, "label", layer=2)
    order = rows.drop_duplicates("expert").sort_values("place")["expert"].tolist()
    assert sorted(order) == list(range(8))
    assert len({expert % 2 for expert in order[:4]}) == len({expert % 2 for expert in order[4:]}) == 1
    labels = rows.drop_duplicates("label").sort_values("class_place")["label"].tolist()
    assert labels.index("take") != 1
    assert rows["found"].tolist() == (rows["q"] < 0.05).tolist()


def test_over_all_layers_only_experts_with_a_find_are_shown(table):
    rows = ordered_profiles(table, "label")
    assert set(zip(rows["layer"], rows["expert"], strict=True)) == {(layer, expert) for layer in (1, 2) for expert in range(4)}
    assert len(rows) == 24
    assert ordered_profiles(table.assign(q=0.5), "label").empty


def test_a_cell_that_could_not_be_measured_is_no_preference(table):
    table.loc[table["label"] == "add", "log2_ratio"] = np.nan
    assert ordered_profiles(table, "label", layer=1)["place"].nunique() == 8


def test_the_chart_fades_what_is_not_significant_and_every_cell_can_be_clicked(table):
    rows = ordered_profiles(table.replace({"label": {"add": "<b>add"}}), "label", layer=1)
    figure = charts.profile_heatmap(rows, "label")
    faded, found, points = figure.data
    assert faded.opacity < 0.5
    assert "&lt;b>add" in found.y
    for row in rows.itertuples():
        here, other = (found, faded) if row.found else (faded, found)
        assert here.z[row.class_place][row.place] == pytest.approx(row.log2_ratio, rel=1e-6)
        assert np.isnan(other.z[row.class_place][row.place])
    assert sorted(map(tuple, points.customdata)) == sorted(zip(rows["layer"], rows["expert"], strict=True))
    assert points.x[0] == f"L{rows['layer'].iloc[0]} E{rows['expert'].iloc[0]}"


def test_clusters_that_are_no_kinds_are_told_as_such(make_run):
    clusters = expert_clusters(make_run(24), views=["profile", "coactivation"], draws=2)
    row = clusterings(clusters).query("view == 'profile' and layer == 2").iloc[0]
    told = clustering_told(clusters, "profile", 2)
    assert "are no kinds beyond chance" in told
    assert f"silhouette {row['mean_silhouette']:.2f} against {row['silhouette_floor']:.2f}" in told
    assert clustering_told(clusters.assign(kinds=True), "profile", None).startswith(
        "By profile, experts of all layers fall into"
    )
    assert not clustering_told(clusters, "coactivation", None)
