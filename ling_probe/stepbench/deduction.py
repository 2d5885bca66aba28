"""Deduction: whether a chain of rules leads from an entity to a property.

The difficulty is the number of rules applied. Each problem holds three chains of categories: one ends in the asked property,
one in its negation, one in a category without a rule. The answer is which of them the asked entity stands on, so neither the
property nor its polarity nor a missing rule, anywhere in the text, says anything about the answer.

In every wording what a rule leads to stands right behind what it starts from, so that one look-up finds it.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from ling_probe.stepbench.draft import Draft, Line
from ling_probe.stepbench.draw import Draw
from ling_probe.stepbench.names import draw_names

FORMS = {form: range(2, 7) for form in ("proved", "refuted", "open")}
"""Form -> the difficulties it comes in."""
ANSWERS = {"proved": "true", "refuted": "false", "open": "unknown"}
PROPERTIES = ("red", "blue", "cold", "hot", "loud", "quiet", "tall", "tiny", "sweet", "sour", "kind", "happy")
RULES = ("from {} {} follows.", "with {} {} comes.", "by {} {} holds.")
"""How a rule may be said; a solution always says the first, without the verb."""
FACTS = ("for {} {} holds.", "in {} {} is found.", "of {} {} is true.")
"""How what an entity is may be said; a solution always says the first, without the verb."""
_ASIDE = 2
"""The most rules on a chain that is not asked about."""


class _Chain(NamedTuple):
    entity: str
    categories: list[str]
    ending: str
    """What the last category leads to: ``always`` or ``never`` and the property, or nothing."""

    def rules(self) -> list[tuple[str, str]]:
        """Category and what it leads to, in the order they apply."""
        rules = list(pairwise(self.categories))
        return [*rules, (self.categories[-1], self.ending)] if self.ending else rules


def draft(draw: Draw, form: str, difficulty: int, *, held_out: bool, bare: bool) -> Draft:
    """A problem of one form, with this many rules on the asked chain; a bare one has no other chain."""
    quality = draw.choice(PROPERTIES)
    forms = (form, *(() if bare else (other for other in FORMS if other != form)))
    sizes = (difficulty, *(draw.between(1, _ASIDE) for _ in forms[1:]))
    names = iter(draw_names(draw, sum(sizes) + 2 * len(sizes), held_out=held_out))
    chains = [_chain(names, size, ending, quality) for ending, size in zip(forms, sizes, strict=True)]
    premises = [premise for chain in chains for premise in _premises(draw, chain)]
    prompt = f"facts: {' '.join(draw.shuffled(premises))} question: is {chains[0].entity} {quality}?\n"
    return Draft(prompt, _lines(chains[0]), ANSWERS[form])


def _chain(names: Iterator[str], size: int, form: str, quality: str) -> _Chain:
    ending = {"proved": f"always {quality}", "refuted": f"never {quality}", "open": ""}[form]
    entity = next(names)
    return _Chain(entity, [next(names) for _ in range(size + (not ending))], ending)


def _premises(draw: Draw, chain: _Chain) -> list[str]:
    rules = [draw.choice(RULES).format(category, what) for category, what in chain.rules()]
    return [draw.choice(FACTS).format(chain.entity, chain.categories[0]), *rules]


def _lines(chain: _Chain) -> list[Line]:
    first, last = chain.categories[0], chain.categories[-1]
    lines = [Line("premise", f"for {chain.entity} {first}", (), first)]
    for category, what in chain.rules():
        label = "negation" if what.startswith("never ") else "modus-ponens"
        lines.append(Line(label, f"from {category} {what}", (category,), what))
    if chain.ending:
        return [*lines, Line("conclude", f"so {chain.entity} is {chain.ending}", (chain.ending,), chain.ending)]
    return [*lines, Line("no-rule", f"from {last} nothing", (last,), "")]
