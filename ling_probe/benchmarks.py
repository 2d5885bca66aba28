"""Benchmark records, and the reader that turns JSON lines into them.

A benchmark is a folder of ``<split>.jsonl`` files or one such file. Stepbench ships with the package; what makes its problems
is `ling_probe.stepbench`, what cuts a solution into steps is `ling_probe.steps`.
"""

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ling_probe.errors import BenchmarkError, UsageError

_PACKAGE = Path(__file__).resolve().parent
_HOMES = (_PACKAGE.parent / "datasets", _PACKAGE / "shipped" / "datasets")
_QUOTED = 60
_LISTED = 8


@dataclass(frozen=True, kw_only=True)
class Step:
    """One reasoning step of a text."""

    label: str
    """What kind of step; for stepbench one of `ling_probe.stepbench.LABELS`, or ``other``."""
    text: str
    """The line, without its newline."""
    start: int
    """First character in the solution."""
    stop: int
    """One past the last character, trailing newline included."""
    inputs: tuple[str, ...] = ()
    """What the step uses, as written."""
    result: str = ""
    """What the step establishes, as written."""
    correct: bool | None = None
    """Whether the step holds; None where nobody can tell."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One problem with its gold solution."""

    id: str
    prompt: str
    solution: str = ""
    answer: str = ""
    family: str = ""
    split: str = ""
    benchmark: str = ""
    steps: tuple[Step, ...] = ()
    """Gold steps, in order; the answer line is not one of them."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Every other field of the record, as read."""


@dataclass(frozen=True)
class Benchmark:
    """The records of one split, and what identifies the bytes they came from."""

    name: str
    split: str
    records: tuple[Record, ...]
    digest: str
    """sha256 of the file."""


def read_benchmark(
    name_or_path: str | Path,
    *,
    split: str = "test",
    prompt_field: str = "prompt",
    solution_field: str = "solution",
    answer_field: str = "answer",
    limit: int | None = None,
) -> Benchmark:
    """Read a shipped benchmark by its name, or any JSON lines by their path.

    A line is one object. Fields that `Record` does not have go to its ``meta``, and so do ``steps`` that are not spans of the
    solution. A step is correct unless it says otherwise.

    Args:
        name_or_path: ``stepbench``, a folder of ``<split>.jsonl`` files, or one file, whose ``split`` is then not asked for.
        split: Which file of a folder.
        prompt_field: The field that holds the problem.
        solution_field: The field that holds the worked solution; it may be missing.
        answer_field: The field that holds the answer; it may be missing.
        limit: At most so many records, the first of each family in turn.

    Raises:
        BenchmarkError: Nothing there, an unknown split, or a line that is no record; the message names the line.
        UsageError: A limit below one.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} leaves no records; give 1 or more")
    try:
        path, defaults = _find(name_or_path, split)
        payload = path.read_bytes()
    except OSError as error:
        raise BenchmarkError(f"{_brief(str(name_or_path))} cannot be read: {error.strerror}") from error
    fields = {"prompt": prompt_field, "solution": solution_field, "answer": answer_field}
    records = _read_records(path, payload, fields, defaults)
    if not records:
        raise BenchmarkError(f"{path} holds no records; one JSON object a line is expected")
    digest = hashlib.sha256(payload).hexdigest()
    return Benchmark(records[0].benchmark, records[0].split, _first(records, limit), digest)


def _find(name_or_path: str | Path, split: str) -> tuple[Path, dict[str, str]]:
    """The file to read, and the benchmark and split of records that do not say theirs."""
    path = Path(name_or_path)
    if path.is_file():
        return path, {"benchmark": path.stem, "split": ""}
    folders = [path, *(home / name_or_path for home in _HOMES)]
    files = next((found for folder in folders if (found := sorted(folder.glob("*.jsonl")))), [])
    for file in files:
        if file.stem == split:
            return file, {"benchmark": file.resolve().parent.name, "split": split}
    if files:
        splits = [file.stem for file in files]
        raise BenchmarkError(f"{name_or_path} has no split {split!r}; these there are: {', '.join(splits)}")
    shipped = sorted({folder.name for home in _HOMES if home.is_dir() for folder in home.iterdir() if folder.is_dir()})
    expected = f"a .jsonl file, a folder of them, or a shipped benchmark ({', '.join(shipped) or 'none found'})"
    raise BenchmarkError(f"no benchmark {_brief(str(name_or_path))}: expected {expected}")


def _read_records(path: Path, payload: bytes, fields: Mapping[str, str], defaults: Mapping[str, str]) -> list[Record]:
    records, places = [], dict[str, int]()
    for number, line in enumerate(payload.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        record = _record(where, _read_object(where, line), fields, {"id": f"{path.stem}-{number:04d}", **defaults})
        if record.id in places:
            raise BenchmarkError(f"{where}: id {_brief(record.id)} was used on line {places[record.id]}; ids must differ")
        places[record.id] = number
        records.append(record)
    return records


def _read_object(where: str, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{where}: not UTF-8 text at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{where}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise BenchmarkError(f"{where}: a JSON {type(values).__name__} where an object was expected")
    return values


def _record(where: str, values: dict[str, Any], fields: Mapping[str, str], defaults: Mapping[str, str]) -> Record:
    if fields["prompt"] not in values:
        found = ", ".join([*map(_brief, list(values)[:_LISTED]), *["..."][: len(values) > _LISTED]]) or "nothing"
        raise BenchmarkError(f"{where}: no field {_brief(fields['prompt'])} (found: {found}); name it with --prompt-field")
    rest = dict(values)
    texts = {field: _text(where, key, rest.pop(key, None)) for field, key in fields.items()}
    texts["family"] = _text(where, "family", rest.pop("family", None))
    texts |= {field: _text(where, field, rest.pop(field, None)) or default for field, default in defaults.items()}
    steps = rest.pop("steps") if _are_spans(rest.get("steps")) else []
    if not texts["prompt"]:
        raise BenchmarkError(f"{where}: field {_brief(fields['prompt'])} is empty; a prompt is expected")
    return Record(**texts, steps=tuple(_step(where, step, texts["solution"]) for step in steps), meta=rest)


def _text(where: str, key: str, value: object) -> str:
    if isinstance(value, list | dict):
        raise BenchmarkError(f"{where}: field {_brief(key)} is a JSON {type(value).__name__}; text is expected")
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BenchmarkError(f"{where}: field {_brief(key)} has half of a surrogate pair, which is no text")
    return text


def _are_spans(steps: object) -> bool:
    return isinstance(steps, list) and bool(steps) and all(isinstance(step, dict) and "start" in step for step in steps)


def _step(where: str, values: dict[str, Any], solution: str) -> Step:
    match {"inputs": [], "result": "", "correct": True} | values:
        case {
            "label": str(label),
            "start": int(start),
            "stop": int(stop),
            "inputs": list(inputs),
            "result": str(result),
            "correct": bool() | None as correct,
        } if 0 <= start < stop <= len(solution):
            uses, text = tuple(map(str, inputs)), solution[start:stop].removesuffix("\n")
            return Step(label=label, text=text, start=start, stop=stop, inputs=uses, result=result, correct=correct)
    expected = f"a label, a start and a stop within the {len(solution)} characters of the solution, and a list of inputs if any"
    raise BenchmarkError(f"{where}: step {_brief(json.dumps(values))} does not have {expected}")


def _first(records: list[Record], limit: int | None) -> tuple[Record, ...]:
    """The first records of each family in turn, in the order of the file."""
    if limit is None or limit >= len(records):
        return tuple(records)
    met: Counter[str] = Counter()
    turns = []
    for place, record in enumerate(records):
        turns.append((met[record.family], place))
        met[record.family] += 1
    return tuple(records[place] for place in sorted(place for _, place in sorted(turns)[:limit]))


def _brief(text: str) -> str:
    """A quoted text short enough for a message."""
    return json.dumps(text if len(text) <= _QUOTED else text[:_QUOTED] + "...", ensure_ascii=False)
