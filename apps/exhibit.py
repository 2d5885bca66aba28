"""A question, its method and its figure or table, the same way on every page."""

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import streamlit as st
from page_html import block, element

from ling_probe import charts
from ling_probe.errors import UsageError


def heading(question: str, method: str = "") -> None:
    """What is asked, and below it how it is answered."""
    said = element("p", method, class_="soft") if method else ""
    st.html(block(element("h2", question), said))


def figure(drawn: go.Figure, *, name: str, question: str, on_pick: Callable[[Any], None] | None = None) -> None:
    """Show a figure without its title, which the heading says.

    Args:
        drawn: The figure.
        name: Of the files it is exported as; one of a kind on its page.
        question: What a reader who cannot see it is told.
        on_pick: Called with what a point that is clicked carries (`customdata`).
    """
    plain = go.Figure(drawn).update_layout(title_text="", margin_t=30).update_yaxes(title_standoff=12)
    key = f"chart-{name}"
    shown = {"width": "stretch", "config": charts.EXPORT_CONFIG, "alt": question, "key": key}
    if on_pick is None:
        st.plotly_chart(plain, **shown)
        return

    def pick() -> None:
        if points := st.session_state[key].selection.points:
            on_pick(points[0]["customdata"])

    st.plotly_chart(plain, **shown, on_select=pick, selection_mode="points")


def refusal(error: UsageError) -> None:
    """Why the run cannot answer."""
    st.text(f"Not applicable: {error}.")
