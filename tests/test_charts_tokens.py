"""Charts of what the words decide: a table in, a figure out."""

import numpy as np
import pandas as pd
import pytest
from synthetic import Effects, Planted, synthetic_run

from ling_probe import charts
from ling_probe.analysis import ANALYSES, enrichment, routing_information, surest_first

NAMES = (
    "routing_information",
    "label_decoding",
    "routing_prediction",
    "vocabulary_specialisation",
    "token_overlap",
    "enrichment",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("charts") / "run"
    return synthetic_run(folder, 90, effects=Effects(token=1.5), planted=Planted(2, 5, "multiply"))


@pytest.fixture(scope="module")
def tables(run):
    return {name: ANALYSES[name].function(run) for name in NAMES}


def figure_of(tables, run, name):
    (figure,) = charts.FIGURES[name](tables[name], run.spec)
    return figure


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_asks_its_question_and_names_its_axes(tables, run, name):
    figure = figure_of(tables, run, name)
    assert figure.layout.title.text == ANALYSES[name].question
    assert figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text or name == "enrichment"
    assert len(figure.data) >= 2


def test_lines_are_those_of_the_table_with_intervals_and_chance(tables, run):
    table = tables["token_overlap"]
    figure = figure_of(tables, run, "token_overlap")
    *lines, chance = figure.data
    for line in lines:
        rows = table[table["pair"] == line.name]
        assert list(line.y) == rows["jaccard"].tolist()
        assert (line.y + line.error_y.array) == pytest.approx(rows["ci_high"].to_numpy())
        assert (line.y - line.error_y.arrayminus) == pytest.approx(rows["ci_low"].to_numpy())
    assert list(chance.y) == table.drop_duplicates("layer")["chance"].tolist()
    assert chance.line.dash == "dash"


def test_vocabulary_has_a_chance_line_for_each(tables, run):
    figure = figure_of(tables, run, "vocabulary_specialisation")
    assert [trace.line.dash for trace in figure.data] == [None, "dash", None, "dash"]


def test_information_shows_layers_and_leaves_the_means_out(tables, run):
    figure = figure_of(tables, run, "routing_information")
    assert [list(trace.x) for trace in figure.data] == [["1", "2", "3"]] * 4
    assert figure.layout.shapes[0].y0 == 0
    families = tables["routing_information"].query("about == 'family'")
    assert "family" in charts.information_lines(families).layout.yaxis.title.text


def test_decoding_ends_at_what_there_is_to_gain(tables, run):
    table = tables["label_decoding"]
    figure = figure_of(tables, run, "label_decoding")
    assert list(figure.data[0].y) == table[table["about"] == "label"]["bits"].tolist()
    assert {shape.y0 for shape in figure.layout.shapes} == {0, *table["entropy"]}


def test_load_is_the_chance_of_prediction(tables, run):
    dashed = [trace for trace in figure_of(tables, run, "routing_prediction").data if trace.line.dash == "dash"]
    assert [trace.name for trace in dashed] == ["chance (load alone)"]
    assert list(dashed[0].y) == tables["routing_prediction"].query("known == 'load'")["recall"].tolist()


def test_enrichment_shows_the_surest_tokens_letter_by_letter(tables, run):
    table = tables["enrichment"]
    tokens = surest_first(table[table["kind"] == "token"].dropna(subset="p"))
    figure = charts.enrichment_dots(table, top=4)
    assert figure.data[1].x == pytest.approx(tokens["pmi"].head(4).to_numpy(), rel=1e-5)
    nasty = charts.enrichment_dots(table.assign(name="<b>x & y</b>"), top=1)
    assert "&lt;b>x &amp; y&lt;/b>" in nasty.data[1].y[0]
    assert not charts.enrichment_dots(table.assign(p=np.nan)).data[1].x.size


def test_tables_give_the_same_figure_again(run, tables):
    again = routing_information(run)
    pd.testing.assert_frame_equal(again, tables["routing_information"])
    pd.testing.assert_frame_equal(enrichment(run), tables["enrichment"])
