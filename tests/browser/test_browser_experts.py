"""The page of experts as a reader meets it."""

import pytest
from browsing import NEEDS_CHROMIUM, address, settle, shoot

from ling_probe.analysis import label_specialisation
from ling_probe.expert_view import largest_weights
from ling_probe.run import Run

pytestmark = NEEDS_CHROMIUM

PLACE = """(plot, [x, y]) => {
    const {xaxis, yaxis} = plot._fullLayout, box = plot.getBoundingClientRect();
    return [box.x + xaxis._offset + xaxis.l2p(x), box.y + yaxis._offset + yaxis.l2p(y)];
}"""
"""Where a point of a figure lies in the window."""


def plot(page, number=0):
    page.locator(".js-plotly-plot").nth(number).wait_for()
    settle(page)
    return page.locator(".js-plotly-plot").nth(number)


def test_a_click_on_the_map_opens_the_expert(server, runs, tab):
    page = tab()
    page.goto(f"{server}/experts?run=planted")
    plot(page)
    shoot(page, "experts-light")
    x, y = plot(page).evaluate(PLACE, [5, 1])
    page.mouse.move(x, y)
    page.locator(".hoverlayer").get_by_text("layer 2, expert 5").wait_for()
    page.mouse.click(x, y)
    page.get_by_role("heading", name="Layer 2, expert 5").wait_for()
    assert (address(page)["layer"], address(page)["expert"]) == ("2", "5")
    page.go_back()
    page.get_by_text("48 experts").wait_for()


def test_an_expert_shows_what_it_prefers_and_leads_to_its_tokens(server, runs, tab):
    page, run = tab(), Run.open(runs / "planted")
    page.goto(f"{server}/experts?run=planted&layer=2&expert=5")
    row = label_specialisation(run).set_index(["layer", "expert", "label"]).loc[(2, 5, "add")]
    page.get_by_text(f"add: log2 {row['log2_ratio']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})").wait_for()
    plot(page, 2)
    shoot(page, "expert-light")
    first = largest_weights(run, 2).query("expert == 5").iloc[0]
    page.get_by_text(f"{first['weight']:.3f}").first.wait_for()
    page.get_by_role("link", name=f"Token {first['position']:.0f}").first.click()
    page.get_by_text(f"at position {first['position']:.0f}, through all layers").wait_for()
    shown = address(page)
    assert (shown["layer"], shown["expert"], shown["token"]) == ("2", "5", f"{first['position']:.0f}")
    assert shown["problem"] == run.sequences["sequence_id"][int(first["sequence"])]
    page.get_by_role("link", name="All about layer 2, expert 5").click()
    page.get_by_role("heading", name="Layer 2, expert 5").wait_for()


def test_the_way_from_the_overview_and_back_to_the_list(server, tab):
    page = tab()
    page.goto(f"{server}/?run=planted")
    page.get_by_role("link", name="All about layer 2, expert 5").click()
    page.get_by_role("heading", name="Layer 2, expert 5").wait_for()
    page.get_by_role("button", name="All experts").click()
    page.get_by_text("48 experts").wait_for()
    assert "expert" not in address(page)


def test_a_row_of_the_list_opens_its_expert(server, tab):
    page = tab()
    page.goto(f"{server}/experts?run=planted&layer=3")
    plot(page)
    box = page.locator("[data-testid=stDataFrame] canvas").first.bounding_box()
    page.mouse.click(box["x"] + 15, box["y"] + 35 * 3 + 17)
    page.get_by_role("heading", name="Layer 3, expert 2").wait_for()
    assert (address(page)["layer"], address(page)["expert"]) == ("3", "2")


@pytest.mark.parametrize("name", ["dark", "phone"])
def test_other_screens(server, tab, name):
    page = tab(scheme="dark") if name == "dark" else tab(390, 844)
    wide = "[...document.querySelectorAll('[data-testid=stMain]')].map(main => main.scrollWidth - main.clientWidth)[0]"
    for kind, query in (("experts", ""), ("expert", "&layer=2&expert=5")):
        page.goto(f"{server}/experts?run=planted{query}")
        plot(page)
        shoot(page, f"{kind}-{name}")
        assert page.evaluate(wide) <= 0


def test_hostile_texts_stay_text(server, tab):
    page = tab()
    page.on("dialog", lambda dialog: pytest.fail(f"a text opened a dialog: {dialog.message}"))
    for query in ("", "&layer=1&expert=0"):
        page.goto(f"{server}/experts?run=hostile{query}")
        plot(page)
        shoot(page, f"experts-hostile{len(query)}")
        assert page.locator("[data-testid=stMain] script, [data-testid=stMain] img, .katex").count() == 0
        assert page.title() == "ling_probe"
