import json

import numpy as np
import pandas as pd
import pytest
from synthetic import Effects, synthetic_run

from ling_probe import charts
from ling_probe.analysis import ANALYSES

NAMES = (
    "coverage",
    "weight_concentration",
    "choice_reasons",
    "expert_reasons",
    "router_confidence",
    "repeat_choice",
    "segment_routing",
    "expert_affinity",
    "committee",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Families and labels are named as nastily as a benchmark may."""
    labels = {"<b>a & b</b>": ("<i>x</i>", "y"), "c": ("<i>x</i>", "z")}
    effects = Effects(step=0.5, sequence=0.5)
    return synthetic_run(tmp_path_factory.mktemp("charts") / "run", 24, keep=("logits",), labels=labels, effects=effects)


@pytest.fixture(scope="module")
def tables(run):
    return {name: ANALYSES[name].function(run) for name in NAMES}


def drawn(figure, name) -> list:
    return [value for trace in figure.data if trace.name == name for value in trace.y]


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_asks_the_question_names_its_axes_and_shows_text_letter_by_letter(name, tables, run):
    figures = charts.FIGURES[name](tables[name], run.spec)
    assert figures[0].layout.title.text == ANALYSES[name].question
    for figure in figures:
        text = json.dumps(figure.to_plotly_json(), default=str)
        assert "<b>a" not in text
        assert "<i>x" not in text
        axes = [axis for axis in figure.layout if axis.startswith(("xaxis", "yaxis"))]
        assert {axis[0] for axis in axes if figure.layout[axis].title.text} == {"x", "y"}


def test_reasons_are_stacked_and_the_line_is_at_one_half(tables):
    table = tables["choice_reasons"]
    figure = charts.reason_bars(table)
    whole = table[table["kind"] == "all"]
    assert [bar.name for bar in figure.data] == ["affinity", "bias", "groups", "both"]
    np.testing.assert_array_equal(drawn(figure, "bias"), whole[whole["reason"] == "bias"]["share"])
    assert figure.layout.barmode == "stack"
    assert figure.layout.shapes[0].y0 == 0.5


def test_the_scatter_holds_every_expert_and_the_line_of_no_bias(tables):
    table = tables["expert_reasons"]
    figure = charts.bias_scatter(table)
    (points,) = figure.data
    assert len(points.x) == 48
    np.testing.assert_array_equal(points.x, table["affinity"])
    np.testing.assert_array_equal(points.marker.color, table["by_bias"])
    assert figure.layout.shapes[0].y0 == 0


def test_confidence_is_drawn_with_its_intervals_and_only_what_is_sure_is_coloured(tables):
    table = tables["router_confidence"]
    lines, heat = charts.confidence_figures(table.assign(q=np.where(table["layer"] == 2, 0.01, 0.5)))
    whole = tables["router_confidence"].query("kind == 'all' and measure == 'entropy'")
    np.testing.assert_array_equal(lines.data[0].y, whole["value"])
    assert list(lines.data[1].y[:3]) == [whole["ci_low"].iloc[0], whole["ci_high"].iloc[0], None]
    assert np.isfinite(heat.data[0].z).any(axis=0).tolist() == [False, True, False]
    assert set(heat.data[0].y) == {"&lt;i>x&lt;/i>", "y", "z"}
    without = tables["router_confidence"].query("kind != 'label'")
    assert len(charts.confidence_figures(without)) == 1


@pytest.mark.parametrize(
    ("name", "draw", "chance"),
    [
        ("coverage", charts.coverage_curves, "balanced router (chance)"),
        ("repeat_choice", charts.repeat_lines, "same first choice, tokens in any order (chance)"),
        ("segment_routing", charts.stretch_lines, "16 tokens, shuffled (chance)"),
        ("committee", charts.committee_lines, "random (chance)"),
    ],
)
def test_chance_is_drawn(name, draw, chance, tables):
    trace = next(trace for trace in draw(tables[name]).data if trace.name == chance)
    assert trace.line.dash == "dash"
    assert np.isfinite(np.array(trace.y, dtype=float)).all()


def test_lines_are_those_of_the_tables(tables, run):
    repeats = tables["repeat_choice"].query("family == 'all' and choice == 'any'")
    assert drawn(charts.repeat_lines(tables["repeat_choice"]), "of the K experts") == repeats["repeat"].tolist()
    stretches = tables["segment_routing"].query("length == 4")
    assert drawn(charts.stretch_lines(tables["segment_routing"]), "4 tokens") == stretches["f1"].tolist()
    layers = tables["committee"].query("phase == 'completion' and kind == 'family'").drop_duplicates("layer")
    assert drawn(charts.committee_lines(tables["committee"]), "completion, family") == layers["jaccard"].tolist()
    (figure,) = charts.FIGURES["expert_affinity"](tables["expert_affinity"], run.spec)
    fifth = tables["expert_affinity"].query("family == 'c'")
    sizes = (fifth["set"] <= 0.2).groupby(fifth["layer"]).sum()
    assert drawn(figure, "c") == sizes.tolist()
    assert drawn(figure, "equal use (chance)") == [4, 4, 4]
    curves = charts.coverage_curves(tables["coverage"])
    first = tables["coverage"].query("scope == 'run' and layer == 1")
    assert list(curves.data[0].x) == first["experts"].tolist()


def test_weights_are_stacked_above_the_even_share(tables):
    figure = charts.weight_bars(tables["weight_concentration"])
    stacked = pd.DataFrame({bar.name: bar.y for bar in figure.data})
    np.testing.assert_allclose(stacked.sum(axis=1), 1, atol=1e-3)
    assert stacked.columns.tolist() == ["weight 1", "weight 2", "weight 3", "weight 4"]
    assert figure.layout.shapes[0].y0 == 0.25
