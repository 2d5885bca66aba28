"""The explorer as a reader meets it: the real server in a headless Chromium."""

import numpy as np
import pytest
from browsing import NEEDS_CHROMIUM, address, settle, shoot
from hostile import LONG, TEXTS

from ling_probe.run import Run
from ling_probe.token_view import leading_experts, problem_table, sequence_choices, token_layers, token_scale, token_table

pytestmark = NEEDS_CHROMIUM


def token(page, position):
    return page.locator(".token").nth(position)


def panel(page, position) -> list[list[str]]:
    """Cells of the pinned token's table, once it is there."""
    page.get_by_text(f"at position {position}, through all layers").wait_for()
    settle(page)
    rows = page.locator("table", has_text="layer").locator("tbody tr")
    return [row.locator("td").all_inner_texts() for row in rows.all()]


def expected_panel(run, sequence, position) -> list[list[str]]:
    return [
        [str(layer), *(f"{row.expert} ({row.weight:.3f})" for row in rows.itertuples())]
        for layer, rows in token_layers(sequence_choices(run, sequence), position).groupby("layer")
    ]


# First, while the server is fresh: nothing has been shown that this page could lean on.
def test_an_address_is_restored_by_a_server_that_has_shown_nothing_yet(server, runs, tab):
    page, run = tab(), Run.open(runs / "planted")
    page.goto(f"{server}/tokens?run=planted&problem=a-0004&layer=3&token=5")
    assert panel(page, 5) == expected_panel(run, 4, 5)
    assert page.locator(".token[aria-pressed=true]").count() == 1
    assert token(page, 5).get_attribute("aria-pressed") == "true"
    assert {"run": "planted", "problem": "a-0004", "layer": "3", "token": "5"}.items() <= address(page).items()


def test_from_the_overview_to_a_pinned_token(server, runs, tab):
    page, run = tab(), Run.open(runs / "planted")
    page.goto(f"{server}/?run=planted")
    page.get_by_text("Layer 2, expert 5 prefers “add”").wait_for()
    page.locator(".js-plotly-plot").nth(1).wait_for()
    settle(page)
    shoot(page, "overview-light")
    page.get_by_text("See it token by token").click()
    token(page, 0).wait_for()
    assert address(page)["layer"] == "2"
    assert address(page)["expert"] == "5"
    sequence = problem_table(run)["sequence_id"].tolist().index(address(page)["problem"])
    table = token_table(run, sequence, layer=2)
    chosen = [5 in experts for experts in table["experts"]]
    marked = [("chosen" in each.get_attribute("class").split()) for each in page.locator(".token").all()]
    assert marked == chosen
    position = int(np.flatnonzero(chosen)[0])
    token(page, position).click()
    assert panel(page, position) == expected_panel(run, sequence, position)
    assert address(page)["token"] == str(position)
    settle(page)
    shoot(page, "tokens-light")
    token(page, position).click()
    page.get_by_text("through all layers").wait_for(state="detached")
    assert "token" not in address(page)


def test_pointing_at_a_token_tells_what_it_chose(server, runs, tab):
    page, run = tab(), Run.open(runs / "planted")
    page.goto(f"{server}/tokens?run=planted&problem=b-0007&layer=1")
    token(page, 8).hover()
    shown, row = page.locator(".tip").inner_text(), token_table(run, 7, layer=1).iloc[8]
    assert f"position 8, {row['segment']}, step {row['step'] + 1} ({row['label']})" in shown
    assert f"next-token loss {row['loss']:.3f} nats" in shown
    for expert, weight in zip(row["experts"], row["weights"], strict=True):
        assert f"\n{expert}\n{weight:.3f}" in shown


def test_a_colouring_has_a_scale_and_tells_its_numbers(server, runs, tab):
    page, run = tab(), Run.open(runs / "planted")
    page.goto(f"{server}/tokens?run=planted&problem=b-0007&layer=1&colour=loss")
    scale = token_scale(run, 7, layer=1, by="loss")
    token(page, 8).hover()
    assert f"{scale.name}: {scale.values[8]:.2f}" in page.locator(".tip").inner_text()
    assert f"{scale.high:.2f}" in page.locator(".legend").inner_text()
    assert page.locator(".ramp .level").count() == 9
    density = "token => parseFloat(token.style.getPropertyValue('--density'))"
    shown = [each.evaluate(density) for each in page.locator(".token").all()[:-1]]
    np.testing.assert_allclose(shown, 5 + 65 * scale.levels[:-1], rtol=1e-6)
    page.get_by_label("Colour").click()
    page.get_by_role("option", name="leading expert").click()
    page.locator(".ramp").wait_for(state="detached")
    assert "colour" not in address(page)


def test_the_keyboard_is_enough(server, runs, tab):
    page, run = tab(), Run.open(runs / "planted")
    page.goto(f"{server}/tokens?run=planted&problem=a-0004&layer=1")
    token(page, 0).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    assert panel(page, 1) == expected_panel(run, 4, 1)
    # The strip is not built anew, so the focus stays where it was and the arrows go on from there.
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert panel(page, 2) == expected_panel(run, 4, 2)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    below = int(token_table(run, 4, layer=1).query("step == 0")["position"].min())
    page.wait_for_function(f"new URLSearchParams(location.search).get('token') >= {below}")
    assert panel(page, int(address(page)["token"])) == expected_panel(run, 4, int(address(page)["token"]))
    page.keyboard.press("Escape")
    page.get_by_text("through all layers").wait_for(state="detached")


def test_a_legend_entry_marks_its_expert(server, runs, tab):
    page, run = tab(), Run.open(runs / "planted")
    page.goto(f"{server}/tokens?run=planted&problem=a-0004&layer=3")
    table = token_table(run, 4, layer=3)
    expert = int(leading_experts(table)["expert"][0])
    page.locator(".legend button").first.click()
    page.locator(".legend button[aria-pressed=true]").wait_for()
    assert address(page)["expert"] == str(expert)
    assert page.locator(".token.chosen").count() == sum(expert in experts for experts in table["experts"])


def test_back_undoes_one_thing_at_a_time(server, tab):
    page = tab()
    page.goto(f"{server}/?run=planted")
    page.get_by_text("See it token by token").click()
    token(page, 4).click()
    page.get_by_text("at position 4, through all layers").wait_for()
    page.go_back()
    page.get_by_text("through all layers").wait_for(state="detached")
    assert token(page, 0).is_visible()
    page.go_back()
    page.get_by_text("The most specialised experts").wait_for()


def test_the_page_list_returns_to_the_view_before(server, tab):
    page = tab()
    page.goto(f"{server}/tokens?run=planted&problem=a-0004&layer=3&token=5&family=a")
    page.get_by_text("at position 5, through all layers").wait_for()
    page.get_by_test_id("stSidebarNav").get_by_text("Overview").click()
    page.get_by_text("The most specialised experts").wait_for()
    page.get_by_test_id("stSidebarNav").get_by_text("Tokens").click()
    page.get_by_text("at position 5, through all layers").wait_for()
    assert address(page) == {"run": "planted", "problem": "a-0004", "layer": "3", "token": "5", "family": "a"}


@pytest.mark.parametrize("name", ["dark", "phone"])
def test_other_screens(server, tab, name):
    page = tab(scheme="dark") if name == "dark" else tab(390, 844)
    page.goto(f"{server}/?run=planted")
    page.locator(".js-plotly-plot").nth(1).wait_for()
    settle(page)
    shoot(page, f"overview-{name}")
    page.goto(f"{server}/tokens?run=planted&problem=b-0007&layer=2&token=12")
    panel(page, 12)
    settle(page)
    shoot(page, f"tokens-{name}")
    wide = "[...document.querySelectorAll('[data-testid=stMain]')].map(main => main.scrollWidth - main.clientWidth)[0]"
    assert page.evaluate(wide) <= 0
    box = page.locator(".strip").bounding_box()
    assert all(
        each.bounding_box()["x"] + each.bounding_box()["width"] <= box["x"] + box["width"] + 1
        for each in page.locator(".token").all()
    )


def test_hostile_texts_stay_text(server, runs, tab):
    page = tab()
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: pytest.fail(f"a text opened a dialog: {dialog.message}"))
    page.goto(f"{server}/?run=hostile")
    page.get_by_text("Routing of <b>$model$</b> on <img src=x onerror=alert(1)> $t$").wait_for()
    page.goto(f"{server}/tokens?run=hostile&token=0")
    panel(page, 0)
    settle(page)
    shoot(page, "tokens-hostile")
    assert token(page, 0).inner_text() == TEXTS[0]
    assert token(page, 2).inner_text() == "$x$"
    assert token(page, 4).inner_text() == "‹202E›abc‹2066›"
    assert token(page, 9).inner_text() == "∅"
    assert token(page, 11).inner_text() == "‹001B›]0;owned‹0007›‹001B›[31mred"
    assert token(page, len(TEXTS)).inner_text().endswith(f"‹… and {len(LONG) - 200:,} more›")
    assert page.locator("[data-testid=stMain] script, [data-testid=stMain] img, .katex").count() == 0
    assert page.title() == "ling_probe"
    assert all(url.startswith((server, "data:", "blob:")) for url in requests)
    page.goto(f"{server}/?run=..")
    page.get_by_text("no run '..' in").wait_for()
