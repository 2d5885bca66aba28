"""A solution put together from its steps, so that the spans of the steps are exact in it."""

from collections.abc import Iterable
from typing import NamedTuple

from ling_probe.benchmarks.operations import OTHER
from ling_probe.benchmarks.record import Step


class Said(NamedTuple):
    """One step before its place is known."""

    text: str
    label: str = OTHER
    inputs: tuple[str, ...] = ()
    result: str = ""
    correct: bool | None = True


class Written(NamedTuple):
    """A text and its steps."""

    solution: str
    steps: tuple[Step, ...]


def write(said: Iterable[Said], *, between: str = "\n", end: str = "") -> Written:
    r"""Join steps, and let each own the characters up to the next.

    >>> text, (first, second) = write([Said("a"), Said("b")], end="answer: c\n")
    >>> text, text[first.start : first.stop], text[second.start : second.stop]
    ('a\nb\nanswer: c\n', 'a\n', 'b\n')
    """
    parts = [each for each in said if each.text.strip()]
    steps, solution = list[Step](), ""
    for place, each in enumerate(parts):
        start = len(solution)
        solution += each.text + (between if end or place < len(parts) - 1 else "")
        steps.append(
            Step(
                label=each.label, text=each.text, start=start, stop=len(solution), inputs=each.inputs, result=each.result,
                correct=each.correct,
            )
        )  # fmt: skip
    return Written(solution + end, tuple(steps))


def answer_line(answer: str) -> str:
    """The line that ends a solution whose source keeps the answer apart from it."""
    return f"answer: {answer}\n"
