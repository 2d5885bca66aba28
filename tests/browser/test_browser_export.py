"""What a reader takes along arrives, opens, and holds what the page shows."""

import io
import json

import pandas as pd
import pytest
from browsing import NEEDS_CHROMIUM, settle, shoot
from pandas.testing import assert_frame_equal

from ling_probe.analysis import load_balance
from ling_probe.run import Run

pytestmark = NEEDS_CHROMIUM


def open_export(page, name):
    page.locator(f".st-key-export-{name}").get_by_role("button", name="Export").click()
    page.get_by_role("button", name="PNG", exact=True).wait_for()


def arrived(page, label) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=label, exact=True).click()
    return waiting.value.suggested_filename, waiting.value.path().read_bytes()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_arrive_and_are_drawn_on_paper(server, tab, scheme):
    page = tab(scheme=scheme)
    page.goto(f"{server}/?run=planted")
    page.locator(".js-plotly-plot").nth(1).wait_for()
    settle(page)
    open_export(page, "expert_load")
    name, png = arrived(page, "PNG")
    assert name == "planted-expert_load.png"
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 2200
    name, svg = arrived(page, "SVG")
    assert name == "planted-expert_load.svg"
    text = svg.decode("utf-8")
    assert text.startswith("<svg")
    assert "How much work does each expert do?" in text
    assert "fill: rgb(255, 255, 255)" in text
    shoot(page, f"export-{scheme}")
    assert drawn(tab, png, "png")[:3] == [255, 255, 255]


def drawn(tab, picture, kind) -> list[int]:
    """Red, green, blue of the first corner of a picture, as a browser shows it."""
    import base64

    page = tab()
    page.set_content(f'<img src="data:image/{kind};base64,{base64.b64encode(picture).decode()}">')
    page.wait_for_function("document.images[0].complete && document.images[0].naturalWidth > 0")
    return page.evaluate(
        """() => { const canvas = document.createElement("canvas"); const pen = canvas.getContext("2d");
        pen.drawImage(document.images[0], 0, 0); return [...pen.getImageData(2, 2, 1, 1).data]; }"""
    )


def test_files_arrive_and_hold_the_table(server, runs, tab, tmp_path):
    page, expected = tab(), load_balance(Run.open(runs / "planted"))
    page.goto(f"{server}/?run=planted")
    page.locator(".js-plotly-plot").nth(1).wait_for()
    settle(page)
    open_export(page, "load_balance")
    name, text = arrived(page, "CSV")
    assert name == "planted-load_balance.csv"
    assert_frame_equal(pd.read_csv(io.BytesIO(text)), expected, check_dtype=False)
    name, packed = arrived(page, "Parquet")
    assert name == "planted-load_balance.parquet"
    assert_frame_equal(pd.read_parquet(io.BytesIO(packed)), expected)
    name, html = arrived(page, "HTML")
    assert name == "planted-load_balance.html"
    (tmp_path / name).write_bytes(html)
    alone, requests = tab(), []
    alone.on("request", lambda request: requests.append(request.url))
    alone.goto((tmp_path / name).as_uri())
    alone.locator(".js-plotly-plot .legend").wait_for()
    assert requests == [(tmp_path / name).as_uri()]
    assert alone.title() == "How evenly is the work spread over the experts of a layer?"
    assert "cloud" not in json.dumps(alone.locator(".modebar-btn").evaluate_all("all => all.map(each => each.dataset.title)"))
