"""What a page shows stands in its address, so that every view can be restored, sent and gone back to.

The address is the only truth: controls are set from it, and change it when they are used. The browser's history gets an entry
at every change, so what belongs together is changed together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import streamlit as st
from page_html import cut, markdown

T = TypeVar("T")


def arrive() -> None:
    """Take up the last address of this session where a page was opened without one, as the page list does."""
    st.session_state["shown"] = {}
    if not st.query_params:
        put(st.session_state.get("address", {}))


def chosen(name: str) -> str | None:
    """The value the address gives a name."""
    return st.query_params.get(name)


def put(values: Mapping[str, object]) -> None:
    """Change the address, once; None takes a name out."""
    changed = st.query_params.to_dict() | {name: str(value) for name, value in values.items()}
    changed = {name: value for name, value in changed.items() if values.get(name, value) is not None}
    if changed != st.query_params.to_dict():
        st.query_params.from_dict(changed)
    st.session_state["address"] = changed


def complete() -> None:
    """Put what the controls show into the address, where it did not name it; to be called after the last of them."""
    put(st.session_state["shown"])


def choose(
    label: str,
    name: str,
    options: Sequence[T],
    *,
    format_func: Callable[[Any], str] = str,
    clears: Sequence[str] = (),
    filters: bool = False,
    control: Callable[..., Any] = st.selectbox,
    default: T | None = None,
) -> T:
    """A select box that shows what the address names, and the first option, or the default, where it names none.

    Args:
        label: Of the box.
        name: In the address.
        options: What there is to choose.
        format_func: How an option reads.
        clears: Names that leave the address when the box is used.
        filters: Whether the first option, or the default, need not stand in the address, as what filters nothing.
        control: Another control for one of several options, such as `st.select_slider`.
        default: An option that may change with what else is chosen.
    """
    by_text = {str(option): option for option in options}
    asked, first = chosen(name), options[0] if default is None else default
    if asked is not None and asked not in by_text:
        st.warning(markdown(f"no {name} {asked!r} here; showing {format_func(first)}"))
    value = by_text.get(asked or "", first)
    key = f"choose-{name}"
    st.session_state[key] = value
    unsaid = first if filters else None
    st.session_state["shown"][name] = None if value == unsaid else value

    def use() -> None:
        used = st.session_state[key]
        put({name: None if used == unsaid else used} | dict.fromkeys(clears))

    control(label, options, key=key, format_func=lambda option: cut(format_func(option)), on_change=use)
    return value
