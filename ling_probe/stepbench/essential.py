"""The same problem without the premises that its solution does not use: what a curriculum begins with."""

import re
from dataclasses import replace

from ling_probe.benchmarks import Record

_QUANTIFIER = re.compile(r"^(?:each|any) ")


def essential(record: Record) -> Record:
    """A deduction or causal record with only the premises its solution cites; any other record as it is.

    >>> from ling_probe.stepbench import generate
    >>> essential(generate("deduction", "train", 0)).prompt.count("not")
    0
    """
    if record.family not in ("deduction", "causal"):
        return record
    opening, rest = record.prompt.split(": ", 1)
    premises, question = rest.split(" question: ", 1)
    lines = record.solution.splitlines()
    kept = [each for each in premises.removesuffix(".").split(". ") if _is_cited(each, lines)]
    return replace(record, prompt=f"{opening}: {'. '.join(kept)}. question: {question}")


def _is_cited(premise: str, lines: list[str]) -> bool:
    subject = premise.split(" is ")[0]
    return (
        premise.startswith("we saw")
        or _QUANTIFIER.sub("every ", premise) in lines
        or f"given {premise}" in lines
        or any(line.startswith(f"then {subject} is ") for line in lines)
    )
