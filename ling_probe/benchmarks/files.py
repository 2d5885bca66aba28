"""Local files to rows: JSON lines, JSON, plain text, and logs of Inspect; and where shipped benchmarks are."""

import codecs
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ling_probe.benchmarks.archive import read_header, read_samples
from ling_probe.benchmarks.source import Row, Source, load_json, load_object, rows_of
from ling_probe.benchmarks.values import brief, listed, object_of, text_of
from ling_probe.errors import BenchmarkError

_PACKAGE = Path(__file__).resolve().parents[1]
_HOMES = (_PACKAGE.parent / "datasets", _PACKAGE / "shipped" / "datasets")


def file_source(name_or_path: str | Path, split: str) -> Source:
    """A shipped benchmark, a folder of ``<split>.jsonl`` files, or one file, by the ending of its name.

    Raises:
        BenchmarkError: Nothing there, an unknown split, or a file that cannot be read as what its ending says.
    """
    try:
        path, name, split = _find(name_or_path, split)
        if path.suffix == ".eval":
            return _archive_source(path)
        payload = path.read_bytes()
    except OSError as error:
        raise BenchmarkError(f"{brief(str(name_or_path))} cannot be read: {error.strerror}") from error
    digest, payload = hashlib.sha256(payload).hexdigest(), payload.removeprefix(codecs.BOM_UTF8)
    source = partial(Source, str(path), name, split, path.stem, digest)
    if path.suffix == ".txt":
        values = {"text": _text(str(path), payload)}
        return source(lambda: iter([Row(str(path), 1, lambda: values)]), "text")
    if path.suffix == ".json":
        return _json_source(path, load_json(str(path), payload), digest)
    return source(lambda: _lines(path, payload))


def _find(name_or_path: str | Path, split: str) -> tuple[Path, str, str]:
    """The file to read, and the benchmark and split of records that do not say theirs."""
    path = Path(name_or_path)
    if path.is_file():
        return path, path.stem, ""
    folders = [path, *(home / name_or_path for home in _HOMES)]
    files = next((found for folder in folders if (found := sorted(folder.glob("*.jsonl")))), [])
    for file in files:
        if file.stem == split:
            return file, file.resolve().parent.name, split
    if files:
        splits = [file.stem for file in files]
        raise BenchmarkError(f"{name_or_path} has no split {split!r}; these there are: {', '.join(splits)}")
    shipped = sorted({folder.name for home in _HOMES if home.is_dir() for folder in home.iterdir() if folder.is_dir()})
    kinds = "a .jsonl file, a folder of them, a .json, .txt or .eval file, hf:OWNER/DATASET, gym:TASK"
    expected = f"{kinds}, or a shipped benchmark ({', '.join(shipped) or 'none found'})"
    raise BenchmarkError(f"no benchmark {brief(str(name_or_path))}: expected {expected}")


def _lines(path: Path, payload: bytes) -> Iterator[Row]:
    for number, line in enumerate(payload.split(b"\n"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield Row(where, number, partial(load_object, where, line))


def _text(where: str, payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{where}: not UTF-8 text at byte {error.start}") from error


def _json_source(path: Path, value: Any, digest: str) -> Source:
    """A list of records, the ``examples`` of BIG-Bench Hard, or a log of Inspect."""
    match value:
        case {"eval": dict(evaluated), "samples": list(samples)}:
            return _log_source(path, evaluated, digest, partial(rows_of, str(path), samples, word="sample"))
        case list(records) | {"examples": list(records)}:
            return Source(str(path), path.stem, "", path.stem, digest, partial(rows_of, str(path), records))
    found = f"fields {listed(value)}" if isinstance(value, dict) else f"a JSON {type(value).__name__}"
    raise BenchmarkError(
        f"{path} holds {found}; a list of records, examples, or an Inspect log with eval and samples is expected"
    )


def _archive_source(path: Path) -> Source:
    evaluated = object_of(read_header(path), "eval")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _log_source(path, evaluated, digest, partial(read_samples, path))


def _log_source(path: Path, evaluated: dict[str, Any], digest: str, rows: Any) -> Source:
    """A log is named by its task, so that logs of one task by several models can be set side by side."""
    return Source(str(path), text_of(evaluated, "task") or path.stem, "", path.stem, digest, rows, "inspect")
