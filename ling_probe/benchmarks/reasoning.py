"""Benchmarks of other reasoning: proofs, causes, choices, puzzles.

Where a source keeps the answer apart from the worked solution, the solution a model reads ends in a line ``answer: X``, so that
the tokens of the answer are a segment of their own.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ling_probe.benchmarks.solution import Said, answer_line, write
from ling_probe.benchmarks.values import brief, object_of, text_of, texts_of
from ling_probe.errors import BenchmarkError

_OPTION = re.compile(r"\s*([A-Z])\)\s*(.*)")
_PROVEN = re.compile(r"\s*(.+?)\s*->\s*(hypothesis|int\d+)\s*(?::\s*(.*))?", re.DOTALL)
_CAUSAL = {
    "step0": "variables",
    "step1": "graph",
    "step2": "query",
    "step3": "estimand",
    "step4": "data",
    "step5": "calculate",
    "end": "conclude",
}
"""CLadder's own order of steps: name the variables, draw the graph, formalise the question, derive what to estimate, gather
what is given, calculate, compare."""


def read_bbh(values: Mapping[str, Any]) -> dict[str, Any]:
    """No worked solution: the answer line alone."""
    answer = text_of(values, "target")
    task = text_of(values, "_task") or text_of(values, "task")
    return {"prompt": text_of(values, "input") + "\n", "solution": answer_line(answer), "answer": answer, "family": task}


def read_arc(values: Mapping[str, Any]) -> dict[str, Any]:
    """The question and a line a choice; as ARC's authors publish it, or as the hub does."""
    question: Any = values["question"]
    stem, choices = (text_of(values, "question"), values.get("choices")) if isinstance(question, str) else (
        text_of(question, "stem"), question.get("choices"))  # fmt: skip
    lines = [f"{label}. {text}\n" for label, text in _choices(choices)]
    answer = text_of(values, "answerKey")
    return {"prompt": f"{stem}\n{''.join(lines)}", "solution": answer_line(answer) if answer else "", "answer": answer}


def _choices(choices: Any) -> Iterator[tuple[str, str]]:
    match choices:
        case {"text": list(texts), "label": list(labels)} if len(texts) == len(labels):
            yield from zip(map(str, labels), map(str, texts), strict=True)
        case [{"text": str(), "label": str()}, *_] if all({"text", "label"} <= set(each) for each in choices):
            yield from ((text_of(each, "label"), text_of(each, "text")) for each in choices)
        case _:
            raise BenchmarkError(f'field "choices" is {brief(str(choices))}; texts with their labels are expected')


def read_prontoqa(values: Mapping[str, Any]) -> dict[str, Any]:
    """The proof, one sentence a step: stated ones are premises, the others are inferred from those before.

    The answer is the option itself, True or False, and not its letter: the question asks for it.
    """
    context = text_of(values, "context")
    stated = {sentence.strip().rstrip(".") for sentence in context.split(". ")}
    steps = (Said(sentence, _proof_label(sentence, stated)) for sentence in texts_of(values, "explanation"))
    found = (_OPTION.fullmatch(option) for option in texts_of(values, "options"))
    options: dict[str, str] = {match[1]: match[2] for match in found if match}
    letter = text_of(values, "answer")
    if letter not in options:
        raise BenchmarkError(
            f'field "answer" is {brief(letter)}; one of the options {", ".join(options) or "(none)"} is expected'
        )
    solution, spans = write(steps, end=answer_line(options[letter]))
    prompt = f"{context}\n{text_of(values, 'question')}\n"
    return {"prompt": prompt, "solution": solution, "steps": spans, "answer": options[letter]}


def _proof_label(sentence: str, stated: set[str]) -> str:
    if sentence.strip().rstrip(".") in stated:
        return "premise"
    return "negation" if " not " in sentence else "modus-ponens"


def read_entailmentbank(values: Mapping[str, Any]) -> dict[str, Any]:
    """The facts and the question; the proof, one inference a step, ends in the hypothesis.

    The hypothesis is what the proof concludes, so it is no part of the prompt.
    """
    facts = re.sub(r"\s+(?=sent\d+:)", "\n", text_of(values, "context").strip())
    steps = [_entailment(part, text_of(values, "hypothesis")) for part in text_of(values, "proof").split(";") if part.strip()]
    answer = text_of(values, "answer")
    solution, spans = write(steps, end=answer_line(answer))
    prompt = f"{facts}\nquestion: {text_of(values, 'question')}\n"
    return {"prompt": prompt, "solution": solution, "steps": spans, "answer": answer}


def _entailment(part: str, hypothesis: str) -> Said:
    match = _PROVEN.fullmatch(part)
    if match is None:
        raise BenchmarkError(f'field "proof" has the step {brief(part)}; an inference "sent1 & sent2 -> int1: ..." is expected')
    premises, name, text = match.groups()
    label = "conclude" if name == "hypothesis" else "entail"
    line = f"{premises} -> {name}: {(text or hypothesis).strip()}"
    return Said(line, label, tuple(each.strip() for each in premises.split("&")), name)


def read_folio(values: Mapping[str, Any]) -> dict[str, Any]:
    """Premises a line each, and the conclusion as a question; no worked solution."""
    listed = isinstance(values["premises"], list)
    premises = texts_of(values, "premises") if listed else text_of(values, "premises").split("\n")
    answer = text_of(values, "label")
    facts = "\n".join(premise.strip() for premise in premises)
    prompt = f"{facts}\nIs the following statement true, false or uncertain? {text_of(values, 'conclusion').strip()}\n"
    return {"prompt": prompt, "solution": answer_line(answer), "answer": answer}


def read_cladder(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is given and asked, and the reasoning in CLadder's own steps.

    The causal graph is told by a background that CLadder keeps in another file; it is read where the record has it, as
    ``background`` or ``_background``.
    """
    meta, reasoning = object_of(values, "meta"), object_of(values, "reasoning")
    steps = (Said(text_of(reasoning, name).strip(), label) for name, label in _CAUSAL.items() if reasoning.get(name))
    answer = text_of(values, "answer")
    solution, spans = write(steps, end=answer_line(answer))
    told = (
        text_of(values, "background") or text_of(values, "_background"),
        text_of(values, "given_info"),
        text_of(values, "question"),
    )
    family = text_of(meta, "query_type")
    return {
        "prompt": " ".join(filter(None, told)) + "\n",
        "solution": solution,
        "steps": spans,
        "answer": answer,
        "family": family,
    }


def read_gym(values: Mapping[str, Any]) -> dict[str, Any]:
    """A generated problem; no worked solution."""
    answer = text_of(values, "answer")
    family = text_of(object_of(values, "metadata"), "source_dataset")
    solution = answer_line(answer) if answer else ""
    return {"prompt": text_of(values, "question") + "\n", "solution": solution, "answer": answer, "family": family}


def read_text(values: Mapping[str, Any]) -> dict[str, Any]:
    """A document: its first line is the prompt and the rest is read on from it, so that every character is traced."""
    text = text_of(values, "text")
    first, newline, rest = text.partition("\n")
    while rest and not first.strip():
        more, following, rest = rest.partition("\n")
        first, newline = first + newline + more, following
    return {"prompt": first + newline, "solution": rest}
