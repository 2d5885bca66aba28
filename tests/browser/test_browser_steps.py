"""The page of steps as a reader meets it."""

import numpy as np
import pytest
from browsing import NEEDS_CHROMIUM, address, settle, shoot

from ling_probe.run import Run
from ling_probe.state_view import problem_states, state_summary, state_tables
from ling_probe.token_view import problem_table

pytestmark = NEEDS_CHROMIUM


def open_steps(page, server, **values):
    words = "&".join(f"{name}={value}" for name, value in values.items())
    page.goto(f"{server}/steps?{words}")
    page.get_by_text("Do wrong solutions pass through other states?").wait_for()
    page.locator(".js-plotly-plot .main-svg").nth(2).wait_for()
    settle(page)


def drawn_states(page) -> list[int]:
    found = page.evaluate("Object.values(document.querySelector('.js-plotly-plot').calcdata.find(each => each[0].z)[0].z[0])")
    return [int(each) for each in found]


def test_a_reader_walks_through_the_problems(server, runs, tab):
    page, run = tab(), Run.open(runs / "planted")
    tables, ids = state_tables(run), problem_table(run)["sequence_id"].tolist()
    open_steps(page, server, run="planted", problem="b-0007")
    np.testing.assert_array_equal(drawn_states(page), problem_states(run, 7, tables).tokens["state"])
    shares = [
        row.locator("td").nth(1).inner_text() for row in page.locator("table", has_text="families").locator("tbody tr").all()
    ]
    assert shares == [f"{share:.1%}" for share in state_summary(tables.profiles)["share"]]
    shoot(page, "steps-light")
    page.get_by_role("button", name="Next").click()
    page.wait_for_function("new URLSearchParams(location.search).get('problem') !== 'b-0007'")
    settle(page)
    shown = ids.index(address(page)["problem"])
    np.testing.assert_array_equal(drawn_states(page), problem_states(run, shown, tables).tokens["state"])


@pytest.mark.parametrize("name", ["dark", "phone"])
def test_steps_on_other_screens(server, tab, name):
    page = tab(scheme="dark") if name == "dark" else tab(390, 844)
    open_steps(page, server, run="planted", problem="a-0004")
    wide = "[...document.querySelectorAll('[data-testid=stMain]')].map(main => main.scrollWidth - main.clientWidth)[0]"
    assert page.evaluate(wide) <= 0
    shoot(page, f"steps-{name}")


def test_hostile_texts_stay_text_among_steps(server, tab):
    page = tab()
    page.goto(f"{server}/steps?run=hostile")
    page.get_by_text("What does each step say").wait_for()
    settle(page)
    assert page.locator("[data-testid=stMain] script, [data-testid=stMain] img, .katex").count() == 0
    assert page.title() == "ling_probe"
