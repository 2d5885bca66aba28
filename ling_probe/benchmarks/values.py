"""Fields of a JSON object as what is expected of them, or one clear line."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ling_probe.errors import BenchmarkError

_QUOTED = 60
_LISTED = 8


def brief(text: str) -> str:
    """A quoted text short enough for a message."""
    return json.dumps(text if len(text) <= _QUOTED else text[:_QUOTED] + "...", ensure_ascii=False)


def listed(names: Iterable[str]) -> str:
    """A few quoted names."""
    names = list(names)
    return ", ".join([*map(brief, names[:_LISTED]), *["..."][: len(names) > _LISTED]]) or "nothing"


def text_of(values: Mapping[str, Any], key: str) -> str:
    """A field as text: numbers and truth values as JSON writes them, nothing where there is none.

    Raises:
        BenchmarkError: It is a list or an object, or no text that can be written.
    """
    value = values.get(key)
    if isinstance(value, list | dict):
        raise BenchmarkError(f"field {brief(key)} is a JSON {type(value).__name__}; text is expected")
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    check_text(text, f"field {brief(key)}")
    return text


def check_text(text: str, what: str) -> None:
    """Refuse what cannot be written as UTF-8."""
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BenchmarkError(f"{what} has half of a surrogate pair, which is no text")


def texts_of(values: Mapping[str, Any], key: str) -> list[str]:
    """A field that is a list of texts.

    Raises:
        BenchmarkError: It is anything else.
    """
    found = values.get(key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise BenchmarkError(f"field {brief(key)} is a JSON {type(found).__name__}; a list of texts is expected")
    for text in found:
        check_text(text, f"field {brief(key)}")
    return found


def object_of(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A field that is an object; empty where there is none.

    Raises:
        BenchmarkError: It is anything else.
    """
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BenchmarkError(f"field {brief(key)} is a JSON {type(found).__name__}; an object is expected")
    return found
