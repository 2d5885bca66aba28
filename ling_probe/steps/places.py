"""Steps and the answer of a text as places in its tokens and characters."""

from bisect import bisect_left
from collections.abc import Sequence

from ling_probe.benchmarks import Record, Step, answer_of


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
