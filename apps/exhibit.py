"""A question, its method and its figure or table, the same way on every page, with what a reader may take along."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from export import chart_key, export_button
from page_html import block, element

from ling_probe import charts
from ling_probe.errors import UsageError


def heading(question: str, method: str = "") -> None:
    """What is asked, and below it how it is answered."""
    said = element("p", method, class_="soft") if method else ""
    st.html(block(element("h2", question), said))


def figure(
    drawn: go.Figure,
    *,
    name: str,
    question: str,
    data: pd.DataFrame | None = None,
    on_pick: Callable[[Any], None] | None = None,
) -> None:
    """Show a figure without its title, which the heading says, and offer it as a file with it.

    Args:
        drawn: The figure; it loses its title, for a copy would take as long as all else.
        name: Of the files it is exported as; one of a kind on its page.
        question: What a reader who cannot see it is told.
        data: The table it was drawn from, to export beside it.
        on_pick: Called with what a point that is clicked carries (`customdata`).
    """
    title = str(drawn.layout.title.text or "")
    drawn.update_layout(title_text="", margin_t=30).update_yaxes(title_standoff=12)
    shown = {"width": "stretch", "config": charts.EXPORT_CONFIG, "alt": question, "key": chart_key(name)}

    def pick() -> None:
        if on_pick is not None and (points := st.session_state[chart_key(name)].selection.points):
            carried = points[0]["customdata"]
            # The browser sends the rows of an array as objects: {"0": layer, "1": expert}.
            on_pick(list(carried.values()) if isinstance(carried, Mapping) else carried)

    if on_pick is None:
        st.plotly_chart(drawn, **shown)
    else:
        st.plotly_chart(drawn, **shown, on_select=pick, selection_mode="points")
    export_button(name, drawn=drawn, title=title, data=data)


def table(rows: pd.DataFrame, *, name: str, data: pd.DataFrame | None = None, height: int = 320) -> None:
    """Show a table that can be sorted and searched, and offer it as a file.

    Args:
        rows: What is shown.
        name: Of the files it is exported as; one of a kind on its page.
        data: The whole table, where more is exported than shown.
        height: Pixels it takes at most; the rest is scrolled to.
    """
    short = {column: st.column_config.NumberColumn(format="%.3g") for column in rows.select_dtypes("float")}
    height = min(height, 40 + 36 * len(rows))
    st.dataframe(rows, hide_index=True, height=height, key=f"table-{name}", column_config=short)
    export_button(name, data=rows if data is None else data)


def refusal(error: UsageError) -> None:
    """Why the run cannot answer."""
    st.text(f"Not applicable: {error}.")
