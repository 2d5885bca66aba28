"""What a reader takes along: a figure as HTML, PNG or SVG, its table as CSV or Parquet, and the whole report.

Pictures are drawn by the browser; every other file is made when it is asked for and not before.
"""

import io
import json
import re
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import opened
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from ling_probe import charts, report
from ling_probe.errors import UsageError

WIDTH = 1100  # pixels of an exported picture, before it is drawn at twice its size
HEIGHT = 450
_HERE = Path(__file__).parent
_pictures = st.components.v2.component(
    "ling_probe_pictures",
    html='<div class="pictures"></div>',
    css=(_HERE / "pictures.css").read_text(encoding="utf-8"),
    js=(_HERE / "pictures.js").read_text(encoding="utf-8"),
)


def file_name(*parts: str) -> str:
    """A file's name without its ending, of letters that every file system takes.

    >>> file_name("../my run", "expert_load")
    'my-run-expert_load'
    """
    plain = (re.sub(r"[^A-Za-z0-9_.-]+", "-", part).strip("-.")[:60] for part in parts)
    return "-".join(part for part in plain if part) or "figure"


def chart_key(name: str) -> str:
    """Key of the chart of a name, and of the class it has on the page."""
    return f"chart-{file_name(name)}"


@st.fragment
def export_button(name: str, *, drawn: go.Figure | None = None, title: str = "", data: pd.DataFrame | None = None) -> None:
    """Offer a figure and its table as files, in a box that is empty until it is opened.

    Args:
        name: Of the files, after that of the run; one of a kind on its page.
        drawn: The figure.
        title: What it is called where no heading stands above it.
        data: Its table.
    """
    with st.container(horizontal=True, horizontal_alignment="right"):
        box = st.popover("Export", icon=":material/download:", type="tertiary", key=f"export-{name}", on_change="rerun")
    if not box.open:
        return
    stem = file_name(st.query_params.get("run", ""), name)
    with box, st.container(horizontal=True, width="content"):
        if drawn is not None:
            titled = go.Figure(drawn).update_layout(title_text=title, margin_t=60)
            _offer("HTML", partial(charts.standalone_html, titled), f"{stem}.html", "text/html")
            _pictures(key=f"pictures-{name}", data=_picture(titled, stem, chart_key(name)), width="content", height="content")
        if data is not None:
            _offer("CSV", partial(csv, data), f"{stem}.csv", "text/csv")
            _offer("Parquet", partial(parquet, data), f"{stem}.parquet", "application/vnd.apache.parquet")


def _offer(label: str, make: Callable[[], str | bytes], name: str, kind: str) -> None:
    st.download_button(label, make, name, kind, key=f"download-{name}", on_click="ignore")


def _picture(drawn: go.Figure, stem: str, key: str) -> dict[str, object]:
    """What the browser draws a picture from; it takes the data from the chart on the page."""
    paper = go.Figure(layout=drawn.layout).update_layout(paper_bgcolor="white")
    height = drawn.layout.height or HEIGHT
    return {"chart": key, "name": stem, "width": WIDTH, "height": height, "layout": json.loads(paper.to_json())["layout"]}


def csv(data: pd.DataFrame) -> str:
    return data.to_csv(index=False)


def parquet(data: pd.DataFrame) -> bytes:
    return data.to_parquet(index=False)


@st.fragment
def report_button(source: opened.Source) -> None:
    """Offer the whole report, which takes as long as all analyses do: it is written when it is asked for."""
    if not st.button("Write the whole report", icon=":material/lab_profile:", key="write-report"):
        return
    try:
        packed = report_zip(source)
    except UsageError as error:
        st.text(f"There is no report: {error}.")
        return
    name = f"{file_name(st.query_params.get('run', ''), 'report')}.zip"
    label = f"Download the report ({len(packed) / 1e6:.1f} MB)"
    st.download_button(label, packed, name, "application/zip", key="download-report", on_click="ignore")


@st.cache_data(show_spinner="Writing the report: every analysis is asked, which takes minutes on a long run", max_entries=1)
def report_zip(source: opened.Source) -> bytes:
    """The files of a run's report, packed; one is kept at a time."""
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as made, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as files:
        report.write_report(opened.open_run(source), Path(made))
        for path in sorted(Path(made).rglob("*")):
            if path.is_file():
                files.write(path, path.relative_to(made))
    return packed.getvalue()
