r"""Where a text gives its answer, and when two answers are the same.

Whether a model was right is judged as the benchmark's own authors judge it, by text alone: nothing is evaluated. A rule looks
for the most explicit form first and takes the last one of that form, since a model that corrects itself does so later.

>>> NUMBER.find("so 9 * 2 = 18\n#### 18").text
'18'
>>> BOXED.find(r"hence \boxed{\frac{1}{2}} is it").text
'\\frac{1}{2}'
>>> LETTER.find("The answer is (B).").text
'B'
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import accumulate
from typing import NamedTuple


class Found(NamedTuple):
    """An answer in a text."""

    text: str
    """As written, without what surrounds it."""
    start: int
    """First character of its line, or of its mark where it is inside a sentence."""


@dataclass(frozen=True)
class Answer:
    """How a format's answers are found and compared."""

    marked: Callable[[str], Found | None]
    """The answer that a text says is its answer, None where it says none."""
    same: Callable[[str, str], bool]
    """Whether a found answer is the expected one."""
    line: re.Pattern[str]
    """A line that only gives the answer, and so is no step."""
    otherwise: Callable[[str], Found | None] = lambda _text: None
    """What is taken for the answer of a text that marks none."""

    def find(self, text: str) -> Found | None:
        """The answer that a text gives, None where it gives none."""
        return self.marked(text) or self.otherwise(text)


_NUMERAL = r"[-+]?\$?\d(?:[\d,]*\d)?(?:\.\d+)?"
_SAYS = r"(?i:\banswer\**\s*(?:is\s*:?|:))[ \t*]*"
_PLAIN_LINE = re.compile(r"^answer:(.*)$", re.MULTILINE)
_ANSWER_LINE = re.compile(r"\s*\**(?i:answer)\**\s*:.*")
_HASHES = re.compile(rf"^####[ \t]*({_NUMERAL})", re.MULTILINE)
_BOX = re.compile(r"\\f?boxed\s*\{")
_TRIED = 3
"""Boxes looked at from the last one back, until one is closed."""


def _last(pattern: re.Pattern[str], text: str) -> Found | None:
    """The first group of the last match."""
    match = None
    for found in pattern.finditer(text):
        match = found
    return Found(match[1].strip(), match.start()) if match else None


def _first_of(*patterns: re.Pattern[str] | Callable[[str], Found | None]) -> Callable[[str], Found | None]:
    """The most explicit form that a text has."""

    def find(text: str) -> Found | None:
        for pattern in patterns:
            if found := _last(pattern, text) if isinstance(pattern, re.Pattern) else pattern(text):
                return found
        return None

    return find


def find_boxed(text: str) -> Found | None:
    r"""What the last ``\boxed{...}`` holds, braces inside it balanced; an unclosed one is none."""
    for match in list(_BOX.finditer(text))[: -_TRIED - 1 : -1]:
        depths = accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in text[match.end() - 1 :])
        length = next((place for place, depth in enumerate(depths) if depth == 0), None)
        if length is not None:
            return Found(text[match.end() : match.end() - 1 + length].strip(), match.start())
    return None


def _tagged(text: str) -> Found | None:
    opening, closing = "<answer>", "</answer>"
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    return Found(text[start + len(opening) :].partition(closing)[0].strip(), start) if start >= 0 else None


def _one_of(words: str, same: Callable[[str, str], bool]) -> Answer:
    """One of some words: said to be the answer, or else the last one of them."""
    word = rf"(?i:({words}))\b"
    said, last = re.compile(rf"{_SAYS}[\"'(]*{word}"), re.compile(rf"\b{word}")
    return Answer(_first_of(said), same, _ANSWER_LINE, _first_of(last))


def _same_text(found: str, expected: str) -> bool:
    return found.strip() == expected.strip()


def _same_number(found: str, expected: str) -> bool:
    try:
        return Decimal(re.sub(r"[$,+\s]", "", found)) == Decimal(re.sub(r"[$,+\s]", "", expected))
    except InvalidOperation:
        return _same_text(found, expected)


def _same_words(found: str, expected: str) -> bool:
    """Letter case, the brackets of a choice and a final stop are no difference."""
    return _bare(found) == _bare(expected)


def _bare(text: str) -> str:
    bare = " ".join(text.split()).strip("*").removesuffix(".").casefold()
    choice = re.fullmatch(r"\((\w)\)", bare)
    return choice[1] if choice else bare


def _same_truth(found: str, expected: str) -> bool:
    return found.casefold().replace("unknown", "uncertain") == expected.casefold().replace("unknown", "uncertain")


_NOTATION = (
    (r"\\left|\\right|\\[!,;: ]|\\displaystyle", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}", r"\1"),
    (r"\^\\circ|\^\{\\circ\}|\\%|\\\$|[\s$%]", ""),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),
    (r"\.$", ""),
)


def _same_math(found: str, expected: str) -> bool:
    """Spacing, units of angle and money, and the two ways to write a fraction are no difference; equal values are."""
    return _notation(found) == _notation(expected)


def _notation(text: str) -> str:
    for pattern, plain in _NOTATION:
        text = re.sub(pattern, plain, text)
    return text


LINE = Answer(_first_of(_PLAIN_LINE), _same_text, re.compile(r"answer:.*"))
"""The last line that starts with ``answer:``, letter by letter."""

NUMBER = Answer(
    _first_of(_HASHES, re.compile(rf"{_SAYS}({_NUMERAL})"), find_boxed),
    _same_number,
    re.compile(rf"####[ \t]*{_NUMERAL}.*|{_ANSWER_LINE.pattern}"),
    _first_of(re.compile(rf"({_NUMERAL})")),
)
r"""``#### 18``, or what is said to be the answer, or the last ``\boxed{}``, or else the last number; compared as numbers."""

BOXED = Answer(_first_of(find_boxed, re.compile(rf"{_SAYS}(\S.*)")), _same_math, _ANSWER_LINE)
r"""The last ``\boxed{}``, or what is said to be the answer; compared as written, but for notation."""

LETTER = Answer(
    _first_of(re.compile(rf"{_SAYS}[\"']?\(?([A-Z0-9])\b"), re.compile(r"^\W*([A-Z0-9])\W*$", re.MULTILINE), find_boxed),
    _same_words,
    _ANSWER_LINE,
)
"""The letter said to be the answer, or the last line that is one letter."""

TRUTH = _one_of("true|false|uncertain|unknown", _same_truth)
"""True, False or Uncertain (also called Unknown): said to be the answer, or else the last such word."""

YES_NO = _one_of("yes|no", _same_words)
"""yes or no: said to be the answer, or else the last such word."""

WORDS = Answer(_first_of(re.compile(rf"{_SAYS}(\S.*)"), find_boxed), _same_words, _ANSWER_LINE)
"""What is said to be the answer, to the end of its line."""

TAGGED = Answer(_first_of(_tagged, re.compile(rf"{_SAYS}(\S.*)")), _same_words, _ANSWER_LINE)
"""What ``<answer>`` and ``</answer>`` enclose, or what is said to be the answer."""
