"""Texts of strangers made fit to show: short, and without characters that steer a terminal or turn the reading direction.

What is written of a run as a page, as Markdown or as JSON goes through here.
"""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader

LONGEST = 400
"""Letters of a text from a run that are shown."""
SENTENCE = 4_000
"""Letters of a sentence, which may name several such texts."""
SENTENCES = {"finding", "method", "specialised_note", "reason", "note", "limits", "prompt"}
"""Fields that hold sentences."""


def pages() -> Environment:
    """The package's templates, with the filters `number`, `markdown` and `token`; those of HTML escape what they are given."""
    found = Environment(loader=PackageLoader("ling_probe"), autoescape=_is_html, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"number": number, "markdown": markdown, "token": token}
    return found


def shown(text: str, *, most: int = LONGEST) -> str:
    r"""Text on one line, cut where it is too long; what has no shape of its own becomes its code.

    >>> shown("a\nb\x1b[2J\u202e")
    'a b‹1B›[2J‹202E›'
    >>> shown("aaaaaa", most=4)
    'aaaa… (6 letters)'
    """
    cut = text[:most]
    told = cut if cut.isprintable() else "".join(map(_letter, cut))
    return told if len(text) <= most else f"{told}… ({len(text):,} letters)"


def visible(text: str, *, most: int = LONGEST) -> str:
    r"""The same for tokens, whose line ends and tabs are told apart from spaces.

    >>> visible("a\n")
    'a⏎'
    """
    return shown(text[:most].translate(_GLYPHS) + text[most:], most=most)


def all_shown(value: Any, *, most: int = LONGEST) -> Any:
    """A plain value with every text in it made fit to show, names of fields too; sentences may be longer."""
    if isinstance(value, str):
        return shown(value, most=most)
    if isinstance(value, Mapping):
        return {
            shown(str(name)): all_shown(each, most=SENTENCE if name in SENTENCES else LONGEST) for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [all_shown(each, most=most) for each in value]
    return value


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values; what is not finite becomes null."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def number(value: float | None) -> str:
    """Three digits; nothing for what is not there, and no more than a bound for what is next to nothing."""
    if value is None:
        return ""
    return "< 1e-12" if 0 < value < 1e-12 else f"{value:.3g}"


def token(text: str) -> str:
    """A token with its spaces visible.

    >>> token(" the"), token("")
    ('·the', '∅')
    """
    return text.replace(" ", "·") or "∅"


def markdown(text: str) -> str:
    r"""Text that Markdown shows letter by letter, on one line of a table.

    >>> markdown("a|*b*<i>")
    'a\\|\\*b\\*&lt;i>'
    """
    safe = shown(" ".join(text.split()), most=SENTENCE).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|~$" else letter for letter in safe)


_GLYPHS = str.maketrans({"\n": "⏎", "\t": "⇥"})


def _letter(letter: str) -> str:
    if letter.isprintable():
        return letter
    return " " if letter.isspace() else f"‹{ord(letter):02X}›"


def _is_html(template: str | None) -> bool:
    return template is None or ".html" in template
