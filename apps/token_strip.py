"""A sequence as a strip of tokens: one small component, drawn in the browser by token_strip.js.

Texts reach the browser as data and are only ever set as text.
"""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from page_html import cut

from ling_probe.charts import PALETTE
from ling_probe.token_view import LONGEST, Scale, visible_pieces

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
    legend: pd.DataFrame | Scale,
    *,
    view: str,
    pinned: int | None,
    marked: int | None,
    on_pin: Callable[[int | None], None],
    on_mark: Callable[[int | None], None],
) -> None:
    """Draw the tokens of a `token_view.token_table`, coloured by its `leading_experts` or by a `token_scale`.

    Args:
        tokens: Rows to draw.
        legend: Experts with a colour, the others are drawn grey; or a scale, whose values are those of all positions.
        view: Names what is drawn; the strip is built anew when it changes.
        pinned: Position of the pinned token.
        marked: Expert to set off wherever it is chosen.
        on_pin: Called with the position the reader pins, None to unpin.
        on_mark: Called with the expert the reader marks, None to unmark.
    """
    drawn = _by_scale(tokens, legend) if isinstance(legend, Scale) else _by_expert(tokens, legend)
    _strip(
        key=_KEY,
        data={
            "view": view,
            **drawn,
            "palette": PALETTE,
            "pinned": pinned,
            "marked": marked,
        },
        on_pin_change=lambda: on_pin(_sent("pin")),
        on_mark_change=lambda: on_mark(_sent("mark")),
    )


def _by_expert(tokens: pd.DataFrame, legend: pd.DataFrame) -> dict[str, Any]:
    colours = dict(zip(legend["expert"], legend["colour"], strict=True))
    rows = [row | {"colour": colours.get(row["expert"])} for row in _rows(tokens)]
    return {"tokens": rows, "legend": legend.to_dict("records"), "scale": None}


def _by_scale(tokens: pd.DataFrame, scale: Scale) -> dict[str, Any]:
    shown = tokens["position"]
    measured = pd.DataFrame({"value": scale.values[shown], "level": scale.levels[shown]}, index=tokens.index)
    return {
        "tokens": _rows(pd.concat([tokens, measured], axis=1)),
        "legend": [],
        "scale": {"name": scale.name, "low": scale.low, "high": scale.high},
    }


def _rows(tokens: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """Rows as the browser gets them: what is missing is null, and no text is longer than it is shown."""
    rows = tokens.astype(object).where(tokens.notna(), None).to_dict("records")
    return [
        row | {"token": row["token"][:LONGEST], "pieces": visible_pieces(row["token"]), "label": cut(row["label"])}
        for row in rows
    ]


def _sent(name: str) -> int | None:
    """The number the browser sent; it sends {"value": null} to take one back."""
    value = st.session_state[_KEY][name]["value"]
    return value if isinstance(value, int) else None
