"""What is offered beside a figure, and that nothing is made before it is asked for."""

import json
from functools import partial

import pytest
from exploring import chart, press

from ling_probe import charts, report


@pytest.fixture
def opened_box(visit):
    """The overview with one figure's export opened."""

    def opened(name, **address):
        app = visit(**address)
        app.session_state[f"export-{name}"] = True
        return app.run()

    return opened


def test_a_closed_box_holds_nothing(visit):
    app = visit(run="planted")
    assert len(app.get("popover")) == 2
    assert not app.get("download_button")
    assert not app.get("bidi_component")


def test_files_are_offered_and_not_yet_made(opened_box, monkeypatch):
    monkeypatch.setattr(charts, "standalone_html", lambda _: pytest.fail("a page was made that nobody asked for"))
    app = opened_box("load_balance", run="planted")
    assert not app.exception
    buttons = [each.proto for each in app.get("download_button")]
    assert [each.label for each in buttons] == ["HTML", "CSV", "Parquet"]
    assert all(each.deferred_file_id and each.ignore_rerun for each in buttons)


def test_a_picture_has_the_title_and_paper_of_the_report(opened_box):
    app = opened_box("load_balance", run="planted")
    (pictures,) = app.get("bidi_component")
    told = json.loads(pictures.proto.json)
    assert told["name"] == "planted-load_balance"
    assert told["chart"] == "chart-load_balance"
    assert told["layout"]["title"]["text"] == "How evenly is the work spread over the experts of a layer?"
    assert told["layout"]["paper_bgcolor"] == "white"
    assert len(chart(app)) == 6


def test_the_report_comes_when_it_is_asked_for(visit, monkeypatch):
    monkeypatch.setattr(report, "write_report", partial(report.write_report, analyses=["expert_load"]))
    app = press(visit(run="null"), "Write the whole report")
    assert not app.exception
    (button,) = (each.proto for each in app.get("download_button"))
    assert button.label.startswith("Download the report (")
    assert button.url.endswith(".zip")


def test_a_run_without_sequences_has_no_report(make_run, visit):
    app = press(visit(folder=make_run(0).folder), "Write the whole report")
    assert any("There is no report" in text.value for text in app.text)
    assert not app.get("download_button")
