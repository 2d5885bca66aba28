"""The page Balance as a reader meets it."""

import pytest
from browsing import NEEDS_CHROMIUM, address, settle, shoot

from ling_probe.analysis import load_curve
from ling_probe.analysis.load_curves import beyond_balanced
from ling_probe.run import Run

pytestmark = NEEDS_CHROMIUM


def told(run, family) -> str:
    curves = load_curve(run)
    outside, low, high = beyond_balanced(curves[curves["family"] == family])
    return f"{outside} of 48 experts lie outside {low:.2f} to {high:.2f} times the even share"


def test_a_family_is_chosen_and_its_numbers_are_shown(server, runs, tab):
    page, run = tab(), Run.open(runs / "planted")
    page.goto(f"{server}/balance?run=planted")
    page.locator(".js-plotly-plot").nth(4).wait_for()
    settle(page)
    assert page.get_by_text(told(run, "all")).is_visible()
    shoot(page, "balance-light")
    page.get_by_role("combobox", name="Family").click()
    page.get_by_role("option", name="b", exact=True).click()
    page.get_by_text(told(run, "b")).wait_for()
    assert address(page)["family"] == "b"


@pytest.mark.parametrize("name", ["dark", "phone"])
def test_other_screens(server, tab, name):
    page = tab(scheme="dark") if name == "dark" else tab(390, 844)
    page.goto(f"{server}/balance?run=planted")
    page.locator(".js-plotly-plot").nth(4).wait_for()
    settle(page)
    shoot(page, f"balance-{name}")
    assert page.evaluate("(main => main.scrollWidth - main.clientWidth)(document.querySelector('[data-testid=stMain]'))") <= 0
