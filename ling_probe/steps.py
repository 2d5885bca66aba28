"""From a text to its reasoning steps, and from a step's characters to tokens."""

from bisect import bisect_left
from collections.abc import Sequence

from ling_probe.benchmarks import Record, Step
from ling_probe.stepbench import OTHER, Reading, read_line

_ANSWER = "answer:"
_STEPBENCH = "stepbench"


def segment(record: Record, completion: str) -> tuple[Step, ...]:
    """Cut a completion into steps, one a line; blank lines and the answer line are none.

    The record's own solution has the record's steps. Lines of any other text are labelled by the stepbench grammar of the
    record's family; each is correct if it holds by itself. Lines outside the grammar, and every line of another benchmark, are
    labelled ``other`` with ``correct`` None.
    """
    if record.steps and completion == record.solution:
        return record.steps
    steps, start = [], 0
    for line in completion.split("\n"):
        stop = min(start + len(line) + 1, len(completion))
        if line.strip() and not line.startswith(_ANSWER):
            steps.append(_step(record, line, start, stop))
        start = stop
    return tuple(steps)


def extract_answer(text: str) -> str | None:
    r"""What follows the last line that starts with ``answer:``; None where no line does.

    >>> extract_answer("7+5=12\nanswer: 12\n")
    '12'
    """
    answers = [line.removeprefix(_ANSWER).strip() for line in text.split("\n") if line.startswith(_ANSWER)]
    return answers[-1] if answers else None


def token_spans(steps: Sequence[Step], offsets: Sequence[tuple[int, int]], *, base: int = 0) -> list[tuple[int, int]]:
    """Token positions of each step, half-open.

    A token belongs to the step that holds its first character. A step that no token begins in has an empty span.

    Args:
        steps: Steps of a text, in order.
        offsets: First and one past the last character of each token of the same text.
        base: Position of the text's first token in its sequence.
    """
    starts = [start for start, _ in offsets]
    return [(base + bisect_left(starts, step.start), base + bisect_left(starts, step.stop)) for step in steps]


def _step(record: Record, line: str, start: int, stop: int) -> Step:
    reading = read_line(line, record.family, record.prompt) if record.benchmark == _STEPBENCH else Reading(OTHER)
    label, inputs, result, correct = reading
    return Step(label=label, text=line, start=start, stop=stop, inputs=inputs, result=result, correct=correct)
