"""The page on paper, by a Chromium that is installed already."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ling_probe.errors import UsageError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge", "microsoft-edge")
"""Names that are looked for, in this order."""
INSTALLED = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
)
"""Places where a browser stands that is on no path."""
SECONDS = 180


def find_browser() -> str:
    """The first browser there is.

    Raises:
        UsageError: There is none.
    """
    found = [path for name in BROWSERS if (path := shutil.which(name))] + [path for path in INSTALLED if Path(path).is_file()]
    if not found:
        raise UsageError(
            f"no Chromium to print with; looked for {', '.join(BROWSERS)} on the path: install chromium, or leave out --pdf"
        )
    return found[0]


def write_pdf(page: Path) -> Path:
    """Print a report's page into a PDF beside it, and return its path.

    The browser has a profile of its own, no network to ask (the page's policy), and its sandbox, unless root runs it.

    Raises:
        UsageError: There is no browser, or it gave none back.
    """
    browser, paper = find_browser(), page.with_suffix(".pdf")
    paper.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="ling-probe-") as profile:
        command = [browser, "--headless", "--disable-gpu", "--disable-background-networking", f"--user-data-dir={profile}"]
        # Chromium refuses to start for root otherwise.
        command += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        command += ["--virtual-time-budget=60000", "--no-pdf-header-footer", f"--print-to-pdf={paper.resolve()}"]
        try:
            done = subprocess.run(
                [*command, f"{page.resolve().as_uri()}#print"], capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise UsageError(f"{browser} did not print {page} in {SECONDS} s; open the page and print it there") from None
    if done.returncode or not paper.is_file():
        said = done.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        raise UsageError(f"{browser} did not print {page} ({said[0]}); open the page and print it there")
    _undate(paper)
    return paper


def _undate(paper: Path) -> None:
    """Take the time of printing out; dates keep their length, so that the file stays whole."""
    dates = re.compile(rb"/(CreationDate|ModDate) \(D:\d{14}")
    paper.write_bytes(dates.sub(rb"/\1 (D:20000101000000", paper.read_bytes()))
