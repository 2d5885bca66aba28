"""A problem before it is a record, and the arithmetic that two families share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ling_probe.benchmarks import Step
from ling_probe.stepbench.draw import Draw

LARGEST = 99
"""No number in any text is larger, none is negative."""
_REACH = 20
"""The most that one step adds or takes away; with larger terms a small model spends its capacity on sums."""
SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}


class Line(NamedTuple):
    """One solution line: its label, its text, what it uses and what it establishes."""

    label: str
    text: str
    inputs: tuple[str, ...]
    result: str


@dataclass(frozen=True)
class Draft:
    """A problem as a family writes it."""

    prompt: str
    lines: Sequence[Line]
    answer: str

    @property
    def solution(self) -> str:
        """The lines, then the answer."""
        return "".join(f"{line.text}\n" for line in self.lines) + f"answer: {self.answer}\n"

    @property
    def steps(self) -> tuple[Step, ...]:
        """The lines with their places in the solution."""
        steps, start = [], 0
        for label, text, inputs, result in self.lines:
            stop = start + len(text) + 1
            steps.append(Step(label=label, text=text, start=start, stop=stop, inputs=inputs, result=result, correct=True))
            start = stop
        return tuple(steps)


class Operation(NamedTuple):
    """One operation on a running value; on the left the constant comes first, as in ``9-value``."""

    label: str
    constant: int
    on_left: bool = False

    def terms(self, value: int) -> tuple[int, int]:
        """The two numbers in the order they are written."""
        return (self.constant, value) if self.on_left else (value, self.constant)

    def apply(self, value: int) -> int:
        """The value afterwards."""
        a, b = self.terms(value)
        return {"add": a + b, "subtract": a - b, "multiply": a * b, "divide": a // (b or 1)}[self.label]

    def equation(self, value: int) -> str:
        """The operation written out, as ``7+5=12``."""
        a, b = self.terms(value)
        return f"{a}{SYMBOLS[self.label]}{b}={self.apply(value)}"

    def line(self, value: int, before: str = "") -> Line:
        """The solution line of this operation, with a text before the equation."""
        a, b = self.terms(value)
        return Line(self.label, before + self.equation(value), (str(a), str(b)), str(self.apply(value)))


def draw_operation(draw: Draw, values: Sequence[int], labels: Sequence[str], *, on_left: bool = False) -> Operation:
    """An operation that keeps each of the values between 0 and 99 and whole; "add" or "subtract" always can."""
    options = [(label, constants) for label in labels if (constants := _constants(label, values, on_left))]
    label, constants = draw.choice(options)
    return Operation(label, draw.choice(constants), on_left)


def _constants(label: str, values: Sequence[int], on_left: bool) -> Sequence[int]:
    low, high = min(values), max(values)
    if label == "add":
        return range(1, min(_REACH, LARGEST - high) + 1)
    if label == "multiply":
        return range(2, min(9, LARGEST // high) + 1) if low else ()
    if label == "subtract":
        return range(high, min(LARGEST, low + _REACH) + 1) if on_left else range(1, min(_REACH, low) + 1)
    if on_left:
        return range(low, LARGEST + 1, low) if 2 <= low == high <= 9 else ()
    return [c for c in range(2, 10) if low and all(value % c == 0 for value in values)]
