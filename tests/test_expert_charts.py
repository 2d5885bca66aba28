"""Figures of clusters, agreement, contributions and attribution show what their tables hold."""

import json

import numpy as np
import pytest
from test_contributions import KEEP

from ling_probe import charts
from ling_probe.analysis import ANALYSES, cluster_agreement, coactivation, expert_clusters, shared_share
from ling_probe.errors import UsageError

NASTY = "<b>a & b"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from synthetic import synthetic_run

    return synthetic_run(tmp_path_factory.mktemp("charts") / "run", 20, keep=KEEP)


@pytest.fixture(scope="module")
def clusters(run):
    return expert_clusters(run, draws=2)


@pytest.mark.parametrize("name", ["expert_saliency", "super_experts", "norm_rank", "shared_share", "logit_attribution"])
def test_every_figure_asks_its_question_and_names_its_axes(run, name):
    table = ANALYSES[name].function(run)
    for figure in charts.FIGURES[name](table, run.spec):
        assert figure.layout.title.text == ANALYSES[name].question
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text


@pytest.mark.parametrize(("name", "column"), [("expert_saliency", "saliency"), ("super_experts", "max_norm")])
def test_every_expert_is_a_point(run, name, column):
    table = ANALYSES[name].function(run)
    (figure,) = charts.FIGURES[name](table, run.spec)
    drawn = np.sort(np.concatenate([trace.y for trace in figure.data]))
    assert drawn == pytest.approx(np.sort(table[column].to_numpy(np.float32)))


def test_attribution_tells_what_was_found_from_what_was_not(run):
    table = ANALYSES["logit_attribution"].function(run)
    table["q"] = np.where(table["expert"] < 5, 0.01, 0.5)
    figure = charts.attribution_scatter(table)
    assert {trace.name: len(trace.x) for trace in figure.data} == {"q < 0.05": 15, "not significant": 33}
    assert len(figure.layout.shapes) == 1, "the line of no effect"


def test_cluster_maps_hold_every_expert_of_a_view_once(clusters):
    figures = charts.cluster_maps(clusters)
    assert [sum(len(trace.x) for trace in figure.data) for figure in figures] == [48, 16]
    here = clusters[(clusters["view"] == "coactivation") & (clusters["layer"] == 2)]
    figure = charts.cluster_map(clusters, view="coactivation", layer=2)
    assert len(figure.data) == here["n_clusters"].iloc[0]
    assert figure.layout.title.text.startswith("Do experts fall into kinds by coactivation, layer 2?")
    with pytest.raises(UsageError, match="no clusters of view gate for layer 2 in this table; it has profile, coactivation"):
        charts.cluster_map(clusters, view="gate", layer=2)


def test_company_is_ordered_by_cluster(run, clusters):
    table = coactivation(run)
    plain = charts.coactivation_heatmap(table, layer=2).data[0]
    ordered = charts.coactivation_heatmap(table, layer=2, clusters=clusters).data[0]
    here = clusters[(clusters["view"] == "coactivation") & (clusters["layer"] == 2)].set_index("expert")["cluster"]
    order = [int(expert) for expert in ordered.y]
    assert sorted(order) == list(range(16))
    assert here[order].is_monotonic_increasing
    np.testing.assert_array_equal(ordered.z, plain.z[np.ix_(order, order)])


def test_agreement_has_a_cell_for_every_comparison(run):
    table = cluster_agreement(run, permutations=19)
    (figure,) = charts.FIGURES["cluster_agreement"](table, run.spec)
    (heat,) = figure.data
    assert list(heat.x) == ["all", "1", "2", "3"]
    assert np.isfinite(heat.z).sum() == len(table)


def test_labels_are_shown_letter_by_letter(run):
    table = shared_share(run, draws=9)
    table.loc[table["name"] == "add", "name"] = NASTY
    text = json.dumps(charts.shared_lines(table).to_plotly_json(), default=str)
    assert NASTY not in text
    assert "&lt;b>a &amp; b" in text
