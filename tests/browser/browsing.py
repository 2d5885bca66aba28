"""What a reader sees of the explorer in a headless Chromium.

Screenshots go to the folder that LING_PROBE_SCREENSHOTS names, if it names one.
"""

import os
import shutil
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EXPLORER = Path(__file__).parents[2] / "apps/explorer.py"
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

# Where every change is tested a missing browser is a failure and no skip.
ABSENT = CHROMIUM is None and not os.environ.get("CI")
NEEDS_CHROMIUM = [pytest.mark.browser, pytest.mark.skipif(ABSENT, reason="chromium not installed")]


def wait_for(address, process) -> None:
    for _ in range(300):
        assert process.poll() is None, "the server ended"
        try:
            with urlopen(address, timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(address)


def settle(page) -> None:
    """Wait until the script has run and its charts are drawn."""
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]")
    page.wait_for_timeout(500)


def shoot(page, name) -> None:
    """Save the whole page, which scrolls inside the window."""
    if not (folder := os.environ.get("LING_PROBE_SCREENSHOTS")):
        return
    size = page.viewport_size
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": size["width"], "height": max(size["height"], height + 20)})
    settle(page)
    Path(folder).mkdir(parents=True, exist_ok=True)
    page.screenshot(path=Path(folder) / f"{name}.png")
    page.set_viewport_size(size)


def address(page) -> dict[str, str]:
    return {name: value for name, (value,) in parse_qs(urlsplit(page.url).query).items()}
