"""The explorer's server on a folder of runs, and tabs whose console must stay without errors."""

import re

import pytest
from browsing import ARGUMENTS, CHROMIUM, explorer_on
from hostile import hostile_run
from synthetic import Planted, synthetic_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    planted = Planted(2, 5, "add", boost=5.0)
    synthetic_run(folder / "planted", 60, planted=planted, labels={"a": ("add", "take"), "b": ("add", "turn")}, parts=3)
    hostile_run(folder / "hostile")
    return folder


@pytest.fixture(scope="session")
def server(runs):
    """Address of an explorer on the runs."""
    with explorer_on(runs) as (address, _):
        yield address


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    """Open tabs whose console must stay without errors."""
    troubles, opened = [], []

    def listen(message) -> None:
        # Streamlit asks beside the page first when its address has a path, then at the root; no setting changes that.
        expected = re.match(r"http://[^/]+/[^/]+/_stcore/", message.location["url"])
        if message.type == "error" and not expected:
            troubles.append(message.text)

    def make(width=1280, height=900, scheme="light"):
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(60_000)
        page.on("console", listen)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        opened.append(page)
        return page

    yield make
    for page in opened:
        page.close()
    assert troubles == []
