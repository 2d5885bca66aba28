"""A report as its reader opens it: from a file, without a network; and on paper."""

import json
import re
import shutil
import subprocess

import pytest
from browsing import NEEDS_CHROMIUM
from hostile import TEXTS, hostile_run
from synthetic import Planted, synthetic_run

from ling_probe.errors import UsageError
from ling_probe.report import Depth, pdf, write_comparison, write_pdf, write_report

pytestmark = NEEDS_CHROMIUM
FEW = ("label_specialisation", "family_specialisation", "expert_load", "load_balance", "coactivation")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    planted = synthetic_run(folder / "run", 60, planted=Planted(2, 5, "add", boost=5.0), keep=("contribution", "lens"))
    hostile = hostile_run(folder / "hostile")
    other = hostile_run(folder / "<img src=x onerror=alert(1)>")
    write_report(planted, folder / "planted", analyses=FEW, depth=Depth.expert)
    write_report(hostile, folder / "texts", analyses=FEW, depth=Depth.expert)
    write_comparison([hostile, other], folder / "compared")
    return folder


def opened(page, path):
    """Every figure of a page drawn, and what it asked of the network."""
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: pytest.fail(f"a text opened a dialog: {dialog.message}"))
    page.goto(path.as_uri())
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator(".main-svg").first.wait_for()
    return [url for url in requests if not url.startswith(("data:", "blob:")) and url != path.as_uri()]


def test_figures_are_drawn_as_they_are_reached_without_a_network(reports, tab):
    page = tab()
    assert opened(page, reports / "planted" / "report.html") == []
    assert page.locator(".plot").count() >= len(FEW)
    told = json.loads((reports / "planted" / "report.json").read_text(encoding="utf-8"))
    first = told["headline"]["specialised"][0]
    page.get_by_text(f"Layer {first['layer']}, expert {first['expert']} prefers “{first['label']}”").wait_for()
    page.locator(".plot").first.hover()
    assert page.locator("[data-title*='cloud' i], [data-title*='Chart Studio' i]").count() == 0
    page.locator("nav.contents a", has_text="2.5").click()
    assert page.url.endswith("#expert-2-5")


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_as_wide_as_its_window(reports, tab, width):
    page = tab(width, 900, "dark")
    assert opened(page, reports / "planted" / "report.html") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", ["texts", "compared"])
def test_hostile_texts_stay_text(reports, tab, name):
    page = tab()
    assert opened(page, reports / name / "report.html") == []
    assert page.locator("main img, main script:not([type])").count() == 0
    assert "owned" not in page.title()
    if name == "texts":
        assert TEXTS[0] in page.locator("main").inner_text()


def test_the_policy_runs_no_other_script(reports, chromium):
    page = chromium.new_page()
    page.goto((reports / "planted" / "report.html").as_uri())
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned = 1'}))")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 1\">')")
    page.wait_for_timeout(300)
    assert page.evaluate("window.owned") is None
    page.close()


def test_a_page_is_printed_with_all_its_figures(reports):
    for name in ("planted", "texts"):
        paper = write_pdf(reports / name / "report.html")
        data = paper.read_bytes()
        assert data.startswith(b"%PDF")
        assert len(re.findall(rb"/Type /Page\b", data)) > 3
        assert 30_000 < len(data) < 5_000_000
    assert b"D:20000101000000" in data


def test_without_a_browser_one_line_says_what_to_install(reports, monkeypatch):
    monkeypatch.setattr(pdf, "INSTALLED", ())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match=r"no Chromium to print with; looked for chromium, .*: install chromium, or leave out"):
        write_pdf(reports / "planted" / "report.html")


def test_a_browser_that_fails_is_told_by_its_last_line(reports, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="first\nno display\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UsageError, match=r"did not print .*report.html \(no display\); open the page and print it there"):
        write_pdf(reports / "texts" / "report.html")
