"""How long the explorer takes on a million tokens of a Ling-mini-sized run, and how much memory its server needs.

Run with ``OMP_NUM_THREADS=1 python -m pytest tests/perf/test_explorer.py -m perf -s``; LING_PROBE_MILLION names a run to use in
the place of a new one, with the answers it keeps. Every page of the list is opened twice by a server of its own: first
where the run keeps no answer yet, to see how soon the first page shows something and how long all takes to compute; then where
it keeps them all. Then, page by page, every select box is given three other values; `processor` is what one of these takes of
the server's processor time, which other work on the machine changes little.
"""

import os
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from browsing import ARGUMENTS, CHROMIUM, NEEDS_CHROMIUM, explorer_on, pages
from large import large_run

pytestmark = [pytest.mark.perf, *NEEDS_CHROMIUM]

FIRST, INTERACTION, BYTES = 3.0, 0.5, 1.5e9
CHANGES = 3
WATCH = """() => {
  window.changed = performance.now();
  const app = document.querySelector("[data-testid=stApp]");
  new MutationObserver(() => { window.changed = performance.now(); })
    .observe(app, { subtree: true, childList: true, characterData: true, attributeFilter: ["data-test-script-state"] });
}"""
QUIET = """(quiet) => document.querySelector("[data-testid=stApp]").dataset.testScriptState === "notRunning"
  && performance.now() - window.changed > quiet"""


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    if named := os.environ.get("LING_PROBE_MILLION"):
        return Path(named)
    folder = tmp_path_factory.mktemp("large") / "run"
    large_run(folder)
    return folder


@contextmanager
def measured(process):
    """The largest sum of resident bytes of a process and all below it while the block runs, in a list."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            peak[0] = max(peak[0], tree_bytes(process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def tree_bytes(root) -> int:
    parents, sizes = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            pages_held = int((folder / "statm").read_text().split()[1])
        except OSError:
            continue
        parents[int(folder.name)], sizes[int(folder.name)] = int(fields[1]), pages_held * os.sysconf("SC_PAGE_SIZE")
    inside = {root}
    while more := {pid for pid, parent in parents.items() if parent in inside} - inside:
        inside |= more
    return sum(sizes.get(pid, 0) for pid in inside)


def tree_seconds(root) -> float:
    """Processor time of a process and all that it started and saw end."""
    fields = Path(f"/proc/{root}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def timed(page, act, *, quiet=400) -> float:
    """Seconds from an act until the page changed for the last time."""
    page.evaluate(WATCH)
    start = page.evaluate("performance.now()")
    act()
    page.wait_for_timeout(100)
    page.wait_for_function(QUIET, arg=quiet, timeout=600_000)
    return (page.evaluate("window.changed") - start) / 1000


def arrive(page, server) -> float:
    """Seconds until the first page shows its heading."""
    start = time.perf_counter()
    page.goto(server)
    page.locator("h1").first.wait_for()
    return time.perf_counter() - start


def open_page(page, title) -> float:
    return timed(page, lambda: page.get_by_test_id("stSidebarNav").get_by_text(title, exact=True).click())


def offered(page, box):
    """Options of a select box; where its list was not opened by the first click, by another."""
    from playwright.sync_api import TimeoutError as Late

    options = page.get_by_role("option")
    for patience in (3_000, 3_000, 30_000):
        box.click()
        try:
            options.first.wait_for(timeout=patience)
        except Late:
            if patience > 3_000:
                raise
            page.keyboard.press("Escape")
        else:
            break
    return options


def change(page, place, option) -> float | None:
    """Give a select box another value."""
    options = offered(page, page.get_by_test_id("stMain").get_by_test_id("stSelectbox").nth(place).locator("input"))
    if options.count() <= option:
        page.keyboard.press("Escape")
        return None
    return timed(page, lambda: options.nth(option).click())


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def test_a_million_tokens_are_explored_without_waiting(million, browser):
    rows, titles = {title: {} for title in pages().values()}, list(pages().values())
    with explorer_on(million) as (server, process), measured(process) as peak_computing:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        first_empty = arrive(page, server)
        for title in titles:
            rows[title]["computed"] = open_page(page, title)
        page.close()
    with explorer_on(million) as (server, process), measured(process) as peak:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        start = time.perf_counter()
        first = arrive(page, server)
        timed(page, lambda: None)
        whole = time.perf_counter() - start - 0.5
        for title in (*titles[1:], titles[0]):
            rows[title]["opened"] = open_page(page, title)
            boxes = page.get_by_test_id("stMain").get_by_test_id("stSelectbox").count()
            before = tree_seconds(process.pid)
            taken = [change(page, box, option) for box in range(boxes) for option in range(1, CHANGES + 1)]
            taken = [each for each in taken if each is not None]
            rows[title] |= {"changes": len(taken), "median": statistics.median(taken or [0]), "slowest": max(taken, default=0)}
            rows[title]["processor"] = (tree_seconds(process.pid) - before) / max(1, len(taken))
        page.close()
    report(first_empty, first, whole, rows, peak_computing[0], peak[0])
    assert max(first_empty, first, whole) <= FIRST
    assert max(row["opened"] for row in rows.values()) <= FIRST
    assert max(row["median"] for row in rows.values()) <= INTERACTION
    assert max(peak_computing[0], peak[0]) <= BYTES


def report(first_empty, first, whole, rows, peak_computing, peak) -> None:
    say = sys.stdout.write
    say(f"\nfirst heading, nothing kept {first_empty:.2f} s; all kept {first:.2f} s, whole page {whole:.2f} s\n")
    say(f"memory {peak / 1e9:.2f} GB; while computing {peak_computing / 1e9:.2f} GB\n")
    say(f"{'page':<18}{'computed':>10}{'opened':>10}{'changes':>9}{'median':>9}{'slowest':>9}{'processor':>11}\n")
    for title, row in rows.items():
        say(f"{title:<18}{row['computed']:>9.1f}s{row['opened']:>9.2f}s{row['changes']:>9}")
        say(f"{row['median']:>8.2f}s{row['slowest']:>8.2f}s{row['processor']:>10.2f}s\n")
