"""The page Specialisation as a reader meets it."""

import pytest
from browsing import NEEDS_CHROMIUM, address, settle, shoot

from ling_probe.analysis import ANALYSES, expert_clusters, label_specialisation
from ling_probe.analysis.clusters import clustering_told
from ling_probe.run import Run

pytestmark = NEEDS_CHROMIUM


def drawn(page, charts):
    page.locator(".js-plotly-plot").nth(charts - 1).wait_for()
    settle(page)


def test_what_is_asked_for_stands_in_the_address_and_on_the_page(server, runs, tab):
    page, run = tab(), Run.open(runs / "planted")
    page.goto(f"{server}/specialisation?run=planted")
    drawn(page, 3)
    assert page.get_by_text(ANALYSES["label_specialisation"].finding(label_specialisation(run)).sentence).is_visible()
    shoot(page, "specialisation-light")
    page.get_by_text("families of problems", exact=True).click()
    page.get_by_text("Which experts prefer which families of problems, at equal words?").wait_for()
    settle(page)
    assert address(page)["by"] == "family"
    page.goto(f"{server}/specialisation?run=planted&layer=2&view=coactivation")
    drawn(page, 3)
    assert page.get_by_text(clustering_told(expert_clusters(run), "coactivation", 2)).is_visible()


def test_pointing_at_a_cell_tells_its_numbers(server, runs, tab):
    page = tab()
    page.goto(f"{server}/specialisation?run=planted&layer=2")
    drawn(page, 3)
    page.locator(".st-key-chart-profiles .nsewdrag").first.hover()
    page.locator(".st-key-chart-profiles .hovertext").wait_for()
    assert "log2 ratio" in page.locator(".st-key-chart-profiles .hovertext").text_content()


@pytest.mark.parametrize("name", ["dark", "phone"])
def test_other_screens(server, tab, name):
    page = tab(scheme="dark") if name == "dark" else tab(390, 844)
    page.goto(f"{server}/specialisation?run=planted&layer=2")
    drawn(page, 3)
    shoot(page, f"specialisation-{name}")
    assert page.evaluate("(main => main.scrollWidth - main.clientWidth)(document.querySelector('[data-testid=stMain]'))") <= 0


def test_a_click_on_a_cell_opens_the_expert(server, tab):
    page = tab()
    page.goto(f"{server}/specialisation?run=planted&layer=2")
    drawn(page, 3)
    page.locator(".st-key-chart-profiles .nsewdrag").first.click()
    page.get_by_text("Layer 2, expert", exact=False).first.wait_for()
    page.wait_for_url("**/experts?**")
    assert address(page)["layer"] == "2"
    assert address(page)["expert"].isdecimal()
