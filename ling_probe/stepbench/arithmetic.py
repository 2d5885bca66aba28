"""Arithmetic: a chain of operations on whole numbers, as an expression or as a story.

The difficulty is the number of operations. The solution has one line per operation, innermost first, and in the compare
forms one more that compares the value with a threshold.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ling_probe.stepbench.draft import LARGEST, SYMBOLS, Draft, Line, Operation, draw_operation
from ling_probe.stepbench.draw import Draw
from ling_probe.stepbench.names import draw_names

FORMS = {form: range(2, 7) for form in ("symbolic", "symbolic-compare", "story", "story-compare")}
"""Form -> the difficulties it comes in."""
ITEMS = ("figs", "pears", "nuts", "plums", "coins", "cards", "beads", "shells")
EVENTS = {
    "add": ("finds {n} more", "buys {n} more", "gets {n} more"),
    "subtract": ("loses {n}", "eats {n}", "gives away {n}", "sells {n}"),
    "multiply": ("ends up with {n} times as many",),
    "divide": ("splits them into {n} equal piles and keeps one",),
}
RELATIONS = {"more": ">", "less": "<"}
_NESTINGS = ("left", "right", "mixed")
_DISTRACTED = 0.5


class _Chain(NamedTuple):
    first: int
    operations: Sequence[Operation]

    def lines(self) -> tuple[list[Line], int]:
        value, lines = self.first, []
        for operation in self.operations:
            lines.append(operation.line(value))
            value = operation.apply(value)
        return lines, value


def draft(draw: Draw, form: str, difficulty: int, *, held_out: bool) -> Draft:
    """A problem of one form, with this many operations."""
    story = form.startswith("story")
    nesting = "left" if story else draw.choice(_NESTINGS)
    chain = _draw_chain(draw, difficulty, nesting)
    lines, value = chain.lines()
    asked = draw.choice(tuple(RELATIONS)) if form.endswith("compare") else ""
    threshold = _draw_threshold(draw, value, asked) if asked else 0
    prompt = _story(draw, chain, asked, threshold, held_out) if story else _expression(chain, asked, threshold)
    if not asked:
        return Draft(prompt, lines, str(value))
    found = "<>="[(value > threshold) + 2 * (value == threshold)]
    lines.append(Line("compare", f"{value}{found}{threshold}", (str(value), str(threshold)), found))
    return Draft(prompt, lines, "yes" if found == RELATIONS[asked] else "no")


def _draw_chain(draw: Draw, length: int, nesting: str) -> _Chain:
    first = value = draw.between(2, 20)
    operations = []
    for _ in range(length):
        on_left = nesting == "right" or (nesting == "mixed" and draw.chance(0.5))
        operation = draw_operation(draw, (value,), tuple(SYMBOLS), on_left=on_left)
        operations.append(operation)
        value = operation.apply(value)
    return _Chain(first, operations)


def _draw_threshold(draw: Draw, value: int, asked: str) -> int:
    """A number near the value; the answer is yes half of the time, and one no in five is a tie."""
    yes = draw.chance(0.5)
    if not yes and draw.chance(0.2):
        return value
    below = yes == (asked == "more")
    low, high = (max(0, value - 10), value - 1) if below else (value + 1, min(LARGEST, value + 10))
    return draw.between(low, high) if low <= high else value


def _expression(chain: _Chain, asked: str, threshold: int) -> str:
    text = str(chain.first)
    for depth, (label, constant, on_left) in enumerate(chain.operations):
        inner = f"({text})" if depth else text
        text = f"{constant}{SYMBOLS[label]}{inner}" if on_left else f"{inner}{SYMBOLS[label]}{constant}"
    return f"is {text} {asked} than {threshold}?\n" if asked else f"compute {text}\n"


def _story(draw: Draw, chain: _Chain, asked: str, threshold: int, held_out: bool) -> str:
    name, other = draw_names(draw, 2, held_out=held_out)
    item = draw.choice(ITEMS)
    events = _tell(draw, name, item, chain)
    if draw.chance(_DISTRACTED):
        aside = _draw_chain(draw, draw.between(1, 2), "left")
        events = draw.merged(events, _tell(draw, other, draw.choice(ITEMS), aside))
    ask = f"does {name} have {asked} than {threshold} {item}?" if asked else f"how many {item} has {name}?"
    return f"story: {' '.join(events)} {ask}\n"


def _tell(draw: Draw, name: str, item: str, chain: _Chain) -> list[str]:
    events = [draw.choice(EVENTS[label]).format(n=constant) for label, constant, _ in chain.operations]
    return [f"{name} has {chain.first} {item}."] + [f"{name} {event}." for event in events]
