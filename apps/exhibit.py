"""A question, its method and its figure or table, the same way on every page, with what a reader may take along."""

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


def figure(drawn: go.Figure, *, name: str, question: str, data: pd.DataFrame | None = None) -> None:
    """Show a figure without its title, which the heading says, and offer it as a file.

    Args:
        drawn: The figure.
        name: Of the files it is exported as; one of a kind on its page.
        question: What a reader who cannot see it is told.
        data: The table it was drawn from, to export beside it.
    """
    plain = go.Figure(drawn).update_layout(title_text="", margin_t=30).update_yaxes(title_standoff=12)
    st.plotly_chart(plain, width="stretch", config=charts.EXPORT_CONFIG, alt=question, key=chart_key(name))
    export_button(name, drawn=drawn, data=data)


def table(rows: pd.DataFrame, *, name: str, height: int = 320) -> None:
    """Show a table that can be sorted and searched, and offer it as a file.

    Args:
        rows: The table.
        name: Of the files it is exported as; one of a kind on its page.
        height: Pixels it takes at most; the rest is scrolled to.
    """
    st.dataframe(rows, hide_index=True, height=min(height, 40 + 36 * len(rows)), key=f"table-{name}")
    export_button(name, data=rows)


def refusal(error: UsageError) -> None:
    """Why the run cannot answer."""
    st.text(f"Not applicable: {error}.")
