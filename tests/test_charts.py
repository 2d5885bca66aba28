import doctest
import json
import re

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
from synthetic import Planted, synthetic_run

from ling_probe import charts
from ling_probe.analysis import (
    ANALYSES,
    coactivation,
    correctness_specialisation,
    expert_load,
    family_specialisation,
    label_specialisation,
    load_balance,
    risk_difference,
    surest_picked,
)
from ling_probe.errors import UsageError

NASTY = "<b>a & b</b><script>alert(1)</script>"


def specialisation_table(n=4, label=NASTY) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": np.arange(n),
            "expert": np.arange(n),
            "label": label,
            "raw_log2_ratio": np.linspace(-1, 2, n),
            "log2_ratio": np.linspace(-0.5, 1, n),
            "ci_low": np.linspace(-0.7, 0.8, n),
            "ci_high": np.linspace(-0.3, 1.2, n),
            "p": np.linspace(0.001, 0.9, n),
            "q": np.linspace(0.01, 0.9, n),
            "picked_q": 0.01,
            **dict.fromkeys(("picked_low", "picked_log2_ratio", "picked_high"), 1.0),
            **dict.fromkeys(("held_out_low", "held_out_log2_ratio", "held_out_high"), 1.0),
            "replicated": np.arange(n) % 2 == 0,
        }
    )


def risk_table() -> pd.DataFrame:
    names = ("share_a", "share_b", "risk_difference", "ci_low", "ci_high", "p", "q", "token_p")
    return pd.DataFrame({"layer": [1, 2], "expert": [3, 4], "a": NASTY, "b": "c"}).assign(**dict.fromkeys(names, 0.01))


def shares_table() -> pd.DataFrame:
    numbers = {"token_share": [0.3, 0.1], "log_odds_z": [5.0, -5.0], "even_share": 0.25}
    return pd.DataFrame({"layer": [1, 1], "expert": [3, 3], "family": [NASTY, "other"]} | numbers)


def lines_at_no_effect(figure) -> int:
    return sum(shape.type == "line" and shape.x0 == shape.x1 == 0 for shape in figure.layout.shapes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("charts") / "run", 120, planted=Planted(2, 5, "multiply", 4.0))


@pytest.fixture(scope="module")
def labels(run):
    return label_specialisation(run)


def test_doctests_hold():
    assert doctest.testmod(charts).failed == 0


def test_load_heatmap_shows_the_table_with_one_scale_for_all_runs(run):
    table = expert_load(run)
    figure = charts.load_heatmap(table, group_size=4)
    (heat,) = figure.data
    assert heat.z.shape == (3, 16)
    assert heat.z[1, 5] == pytest.approx(table[(table["layer"] == 2) & (table["expert"] == 5)]["log2_ratio"].item(), abs=1e-6)
    assert (heat.zmin, heat.zmax) == (-2, 2)
    assert list(heat.y) == ["1", "2", "3"]
    assert [shape.x0 for shape in figure.layout.shapes] == [3.5, 7.5, 11.5]
    assert not charts.load_heatmap(table).layout.shapes


def test_balance_is_drawn_above_its_floor(run):
    table = load_balance(run)
    table = table[table["family"] == "all"]
    figure = charts.balance_lines(table)
    assert [list(trace.y) for trace in figure.data] == [
        table[name].tolist() for name in ("gini", "gini_floor", "max_vio", "max_vio_floor", "entropy", "entropy_floor")
    ]
    assert sum(bool(trace.showlegend) for trace in figure.data) == 2


def test_bars_put_raw_beside_adjusted_surest_first(labels):
    figure = charts.specialisation_bars(labels, top=5)
    interval, adjusted, raw = figure.data
    assert adjusted.y[0] == raw.y[0] == "L2 E5 · multiply"
    assert len(adjusted.y) == 5
    best = labels[(labels["layer"] == 2) & (labels["expert"] == 5) & (labels["label"] == "multiply")].iloc[0]
    assert (adjusted.x[0], raw.x[0]) == (best["log2_ratio"], best["raw_log2_ratio"])
    assert interval.x[:3] == (best["ci_low"], best["ci_high"], None)
    assert adjusted.marker.color[0] == charts.PALETTE[0]
    assert lines_at_no_effect(figure) == 1


def test_what_is_not_significant_is_muted():
    figure = charts.specialisation_bars(specialisation_table())
    assert charts.MUTED in figure.data[1].marker.color


def test_volcano_draws_no_more_than_it_is_told_and_nothing_untested():
    table = specialisation_table(50).assign(label=["a", "b"] * 25)
    table.loc[:9, ["p", "q"]] = np.nan
    figure = charts.specialisation_volcano(table, most=20)
    assert [trace.name for trace in figure.data] == ["a", "b"]
    assert sum(len(trace.x) for trace in figure.data) == 20
    assert max(trace.y.max() for trace in figure.data) < table["q"].max()
    assert lines_at_no_effect(figure) == 1


def test_many_classes_can_be_told_apart():
    table = specialisation_table(20).assign(label=[f"label {number:02}" for number in range(20)])
    looks = {(trace.marker.color, trace.marker.symbol) for trace in charts.specialisation_volcano(table).data}
    assert len(looks) == 20


def test_specialisation_heatmap_leaves_the_insignificant_blank(labels):
    figure = charts.specialisation_heatmap(labels, "multiply")
    shown = labels[(labels["label"] == "multiply") & (labels["q"] < 0.05)]
    assert np.isfinite(figure.data[0].z).sum() == len(shown) > 0
    with pytest.raises(UsageError, match='no label "dance" in this table; these there are: abduce, add'):
        charts.specialisation_heatmap(labels, "dance")


def test_replication_draws_what_was_picked_at_both_effects(labels):
    figure = charts.replication(labels)
    interval, held, failed = figure.data
    picked = surest_picked(labels)
    assert len(picked) > 0
    assert sorted([*held.x, *failed.x]) == pytest.approx(sorted(picked["picked_log2_ratio"]), abs=1e-6)
    first = picked[picked["replicated"]].iloc[0]
    assert (held.x[0], held.y[0]) == pytest.approx((first["picked_log2_ratio"], first["held_out_log2_ratio"]))
    assert held.text[0] == "L2 E5 · multiply"
    assert interval.y[:3] == (picked["held_out_low"].iloc[0], picked["held_out_high"].iloc[0], None)
    assert not len(charts.replication(labels.assign(picked_q=np.nan)).data[1].x)


def test_shares_of_tokens_stand_beside_the_even_share(run):
    table = family_specialisation(run)
    figure = charts.token_shares(table, top=3)
    assert [trace.name for trace in figure.data] == ["arithmetic", "causal", "deduction"]
    assert all(len(trace.y) == 3 for trace in figure.data)
    best = table.loc[table["log_odds_z"].abs().idxmax()]
    assert figure.data[0].x[0] == f"L{best['layer']} E{best['expert']}"
    (line,) = figure.layout.shapes
    assert line.y0 == line.y1 == 4 / 16


def test_risk_is_drawn_with_its_interval_and_both_tests(run):
    table = risk_difference(run, draws=50)
    interval, difference = charts.risk_bars(table, top=4).data
    assert len(difference.x) == 4
    assert interval.x[0] < difference.x[0] < interval.x[1]
    figure = charts.token_test(table)
    drawn = {(p, token_p) for trace in figure.data for _, _, p, token_p in trace.customdata}
    assert drawn == set(zip(table["p"], table["token_p"], strict=True))
    assert min(trace.y.min() for trace in figure.data) >= 1e-12
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"


def test_coactivation_heatmap_is_symmetric_with_an_empty_diagonal(run):
    table = coactivation(run)
    z = charts.coactivation_heatmap(table, layer=3).data[0].z
    assert z.shape == (16, 16)
    np.testing.assert_array_equal(z, z.T)
    assert np.isnan(np.diag(z)).all()
    assert np.isfinite(z).sum() == 16 * 15
    with pytest.raises(UsageError, match="layer 7 is not in this table; these are: 1, 2, 3"):
        charts.coactivation_heatmap(table, layer=7)


def test_titles_ask_the_question_and_axes_are_named(run, labels):
    figures = {
        "expert_load": charts.load_heatmap(expert_load(run)),
        "load_balance": charts.balance_lines(load_balance(run)),
        "label_specialisation": charts.specialisation_volcano(labels),
        "family_specialisation": charts.specialisation_volcano(family_specialisation(run)),
        "correctness_specialisation": charts.specialisation_bars(correctness_specialisation(run)),
        "risk_difference": charts.risk_bars(risk_difference(run)),
    }
    for name, figure in figures.items():
        assert figure.layout.title.text == ANALYSES[name].question
        assert figure.layout.yaxis.title.text or figure.layout.yaxis.type == "category"
        assert any(axis.title.text for axis in figure.select_xaxes())


@pytest.mark.parametrize(
    "figure",
    [
        charts.specialisation_bars(specialisation_table()),
        charts.specialisation_volcano(specialisation_table()),
        charts.specialisation_heatmap(specialisation_table(), NASTY),
        charts.replication(specialisation_table()),
        charts.token_shares(shares_table()),
        charts.risk_bars(risk_table()),
        charts.token_test(risk_table()),
    ],
    ids=["bars", "volcano", "heatmap", "replication", "shares", "risk", "token-test"],
)
def test_text_of_a_benchmark_is_shown_not_obeyed(figure):
    text = json.dumps(figure.to_plotly_json(), default=str)
    assert "<b>a" not in text
    assert "<script>" not in text
    assert "&lt;b>a &amp; b" in text
    page = pio.to_html(figure, include_plotlyjs=False, full_html=False, config=charts.EXPORT_CONFIG)
    assert "<script>alert" not in page
    assert '"showSendToCloud": false' in page


def test_training_curves_draw_every_layer_of_the_log():
    log = pd.DataFrame(
        {
            "step": [10, 20],
            "loss": [2.0, 1.0],
            "solution_loss": [1.5, 0.5],
            "max_vio": [[3.0, 2.0], [1.0, 0.5]],
            "bias_range": [[0.1, 0.2], [0.3, 0.4]],
        }
    )
    lines = charts.training_curves(log).data
    assert [list(line.y) for line in lines] == [[2.0, 1.0], [1.5, 0.5], [3.0, 1.0], [2.0, 0.5], [0.1, 0.3], [0.2, 0.4]]
    assert all(list(line.x) == [10, 20] for line in lines)


def test_a_figure_alone_needs_no_network_and_runs_no_label(run):
    figure = charts.load_heatmap(expert_load(run)).update_layout(title_text="&lt;/title>&lt;script>alert(1)&lt;/script>")
    figure.add_annotation(text="</script><script>alert(2)</script>")
    page = charts.standalone_html(figure)
    assert "<title>&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;</title>" in page
    assert "<script>alert(" not in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert '"showSendToCloud": false' in page
