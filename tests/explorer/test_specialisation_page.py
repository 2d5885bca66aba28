"""The page Specialisation shows what the tables say."""

import numpy as np
import pytest
from exploring import chart, choose, page_text, values

from ling_probe.analysis import ANALYSES, expert_clusters, family_specialisation, label_specialisation
from ling_probe.analysis.clusters import clustering_told
from ling_probe.analysis.profile_order import ordered_profiles
from ling_probe.run import Run


def grid(trace, rows):
    return values(trace["z"]).reshape(rows["class_place"].nunique(), rows["place"].nunique())


@pytest.mark.parametrize(("by", "layer"), [("label", 2), ("family", 1)])
def test_the_heatmap_holds_the_table(runs, visit, by, layer):
    app, run = visit("specialisation", run="planted", by=by, layer=layer), Run.open(runs / "planted")
    assert not app.exception
    table = {"label": label_specialisation, "family": family_specialisation}[by](run)
    rows = ordered_profiles(table, by, layer=layer)
    faded, found = (grid(trace, rows) for trace in chart(app)[:2])
    for row in rows.itertuples():
        assert (found if row.found else faded)[row.class_place, row.place] == np.float32(row.log2_ratio)
    assert ANALYSES[f"{by}_specialisation"].finding(table).sentence in [text.value for text in app.text]
    assert len(app.dataframe[0].value) == len(table[table["layer"] == layer])


def test_the_map_says_what_its_clusters_are_worth(runs, visit):
    app, run = visit("specialisation", run="planted", view="coactivation", layer=3), Run.open(runs / "planted")
    clusters = expert_clusters(run)
    assert clustering_told(clusters, "coactivation", 3) in [text.value for text in app.text]
    drawn = np.concatenate([values(trace["x"]) for trace in chart(app, 2)])
    here = clusters[(clusters["view"] == "coactivation") & (clusters["layer"] == 3)]
    np.testing.assert_array_equal(np.sort(drawn), np.sort(here["x"].to_numpy(np.float32)))
    app = choose(app, "Layer", "all")
    assert any("keep no company" in text.value for text in app.text)


def test_without_an_effect_the_page_says_so(visit):
    app = visit("specialisation", run="null")
    assert not app.exception
    assert any("No expert has a preference beyond chance" in text.value for text in app.text)
    assert any("no kinds beyond chance" in text.value for text in app.text)


@pytest.mark.parametrize(("name", "value"), [("by", "x"), ("layer", "0"), ("view", "z"), ("label", "none")])
def test_an_address_that_names_nothing_is_said(visit, name, value):
    app = visit("specialisation", run="planted", **{name: value})
    assert not app.exception
    assert any(f"no {name}" in warning.value and value in warning.value for warning in app.warning)


def test_a_run_without_steps_is_refused(make_run, visit):
    bare = make_run(4, n_steps=(0, 0))
    app = visit("specialisation", folder=bare.folder, run=bare.folder.name)
    assert not app.exception
    assert any("Not applicable" in text.value for text in app.text)
    assert "Do experts fall into kinds" in page_text(app)
