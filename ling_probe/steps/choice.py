"""From a text to its reasoning steps, by the segmenter that was chosen."""

import re
from collections.abc import Iterable, Sequence

from ling_probe.benchmarks import Record, Step, answer_of
from ling_probe.errors import UsageError
from ling_probe.stepbench import read_line
from ling_probe.steps.boundaries import SEGMENTERS, cut_text
from ling_probe.steps.labels import label_text

CHOICES = ("auto", "annotated", *SEGMENTERS)
"""Ways to find the steps of a text."""
RULES_VERSION = 1
"""Of the rules that cut and label a text; it grows with every change to what they give."""
_STEPBENCH = "stepbench"
_REMEDY = "find them by auto, rules, sentences or lines"


def segment(record: Record, completion: str, *, steps: str = "auto") -> tuple[Step, ...]:
    """Cut a completion into steps.

    ``annotated`` steps are the record's own where the completion is its solution. Any other text about a stepbench problem is
    read line by line in stepbench's grammar, which knows whether a line holds; blank lines and lines that only give the answer
    are no steps. ``rules``, ``sentences`` and ``lines`` cut any text (`boundaries`) and label it (`labels`): their steps hold
    every character, and are correct as far as that follows from annotated ones. ``auto`` takes what is annotated, or ``rules``.

    Raises:
        UsageError: No such segmenter, or annotated steps were asked for and there are none.
    """
    check_steps(steps)
    if steps in ("auto", "annotated"):
        if record.steps and completion == record.solution:
            return record.steps
        if record.benchmark == _STEPBENCH:
            return _stepbench(record, completion)
        if steps == "annotated":
            raise UsageError(f"nobody annotated the steps of this text of record {record.id}; {_REMEDY}")
    answer, known = answer_of(record.format).line, record.steps if completion == record.solution else ()
    return tuple(
        _labelled(completion[start:stop], start, answer, _follows(known, start, stop))
        for start, stop in cut_text(completion, "rules" if steps == "auto" else steps, answer)
    )


def check_steps(steps: str, records: Iterable[Record] = (), *, generated: bool = False) -> None:
    """Refuse what cannot be done before a model is run.

    Raises:
        UsageError: No such way to find steps, or a record whose text, its own or a generated one, has no annotated steps.
    """
    if steps not in CHOICES:
        raise UsageError(f'no way to find steps is called "{steps}"; these there are: {", ".join(CHOICES)}')
    if steps == "annotated":
        bare = next((each for each in records if each.benchmark != _STEPBENCH and (generated or not each.steps)), None)
        if bare:
            text = "a text that a model writes" if generated else f"the solution of record {bare.id}"
            raise UsageError(f"nobody annotated the steps of {text}; {_REMEDY}")


def _labelled(said: str, start: int, answer: re.Pattern[str], correct: bool | None) -> Step:
    label, inputs, result = label_text(said, answer)
    stop = start + len(said)
    return Step(label=label, text=said.strip(), start=start, stop=stop, inputs=inputs, result=result, correct=correct)


def _follows(known: Sequence[Step], start: int, stop: int) -> bool | None:
    """Whether a span is correct: as a part of steps that are, it is; around a whole one that is not, it is not."""
    touched = [each for each in known if each.start < stop and start < each.stop]
    if any(each.correct is False and start <= each.start and each.stop <= stop for each in touched):
        return False
    return True if touched and all(each.correct for each in touched) else None


def _stepbench(record: Record, completion: str) -> tuple[Step, ...]:
    steps, start, answer = [], 0, answer_of(record.format).line
    for line in completion.split("\n"):
        stop = min(start + len(line) + 1, len(completion))
        if line.strip() and not answer.match(line):
            label, inputs, result, correct = read_line(line, record.family, record.prompt)
            steps.append(Step(label=label, text=line, start=start, stop=stop, inputs=inputs, result=result, correct=correct))
        start = stop
    return tuple(steps)
