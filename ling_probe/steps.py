"""From a text to its reasoning steps and its answer, and from a step's characters to tokens."""

from bisect import bisect_left
from collections.abc import Sequence

from ling_probe.benchmarks import Record, Step, answer_of, label_of
from ling_probe.stepbench import OTHER, Reading, read_line

_STEPBENCH = "stepbench"


def segment(record: Record, completion: str) -> tuple[Step, ...]:
    """Cut a completion into steps, one a line; blank lines and lines that only give the answer are none.

    The record's own solution has the record's steps. Lines of any other text are labelled by the stepbench grammar of the
    record's family, and each is correct if it holds by itself; or they are labelled as the record's format labels lines, with
    ``correct`` None. All other lines are labelled ``other``.
    """
    if record.steps and completion == record.solution:
        return record.steps
    steps, start, answer = [], 0, answer_of(record.format).line
    for line in completion.split("\n"):
        stop = min(start + len(line) + 1, len(completion))
        if line.strip() and not answer.match(line):
            steps.append(_step(record, line, start, stop))
        start = stop
    return tuple(steps)


def answer_start(record: Record, completion: str) -> int | None:
    """First character of what the completion says is its answer, in a form of the record's format; None if it says none."""
    found = answer_of(record.format).marked(completion)
    return found.start if found else None


def judge(record: Record, completion: str, *, generated: bool) -> tuple[str, bool | None]:
    """What a completion answers, and whether that is right; None where there is no answer to compare with.

    A solution that was only read is not judged; what its source says of it is passed on.
    """
    if not generated:
        return record.predicted, record.correct
    rule = answer_of(record.format)
    found = rule.find(completion)
    predicted = found.text if found else ""
    return predicted, rule.same(predicted, record.answer) if record.answer else None


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
    label_line = label_of(record.format)
    if record.benchmark == _STEPBENCH:
        reading = read_line(line, record.family, record.prompt)
    else:
        reading = Reading(*label_line(line)) if label_line else Reading(OTHER)
    label, inputs, result, correct = reading
    return Step(label=label, text=line, start=start, stop=stop, inputs=inputs, result=result, correct=correct)
