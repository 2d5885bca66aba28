"""The page Compare as a reader meets it."""

import pytest
from browsing import NEEDS_CHROMIUM, address, settle, shoot
from synthetic import Planted, synthetic_run, synthetic_spec

from ling_probe.analysis import ANALYSES, route_agreement
from ling_probe.compare_view import token_overlap_table

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def pair(runs):
    """A model and a snapshot of its training on the same texts, among the runs of the explorer."""
    plant = Planted(2, 3, "premise", boost=4.0)
    final = synthetic_run(runs / "final", 12, spec=synthetic_spec(name="m"), planted=plant)
    return final, synthetic_run(runs / "early", 12, spec=synthetic_spec(name="m@step-5"))


def test_two_runs_side_by_side_down_to_a_token(server, pair, tab):
    page = tab()
    page.goto(f"{server}/compare?run=final&against=early&layer=2&problem=deduction-0001")
    page.locator(".js-plotly-plot").nth(2).wait_for()
    settle(page)
    assert page.get_by_text(ANALYSES["route_agreement"].finding(route_agreement(pair)).sentence).is_visible()
    shoot(page, "compare-light")
    table = token_overlap_table(pair, [1, 1], layer=2)
    shades = page.locator(".shaded .token").evaluate_all("all => all.map(each => Number(each.className.match(/d(\\d)/)[1]))")
    assert shades == table["shade"].tolist()
    page.get_by_text("These tokens in early").click()
    page.wait_for_url("**/tokens?**")
    assert {"run": "early", "layer": "2", "problem": "deduction-0001"}.items() <= address(page).items()


def test_runs_that_do_not_compare_are_told_in_one_line(server, pair, tab):
    page = tab()
    page.goto(f"{server}/compare?run=final&against=hostile")
    page.get_by_text("Not applicable:").wait_for()
    settle(page)
    assert page.locator(".js-plotly-plot").count() == 0


@pytest.mark.parametrize("name", ["dark", "phone"])
def test_other_screens(server, pair, tab, name):
    page = tab(scheme="dark") if name == "dark" else tab(390, 844)
    page.goto(f"{server}/compare?run=final&against=early&layer=2")
    page.locator(".js-plotly-plot").nth(2).wait_for()
    settle(page)
    shoot(page, f"compare-{name}")
    assert page.evaluate("(main => main.scrollWidth - main.clientWidth)(document.querySelector('[data-testid=stMain]'))") <= 0
