"""The page of steps in Streamlit's own test harness."""

import numpy as np
import pytest
from exploring import chart, choose, page_text, values
from hostile import TEXTS

from ling_probe.run import Run
from ling_probe.state_view import problem_states, state_summary, state_tables
from ling_probe.token_view import problem_table


def charts_of(app) -> dict[str, list]:
    """Figures by what they hold."""
    return {name: chart(app, place) for place, name in enumerate(("timeline", "order", "answers"))}


def test_the_timeline_shows_the_decoded_states_and_the_lines(runs, visit):
    app, run = visit("steps", run="planted", problem="b-0007"), Run.open(runs / "planted")
    assert not app.exception
    assert not app.error
    shown = problem_states(run, problem_table(run)["sequence_id"].tolist().index("b-0007"), state_tables(run))
    drawn = chart(app)
    bars = [trace for trace in drawn if trace["type"] == "bar"]
    assert [bar["text"][0] for bar in bars] == shown.steps["label"].tolist()
    assert [bar["base"][0] + 0.5 for bar in bars] == shown.steps["start"].tolist()
    (row,) = [trace for trace in drawn if trace["type"] == "heatmap"]
    np.testing.assert_array_equal(values(row["z"]).ravel(), shown.tokens["state"])
    (line,) = [trace for trace in drawn if trace.get("mode") == "lines"]
    np.testing.assert_allclose(values(line["y"]), shown.tokens[shown.lines[0]], rtol=1e-6)
    marks = [values(trace["x"]) + 0.5 for trace in drawn if trace.get("mode") == "markers"]
    for drawn_at, name in zip(marks, ("annotated", "by routing", "by tokens alone"), strict=True):
        told = shown.boundaries[shown.boundaries["found"] == name]
        np.testing.assert_array_equal(drawn_at, told["position"])


def test_states_their_order_and_their_answers_are_those_of_the_tables(runs, visit):
    app, run = visit("steps", run="planted", least="0.3"), Run.open(runs / "planted")
    tables, text = state_tables(run), page_text(app)
    for row in state_summary(tables.profiles).itertuples():
        assert f"{row.share:.1%}" in text
    (link,) = charts_of(app)["order"]
    assert values(link["link"]["value"]).sum() == tables.transitions.query("leaving >= 0.3")["count"].sum()
    for bar in charts_of(app)["answers"]:
        answer = bar["name"].removesuffix(" answers")
        np.testing.assert_allclose(values(bar["y"]), tables.answers[tables.answers["answer"] == answer]["share"])


def test_a_problem_is_chosen_and_stands_in_the_address(visit):
    app = visit("steps", run="planted", family="a")
    assert app.query_params["problem"] == "a-0000"
    choose(app, "Problem", "a-0004")
    assert app.query_params["problem"] == "a-0004"
    assert {box.label for box in app.selectbox} >= {"Family", "Answers", "Problem", "Show chances from"}


def test_unknown_values_in_the_address_are_told(visit):
    app = visit("steps", run="planted", least="2", family="z")
    assert not app.exception
    assert {"least", "family"} <= {word for warning in app.warning for word in warning.value.split()}


def test_a_run_too_small_for_states_says_so_and_shows_its_steps(visit):
    app = visit("steps", run="null")
    assert not app.exception
    assert any("fitting states on half of them needs 12" in text.value for text in app.text)
    assert "What does each step say" in page_text(app)


def test_texts_of_a_hostile_run_stay_text(visit):
    app = visit("steps", run="hostile")
    assert not app.exception
    shown = " ".join(html.proto.body for html in app.get("html"))
    assert not any(f"<{tag}" in shown for tag in ("script", "img", "i>9"))
    labels = [bar["text"][0] for trace in [chart(app)] for bar in trace if bar["type"] == "bar"]
    assert labels
    assert set(labels) <= {text.replace("&", "&amp;").replace("<", "&lt;") for text in TEXTS}


@pytest.mark.parametrize("name", ["steps"])
def test_the_page_holds_few_charts(visit, name):
    assert len(visit(name, run="planted").get("plotly_chart")) <= 4
