"""What stepbench text says, read back from the text alone.

`read_line` names one solution line, whoever wrote it; `Facts` and `Mechanisms` are what a prompt states. Nothing here is shared
with what generates the text, so that one can be checked against the other.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

LABELS = (
    "add",
    "subtract",
    "multiply",
    "divide",
    "compare",
    "premise",
    "modus-ponens",
    "negation",
    "conclude",
    "no-rule",
    "abduce",
    "intervene",
)
"""Every label a stepbench step can have."""
OTHER = "other"
"""The label of a line that stepbench would not write."""

_NUMBER = r"(0|[1-9][0-9]{0,3})"
_EQUATION = rf"{_NUMBER}([-+*/]){_NUMBER}={_NUMBER}"
_EFFECT = rf"(\w+) (\w+) (adds|subtracts|multiplies) ({_NUMBER}|noise)"
_RULE = r"(\w+) ((?:always |never )?\w+)"
_LINES = {
    "arithmetic": {
        "premise": rf"given (\w+) (has {_NUMBER} \w+)",
        "compare": rf"compare {_NUMBER} with {_NUMBER}: (larger|smaller|equal)",
        "equation": rf"(?:([a-z][a-z0-9 ]*): )?{_EQUATION}",
    },
    "deduction": {
        "premise": r"for (\w+) (\w+)",
        "no-rule": r"from (\w+) nothing",
        "rule": rf"from {_RULE}",
        "conclude": r"so (\w+) is ((?:always|never) \w+)",
    },
    "causal": {
        "premise": rf"given (\w+) is {_NUMBER}",
        "intervene": rf"set (\w+) to {_NUMBER}",
        "abduce": rf"noise is {_NUMBER}(-){_NUMBER}={_NUMBER}",
        "effect": rf"from {_EFFECT}: {_EQUATION}",
    },
}
_PATTERNS = {family: {kind: re.compile(pattern) for kind, pattern in lines.items()} for family, lines in _LINES.items()}
_OPERATIONS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
_SIGNS = {"adds": "+", "subtracts": "-", "multiplies": "*"}


class Reading(NamedTuple):
    """One line: its label, what it uses, what it establishes, and whether that holds."""

    label: str
    inputs: tuple[str, ...] = ()
    result: str = ""
    correct: bool | None = None


@dataclass(frozen=True)
class Facts:
    """What a deduction prompt states."""

    kinds: Mapping[str, str]
    """Entity -> its category."""
    rules: Mapping[str, str]
    """Category -> what it leads to: a category, or ``always`` or ``never`` and a property."""

    def ending(self, entity: str) -> str:
        """What the rules say last about an entity: ``always`` or ``never`` and a property, or a category without a rule."""
        link, passed = self.kinds.get(entity, ""), set[str]()
        while link in self.rules and link not in passed:
            passed.add(link)
            link = self.rules[link]
        return link


@dataclass(frozen=True)
class Mechanisms:
    """What a causal prompt states."""

    constants: Mapping[str, int]
    causes: Mapping[str, tuple[str, str, str]]
    """Variable -> its cause, the sign, and a number or ``noise``."""
    forced: Mapping[str, int]
    """What the question sets."""
    seen: Mapping[str, int]
    """What was observed."""


@lru_cache(maxsize=64)
def read_facts(prompt: str) -> Facts:
    """The entities and rules of a deduction prompt; of any other text, nothing."""
    text = prompt.partition("question:")[0]
    rules = re.findall(rf"\b(?:from|with|by) {_RULE} (?:follows|comes|holds)\.", text)
    kinds = re.findall(r"\b(?:for|in|of) (\w+) (\w+) (?:holds|is found|is true)\.", text)
    return Facts(dict(kinds), dict(rules))


@lru_cache(maxsize=64)
def read_mechanisms(prompt: str) -> Mechanisms:
    """The variables and the question of a causal prompt; of any other text, nothing."""
    model, _, rest = prompt.partition("question:")
    model, _, observed = model.partition("we saw")
    constants = {name: int(value) for name, value in re.findall(rf"(\w+) (?:is|equals) {_NUMBER}\.", model)}
    causes = re.findall(rf"\b(?:from|with|by) {_EFFECT}\.", model)
    seen = re.findall(rf"(\w+) is {_NUMBER}\.", observed)
    forced = re.findall(rf"set (\w+) to {_NUMBER},", rest) + re.findall(rf"if (\w+) were {_NUMBER}\?", rest)
    return Mechanisms(
        constants,
        {name: (cause, _SIGNS[word], constant) for cause, name, word, constant, _ in causes},
        {name: int(value) for name, value in forced},
        {name: int(value) for name, value in seen},
    )


def label_line(line: str, family: str) -> str:
    """The label of a solution line, ``other`` where the family has no such line.

    >>> label_line("7+5=12", "arithmetic")
    'add'
    """
    return read_line(line, family).label


def read_line(line: str, family: str, prompt: str = "") -> Reading:
    """Label a solution line, and say whether it holds.

    A line holds by itself: its equation is right, and what it quotes is in the prompt. Whether it was the line to write is not
    asked. Without a prompt, lines that quote have ``correct`` None.
    """
    for kind, pattern in _PATTERNS.get(family, {}).items():
        if match := pattern.fullmatch(line):
            groups = match.groups()
            return {"arithmetic": _arithmetic, "deduction": _deduction, "causal": _causal}[family](kind, groups, prompt)
    return Reading(OTHER)


def _arithmetic(kind: str, groups: tuple[str, ...], prompt: str) -> Reading:
    if kind == "compare":
        left, right, found = groups
        a, b = int(left), int(right)
        return Reading("compare", (left, right), found, found == ("larger" if a > b else "smaller" if a < b else "equal"))
    sentences = prompt.removeprefix("story: ").split(". ")
    if kind == "premise":
        name, stated, value = groups
        return Reading("premise", (), value, f"{name} {stated}" in sentences if prompt else None)
    quoted, *equation = groups
    reading = _equation(*equation)
    if not quoted or not prompt:
        return reading
    told = any(sentence.partition(" ")[2] == quoted for sentence in sentences)
    return reading._replace(correct=bool(reading.correct) and told and equation[2] in re.findall(r"\d+", quoted))


def _equation(left: str, sign: str, right: str, result: str) -> Reading:
    a, b, c = int(left), int(right), int(result)
    holds = {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b > 0 and a == b * c}[sign]
    return Reading(_OPERATIONS[sign], (left, right), result, holds)


def _deduction(kind: str, groups: tuple[str, ...], prompt: str) -> Reading:
    facts, subject = read_facts(prompt), groups[0]
    if kind == "no-rule":
        known = subject in {*facts.kinds.values(), *facts.rules.values()}
        return Reading("no-rule", (subject,), "", known and subject not in facts.rules if prompt else None)
    what = groups[1]
    if kind == "rule":
        label = "negation" if what.startswith("never ") else "modus-ponens"
        return Reading(label, (subject,), what, facts.rules.get(subject) == what if prompt else None)
    if kind == "premise":
        return Reading("premise", (), what, facts.kinds.get(subject) == what if prompt else None)
    return Reading("conclude", (what,), what, facts.ending(subject) == what if prompt else None)


def _causal(kind: str, groups: tuple[str, ...], prompt: str) -> Reading:
    if kind == "abduce":
        reading = _equation(*groups)
        return reading._replace(label="abduce")
    model, name = read_mechanisms(prompt), groups[0]
    if kind == "effect":
        cause, effect, word, constant, _, *equation = groups
        reading = _equation(*equation)
        stated = model.causes.get(effect) == (cause, _SIGNS[word], constant)
        used = equation[1] == _SIGNS[word] and constant in (equation[2], "noise")
        return reading if not prompt else reading._replace(correct=bool(reading.correct) and stated and used)
    known = model.constants if kind == "premise" else model.forced
    return Reading(kind, (), groups[1], known.get(name) == int(groups[1]) if prompt else None)
