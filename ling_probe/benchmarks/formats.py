"""Every kind of record that can be read, one entry each: how it is known, read and judged.

A new kind is a function from an object to the fields of a `Record`, and a line in the table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ling_probe.benchmarks import logs, mathematics, reasoning
from ling_probe.benchmarks.answers import BOXED, LETTER, LINE, NUMBER, TAGGED, TRUTH, WORDS, YES_NO, Answer
from ling_probe.benchmarks.record import PLAIN
from ling_probe.benchmarks.values import listed
from ling_probe.errors import BenchmarkError, UsageError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """One kind of record."""

    name: str
    what: str
    """For a person who chooses."""
    needs: Mapping[str, Any]
    """Fields that a record must have, and their types."""
    read: Callable[[Values], dict[str, Any]]
    """From the object to fields of `Record`; it raises `BenchmarkError` without saying where."""
    answer: Answer
    fits: Callable[[Values], bool] = lambda _values: True
    """Whether an object with the needed fields is of this kind; it tells apart kinds that share their fields."""
    uses: Sequence[str] = ()
    """Optional fields that end in the record, and so not in its ``meta``."""
    repeats: Callable[[Values, Values], bool] = lambda _values, _first: False
    """Whether an object, beside the first of the source, says again what was read already."""

    def lacks(self, values: Values) -> list[str]:
        """Needed fields that are missing or of another type."""
        return [name for name, kind in self.needs.items() if not isinstance(values.get(name), kind)]


_TEXT = (str, int, float)
_QA = {"question": str, "answer": str}

_ALL = (
    Format(
        "gsm8k", "GSM8K: question, and an answer that ends in #### and a number", _QA, mathematics.read_gsm8k, NUMBER,
        fits=mathematics.is_gsm8k,
    ),
    Format(
        "gsm8k-socratic", "GSM8K with a sub-question before each step", _QA, mathematics.read_gsm8k, NUMBER,
        fits=mathematics.is_socratic,
    ),
    Format(
        "svamp", "SVAMP: Body, Question, Equation, Answer", {"Body": str, "Question": str, "Equation": str, "Answer": _TEXT},
        mathematics.read_svamp, NUMBER, uses=("ID",),
    ),
    Format(
        "math", "MATH: problem and a solution with \\boxed{}", {"problem": str, "solution": str}, mathematics.read_math, BOXED,
        fits=mathematics.is_boxed, uses=("answer", "subject", "type"),
    ),
    Format(
        "math-qa", "MATH as question and an answer that is a solution with \\boxed{}", _QA, mathematics.read_math, BOXED,
        fits=mathematics.is_boxed, uses=("subject", "type"),
    ),
    Format(
        "processbench", "ProcessBench: a model's steps, and label, the first wrong one",
        {"problem": str, "steps": list, "label": int, "final_answer_correct": bool}, mathematics.read_processbench, BOXED,
        uses=("id",),
    ),
    Format(
        "bbh", "BIG-Bench Hard: input and target", {"input": str, "target": str}, reasoning.read_bbh, WORDS,
        fits=lambda values: "arguments" not in values and "output" not in values, uses=("_task", "task"),
    ),
    Format(
        "arc", "ARC: question with choices, answerKey", {"question": (str, dict), "answerKey": str}, reasoning.read_arc, LETTER,
        fits=lambda values: "choices" in (values if isinstance(values["question"], str) else values["question"]),
        uses=("id", "choices"),
    ),
    Format(
        "prontoqa", "ProntoQA: context, question, options, and the proof as explanation",
        {"context": str, "question": str, "options": list, "answer": str, "explanation": list}, reasoning.read_prontoqa, TRUTH,
        uses=("id",),
    ),
    Format(
        "entailmentbank", "EntailmentBank: facts, question, and the proof of a hypothesis",
        {"context": str, "question": str, "answer": str, "hypothesis": str, "proof": str}, reasoning.read_entailmentbank, WORDS,
        uses=("id",),
    ),
    Format(
        "folio", "FOLIO: premises, conclusion, label", {"premises": (str, list), "conclusion": str, "label": str},
        reasoning.read_folio, TRUTH,
    ),
    Format(
        "cladder", "CLadder: given_info, question, answer, and the reasoning by steps",
        {"given_info": str, "question": str, "answer": str}, reasoning.read_cladder, YES_NO,
        fits=lambda values: isinstance(values.get("meta"), dict), uses=("reasoning", "background", "_background"),
    ),
    Format(
        "reasoning-gym", "a problem that reasoning-gym generated", _QA, reasoning.read_gym, TAGGED,
        fits=lambda values: isinstance(values.get("metadata"), dict) and "source_dataset" in values["metadata"],
    ),
    Format(
        "inspect", "a sample of an Inspect log", {"id": _TEXT, "input": (str, list), "output": dict}, logs.read_inspect, WORDS,
        uses=("messages", "attachments"),
    ),
    Format(
        "lm-eval", "a sample that lm-evaluation-harness logged", {"doc_id": int, "arguments": (list, dict), "resps": list},
        logs.read_lm_eval, WORDS, fits=logs.is_lm_eval, repeats=logs.other_filter,
    ),
    Format(
        "text", "a document: nothing is asked, all of it is traced", {"text": str}, reasoning.read_text, LINE, uses=("id",),
        fits=lambda values: not {"question", "problem", "input", "label"} & set(values),
    ),
)  # fmt: skip
FORMATS: Mapping[str, Format] = {each.name: each for each in _ALL}
"""Every kind but ``plain``, by name."""


def answer_of(name: str) -> Answer:
    """How answers of a format are found and compared; a name that is no format's is plain."""
    return FORMATS[name].answer if name in FORMATS else LINE


def named(name: str) -> Format:
    """A format by its name.

    Raises:
        UsageError: There is none.
    """
    if name not in FORMATS:
        raise UsageError(f'no format "{name}"; these there are: {PLAIN}, {", ".join(FORMATS)}')
    return FORMATS[name]


def recognise(values: Values) -> Format:
    """The one format that an object's fields fit.

    Raises:
        BenchmarkError: None does, or several do.
    """
    fitting = [each for each in FORMATS.values() if not each.lacks(values) and each.fits(values)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise BenchmarkError(f"the record could be {' or '.join(each.name for each in fitting)}; say which with --format")
    raise BenchmarkError(
        f'no field "prompt", and no known format (found: {listed(values)}); '
        f"name it with --prompt-field, or the format with --format ({', '.join(FORMATS)})"
    )
