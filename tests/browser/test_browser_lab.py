"""The Lab as a reader meets it: the shipped model is loaded at the press of a button."""

import pytest
from browsing import NEEDS_CHROMIUM, address, settle, shoot

from ling_probe.interventions import exclude
from ling_probe.laboratory import try_change

pytestmark = [*NEEDS_CHROMIUM, pytest.mark.slow]

PROMPT = "evaluate (8+12)*2\n"


@pytest.fixture(scope="module")
def outcome():
    from ling_probe.model.load import load_native

    return try_change(load_native("ling-tiny"), PROMPT, [exclude(layer=2, experts=[1, 5])])


def pick(page, label, words) -> None:
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=words, exact=True).click()
    settle(page)


def test_a_change_is_tried(server, tab, outcome):
    page = tab()
    page.goto(f"{server}/lab?run=planted&problem=b-0007&layer=2&expert=5")
    page.get_by_role("button", name="Write with and without the change").wait_for()
    settle(page)
    pick(page, "Experts", "1")
    assert address(page)["experts"] == "1,5"
    page.keyboard.press("Escape")
    page.get_by_label("Prompt").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    settle(page)
    page.get_by_role("button", name="Write with and without the change").click()
    page.get_by_text("As it is", exact=True).wait_for()
    settle(page)
    before, after = page.locator(".written").all_inner_texts()
    assert (before.strip(), after.strip()) == (outcome.before.strip(), outcome.after.strip())
    assert f"{outcome.loss_after:.3g} nats a token" in page.locator("dl").all_inner_texts()[-1]
    rows = [row.locator("td").all_inner_texts() for row in page.locator("table tbody tr").all()]
    assert rows == [[str(row.layer), f"{row.moved:.1%}", f"{row.touched:.1%}"] for row in outcome.layers.itertuples()]
    assert page.locator(".js-plotly-plot").count() == 1
    shoot(page, "lab-light")
    pick(page, "Change", "silence: stays chosen and adds nothing")
    page.get_by_text("The settings have changed since").wait_for()
    assert address(page)["change"] == "silence"


@pytest.mark.parametrize(("scheme", "width"), [("dark", 1280), ("light", 390)])
def test_in_the_dark_and_on_a_phone(server, tab, scheme, width):
    page = tab(width=width, scheme=scheme)
    page.goto(f"{server}/lab?run=planted&layer=1&experts=3,5&change=bias&value=0.2")
    page.get_by_role("button", name="Write with and without the change").click()
    page.get_by_text("As it is", exact=True).wait_for()
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shoot(page, f"lab-{scheme}-{width}")
