r"""Grade-school and competition mathematics: GSM8K, SVAMP, MATH, ProcessBench.

**Calculator marks of GSM8K are taken out** of what a model reads. ``48/2 = <<48/2=24>>24`` was written for a decoder that calls
a calculator at ``=``; no chat model writes it, and it doubles every result, so that the second one costs nothing to predict and
would flatter any count by token. What a mark says is not lost: it labels the step. The separator `` ** `` of the socratic
variant becomes the end of a line for the same reason, and the sub-question a step of its own.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ling_probe.benchmarks.answers import NUMBER, find_boxed
from ling_probe.benchmarks.operations import OTHER, read_operations
from ling_probe.benchmarks.solution import Said, write
from ling_probe.benchmarks.values import brief, text_of, texts_of
from ling_probe.errors import BenchmarkError

_MARK = re.compile(r"<<([^<>]*)>>")
_ASKS = " ** "
_FINAL = re.compile(r"^####", re.MULTILINE)


def is_gsm8k(values: Mapping[str, Any]) -> bool:
    """Whether the answer ends in ``#### 18`` and asks no sub-questions."""
    return bool(_FINAL.search(values["answer"])) and _ASKS not in values["answer"]


def is_socratic(values: Mapping[str, Any]) -> bool:
    """Whether the answer ends in ``#### 18`` and its lines ask sub-questions."""
    return bool(_FINAL.search(values["answer"])) and _ASKS in values["answer"]


def is_boxed(values: Mapping[str, Any]) -> bool:
    """Whether the worked solution boxes its answer."""
    return "boxed" in values.get("solution", values.get("answer", ""))


def read_gsm8k(values: Mapping[str, Any]) -> dict[str, Any]:
    """One step a line, labelled by its calculator marks, or if it has none by the equations it writes."""
    worked = text_of(values, "answer")
    final = _FINAL.search(worked)
    if final is None:
        raise BenchmarkError(f'field "answer" ends in {brief(worked[-30:])}; GSM8K ends its solutions with #### and a number')
    steps = (step for line in worked[: final.start()].split("\n") for step in _gsm8k_steps(line))
    last = worked[final.start() :]
    solution, spans = write(steps, end=last)
    found = NUMBER.find(last)
    answer = found.text if found else last.removeprefix("####").strip()
    return {"prompt": text_of(values, "question") + "\n", "solution": solution, "steps": spans, "answer": answer}


def _gsm8k_steps(line: str) -> Iterator[Said]:
    question, asks, statement = line.rpartition(_ASKS)
    if asks:
        yield Said(question.strip(), "ask")
    marks, text = "\n".join(_MARK.findall(statement)), _MARK.sub("", statement)
    by_marks = read_operations(marks)
    yield Said(text, *(by_marks if by_marks.label != OTHER else read_operations(text)))


def read_svamp(values: Mapping[str, Any]) -> dict[str, Any]:
    """One step: the equation of the problem, labelled by its operations."""
    answer = re.sub(r"\.0$", "", text_of(values, "Answer"))
    equation = f"{text_of(values, 'Equation').strip()} = {answer}"
    solution, steps = write([Said(equation, *read_operations(equation))], end=f"#### {answer}")
    body = text_of(values, "Body").strip()
    joint = "" if body.endswith((".", "?", "!", ",")) else ","
    prompt = f"{body}{joint} {text_of(values, 'Question').strip()}\n"
    return {"prompt": prompt, "solution": solution, "steps": steps, "answer": answer}


def read_math(values: Mapping[str, Any]) -> dict[str, Any]:
    r"""The worked solution as written; its answer is the field for it, or what the last ``\boxed{}`` holds."""
    by_question = "question" in values
    worked = text_of(values, "answer" if by_question else "solution")
    answer = "" if by_question else text_of(values, "answer")
    if not answer:
        found = find_boxed(worked)
        answer = found.text if found else ""
    family = text_of(values, "subject") or text_of(values, "type")
    return {
        "prompt": text_of(values, "question" if by_question else "problem") + "\n",
        "solution": worked,
        "answer": answer,
        "family": family,
    }


def read_processbench(values: Mapping[str, Any]) -> dict[str, Any]:
    """A model's own steps; those before the first wrong one hold, it does not, and nobody looked at the ones after it.

    A step is a paragraph that does many things, so its label is ``other``; what counts here is ``correct``.
    """
    texts, wrong = texts_of(values, "steps"), values["label"]
    if not -1 <= wrong < len(texts):
        raise BenchmarkError(f'field "label" is {wrong}; the first wrong of {len(texts)} steps is expected, or -1 for none')
    verdicts = [True if wrong < 0 or place < wrong else False if place == wrong else None for place in range(len(texts))]
    steps = (Said(text, correct=verdict) for text, verdict in zip(texts, verdicts, strict=True))
    solution, spans = write(steps, between="\n\n")
    found = find_boxed(solution)
    return {
        "prompt": text_of(values, "problem") + "\n",
        "solution": solution,
        "steps": spans,
        "family": text_of(values, "id").rpartition("-")[0],
        "predicted": found.text if found else "",
        "correct": values["final_answer_correct"],
    }
