"""One problem of a family and a split, as a record."""

from functools import lru_cache

from ling_probe.benchmarks import Record
from ling_probe.errors import UsageError
from ling_probe.stepbench import arithmetic, causal, deduction
from ling_probe.stepbench.draft import Draft
from ling_probe.stepbench.draw import Draw

_FAMILIES = {"arithmetic": arithmetic, "deduction": deduction, "causal": causal}
FAMILIES = tuple(_FAMILIES)
SHIPPED = ("test", "longer", "novel-names", "pairs")
SPLITS = ("train", *SHIPPED)
_LEVELS = {"longer": range(7, 10), "pairs": range(2, 5)}
"""Difficulties of the splits that have others than their forms."""


def generate(family: str, split: str, index: int, seed: int = 0, *, bare: bool = False) -> Record:
    """One problem, the same for the same arguments on every machine and Python version.

    Forms take turns with the index, and within a form so do difficulties. A bare problem has hardly a premise that its solution
    does not use; curricula begin with these.

    Raises:
        UsageError: No such family or split.
    """
    turns = _cells(family, split)
    form, difficulty = turns[index % len(turns)]
    draw = Draw(seed, family, split, index)
    draft = _FAMILIES[family].draft(draw, form, difficulty, held_out=split == "novel-names", bare=bare)
    return _record(draft, family, split, index, form, difficulty)


def cells(family: str, split: str) -> int:
    """After how many indices forms and difficulties repeat."""
    return len(_cells(family, split))


def _record(draft: Draft, family: str, split: str, index: int, form: str, difficulty: int) -> Record:
    return Record(
        id=f"{family}-{split}-{index:04d}",
        prompt=draft.prompt,
        solution=draft.solution,
        answer=draft.answer,
        family=family,
        split=split,
        benchmark="stepbench",
        steps=draft.steps,
        meta={"form": form, "difficulty": difficulty, "n_steps": len(draft.lines)},
    )


@lru_cache
def _cells(family: str, split: str) -> tuple[tuple[str, int], ...]:
    """Form and difficulty by index; as many of each form, and within it of each difficulty."""
    if family not in _FAMILIES:
        raise UsageError(f"stepbench has no family {family!r}; these there are: {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise UsageError(f"stepbench has no split {split!r}; these there are: {', '.join(SPLITS)}")
    # Expressions hold no names, so under novel-names they would only repeat the test split.
    forms = {f: d for f, d in _FAMILIES[family].FORMS.items() if split != "novel-names" or not f.startswith("symbolic")}
    levels = [_allowed(split, difficulties) for difficulties in forms.values()]
    rounds = range(12 if split == "pairs" else 60)  # a multiple of every number of difficulties
    return tuple((form, level[turn % len(level)]) for turn in rounds for form, level in zip(forms, levels, strict=True))


def _allowed(split: str, difficulties: range) -> list[int]:
    if split == "pairs":
        return [level for level in _LEVELS[split] if level in difficulties]
    return list(_LEVELS.get(split, difficulties))
