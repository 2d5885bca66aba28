"""A folder of runs, and the explorer opened on it."""

import sys
from pathlib import Path

import pytest
from hostile import hostile_run
from streamlit.testing.v1 import AppTest
from synthetic import Planted, synthetic_run

APPS = Path(__file__).parents[2] / "apps"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with a run that has an effect to find, one without, and one whose texts attack."""
    folder = tmp_path_factory.mktemp("runs")
    planted = Planted(2, 5, "add", boost=5.0)
    synthetic_run(folder / "planted", 60, planted=planted, labels={"a": ("add", "take"), "b": ("add", "turn")}, parts=3)
    synthetic_run(folder / "null", 9, seed=3)
    hostile_run(folder / "hostile")
    return folder


@pytest.fixture
def visit(runs, monkeypatch):
    """Open a page of the explorer on a folder, with an address."""

    def opened(page="overview", *, folder=runs, **address):
        monkeypatch.setattr(sys, "argv", ["explorer.py", str(folder)])
        app = AppTest.from_file(str(APPS / "explorer.py"), default_timeout=60)
        if page != "overview":
            app.query_params["run"] = address.get("run", "null")
            app.run()
            app.switch_page(f"views/{page}.py")
        for name, value in address.items():
            app.query_params[name] = str(value)
        return app.run()

    return opened
