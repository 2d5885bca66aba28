"""Minimal pairs: what separates routing by operation from routing by token.

An *operation* pair is two prompts that differ in one word or sign and need another operation at one known step. A *content*
pair is two problems of one form that apply the same operations in the same order and share no content word: no name, no item,
no verb of an event, no property. Expressions hold no words and so have no content pairs.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from ling_probe.benchmarks import Record
from ling_probe.stepbench.arithmetic import EVENTS, ITEMS
from ling_probe.stepbench.causal import WORDS
from ling_probe.stepbench.deduction import ANSWERS, PROPERTIES
from ling_probe.stepbench.draft import SYMBOLS
from ling_probe.stepbench.draw import Draw
from ling_probe.stepbench.names import all_names
from ling_probe.stepbench.problem import cells, generate
from ling_probe.stepbench.reading import read_line
from ling_probe.stepbench.verify import solve

KINDS = ("operation", "content")
_TRIES = 300
"""Problems of the same form and difficulty among which a counterpart is looked for."""
_ONE_WORD = {label: [phrase.split()[0] for phrase in EVENTS[label] if phrase.count(" ") == 1] for label in ("add", "subtract")}
_SWAPS = (
    *(({sign}, set(SYMBOLS.values()) - {sign}) for sign in SYMBOLS.values()),
    (set(_ONE_WORD["add"]), set(_ONE_WORD["subtract"])),
    (set(_ONE_WORD["subtract"]), set(_ONE_WORD["add"])),
    ({"always"}, {"never"}),
    ({"never"}, {"always"}),
    *(({word}, set(WORDS.values()) - {word}) for word in WORDS.values()),
)
"""Words and signs, and those that one of them may be exchanged for."""
_CONTENT = frozenset(
    (*all_names(held_out=False), *ITEMS, *PROPERTIES, *(phrase.split()[0] for phrases in EVENTS.values() for phrase in phrases))
)
_PIECE = re.compile(r"\w+|[^\w\s]")


def pair_records(family: str, pairs: int, seed: int = 0) -> list[Record]:
    """So many pairs of each kind, the two of a pair one after the other; no prompt twice.

    A record's ``meta`` has ``pair`` (the same for both), ``pair_kind``, and ``pair_step``: the 0-based step at which the
    operations differ, None for a content pair.
    """
    taken: set[str] = set()
    indices = count()
    return [
        record
        for kind, draw_pair in zip(KINDS, (_operation_pair, _content_pair), strict=True)
        for number in range(pairs)
        for record in _number(draw_pair(family, indices, seed, taken), f"{family}-pairs-{kind}-{number:03d}", kind, taken)
    ]


def _number(pair: tuple[Record, Record, int | None], name: str, kind: str, taken: set[str]) -> Iterator[Record]:
    *records, step = pair
    for letter, record in zip("ab", records, strict=True):
        taken.add(record.prompt)
        meta = {**record.meta, "n_steps": len(record.steps), "pair": name, "pair_kind": kind, "pair_step": step}
        yield replace(record, id=f"{name}-{letter}", meta=meta)


def _operation_pair(family: str, indices: Iterator[int], seed: int, taken: set[str]) -> tuple[Record, Record, int | None]:
    """The next problem that has a twin, and its twin."""
    for index in indices:
        first = generate(family, "pairs", index, seed)
        for prompt in Draw(seed, family, "twin", index).shuffled(_edits(first.prompt)):
            second = _solved(first, prompt)
            if second and not {first.prompt, prompt} & taken:
                differ = [n for n, (a, b) in enumerate(zip(first.steps, second.steps, strict=True)) if a.label != b.label]
                if len(differ) == 1:
                    return first, second, differ[0]
    raise AssertionError("indices end")


def _edits(prompt: str) -> list[str]:
    """Every prompt that differs from this one by one exchange."""
    return [
        prompt[: piece.start()] + other + prompt[piece.end() :]
        for piece in _PIECE.finditer(prompt)
        for some, others in _SWAPS
        if piece[0] in some
        for other in sorted(others)
    ]


def _solved(first: Record, prompt: str) -> Record | None:
    """The record of an edited prompt; None where it has no solution of as many steps with numbers in range."""
    try:
        lines, answer = solve(first.family, prompt)
    except (ValueError, LookupError):
        return None
    if len(lines) != len(first.steps):
        return None
    steps, start = [], 0
    for line in lines:
        reading, stop = read_line(line, first.family, prompt), start + len(line) + 1
        step = replace(first.steps[0], label=reading.label, text=line, start=start, stop=stop)
        steps.append(replace(step, inputs=reading.inputs, result=reading.result))
        start = stop
    solution = "".join(f"{line}\n" for line in [*lines, f"answer: {answer}"])
    form = next((form for form, known in ANSWERS.items() if known == answer), first.meta["form"])
    meta = {**first.meta, "form": form}
    return replace(first, prompt=prompt, solution=solution, answer=answer, steps=tuple(steps), meta=meta)


def _content_pair(family: str, indices: Iterator[int], seed: int, taken: set[str]) -> tuple[Record, Record, int | None]:
    """The next problem with words that has a counterpart, and its counterpart."""
    for index in indices:
        first = generate(family, "pairs", index, seed)
        words, labels = content_words(first.prompt), [step.label for step in first.steps]
        if not words or first.prompt in taken:
            continue
        turn = cells(family, "pairs")
        for other in range(index + turn, index + turn * (_TRIES + 1), turn):
            second = generate(family, "pairs", other, seed)
            same = [step.label for step in second.steps] == labels
            if same and second.prompt not in taken and not words & content_words(second.prompt):
                return first, second, None
    raise AssertionError("indices end")


def content_words(prompt: str) -> frozenset[str]:
    """The names, items, verbs of events and properties of a prompt."""
    return _CONTENT.intersection(re.findall(r"[a-z]+", prompt))
