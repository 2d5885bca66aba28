"""The page of paths as a reader meets it."""

import pytest
from browsing import NEEDS_CHROMIUM, address, settle, shoot

from ling_probe import path_view
from ling_probe.run import Run

pytestmark = NEEDS_CHROMIUM
LAYERS = (1, 2, 3)


def pick(page, label, option) -> None:
    """Choose in a box by typing."""
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=option, exact=True).click()
    settle(page)


def test_a_set_is_drawn_compared_and_led_to_its_experts(server, runs, tab):
    page, paths = tab(), path_view.read_paths(Run.open(runs / "planted"))
    page.goto(f"{server}/paths?run=planted")
    page.locator(".sankey-link").first.wait_for()
    settle(page)
    pick(page, "Tokens of", "steps: add")
    table = path_view.flow_table(paths.tokens.only(path_view.members(paths, "label", "add")), LAYERS)
    drawn = path_view.drawn_flows(table, least=path_view.suggested_level(table))
    page.get_by_text(f"{table['tokens'].iloc[0]:,} tokens of {table['problems'].iloc[0]} problems").wait_for()
    settle(page)
    assert page.locator(".sankey-link").count() == len(drawn)
    assert address(page)["of"] == "label:add"
    pick(page, "Compared with", "the rest")
    page.get_by_text("Where do the two part?").wait_for()
    page.locator(".js-plotly-plot").nth(2).wait_for()
    settle(page)
    sides = [paths.tokens.only(each(paths, "label", "add")) for each in (path_view.members, path_view.outside)]
    page.get_by_text(path_view.told_differences(path_view.difference_table(*sides, LAYERS))).wait_for()
    shoot(page, "paths-light")
    page.go_back()
    page.get_by_text("Where do the two part?").wait_for(state="detached")
    assert "beside" not in address(page) or address(page)["beside"] == "nothing"


def test_the_slider_draws_fewer(server, tab):
    page = tab()
    page.goto(f"{server}/paths?run=planted&of=label:add&least=0.005")
    page.locator(".sankey-link").first.wait_for()
    settle(page)
    before = page.locator(".sankey-link").count()
    page.get_by_role("slider").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("new URLSearchParams(location.search).get('least') == '0.05'")
    settle(page)
    assert page.locator(".sankey-link").count() < before


@pytest.mark.parametrize("name", ["dark", "phone"])
def test_other_screens(server, tab, name):
    page = tab(scheme="dark") if name == "dark" else tab(390, 844)
    page.goto(f"{server}/paths?run=planted&of=label:add&beside=rest")
    page.locator(".js-plotly-plot").nth(2).wait_for()
    settle(page)
    shoot(page, f"paths-{name}")
    wide = "[...document.querySelectorAll('[data-testid=stMain]')].map(main => main.scrollWidth - main.clientWidth)[0]"
    assert page.evaluate(wide) <= 0


def test_hostile_texts_stay_text(server, tab):
    page = tab()
    page.on("dialog", lambda dialog: pytest.fail(f"a text opened a dialog: {dialog.message}"))
    page.goto(f"{server}/paths?run=hostile&of=text&beside=problem")
    page.locator(".sankey-link").first.wait_for()
    settle(page)
    shoot(page, "paths-hostile")
    assert page.locator("[data-testid=stMain] script, [data-testid=stMain] img, .katex").count() == 0
    assert page.title() == "ling_probe"
