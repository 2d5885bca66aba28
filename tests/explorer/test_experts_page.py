"""The page of experts: the list and one expert's page equal the tables, and every way leads to an expert."""

import json

import numpy as np
import pytest
from exploring import chart, choose, page_text, press, values

from ling_probe.analysis import ANALYSES
from ling_probe.errors import UsageError
from ling_probe.expert_view import NEEDED, expert_facts, expert_list
from ling_probe.run import Run


@pytest.fixture(scope="module")
def planted(runs):
    run, tables = Run.open(runs / "planted"), {}
    for name in NEEDED:
        try:
            tables[name] = ANALYSES[name].function(run)
        except UsageError as error:
            tables[name] = error
    return run, tables


def dots(app):
    """Effects of every dot plot on the page, by the name of its axis."""
    figures = [json.loads(each.proto.spec) for each in app.get("plotly_chart")]
    return {each["layout"]["xaxis"]["title"]["text"]: each["data"][1] for each in figures}


def test_the_map_and_the_list_are_the_table(visit, planted):
    app = visit("experts", run="planted")
    listed = expert_list(*planted)
    assert not app.exception
    heat, points = chart(app)[:2]
    np.testing.assert_allclose(values(heat["z"]).ravel(), listed["load_log2"].to_numpy(np.float32))
    np.testing.assert_array_equal(values(points["customdata"]), listed[["layer", "expert"]])
    shown = app.dataframe[0].value
    assert len(shown) == len(listed) == 48
    np.testing.assert_allclose(shown["label_log2_ratio"], listed["label_log2_ratio"])
    assert shown["label"].tolist() == listed["label"].tolist()
    app = choose(app, "Colour by", "label_log2_ratio")
    assert app.query_params["shade"] == "label_log2_ratio"
    np.testing.assert_allclose(values(chart(app)[0]["z"]).ravel(), listed["label_log2_ratio"].to_numpy(np.float32))
    app = choose(app, "Layer", 2)
    assert app.dataframe[0].value["layer"].unique().tolist() == [2]


def test_one_expert_is_its_facts(visit, planted):
    app = visit("experts", run="planted", layer=2, expert=5)
    facts, text = expert_facts(planted[0], 2, 5, planted[1]), page_text(app)
    assert not app.exception
    assert "Layer 2, expert 5" in text
    row = facts["row"]
    assert f"{row['load']:.2%} of its layer, {row['load_ratio']:.2f}× the even share" in text
    assert f"add: log2 {row['label_log2_ratio']:.2f} ({row['label_low']:.2f} to {row['label_high']:.2f})" in text
    shown = dots(app)
    assert set(values(shown["at equal words, log2"]["x"])) <= {
        *facts["labels"]["log2_ratio"],
        *facts["families"]["log2_ratio"],
    }
    assert facts["tokens"].empty
    assert "No token is frequent enough to tell." in [each.value for each in app.text]
    company = facts["neighbours"].head(12)
    np.testing.assert_allclose(values(shown["over groups and loads, log2"]["x"]), company["lift"])
    for context in facts["contexts"].to_dict("records"):
        assert f"{context['weight']:.3f}" in text
    links = [each.proto for each in app.get("page_link") if each.proto.label.startswith("Token ")]
    first = facts["contexts"].iloc[0]
    assert len(links) == len(facts["contexts"])
    assert f"problem={first['problem']}" in links[0].query_string
    assert f"token={first['position']}" in links[0].query_string
    assert any("capture it with --keep lens" in each.value for each in app.text)
    assert any("no causal study in this run" in each.value for each in app.text)


def test_the_list_is_left_and_returned_to(visit):
    app = press(visit("experts", run="planted", layer=2, expert=5), "All experts")
    assert "expert" not in app.query_params
    assert len(app.dataframe) == 1


def test_a_run_that_kept_more_shows_more(make_run, visit):
    run = make_run(60, keep=("contribution", "lens"), planted=None)
    app = visit("experts", folder=run.folder, run=run.folder.name)
    assert {"saliency", "logits"} <= set(app.dataframe[0].value)
    assert "a norm of" in page_text(visit("experts", folder=run.folder, run=run.folder.name, layer=1, expert=0))


@pytest.mark.parametrize(("name", "value"), [("expert", "16"), ("expert", "x"), ("layer", "0"), ("shade", "z")])
def test_an_address_that_names_nothing_is_said(visit, name, value):
    address = {name: value} if name == "shade" else {"expert": "1", name: value}
    app = visit("experts", run="planted", **address)
    assert not app.exception
    assert any(f"no {name}" in warning.value for warning in app.warning)


def test_a_run_without_steps_or_sequences(make_run, visit):
    empty, bare = make_run(0), make_run(4, n_steps=(0, 0))
    assert "holds no sequences yet" in visit("experts", folder=empty.folder, run=empty.folder.name).info[0].value
    app = visit("experts", folder=bare.folder, run=bare.folder.name, layer=1, expert=0)
    assert not app.exception
    assert any("no step labels" in each.value for each in app.text)


def test_other_pages_lead_to_an_expert(visit):
    links = [each.proto.query_string for each in visit(run="planted").get("page_link") if "All about" in each.proto.label]
    assert "layer=2&expert=5" in links[0]
    app = visit("tokens", run="planted", layer=3, expert=7)
    (there,) = app.get("page_link")
    assert "layer=3&expert=7" in there.proto.query_string


def test_hostile_texts_are_shown_and_inert(visit):
    app = visit("experts", run="hostile", layer=1, expert=0)
    assert not app.exception
    assert not app.markdown
    assert "<script>document.title='owned'</script>" in page_text(app)
    assert not visit("experts", run="hostile").exception
