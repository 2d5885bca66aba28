"""The page Balance shows what the tables say, for all problems and for a family."""

import numpy as np
import pytest
from exploring import chart, choose, page_text, values

from ling_probe.analysis import coverage, load_balance, load_curve
from ling_probe.analysis.load_curves import beyond_balanced, loads_with_bias
from ling_probe.run import Run


@pytest.mark.parametrize("family", ["all", "b"])
def test_figures_hold_the_tables(runs, visit, family):
    app, run = visit("balance", run="planted", family=family), Run.open(runs / "planted")
    assert not app.exception
    curves = load_curve(run)
    rows = curves[curves["family"] == family]
    loads = rows.sort_values(["layer", "expert"])["log2_ratio"].to_numpy(np.float32)
    np.testing.assert_array_equal(values(chart(app, 0)[0]["z"]).ravel(), loads)
    np.testing.assert_allclose(values(chart(app, 1)[3]["y"]), [0, *rows[rows["layer"] == 2]["share"]])
    balance = load_balance(run)
    np.testing.assert_allclose(values(chart(app, 2)[0]["y"]), balance[balance["family"] == family]["gini"])
    np.testing.assert_allclose(values(chart(app, 2)[5]["y"]), balance[balance["family"] == family]["entropy_floor"])
    experts = coverage(run).query("scope == 'run' and layer == 1")["experts"]
    np.testing.assert_allclose(values(chart(app, 3)[0]["x"]), experts)
    whole = loads_with_bias(run, curves[curves["family"] == "all"]).query("layer == 1")
    np.testing.assert_allclose(values(chart(app, 4)[0]["y"]), whole["bias"])
    np.testing.assert_allclose(values(chart(app, 4)[0]["x"]), whole["log2_ratio"])
    outside, low, high = beyond_balanced(rows)
    assert f"{outside} of 48 experts lie outside {low:.2f} to {high:.2f} times the even share" in page_text(app)


def test_a_family_stands_in_the_address(visit):
    app = choose(visit("balance", run="planted"), "Family", "a")
    assert app.query_params["family"] == "a"
    assert "family" not in choose(app, "Family", "all").query_params
    warnings = [each.value for each in visit("balance", run="planted", family="nowhere").warning]
    assert any("no family" in each and "nowhere" in each for each in warnings)


def test_a_run_without_sequences_is_refused(make_run, visit):
    empty = make_run(0)
    app = visit("balance", folder=empty.folder, run=empty.folder.name)
    assert not app.exception
    assert any("Not applicable" in text.value for text in app.text)
