"""A sequence as a strip of tokens: one small component, drawn in the browser by token_strip.js.

Texts reach the browser as data and are only ever set as text.
"""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from ling_probe.charts import PALETTE
from ling_probe.token_view import visible_pieces

_HERE = Path(__file__).parent
_KEY = "token-strip"
_strip = st.components.v2.component(
    "ling_probe_token_strip",
    html='<div class="strip"></div>',
    css=(_HERE / "token_strip.css").read_text(encoding="utf-8"),
    js=(_HERE / "token_strip.js").read_text(encoding="utf-8"),
)


def token_strip(
    tokens: pd.DataFrame,
    legend: pd.DataFrame,
    *,
    view: str,
    pinned: int | None,
    marked: int | None,
    on_pin: Callable[[int | None], None],
    on_mark: Callable[[int | None], None],
) -> None:
    """Draw the tokens of a `token_view.token_table`, coloured by the experts of its `leading_experts`.

    Args:
        tokens: Rows to draw.
        legend: Experts with a colour; the others are drawn grey.
        view: Names what is drawn; the strip is built anew when it changes.
        pinned: Position of the pinned token.
        marked: Expert to set off wherever it is chosen.
        on_pin: Called with the position the reader pins, None to unpin.
        on_mark: Called with the expert the reader marks, None to unmark.
    """
    _strip(
        key=_KEY,
        data={
            "view": view,
            "tokens": _token_data(tokens, dict(zip(legend["expert"], legend["colour"], strict=True))),
            "legend": legend.to_dict("records"),
            "palette": PALETTE,
            "pinned": pinned,
            "marked": marked,
        },
        on_pin_change=lambda: on_pin(_sent("pin")),
        on_mark_change=lambda: on_mark(_sent("mark")),
    )


def _token_data(tokens: pd.DataFrame, colours: dict[int, int]) -> list[dict[Hashable, Any]]:
    rows = tokens.astype(object).where(tokens.notna(), None).to_dict("records")
    return [row | {"pieces": visible_pieces(row["token"]), "colour": colours.get(row["expert"])} for row in rows]


def _sent(name: str) -> int | None:
    """The number the browser sent; it sends {"value": null} to take one back."""
    value = st.session_state[_KEY][name]["value"]
    return value if isinstance(value, int) else None
