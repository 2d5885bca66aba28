"""The way from an expert on a figure to the page that shows it."""

from pathlib import Path
from typing import Any

import streamlit as st

PAGE = "views/experts.py"
_PICKED = "expert-to-open"


def there() -> bool:
    """Whether there is a page to lead to."""
    return (Path(__file__).parent / PAGE).is_file()


def open_expert(cell: Any) -> None:
    """Remember an expert, as (layer, expert) and more, to be opened by `follow`: a callback cannot change the page."""
    st.session_state[_PICKED] = [int(value) for value in cell[:2]]


def follow() -> None:
    """Go to the page of the expert that was picked, if one was."""
    if (picked := st.session_state.pop(_PICKED, None)) and there():
        layer, expert = picked
        st.switch_page(PAGE, query_params={"run": st.query_params["run"], "layer": str(layer), "expert": str(expert)})
