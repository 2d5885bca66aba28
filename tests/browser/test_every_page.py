"""Every page of the list, as it is opened, on the shipped model's own run and on one whose texts attack."""

import re

import pytest
from browsing import NEEDS_CHROMIUM, explorer_on, pages, settle, shoot
from hostile import LONG

from ling_probe.benchmarks import read_benchmark
from ling_probe.recording import record

pytestmark = NEEDS_CHROMIUM

SCREENS = {"light": (1280, "light"), "dark": (1280, "dark"), "phone": (390, "light")}
DRAWN = """() => [...document.querySelectorAll("[data-testid=stPlotlyChart]")]
  .every(chart => chart.querySelector(".main-svg"))"""
TOO_WIDE = """() => [...document.querySelectorAll("[data-testid=stMain]")]
  .filter(main => main.scrollWidth > main.clientWidth).length"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with a small run of the shipped model that keeps all that pages can show, and one of an earlier snapshot."""
    from ling_probe.model.load import load_native

    folder = tmp_path_factory.mktemp("shipped")
    keep = ("experts", "loss", "logits", "contribution", "lens", "residual")
    problems = read_benchmark("stepbench", limit=30)
    record(load_native("ling-tiny"), problems, folder / "demo", keep=keep)
    record(load_native("ling-tiny@step-3040"), problems, folder / "earlier", keep=("experts", "loss"))
    return folder


@pytest.fixture(scope="module")
def demo_server(demo):
    with explorer_on(demo) as (address, _):
        yield address


def check(page) -> None:
    """What holds for every page, whatever it shows."""
    page.locator("[data-testid=stMain] h1, [data-testid=stMain] h2").first.wait_for()
    settle(page)
    page.wait_for_function(DRAWN)
    assert page.get_by_test_id("stException").count() == 0
    assert page.locator("[data-testid=stAlertContentError]").all_inner_texts() == []
    main = page.get_by_test_id("stMain")
    shown = main.locator("[data-testid=stPlotlyChart], table, .token, [data-testid=stDataFrame], [data-testid=stButton]")
    assert shown.count() or "Not applicable" in main.inner_text()
    assert page.evaluate(TOO_WIDE) == 0


@pytest.mark.parametrize("screen", SCREENS)
def test_every_page_opens_and_fits(demo_server, tab, screen):
    width, scheme = SCREENS[screen]
    page = tab(width, 900, scheme=scheme)
    page.goto(demo_server)
    for place, title in pages().items():
        if screen == "phone":  # the list is folded away
            page.goto(f"{demo_server}/{place}?run=demo")
        else:
            page.get_by_test_id("stSidebarNav").get_by_text(title, exact=True).click()
            page.wait_for_url(re.compile(rf"{demo_server}/{place}(\?|$)"))
        check(page)
        shoot(page, f"page-{place or 'overview'}-{screen}")


def test_no_page_is_acted_on_by_texts(server, tab):
    page, received, requests = tab(), [], []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda data: received.append(len(data))))
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: pytest.fail(f"a text opened a dialog: {dialog.message}"))
    for place in pages():
        received.clear()
        page.goto(f"{server}/{place}?run=hostile")
        page.locator("[data-testid=stMain] h1, [data-testid=stMain] h2").first.wait_for()
        settle(page)
        assert page.get_by_test_id("stException").count() == 0, place
        assert "owned" not in page.title()
        assert page.locator("[data-testid=stMain] script, [data-testid=stMain] iframe, .katex").count() == 0, place
        assert 0 < sum(received) < len(LONG), place
    assert all(url.startswith((server, "data:", "blob:")) for url in requests)
