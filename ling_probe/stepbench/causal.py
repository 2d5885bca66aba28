"""Causal: a small structural model, and what is, what would be if a variable were set, or what would have been.

The difficulty is the number of solution lines. Setting a variable cuts it off from its causes, so nothing upstream is computed;
a counterfactual first recovers the noise from what was seen, then keeps it.

An equation "from kelzan velsof adds 3" says that velsof is kelzan plus 3. In every wording a cause stands right before its
effect, so that one look-up finds it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ling_probe.stepbench.draft import Draft, Line, Operation, draw_operation
from ling_probe.stepbench.draw import Draw
from ling_probe.stepbench.names import draw_names

FORMS = {"observe": range(2, 7), "intervene": range(2, 7), "counterfactual": range(4, 7)}
"""Form -> the difficulties it comes in."""
WORDS = {"add": "adds", "subtract": "subtracts", "multiply": "multiplies"}
_ASIDES = 2
"""The most variables off the asked path."""
_ALONE = ("", 0)
"""The cause of a variable that has none."""
_UPSTREAM = 2
"""The most variables before the one that is set."""


EQUATIONS = ("from {cause} {term}.", "with {cause} {term}.", "by {cause} {term}.")
"""How a model may say it; a solution always says the first."""
CONSTANTS = ("{name} is {value}.", "{name} equals {value}.")


class _Mechanism(NamedTuple):
    name: str
    cause: str
    operation: Operation
    noisy: bool = False
    """The constant is noise, which the model does not tell."""

    def equation(self, draw: Draw) -> str:
        return draw.choice(EQUATIONS).format(cause=self.cause, term=self._term())

    def line(self, value: int) -> Line:
        quote = EQUATIONS[0].format(cause=self.cause, term=self._term()).removesuffix(".")
        return self.operation.line(value, f"{quote}: ")

    def _term(self) -> str:
        return f"{self.name} {WORDS[self.operation.label]} {'noise' if self.noisy else self.operation.constant}"


class _World:
    """A chain of variables under construction; its end has a value in each world that must stay in range, the actual first."""

    def __init__(self, draw: Draw, names: Iterator[str], root: str, start: int) -> None:
        self.draw, self.names, self.end, self.values = draw, names, root, [start]
        self.equations = [_constant(draw, root, start)]

    def grow(self, length: int, world: int) -> list[Line]:
        """Add variables to the chain, and return the lines that compute them in one world."""
        lines = []
        for _ in range(length):
            mechanism = _Mechanism(next(self.names), self.end, draw_operation(self.draw, self.values, tuple(WORDS)))
            lines.append(mechanism.line(self.values[world]))
            self.equations.append(mechanism.equation(self.draw))
            self.values = [mechanism.operation.apply(value) for value in self.values]
            self.end = mechanism.name
        return lines

    def text(self, causes: Sequence[tuple[str, int]], *, bare: bool) -> str:
        """The model in words, in random order, with up to two variables off the path, or in a bare one none.

        A variable off the path is caused by one of ``causes`` or by the asked variable. It never forks the path before its end:
        then the next line could not be found without looking further ahead.
        """
        for _ in range(0 if bare else self.draw.between(0, _ASIDES)):
            cause = self.draw.choice([*causes, (self.end, self.values[0])])
            self.equations.append(self._aside(next(self.names), *cause))
        return f"model: {' '.join(self.draw.shuffled(self.equations))}"

    def _aside(self, name: str, cause: str, value: int) -> str:
        if not cause:
            return _constant(self.draw, name, self.draw.between(1, 20))
        return _Mechanism(name, cause, draw_operation(self.draw, (value,), tuple(WORDS))).equation(self.draw)


def draft(draw: Draw, form: str, difficulty: int, *, held_out: bool, bare: bool) -> Draft:
    """A problem of one form, solved in this many lines."""
    names = iter(draw_names(draw, difficulty + _UPSTREAM + _ASIDES, held_out=held_out))
    write = {"observe": _observe, "intervene": _intervene, "counterfactual": _counterfactual}[form]
    return write(draw, names, difficulty, bare=bare)


def _observe(draw: Draw, names: Iterator[str], difficulty: int, *, bare: bool) -> Draft:
    root, start = next(names), draw.between(1, 20)
    world = _World(draw, names, root, start)
    lines = [_premise(root, start), *world.grow(difficulty - 1, world=0)]
    return Draft(f"{world.text((), bare=bare)} question: what is {world.end}?\n", lines, lines[-1].result)


def _intervene(draw: Draw, names: Iterator[str], difficulty: int, *, bare: bool) -> Draft:
    root, start = next(names), draw.between(1, 20)
    world = _World(draw, names, root, start)
    world.grow(draw.between(1, _UPSTREAM), world=0)
    target, forced = world.end, _another(draw, world.values[0])
    world.values.append(forced)
    lines = [_set(target, forced), *world.grow(difficulty - 1, world=1)]
    question = f"if we set {target} to {forced}, what is {world.end}?"
    text = world.text((_ALONE, (root, start)), bare=bare)
    return Draft(f"{text} question: {question}\n", lines, lines[-1].result)


def _counterfactual(draw: Draw, names: Iterator[str], difficulty: int, *, bare: bool) -> Draft:
    cause, effect = next(names), next(names)
    start, noise = draw.between(1, 20), draw.between(1, 20)
    forced, seen = _another(draw, start), start + noise
    world = _World(draw, names, cause, start)
    mechanism = _Mechanism(effect, cause, Operation("add", noise), noisy=True)
    world.equations.append(mechanism.equation(draw))
    world.end, world.values = effect, [seen, forced + noise]
    lines = [
        _premise(cause, start),
        Line("abduce", f"noise is {seen}-{start}={noise}", (str(seen), str(start)), str(noise)),
        _set(cause, forced),
        mechanism.line(forced),
        *world.grow(difficulty - 4, world=1),
    ]
    question = f"we saw {effect} is {seen}. question: what would {world.end} be if {cause} were {forced}?"
    return Draft(f"{world.text((_ALONE,), bare=bare)} {question}\n", lines, lines[-1].result)


def _another(draw: Draw, value: int) -> int:
    other = draw.between(1, 20)
    return other if other != value else other + 1


def _constant(draw: Draw, name: str, value: int) -> str:
    return draw.choice(CONSTANTS).format(name=name, value=value)


def _premise(name: str, value: int) -> Line:
    return Line("premise", f"given {name} is {value}", (), str(value))


def _set(name: str, value: int) -> Line:
    return Line("intervene", f"set {name} to {value}", (), str(value))
