"""The splits of stepbench: an endless training stream and four fixed files."""

import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from ling_probe.benchmarks import Record
from ling_probe.stepbench.pairs import pair_records
from ling_probe.stepbench.problem import FAMILIES, SHIPPED, generate

SHIPPED_PER_FAMILY = 300


def train_records(family: str, seed: int = 0) -> Iterator[Record]:
    """Training problems of one family without end; none has the prompt of a shipped record."""
    shipped = shipped_prompts(family)
    return (record for index in count() if (record := generate(family, "train", index, seed)).prompt not in shipped)


def shipped_records(split: str, seed: int = 0) -> list[Record]:
    """The records of a shipped split: 300 a family, no prompt twice."""
    return [record for family in FAMILIES for record in _distinct(family, split, seed)]


def write_shipped(folder: str | Path) -> list[Path]:
    """Write one ``<split>.jsonl`` per shipped split; the bytes are always the same."""
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


def _distinct(family: str, split: str, seed: int) -> list[Record]:
    if split == "pairs":
        return pair_records(family, SHIPPED_PER_FAMILY // 4, seed)
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
