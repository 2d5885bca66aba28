"""Arithmetic: a chain of operations on whole numbers, as an expression or as a story.

The difficulty is the number of operations. The solution of an expression has one line per operation, innermost first; that of a
story quotes what the asked person begins with, then each event beside its operation. The compare forms have one line more: for
"more" it compares the value with the threshold, for "less" the threshold with the value, so that "larger" means "yes".
"""

from collections.abc import Sequence
from typing import NamedTuple

from ling_probe.stepbench.draft import LARGEST, SYMBOLS, Draft, Line, Operation, draw_operation
from ling_probe.stepbench.draw import Draw
from ling_probe.stepbench.names import draw_names

FORMS = {form: range(2, 7) for form in ("symbolic", "symbolic-compare", "story", "story-compare")}
"""Form -> the difficulties it comes in."""
ITEMS = ("figs", "pears", "nuts", "plums", "coins", "cards", "beads", "shells", "keys", "pens", "maps", "bells")
EVENTS = {
    "add": ("finds {n}", "buys {n}", "gets {n}", "picks {n}", "wins {n}"),
    "subtract": ("loses {n}", "eats {n}", "sells {n}", "drops {n}", "gives away {n}"),
    "multiply": ("ends up with {n} times as many", "multiplies the lot by {n}"),
    "divide": ("splits them into {n} piles and keeps one", "divides the lot by {n}"),
}
RELATIONS = {"more": ("more", "greater"), "less": ("less", "smaller")}
"""What is asked -> the words for it; a story uses the first."""
ORDERS = ("larger", "smaller", "equal")
"""What a comparison finds."""
_COMMANDS = ("compute {}\n", "what is {}?\n", "evaluate {}\n")
_SCENERY = ("there are {n} trees near the road.", "the road is {n} miles long.", "it is day {n} of the month.")
_NESTINGS = ("left", "right", "mixed")
_DISTRACTED = 0.5
_SCENIC = 0.25


class _Chain(NamedTuple):
    first: int
    operations: Sequence[Operation]

    @property
    def value(self) -> int:
        """What the chain comes to."""
        value = self.first
        for operation in self.operations:
            value = operation.apply(value)
        return value

    def lines(self, quotes: Sequence[str]) -> list[Line]:
        """One line per operation, each behind its quote."""
        value, lines = self.first, []
        for quote, operation in zip(quotes, self.operations, strict=True):
            lines.append(operation.line(value, quote))
            value = operation.apply(value)
        return lines


def draft(draw: Draw, form: str, difficulty: int, *, held_out: bool, bare: bool) -> Draft:
    """A problem of one form, with this many operations."""
    story = form.startswith("story")
    chain = _draw_chain(draw, difficulty, "left" if story else draw.choice(_NESTINGS))
    asked = draw.choice(tuple(RELATIONS)) if form.endswith("compare") else ""
    threshold = _draw_threshold(draw, chain.value, asked) if asked else 0
    write = _story if story else _expression
    prompt, lines = write(draw, chain, asked, threshold, held_out=held_out, bare=bare)
    if not asked:
        return Draft(prompt, lines, str(chain.value))
    left, right = (chain.value, threshold) if asked == "more" else (threshold, chain.value)
    found = ORDERS[(left < right) + 2 * (left == right)]
    lines.append(Line("compare", f"compare {left} with {right}: {found}", (str(left), str(right)), found))
    return Draft(prompt, lines, "yes" if found == "larger" else "no")


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


def _expression(draw: Draw, chain: _Chain, asked: str, threshold: int, *, held_out: bool, bare: bool) -> tuple[str, list[Line]]:
    del held_out, bare  # nothing in an expression has a name or can be spared
    text = str(chain.first)
    for depth, (label, constant, on_left) in enumerate(chain.operations):
        inner = f"({text})" if depth else text
        text = f"{constant}{SYMBOLS[label]}{inner}" if on_left else f"{inner}{SYMBOLS[label]}{constant}"
    lines = chain.lines([""] * len(chain.operations))
    if asked:
        return f"is {text} {draw.choice(RELATIONS[asked])} than {threshold}?\n", lines
    return draw.choice(_COMMANDS).format(text), lines


def _story(draw: Draw, chain: _Chain, asked: str, threshold: int, *, held_out: bool, bare: bool) -> tuple[str, list[Line]]:
    name, other = draw_names(draw, 2, held_out=held_out)
    item = draw.choice(ITEMS)
    events = _tell(draw, item, chain)
    sentences = [f"{name} {event}." for event in events]
    if draw.chance(_DISTRACTED) and not bare:
        aside = _draw_chain(draw, draw.between(1, 2), "left")
        others = [f"{other} {event}." for event in _tell(draw, draw.choice(ITEMS), aside)]
        sentences = others + sentences if draw.chance(0.5) else sentences + others
    if draw.chance(_SCENIC) and not bare:
        sentences = draw.merged(sentences, [draw.choice(_SCENERY).format(n=draw.between(2, 30))])
    ask = f"does {name} have {RELATIONS[asked][0]} than {threshold} {item}?" if asked else f"how many {item} has {name}?"
    given = Line("premise", f"given {name} {events[0]}", (), str(chain.first))
    return f"story: {' '.join(sentences)} {ask}\n", [given, *chain.lines([f"{event}: " for event in events[1:]])]


def _tell(draw: Draw, item: str, chain: _Chain) -> list[str]:
    """What happens, without its subject; no event twice while there are words for it."""
    told = [f"has {chain.first} {item}"]
    for label, constant, _ in chain.operations:
        phrases = [phrase.format(n=constant) for phrase in EVENTS[label]]
        told.append(draw.choice([phrase for phrase in phrases if phrase not in told] or phrases))
    return told
