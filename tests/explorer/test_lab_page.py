"""The Lab: a model is loaded when asked, and what it shows is what `laboratory` found."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import streamlit as st
from exploring import chart, choose, error, page_text, press, values
from hostile import TEXTS

from ling_probe import laboratory
from ling_probe.interventions import bias, exclude
from ling_probe.laboratory import try_change
from ling_probe.run import Run
from ling_probe.token_view import problem_facts

PROMPT = "evaluate (8+12)*2\n"
BUTTON = "Write with and without the change"


@pytest.fixture
def lab(visit, small_ling, monkeypatch):
    """The page with a small random model in place of the shipped one."""
    st.cache_resource.clear()
    asked = []
    monkeypatch.setattr("ling_probe.model.load.load_native", lambda name: asked.append(name) or small_ling)

    def opened(**address):
        app = visit("lab", run="planted", **address)
        app.asked = asked
        return app

    yield opened
    st.cache_resource.clear()


def written(app, prompt=PROMPT):
    app.text_area[0].set_value(prompt).run()
    return press(app, BUTTON)


def test_opening_the_page_imports_no_model(runs):
    program = (
        "import sys\nfrom streamlit.testing.v1 import AppTest\n"
        f"sys.argv = ['explorer.py', {str(runs)!r}]\n"
        f"app = AppTest.from_file({str(Path(__file__).parents[2] / 'apps/explorer.py')!r}, default_timeout=60)\n"
        "app.query_params['run'] = 'planted'\napp.run()\napp.switch_page('views/lab.py')\napp.run()\n"
        f"assert not app.exception and any(b.label == {BUTTON!r} for b in app.button), app\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_prompt_is_that_of_the_problem_and_nothing_is_loaded_yet(runs, lab):
    app = lab(problem="b-0007", layer=2, expert=5)
    assert app.text_area[0].value == problem_facts(Run.open(runs / "planted"), 7)["prompt"]
    assert app.multiselect[0].value == [5]
    assert app.query_params["experts"] == "5"
    assert app.asked == []
    assert not app.get("plotly_chart")


def test_what_is_shown_is_what_was_found(lab, small_ling):
    app = written(lab(layer=2, experts="1,2,5"))
    assert app.asked == ["ling-tiny"]
    expected = try_change(small_ling, PROMPT, [exclude(layer=2, experts=[1, 2, 5])])
    text = page_text(app)
    assert f"{expected.loss_before:.3g} nats a token" in text
    assert f"{expected.loss_after:.3g} nats a token" in text
    pieces = [each.proto.body for each in app.get("html") if 'class="written"' in each.proto.body]
    assert len(pieces) == 2
    (heat,) = chart(app)
    np.testing.assert_allclose(values(heat["z"]).ravel(), expected.choices["moved"], rtol=1e-6)
    for row in expected.layers.itertuples():
        assert f"{row.moved:.1%}" in text
    assert any("not those that the run was made with" in info.value for info in app.info)
    app = choose(app, "Change", "silence")
    assert any("settings have changed since" in warning.value for warning in app.warning)
    assert app.query_params["change"] == "silence"


def test_a_bias_has_a_value(lab, small_ling):
    app = written(lab(layer=1, experts="3", change="bias", value="0.25"))
    assert app.query_params["value"] == "0.25"
    expected = try_change(small_ling, PROMPT, [bias(layer=1, experts=[3], value=0.25)])
    assert f"{expected.loss_after:.3g} nats a token" in page_text(app)


@pytest.mark.parametrize(
    ("name", "value"),
    [("experts", "99"), ("layer", "0"), ("change", "x"), ("model", "/etc"), ("problem", "z"), ("value", "nan")],
)
def test_an_address_that_names_nothing_is_said(lab, name, value):
    app = lab(**{"change": "bias", "experts": "1"} | {name: value})
    assert not app.exception
    assert any("no " in warning.value and value.strip("/") in warning.value for warning in app.warning)
    assert app.asked == []


def test_only_models_the_explorer_was_started_with_are_offered(lab):
    (box,) = (box for box in lab().selectbox if box.label == "Model")
    assert box.options == ["ling-tiny"]


def test_refusals_are_one_line(lab):
    app = written(lab(layer=3, experts="1"))
    assert "layer 3 of random has no router; these do: 1, 2" in error(app)
    assert not app.get("plotly_chart")
    with laboratory._BUSY:
        assert "another text is being written" in error(written(lab(layer=1, experts="1")))


def test_texts_are_shown_and_inert(runs, visit):
    app, prompt = visit("lab", run="hostile"), problem_facts(Run.open(runs / "hostile"), 0)["prompt"]
    assert not app.exception
    assert not app.markdown
    assert app.text_area[0].value == prompt
    assert TEXTS[0] in prompt
