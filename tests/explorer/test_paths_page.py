"""The page of paths: what it draws equals the tables, and its address restores it."""

import json

import numpy as np
import pytest
from exploring import chart, choose, page_text, values

from ling_probe import path_view
from ling_probe.run import Run

LAYERS = (1, 2, 3)


def drawn(app, number):
    """A figure's JSON."""
    return json.loads(app.get("plotly_chart")[number].proto.spec)


@pytest.fixture(scope="module")
def paths(runs):
    return path_view.read_paths(Run.open(runs / "planted"))


def flows_of(paths, value):
    tokens = paths.tokens.only(path_view.members(paths, "label", value))
    return path_view.flow_table(tokens, LAYERS)


def test_bands_are_the_flows_of_the_set(visit, paths):
    app = visit("paths", run="planted", of="label:add", least=0.01)
    table = flows_of(paths, "add")
    expected = path_view.drawn_flows(table, least=0.01)
    sankey = chart(app)[0]
    assert not app.exception
    np.testing.assert_allclose(values(sankey["link"]["value"]), expected["share"])
    names = sankey["node"]["customdata"]
    ends = [(names[a], names[b]) for a, b in zip(sankey["link"]["source"], sankey["link"]["target"], strict=True)]
    told = [
        tuple(f"L{layer}·{'others' if expert < 0 else f'E{expert}'}" for layer, expert in sides)
        for sides in zip(
            zip(expected["layer"], expected["expert"], strict=True),
            zip(expected["next_layer"], expected["next_expert"], strict=True),
            strict=True,
        )
    ]
    assert ends == told
    reach = int((table["share"] >= 0.01).sum())
    assert f"{table['tokens'].iloc[0]:,} tokens of {table['problems'].iloc[0]} problems" in page_text(app)
    assert f"{reach} of {reach} flows that reach 1.00%" in page_text(app)


def test_two_sets_stand_side_by_side_with_their_difference(visit, paths):
    app = visit("paths", run="planted", of="label:add", beside="rest")
    sides = [paths.tokens.only(each(paths, "label", "add")) for each in (path_view.members, path_view.outside)]
    table = path_view.difference_table(*sides, LAYERS)
    assert len(app.get("plotly_chart")) == 3
    dots = chart(app, 2)[1]
    np.testing.assert_allclose(values(dots["x"]), table["difference"].head(20))
    assert path_view.told_differences(table) in [text.value for text in app.text]
    row = table.iloc[0].astype(int)
    assert dots["y"][0] == f"L{row['layer']}·E{row['expert']} → L{row['next_layer']}·E{row['next_expert']}"


def test_the_address_restores_a_view(visit):
    address = {
        "run": "planted", "of": "problem", "problem": "b-0007", "beside": "text", "beside-text": " w5", "layer": "2",
        "layers": "2", "top": "4", "least": "0.01",
    }  # fmt: skip
    app = visit("paths", **address)
    assert not app.exception
    assert not app.warning
    assert app.query_params == address
    shown = {box.label: box.value for box in app.selectbox}
    assert shown == {
        "Run": "planted", "Tokens of": "problem", "Problem": "b-0007", "Compared with": "text", "Token": " w5",
        "First layer": 2, "Layers shown": 2, "Experts counted": 4,
    }  # fmt: skip


def test_a_set_is_chosen_and_its_members_are_forgotten(visit):
    app = choose(visit("paths", run="planted"), "Tokens of", "problem")
    assert app.query_params["problem"] == "a-0000"
    app = choose(app, "Tokens of", "family:a")
    assert "problem" not in app.query_params
    assert app.query_params["of"] == "family:a"
    assert "family: a" in page_text(app)


def test_a_label_of_another_page_is_the_set(visit):
    assert visit("paths", run="planted", label="take").query_params["of"] == "label:take"


@pytest.mark.parametrize(
    ("name", "value"), [("of", "label:none"), ("beside", "x"), ("layer", "0"), ("layers", "9"), ("top", "3"), ("least", "2")]
)
def test_an_address_that_names_nothing_is_said(visit, name, value):
    app = visit("paths", run="planted", **{name: value})
    assert not app.exception
    assert any(f"no {name}" in warning.value.replace("\\", "") for warning in app.warning)


def test_a_run_without_steps_or_sequences_or_a_next_layer(make_run, visit):
    from synthetic import synthetic_spec

    empty, bare = make_run(0), make_run(4, n_steps=(0, 0))
    assert "holds no sequences yet" in visit("paths", folder=empty.folder, run=empty.folder.name).info[0].value
    assert not visit("paths", folder=bare.folder, run=bare.folder.name).exception
    flat = make_run(4, spec=synthetic_spec(n_layers=2, routed_layers=(1,)))
    app = visit("paths", folder=flat.folder, run=flat.folder.name)
    assert "a path needs a next one" in app.error[0].value.replace("\\", "")


def test_hostile_texts_are_shown_and_inert(visit):
    app = visit("paths", run="hostile", of="text", beside="problem")
    assert not app.exception
    assert not app.markdown
    app = visit("paths", run="hostile", of="label:$x$", beside="rest")
    assert not app.exception
    assert "steps: $x$" in page_text(app)
