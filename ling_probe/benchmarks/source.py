"""Where records come from, before anybody knows what they mean: objects one after the other, each with its place."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ling_probe.errors import BenchmarkError


@dataclass(frozen=True)
class Row:
    """One object of a source."""

    where: str
    """Its place, for a message."""
    number: int
    """Its place, for an id; of a file, its line."""
    load: Callable[[], dict[str, Any]]
    """The object; it raises `BenchmarkError`, which says the place, where there is none."""


@dataclass(frozen=True)
class Source:
    """A file, or what was made or fetched by a name."""

    place: str
    """As a person would name it."""
    name: str
    """The benchmark of records that do not say theirs."""
    split: str
    """The split of records that do not say theirs."""
    stem: str
    """Begins the id of records that do not have one."""
    digest: str
    rows: Callable[[], Iterator[Row]]
    format: str | None = None
    """What every record is, where the source itself says so."""


def load_object(where: str, payload: bytes) -> dict[str, Any]:
    """The JSON object in some bytes.

    Raises:
        BenchmarkError: They hold something else.
    """
    return check_object(where, load_json(where, payload))


def load_json(where: str, payload: bytes) -> Any:
    """The JSON value in some bytes.

    Raises:
        BenchmarkError: They hold something else.
    """
    try:
        return json.loads(payload.decode())
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{where}: not UTF-8 text at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{where}: not JSON ({error})") from error


def check_object(where: str, value: Any) -> dict[str, Any]:
    """The value, if it is an object.

    Raises:
        BenchmarkError: It is none.
    """
    if not isinstance(value, dict):
        raise BenchmarkError(f"{where}: a JSON {type(value).__name__} where an object was expected")
    return value


def rows_of(place: str, values: Iterable[Any], *, word: str = "record") -> Iterator[Row]:
    """Rows of values that are in memory already, counted from 1."""
    for number, value in enumerate(values, start=1):
        where = f"{place} {word} {number}"
        yield Row(where, number, partial(check_object, where, value))


def digest_of(values: Iterable[Any]) -> str:
    """sha256 of values as JSON lines with sorted keys."""
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()
