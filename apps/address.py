"""What a page shows stands in its address, so that every view can be restored, sent and gone back to.

The address is the only truth: controls are set from it, and write to it when they are used.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import streamlit as st
from page_html import markdown

T = TypeVar("T")


def chosen(name: str) -> str | None:
    """The value the address gives a name, or the last one it had in this session."""
    remembered: dict[str, str] = st.session_state.setdefault("remembered", {})
    return st.query_params.get(name, remembered.get(name))


def write(name: str, value: object) -> None:
    """Put a value into the address, and remember it for when a page link drops it."""
    st.session_state.setdefault("remembered", {})[name] = str(value)
    if st.query_params.get(name) != str(value):
        st.query_params[name] = str(value)


def forget(*names: str) -> None:
    """Take names out of the address."""
    for name in names:
        st.session_state.setdefault("remembered", {}).pop(name, None)
        st.query_params.pop(name, None)


def choose(
    label: str,
    name: str,
    options: Sequence[T],
    *,
    format_func: Callable[[Any], str] = str,
    clears: Sequence[str] = (),
) -> T:
    """A select box whose value stands in the address; using it takes the names it clears out of there.

    A value that is no option is said to be none, and the first option is shown.
    """
    by_text = {str(option): option for option in options}
    wanted = chosen(name)
    if wanted is not None and wanted not in by_text and name in st.query_params:
        st.warning(markdown(f"no {name} {wanted!r} here; showing {options[0]}"))
    value = by_text.get(wanted or "", options[0])
    key = f"choose-{name}"
    st.session_state[key] = value
    write(name, value)
    st.selectbox(label, options, key=key, format_func=format_func, on_change=_use, args=(name, key, tuple(clears)))
    return value


def _use(name: str, key: str, clears: Sequence[str]) -> None:
    write(name, st.session_state[key])
    forget(*clears)
