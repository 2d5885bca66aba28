"""Charts of operations and mistakes: a table in, a figure out."""

import pytest
from pairs import write_run
from synthetic import Planted, synthetic_run
from test_mistakes import run_of
from test_twins import pair_traces

from ling_probe import charts
from ling_probe.analysis import ANALYSES, operation_transfer

TALK = {"talk": ("plan", "<b>check</b>")}
PLANTS = (Planted(1, 3, "plan", 3.0),)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("charts")
    told = synthetic_run(folder / "told", 40, labels=TALK, planted=PLANTS)
    other = synthetic_run(folder / "other", 40, labels={"speech": TALK["talk"]}, seed=1)
    wrong = run_of(folder / "wrong", 120, astray=0.8)
    pairs = write_run(folder / "pairs", pair_traces(20, follows=0.7, noise=0.2))
    runs = {"label_onset": told, "label_carriers": told, "minimal_pairs": pairs}
    runs |= dict.fromkeys(("first_wrong_step", "wrong_step_localisation"), wrong)
    found = {name: ANALYSES[name].function(run, draws=20) for name, run in runs.items()}
    return found | {"operation_transfer": operation_transfer([told, other], draws=20, permutations=19)}, told.spec


NAMES = ("operation_transfer", "label_onset", "label_carriers", "minimal_pairs", "first_wrong_step", "wrong_step_localisation")


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_asks_its_question_names_its_axes_and_draws_chance(tables, name):
    found, spec = tables
    figures = charts.FIGURES[name](found[name], spec)
    assert figures[0].layout.title.text == ANALYSES[name].question
    for figure in figures:
        assert figure.layout.xaxis.title.text or figure.layout.yaxis.title.text
        assert figure.layout.shapes[0].line.dash == "dash"
        assert figure.to_json()


def test_figures_show_what_the_tables_hold(tables):
    found, _ = tables
    figure = charts.transfer_bars(found["operation_transfer"])
    assert list(figure.data[0].y) == found["operation_transfer"]["bits"].tolist()
    assert list(figure.data[-1].y) == found["operation_transfer"]["home"].tolist()
    table = found["label_carriers"]
    figure = charts.carrier_bars(table, top=3)
    first = table[table["kind"] == "expert"].nsmallest(3, "rank")
    assert list(figure.data[0].x) == first["lost"].tolist()
    assert all("<b>" not in name for name in figure.data[0].y)
    table = found["label_onset"]
    line = charts.onset_lines(table).data[1]
    assert list(line.y) == table[table["features"] == line.name]["bits"].tolist()
    table = found["minimal_pairs"]
    line = charts.pair_accuracy(table).data[1]
    rows = table[(table["name"] == line.name) & (table["by"] == "place") & table["layer"].notna()]
    assert list(line.y) == rows["accuracy"].tolist()
    table = found["first_wrong_step"]
    dots = charts.wrong_step_dots(table).data
    assert sum(len(each.x) for each in dots) == len(table)
    assert charts.wrong_step_dots(table).layout.xaxis.categoryarray[-1] == "no layer"
    assert (
        list(charts.located_bars(found["wrong_step_localisation"]).data[0].x)
        == found["wrong_step_localisation"]["located"].tolist()
    )
