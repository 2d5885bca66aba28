"""From the name of a benchmark to its records."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ling_probe.benchmarks.files import file_source
from ling_probe.benchmarks.formats import Format, named, recognise
from ling_probe.benchmarks.hub import GYM, HUB, gym_source, hub_source
from ling_probe.benchmarks.record import PLAIN, Benchmark, Record, Step
from ling_probe.benchmarks.source import Row, Source
from ling_probe.benchmarks.values import brief, listed, text_of
from ling_probe.errors import BenchmarkError, UsageError

_FIELDS = {"prompt": "prompt", "solution": "solution", "answer": "answer"}
_TOLD = 5
"""Messages kept of records that were skipped."""


def read_benchmark(
    name_or_path: str | Path,
    *,
    split: str = "test",
    format: str | None = None,
    prompt_field: str = "prompt",
    solution_field: str = "solution",
    answer_field: str = "answer",
    limit: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
) -> Benchmark:
    """Read a benchmark by its name or its path.

    What a record is, is known by its fields: one with a ``prompt`` is plain, any other must fit one of `FORMATS`. The first
    record decides for all. Fields of a plain record that `Record` does not have go to its ``meta``, and so do ``steps`` that
    are not spans of the solution; a step is correct unless it says otherwise.

    Args:
        name_or_path: ``stepbench``, a folder of ``<split>.jsonl`` files, or one file, whose ``split`` is then not asked for:
            JSON lines, a ``.json`` list, a ``.txt`` document, an Inspect log (``.eval``, ``.json``). Or
            ``hf:OWNER/DATASET[:CONFIG[:SPLIT]]`` and ``gym:TASK[:size=N][:seed=N]``, which need the extras ``hub`` and ``gym``.
        split: Which file of a folder, or which split of a dataset.
        format: A name in `FORMATS`, or ``plain``; by default it is recognised.
        prompt_field: The field that holds the problem of a plain record.
        solution_field: The field that holds the worked solution; it may be missing.
        answer_field: The field that holds the answer; it may be missing.
        limit: At most so many records, the first of each family in turn.
        on_error: What a record that cannot be read does: ``stop`` raises; ``skip`` leaves it out and counts it.

    Raises:
        BenchmarkError: Nothing there, an unknown split, or a line that is no record; the message names the line.
        UsageError: A limit below one, an unknown format, or names of fields for a format that has its own.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} leaves no records; give 1 or more")
    if on_error not in ("stop", "skip"):
        raise UsageError(f'a record that cannot be read can "stop" or "skip", not {brief(on_error)}')
    fields = {"prompt": prompt_field, "solution": solution_field, "answer": answer_field}
    if fields != _FIELDS and format not in (None, PLAIN):
        raise UsageError(f"format {format} knows its fields; name fields only for records of no known format")
    source = _source(name_or_path, split)
    reader = _Reader(source, PLAIN if fields != _FIELDS else format or source.format, fields, skip=on_error == "skip")
    records = list(reader.records())
    if not records:
        reason = f"; the first: {reader.problems[0]}" if reader.problems else "; one JSON object a line is expected"
        raise BenchmarkError(f"{source.place} holds no records{' that can be read' if reader.problems else ''}{reason}")
    first = records[0]
    return Benchmark(
        first.benchmark,
        first.split,
        _first(records, limit),
        source.digest,
        first.format,
        reader.skipped,
        tuple(reader.problems),
    )


def _source(name_or_path: str | Path, split: str) -> Source:
    name = str(name_or_path)
    if name.startswith(HUB):
        return hub_source(name, split)
    return gym_source(name) if name.startswith(GYM) else file_source(name_or_path, split)


@dataclass
class _Reader:
    """One pass over a source: what every record is, which ids were used, and what could not be read."""

    source: Source
    format: str | None
    """None until a record was recognised."""
    fields: Mapping[str, str]
    skip: bool
    first: dict[str, Any] | None = None
    places: dict[str, str] = field(default_factory=dict)
    skipped: int = 0
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.format not in (None, PLAIN):
            named(self.format)

    def records(self) -> Iterator[Record]:
        for row in self.source.rows():
            try:
                if (record := self._record(row)) is not None:
                    yield record
            except BenchmarkError as error:
                if not self.skip:
                    raise
                self.skipped += 1
                self.problems += [str(error)] if len(self.problems) < _TOLD else []

    def _record(self, row: Row) -> Record | None:
        """The record of a row; None where the row says again what was read."""
        values = row.load()
        try:
            chosen = self._choose(values)
            record = self._plain(row, values) if chosen is None else self._formatted(chosen, row, values)
        except BenchmarkError as error:
            raise BenchmarkError(f"{row.where}: {error}") from error
        if record is not None and record.id in self.places:
            raise BenchmarkError(f"{row.where}: id {brief(record.id)} was used on {self.places[record.id]}; ids must differ")
        if record is not None:
            self.places[record.id] = row.where.removeprefix(f"{self.source.place} ")
        return record

    def _choose(self, values: dict[str, Any]) -> Format | None:
        """What the source's records are, None for plain ones; the first record decides."""
        if self.format is None:
            self.format = PLAIN if _FIELDS["prompt"] in values else recognise(values).name
        self.first = self.first or values
        return None if self.format == PLAIN else named(self.format)

    def _defaults(self, row: Row) -> dict[str, str]:
        return {"id": f"{self.source.stem}-{row.number:04d}", "benchmark": self.source.name, "split": self.source.split}

    def _formatted(self, chosen: Format, row: Row, values: dict[str, Any]) -> Record | None:
        if lacking := chosen.lacks(values):
            raise BenchmarkError(f"field {brief(lacking[0])} is not as {chosen.name} has it (found: {listed(values)})")
        if self.first is not None and chosen.repeats(values, self.first):
            return None
        found = chosen.read(values)
        own = text_of(values, "id") if "id" in chosen.uses else text_of(values, "ID") if "ID" in chosen.uses else ""
        meta = {name: value for name, value in values.items() if name not in chosen.needs and name not in chosen.uses}
        parts = self._defaults(row) | ({"id": own} if own else {}) | {"meta": meta, "format": chosen.name} | found
        if not parts["prompt"].strip():
            raise BenchmarkError("the prompt is empty; there is nothing to run")
        return Record(**parts)

    def _plain(self, row: Row, values: dict[str, Any]) -> Record:
        if self.fields["prompt"] not in values:
            raise BenchmarkError(
                f"no field {brief(self.fields['prompt'])} (found: {listed(values)}); name it with --prompt-field"
            )
        texts = {name: text_of(values, key) for name, key in self.fields.items()}
        texts["family"] = text_of(values, "family")
        texts |= {name: text_of(values, name) or default for name, default in self._defaults(row).items()}
        if not texts["prompt"]:
            raise BenchmarkError(f"field {brief(self.fields['prompt'])} is empty; a prompt is expected")
        spans = values.get("steps")
        steps = [_step(step, texts["solution"]) for step in spans] if _are_spans(spans) and spans else []
        used = {*self.fields.values(), "family", *self._defaults(row), *(["steps"] if steps else [])}
        parts: dict[str, Any] = {**texts, "meta": {name: value for name, value in values.items() if name not in used}}
        return Record(**parts, steps=tuple(steps))


def _are_spans(steps: object) -> bool:
    return isinstance(steps, list) and bool(steps) and all(isinstance(step, dict) and "start" in step for step in steps)


def _step(values: dict[str, Any], solution: str) -> Step:
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
    raise BenchmarkError(f"step {brief(str(values))} does not have {expected}")


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
