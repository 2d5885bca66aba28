"""Charts of compared runs, and of what moves inside one."""

import json

import numpy as np
import pytest
from pairs import plain_traces, rerouted, write_run
from synthetic import synthetic_spec

from ling_probe import charts
from ling_probe.analysis import (
    layer_transition,
    load_shift,
    prompt_rollout,
    route_agreement,
    router_saturation,
    routing_churn,
)
from ling_probe.errors import UsageError

NASTY = "<b>a & b</b>"
SAFE = "&lt;b>a &amp; b&lt;/b>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, traces = tmp_path_factory.mktemp("charts"), plain_traces(30, keep=("logits",))
    others = {f"{NASTY}@step-9": 0.3, f"{NASTY}@step-4": 0.8}
    return [
        write_run(folder / "final", traces, name=NASTY),
        *(write_run(folder / f"{place}", rerouted(traces, share=share), name=name)
          for place, (name, share) in enumerate(others.items())),
    ]  # fmt: skip


def named(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def level_lines(figure, axis="y"):
    return sum(
        shape.type == "line" and getattr(shape, f"{axis}0") == getattr(shape, f"{axis}1") == 0 for shape in figure.layout.shapes
    )


def test_curves_of_saturation_rise_above_chance(runs):
    table = router_saturation(runs)
    figure = charts.saturation_curves(table)
    rows = table[table["layer"] == 2]
    (line,) = named(figure, "layer 2")
    assert list(line.x) == [f"{SAFE}@step-4", f"{SAFE}@step-9"]
    assert list(line.y) == rows["agreement"].tolist()
    assert np.array(line.customdata).tolist() == rows[["ci_low", "ci_high"]].to_numpy().tolist()
    band = next(trace for trace in figure.data if trace.fill == "toself" and trace.legendgroup == "layer 2")
    assert list(band.y) == [*rows["ci_high"], *rows["ci_low"][::-1]]
    assert list(band.x) == [*line.x, *line.x[::-1]]
    chance = named(figure, "loads alone (chance)")
    assert [list(trace.y) for trace in chance] == [each["chance"].tolist() for _, each in table.groupby("layer")]
    assert sum(bool(trace.showlegend) for trace in chance) == 1
    by_layer = charts.saturation_lines(table)
    assert list(named(by_layer, f"against {SAFE}@step-4")[0].y) == table[table["step"] == 4]["agreement"].tolist()
    assert list(named(by_layer, "same token elsewhere")[0].y) == table[table["step"] == 4]["token_agreement"].tolist()


def test_agreement_is_drawn_by_layer_and_by_margin(runs):
    table = route_agreement(runs)
    whole = table[table["margin"] == "all"]
    figure = charts.agreement_lines(table)
    for name in (f"{NASTY}@step-9", f"{NASTY}@step-4"):
        (line,) = named(figure, f"against {charts.escape(name)}")
        assert list(line.y) == whole[whole["against"] == name]["agreement"].tolist()
    close = charts.margin_lines(table)
    assert len(close.data) == 6
    (line,) = named(close, f"layer 1, {SAFE}@step-9")
    rows = table[(table["layer"] == 1) & (table["against"] == f"{NASTY}@step-9") & (table["margin"] != "all")]
    assert list(line.y) == rows["decisions_differ"].tolist()
    order = list(close.layout.xaxis.categoryarray)
    assert order[0] == "below 0.001"
    assert set(order) == set(table["margin"]) - {"all"}


def test_shifts_are_drawn_for_each_run_and_the_surest_named(runs):
    table = load_shift(runs, draws=50, flips=199)
    figure = charts.shift_heatmap(table, against=f"{NASTY}@step-4")
    rows = table[table["against"] == f"{NASTY}@step-4"]
    shown = np.isfinite(np.array(figure.data[0].z, float))
    assert shown.sum() == (rows["q"] < 0.05).sum()
    assert SAFE in figure.layout.title.text
    bars = charts.shift_bars(table, top=5)
    assert len(bars.data[1].y) == 5
    assert all(SAFE in name for name in bars.data[1].y)
    assert level_lines(bars, "x") == 1


def test_a_boundary_is_drawn_where_it_can_be_told(tmp_path):
    words = synthetic_spec(vocab_size=12)
    table = routing_churn(write_run(tmp_path / "run", plain_traces(40, spec=words)), draws=50, flips=99)
    figure = charts.churn_lines(table)
    (line,) = named(figure, "across a step boundary, at equal words")
    assert list(line.y) == table["boundary_effect"].tolist()
    assert level_lines(figure) == 1
    untold = charts.churn_lines(table.assign(p=np.nan))
    assert not named(untold, line.name)


def test_what_moves_inside_a_run_is_drawn_beside_its_null(runs):
    churn, rollout, transition = routing_churn(runs[0]), prompt_rollout(runs[0]), layer_transition(runs[0])
    figure = charts.churn_lines(churn)
    assert list(named(figure, "next token")[0].y) == churn["churn"].tolist()
    assert list(named(figure, "tokens in random order (chance)")[0].y) == churn["shuffled"].tolist()
    figure = charts.rollout_lines(rollout)
    assert list(named(figure, "as they are")[0].y) == rollout["raw_divergence"].tolist()
    assert list(named(figure, "at equal tokens")[0].y) == rollout["divergence"].tolist()
    assert level_lines(figure) == 1
    figure = charts.transition_lines(transition)
    assert list(named(figure, "by the token alone")[0].x) == ["1 to 2", "2 to 3"]
    heat = charts.transition_heatmap(transition, layer=2).data[0]
    cell = transition[(transition["layer"] == 2) & (transition["expert"] == 3) & (transition["next_expert"] == 7)]
    assert heat.z[3, 7] == pytest.approx(cell["log2_ratio"].item(), abs=1e-6)
    with pytest.raises(UsageError, match="no transition from layer 3 in this table; these start one: 1, 2"):
        charts.transition_heatmap(transition, layer=3)


def test_every_figure_of_a_report_is_valid_json_with_a_title(runs):
    spec = runs[0].spec
    for analysis in (route_agreement, router_saturation, load_shift):
        for figure in charts.FIGURES[analysis.__name__](analysis(runs), spec):
            assert json.loads(figure.to_json())["layout"]["title"]["text"].endswith(("?", "(q < 0.05)"))
            assert figure.layout.xaxis.title.text
    assert len(charts.FIGURES["route_agreement"](route_agreement(runs[:2]), spec)) == 2
    plain = route_agreement([runs[1], runs[0]])
    assert len(charts.FIGURES["route_agreement"](plain[plain["margin"] == "all"], spec)) == 1
