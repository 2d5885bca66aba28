"""What a reader sees of the explorer in a headless Chromium.

Screenshots go to the folder that LING_PROBE_SCREENSHOTS names, if it names one.
"""

import ast
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EXPLORER = Path(__file__).parents[1] / "apps/explorer.py"
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

# Where every change is tested a missing browser is a failure and no skip.
ABSENT = CHROMIUM is None and not os.environ.get("CI")
NEEDS_CHROMIUM = [pytest.mark.browser, pytest.mark.skipif(ABSENT, reason="chromium not installed")]


def pages() -> dict[str, str]:
    """Every page of the explorer: its title by its path in the address, which is empty for the first."""
    calls = [each for each in ast.walk(ast.parse(EXPLORER.read_text(encoding="utf-8"))) if isinstance(each, ast.Call)]
    found = {}
    for call in (each for each in calls if isinstance(each.func, ast.Attribute) and each.func.attr == "Page"):
        said = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        file = Path(ast.literal_eval(call.args[0]))
        found["" if said.get("default") else said.get("url_path", file.stem)] = said["title"]
    return found


@contextmanager
def explorer_on(folder) -> Iterator[tuple[str, subprocess.Popen]]:
    """Address and process of an explorer on a run or a folder of runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--server.address", "127.0.0.1", "--server.port", str(port), "--server.headless", "true"]
    command = [sys.executable, "-m", "streamlit", "run", str(EXPLORER), *options, "--browser.gatherUsageStats", "false"]
    process = subprocess.Popen([*command, "--", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/_stcore/health", process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(timeout=20)


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
