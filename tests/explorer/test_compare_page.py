"""The page Compare shows what the comparisons say, and refuses in one line."""

import re

import numpy as np
import pytest
from exploring import chart, page_text, values
from synthetic import Planted, synthetic_run, synthetic_spec

from ling_probe.analysis import ANALYSES, load_shift, route_agreement, router_saturation
from ling_probe.compare_view import answers_side_by_side, token_overlap_table
from ling_probe.run import Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model and a snapshot of its training on the same texts, and a run that compares with neither."""
    folder = tmp_path_factory.mktemp("trained")
    plants = (Planted(2, 3, "premise", boost=5.0), Planted(2, 3, "add", boost=5.0))
    synthetic_run(folder / "final", 24, spec=synthetic_spec(name="m"), planted=plants)
    synthetic_run(folder / "early", 24, spec=synthetic_spec(name="m@step-5"))
    synthetic_run(folder / "other", 6, spec=synthetic_spec(name="o", n_experts=32, topk_groups=3))
    return folder


def test_figures_hold_the_comparisons(trained, visit):
    app = visit("compare", folder=trained, run="final", against="early", layer=2)
    assert not app.exception
    runs = [Run.open(trained / name) for name in ("final", "early")]
    agreement, shift = route_agreement(runs), load_shift(runs)
    np.testing.assert_allclose(values(chart(app, 0)[1]["y"]), agreement["agreement"])
    z = values(chart(app, 1)[0]["z"]).ravel()
    expected = shift["log2_ratio"].where(shift["q"] < 0.05).to_numpy(np.float32)
    np.testing.assert_array_equal(z, expected)
    assert np.isfinite(expected).any()
    told = [text.value for text in app.text]
    for name, answer in (("route_agreement", agreement), ("load_shift", shift), ("router_saturation", router_saturation(runs))):
        assert ANALYSES[name].finding(answer).sentence in told
    text, answers = page_text(app), answers_side_by_side(*runs)
    for row in answers.itertuples():
        assert f"{row.share_here:.1%} ({row.low_here:.1%} to {row.high_here:.1%})" in text


def test_tokens_are_shaded_by_what_both_chose(trained, visit):
    app = visit("compare", folder=trained, run="final", against="early", layer=2, problem="deduction-0001")
    table = token_overlap_table([Run.open(trained / name) for name in ("final", "early")], [1, 1], layer=2)
    (shown,) = (each.proto.body for each in app.get("html") if 'class="shaded"' in each.proto.body)
    assert [int(shade) for shade in re.findall(r'token d(\d)" title', shown)] == table["shade"].tolist()
    told = ", ".join(map(str, table["experts"][3]))
    assert f"experts {told} here" in shown
    links = [link.proto.query_string for link in app.get("page_link")]
    assert any("run=final" in link and "problem=deduction-0001" in link for link in links)
    assert any("run=early" in link and "layer=2" in link for link in links)


def test_runs_that_do_not_compare_are_refused_in_one_line(trained, visit):
    app = visit("compare", folder=trained, run="final", against="other")
    assert not app.exception
    (told,) = (text.value for text in app.text)
    assert "only runs of one geometry compare" in told
    assert "\n" not in told
    assert not app.get("plotly_chart")


def test_a_run_alone_has_nothing_to_compare_with(make_run, visit):
    run = make_run(3)
    app = visit("compare", folder=run.folder, run=run.folder.name)
    assert "no other run" in app.text[0].value


def test_a_run_that_is_not_there_is_said(runs, visit):
    app = visit("compare", run="null", against="../elsewhere")
    assert not app.exception
    assert any("no against" in warning.value for warning in app.warning)
