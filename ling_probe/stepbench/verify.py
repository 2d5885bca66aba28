"""Stepbench worked out a second time, from the prompt alone, to check records by."""

import re

from ling_probe.benchmarks import Record
from ling_probe.stepbench.reading import LABELS, Mechanisms, read_facts, read_line, read_mechanisms

_LARGEST = 99
_WORDS = {"+": "adds", "-": "subtracts", "*": "multiplies"}
_EVENTS = {
    "+": r"(?:finds|buys|gets|picks|wins) (\d+)",
    "-": r"(?:loses|eats|sells|drops|gives away) (\d+)",
    "*": r"ends up with (\d+) times as many|multiplies the lot by (\d+)",
    "/": r"splits them into (\d+) piles and keeps one|divides the lot by (\d+)",
}


def check(record: Record) -> list[str]:
    """What is wrong with a stepbench record; an empty list says nothing is.

    Every step and the answer are recomputed from the prompt, and labels, spans, inputs and results from the solution.
    """
    try:
        expected, answer = solve(record.family, record.prompt)
    except (ValueError, LookupError) as error:
        return [f"{record.id}: the prompt cannot be solved: {error!r}"]
    problems = [] if record.answer == answer else [f"answer {record.answer!r}, the prompt gives {answer!r}"]
    if [step.text for step in record.steps] != expected:
        problems.append(f"steps {[step.text for step in record.steps]}, the prompt gives {expected}")
    if record.solution != "".join(f"{line}\n" for line in [*expected, f"answer: {answer}"]):
        problems.append(f"solution {record.solution!r} is not its steps and its answer")
    return [f"{record.id}: {problem}" for problem in problems + _check_steps(record)]


def solve(family: str, prompt: str) -> tuple[list[str], str]:
    """The solution lines and the answer of a prompt, read from it alone.

    Raises:
        ValueError: What is read has no solution within the family's limits.
        LookupError: A name or a value is missing, or there is no such family.
    """
    return {"arithmetic": _arithmetic, "deduction": _deduction, "causal": _causal}[family](prompt)


def _check_steps(record: Record) -> list[str]:
    problems, end = [], 0
    for step in record.steps:
        reading = read_line(step.text, record.family, record.prompt)
        if (step.label, step.inputs, step.result, True) != reading or step.label not in LABELS:
            problems.append(f"step {step} reads as {reading}")
        if step.start != end or record.solution[step.start : step.stop] != step.text + "\n":
            problems.append(f"step {step.text!r} is not at {step.start}-{step.stop}")
        end = step.stop
    if record.meta.get("n_steps") != len(record.steps):
        problems.append(f"n_steps {record.meta.get('n_steps')} for {len(record.steps)} steps")
    return problems


def _calculate(a: int, sign: str, b: int) -> int:
    if sign == "/" and (b < 2 or a % b):
        raise ValueError(f"{a}/{b} is not whole")
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // (b or 1)}[sign]
    if not 0 <= value <= _LARGEST:
        raise ValueError(f"{a}{sign}{b} leaves 0-{_LARGEST}")
    return value


def _arithmetic(prompt: str) -> tuple[list[str], str]:
    lines, value = _story(prompt) if prompt.startswith("story: ") else _expression(prompt)
    asked = re.search(r"(more|greater|less|smaller) than (\d+)(?: \w+)?\?\n", prompt)
    if not asked:
        return lines, str(value)
    threshold = int(asked[2])
    a, b = (value, threshold) if asked[1] in ("more", "greater") else (threshold, value)
    found = "equal" if a == b else "larger" if a > b else "smaller"
    return [*lines, f"compare {a} with {b}: {found}"], "yes" if found == "larger" else "no"


def _expression(prompt: str) -> tuple[list[str], int]:
    """Replace the innermost operation by its value until a number is left."""
    text = re.split(r"(?:compute|evaluate|what is|is) | (?:more|greater|less|smaller) |\?|\n", prompt)[1]
    lines = []
    while not text.isdecimal():
        found = re.search(r"\((\d+)([-+*/])(\d+)\)", text) or re.fullmatch(r"(\d+)([-+*/])(\d+)", text)
        if not found:
            raise ValueError(f"no innermost operation in {text!r}")
        value = _calculate(int(found[1]), found[2], int(found[3]))
        lines.append(f"{found[1]}{found[2]}{found[3]}={value}")
        text = text[: found.start()] + str(value) + text[found.end() :]
    return lines, int(text)


def _story(prompt: str) -> tuple[list[str], int]:
    *sentences, question = prompt.removeprefix("story: ").rstrip("\n").split(". ")
    name = question.removesuffix("?").split()[-1] if question.startswith("how many") else question.split()[1]
    told = [sentence.removeprefix(f"{name} ") for sentence in sentences if sentence.startswith(f"{name} ")]
    value, lines = int(told[0].split()[1]), [f"given {name} {told[0]}"]
    for event in told[1:]:
        sign, number = _read_event(event)
        lines.append(f"{event}: {value}{sign}{number}={_calculate(value, sign, number)}")
        value = _calculate(value, sign, number)
    return lines, value


def _read_event(event: str) -> tuple[str, int]:
    for sign, pattern in _EVENTS.items():
        if match := re.fullmatch(pattern, event):
            return sign, int(match[match.lastindex or 0])
    raise ValueError(f"no event {event!r}")


def _deduction(prompt: str) -> tuple[list[str], str]:
    facts = read_facts(prompt)
    if len(facts.kinds) + len(facts.rules) != prompt.count("."):
        raise ValueError("a premise is unread or a category has two rules")
    asked = re.search(r"question: is (\w+) (\w+)\?\n", prompt)
    entity, quality = asked.groups() if asked else ("", "")
    lines, link = [f"for {entity} {facts.kinds[entity]}"], facts.kinds[entity]
    while link in facts.rules:
        lines.append(f"from {link} {facts.rules[link]}")
        link = facts.rules[link]
    ending = facts.ending(entity)
    truth = {f"always {quality}": "true", f"never {quality}": "false"}.get(ending, "unknown")
    return [*lines, f"from {ending} nothing" if truth == "unknown" else f"so {entity} is {ending}"], truth


def _causal(prompt: str) -> tuple[list[str], str]:
    model = read_mechanisms(prompt)
    if len(model.constants) + len(model.causes) + len(model.seen) != prompt.count("."):
        raise ValueError("an equation is unread or a variable has two")
    asked = re.search(r"what is (\w+)\?\n|what would (\w+) be", prompt)
    query = (asked[1] or asked[2]) if asked else ""
    path = [query]
    while path[-1] not in model.forced and path[-1] not in model.constants:
        path.append(model.causes[path[-1]][0])
    lines, value, noise = _start(model, path.pop())
    for name in reversed(path):
        cause, sign, constant = model.causes[name]
        number = noise if constant == "noise" else int(constant)
        quote = f"{cause} {name} {_WORDS[sign]} {constant}"
        lines.append(f"from {quote}: {value}{sign}{number}={_calculate(value, sign, number)}")
        value = _calculate(value, sign, number)
    return lines, str(value)


def _start(model: Mechanisms, root: str) -> tuple[list[str], int, int]:
    """The lines before anything is computed downstream, the value that the path starts from, and the noise."""
    if root not in model.forced:
        return [f"given {root} is {model.constants[root]}"], model.constants[root], 0
    value = model.forced[root]
    lines, noise = [f"set {root} to {value}"], 0
    for effect, seen in model.seen.items():
        if model.causes[effect] != (root, "+", "noise"):
            raise ValueError(f"{effect} was seen and has no noise")
        before = model.constants[root]
        noise = _calculate(seen, "-", before)
        lines = [f"given {root} is {before}", f"noise is {seen}-{before}={noise}", *lines]
    return lines, value, noise
