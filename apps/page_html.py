"""Words from a run made safe to show: everything a run holds is somebody else's text, and none of it may act on the page."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from ling_probe.token_view import visible_pieces

STYLE = f"<style>{Path(__file__).with_name('page.css').read_text(encoding='utf-8')}</style>"


LONGEST = 2_000
"""Characters of any one text that are shown."""


def cut(text: str) -> str:
    """A text that is not too long to show, with a note of how much more there is.

    >>> cut("a" * 2_100)[-16:]
    'a … and 100 more'
    """
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … and {len(text) - LONGEST:,} more"


def markdown(text: str) -> str:
    r"""Text that Streamlit's Markdown shows letter by letter, on one line.

    >>> markdown("<b> :red[a]\n$x$")
    '\\<b\\> \\:red\\[a\\] \\$x\\$'
    """
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(cut(text).split()))


def element(tag: str, text: object, **attributes: str) -> str:
    """One HTML element around escaped text.

    >>> element("p", "a < b", id="x")
    '<p id="x">a &lt; b</p>'
    """
    spelled = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items())
    return f"<{tag}{spelled}>{escape(cut(str(text)))}</{tag}>"


def block(*pieces: str, kind: str = "lp") -> str:
    """Elements in a box of a class of `STYLE`; "lp" is the outermost."""
    return f'<div class="{kind}">{"".join(pieces)}</div>'


def facts(values: Mapping[str, object]) -> str:
    """Names and values as a definition list."""
    return f"<dl>{''.join(element('dt', name) + element('dd', value) for name, value in values.items())}</dl>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "") -> str:
    """A table whose first column names its rows."""
    head = "".join(element("th", name, scope="col") for name in header)
    lines = ["".join(element("td", value) for value in row) for row in rows]
    title = element("caption", caption) if caption else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def token(text: str) -> str:
    """A token with its white space visible."""
    pieces = [element("i", piece) if stands_for else escape(piece) for piece, stands_for in visible_pieces(text)]
    return f"<code>{''.join(pieces)}</code>"


def disagreement(tokens: pd.DataFrame, other: str) -> str:
    """Tokens of a `compare_view.token_overlap_table` as text, shaded by how far two runs differ, a line a step.

    Args:
        tokens: The table.
        other: What the other run is called.
    """
    bands = (tokens["segment"].ne(tokens["segment"].shift()) | tokens["step"].ne(tokens["step"].shift())).cumsum()
    lines = []
    for _, rows in tokens.groupby(bands):
        first = rows.iloc[0]
        name = first["label"] if first["step"] >= 0 else first["segment"]
        lines.append(f"<p>{element('b', name)} {''.join(map(_shaded, rows.to_dict('records')))}</p>")
    told = f"Choices in common with {other}: all"
    scale = "".join(element("span", shown, class_=f"token d{shade}") for shade, shown in enumerate(["\u00a0\u00a0"] * 5))
    return f'<div class="shaded">{"".join(lines)}</div>' + f"<p>{escape(told)} {scale} none</p>"


def _shaded(row: Mapping[Any, Any]) -> str:
    told = "experts {} here, {} there".format(*(", ".join(map(str, row[name])) for name in ("experts", "experts_there")))
    pieces = [element("i", piece) if stands_for else escape(piece) for piece, stands_for in visible_pieces(row["token"])]
    return f'<span class="token d{int(row["shade"])}" title="{escape(told)}">{"".join(pieces) or "∅"}</span>'


def verdict(correct: Any) -> str:
    """Correctness in a word; what nobody judged is missing.

    >>> verdict(None)
    'not judged'
    """
    return "not judged" if pd.isna(correct) else "correct" if correct else "wrong"
