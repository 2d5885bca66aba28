"""The splits of stepbench: an endless training stream and three fixed files."""

import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from ling_probe.benchmarks import Record
from ling_probe.errors import UsageError
from ling_probe.stepbench import arithmetic, causal, deduction
from ling_probe.stepbench.draft import Draft
from ling_probe.stepbench.draw import Draw

_FAMILIES = {"arithmetic": arithmetic, "deduction": deduction, "causal": causal}
FAMILIES = tuple(_FAMILIES)
SHIPPED = ("test", "longer", "novel-names")
SPLITS = ("train", *SHIPPED)
SHIPPED_PER_FAMILY = 300
_LONGER = range(7, 10)


def generate(family: str, split: str, index: int, seed: int = 0) -> Record:
    """One problem, the same for the same arguments on every machine and Python version.

    Forms take turns with the index, and within a form so do difficulties.

    Raises:
        UsageError: No such family or split.
    """
    cells = _cells(family, split)
    form, difficulty = cells[index % len(cells)]
    draw = Draw(seed, family, split, index)
    draft = _FAMILIES[family].draft(draw, form, difficulty, held_out=split == "novel-names")
    return _record(draft, family, split, index, form, difficulty)


def train_records(family: str, seed: int = 0) -> Iterator[Record]:
    """Training problems of one family without end; none has the prompt of a shipped record."""
    shipped = shipped_prompts(family)
    return (record for index in count() if (record := generate(family, "train", index, seed)).prompt not in shipped)


def shipped_records(split: str, seed: int = 0) -> list[Record]:
    """The records of a shipped split: 300 a family, no prompt twice."""
    return [record for family in FAMILIES for record in _distinct(family, split, seed)]


def write_shipped(folder: str | Path) -> list[Path]:
    """Write ``test.jsonl``, ``longer.jsonl`` and ``novel-names.jsonl``; the bytes are always the same."""
    paths = []
    for split in SHIPPED:
        path = Path(folder) / f"{split}.jsonl"
        lines = (json.dumps(to_json(record)) for record in shipped_records(split))
        path.write_bytes("".join(f"{line}\n" for line in lines).encode())
        paths.append(path)
    return paths


def to_json(record: Record) -> dict[str, Any]:
    """The record as one line of a shipped file holds it."""
    steps = [
        {"label": s.label, "text": s.text, "start": s.start, "stop": s.stop, "inputs": list(s.inputs), "result": s.result}
        for s in record.steps
    ]
    return {
        "id": record.id,
        "benchmark": record.benchmark,
        "family": record.family,
        "split": record.split,
        **record.meta,
        "prompt": record.prompt,
        "solution": record.solution,
        "steps": steps,
        "answer": record.answer,
    }


def _record(draft: Draft, family: str, split: str, index: int, form: str, difficulty: int) -> Record:
    return Record(
        id=f"{family}-{split}-{index:04d}",
        prompt=draft.prompt,
        solution=draft.solution,
        answer=draft.answer,
        family=family,
        split=split,
        benchmark="stepbench",
        steps=draft.steps,
        meta={"form": form, "difficulty": difficulty, "n_steps": len(draft.lines)},
    )


@lru_cache
def _cells(family: str, split: str) -> tuple[tuple[str, int], ...]:
    """Form and difficulty by index; as many of each form, and within it of each difficulty."""
    if family not in _FAMILIES:
        raise UsageError(f"stepbench has no family {family!r}; these there are: {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise UsageError(f"stepbench has no split {split!r}; these there are: {', '.join(SPLITS)}")
    # Expressions hold no names, so under novel-names they would only repeat the test split.
    forms = {f: d for f, d in _FAMILIES[family].FORMS.items() if split != "novel-names" or not f.startswith("symbolic")}
    levels = [list(_LONGER if split == "longer" else difficulties) for difficulties in forms.values()]
    rounds = range(60)  # a multiple of every number of difficulties
    return tuple((form, level[turn % len(level)]) for turn in rounds for form, level in zip(forms, levels, strict=True))


def _distinct(family: str, split: str, seed: int) -> list[Record]:
    found: dict[str, Record] = {}
    indices = count()
    while len(found) < SHIPPED_PER_FAMILY:
        record = generate(family, split, next(indices), seed)
        found.setdefault(record.prompt, record)
    return list(found.values())


@lru_cache
def shipped_prompts(family: str) -> frozenset[str]:
    """Every prompt of a family's shipped records; training shows none of them."""
    return frozenset(record.prompt for split in SHIPPED for record in _distinct(family, split, 0))
