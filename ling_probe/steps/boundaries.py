r"""Where a text is cut into steps by rules.

1. Fenced code, LaTeX displays (``$$``, ``\[``, environments) and inline mathematics are never cut inside.
2. A text is parted around what stands apart: a ``<think>`` section, fenced code, a line that only gives the answer.
3. What is between is cut by one of `SEGMENTERS`.

Spans tile the text. White space between two steps belongs to the first up to its last newline, and to the second from there on,
because that is how tokens are cut: a newline ends a token, a space begins one.
"""

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Kept(NamedTuple):
    """Characters that no cut falls inside."""

    start: int
    stop: int
    is_code: bool = False


class Line(NamedTuple):
    """A line that is not blank and does not begin inside what is kept whole."""

    start: int
    text: str
    """Up to the next such line, without white space around it."""
    indent: int
    apart: bool
    """Whether a blank line comes before it."""


MOST_STEPS = 2**15
"""A run numbers the steps of a sequence in 16 bits; the last of so many holds the rest of its text."""

_MARK = re.compile(r"^[ \t]*(?:```|~~~)|(?<!\\)(?:\$\$|\$|\\[\[\]()])|\\(?:begin|end)\{\w+\*?\}|\[/?asy\]", re.MULTILINE)
_CLOSING = {"```": "```", "~~~": "~~~", "$$": "$$", "$": "$", "\\[": "\\]", "\\(": "\\)", "[asy]": "[/asy]"}
_BLANK = re.compile(r"\n[ \t]*\n")
_GAP = re.compile(r"\s*")
_THINK = re.compile(r"(?=<think>)|</think>")

_ITEM = re.compile(
    r"(?:#{1,6}\s*|\*\*|__)*+(?:(?:step|case|part)\s*\d+\b|\(?\d{1,2}[.)]\s|\(?[a-z]\)\s|\([ivx]+\)\s|[-*•]\s+)", re.IGNORECASE
)
_HEADING = re.compile(r"#{1,6}\s.*|\*\*[^*\n]+\*\*:?|(?:step|case|part)\s*\d+[.:]?", re.IGNORECASE)
_RELATION = re.compile(r"[=<>≤≥≈&+]|\\(?:leq?|geq?|approx|implies|Rightarrow|iff)\b")
_DISPLAY = re.compile(r"\$\$|\\\[|\\begin\{")
_DISPLAY_END = re.compile(r"(?:\$\$|\\\]|\\end\{\w+\*?\})[.,;]?$")

_SENTENCE_END = re.compile(
    r"(?<![.?!])[.?!]++(?:(?:[)\]\"'”’*_$]|\\[)\]])*+(?=\s)|\s?(?:\\\]|\$\$))|[。？！][”」』）]*"
    r"|(?<![#*\s>-])(?=\s(?:\*\*)?Step \d+\s*[:.])"
)
_ABBREVIATION = re.compile(r"\b(?:Mrs?|Ms|Dr|Prof|St|cf|vs|viz|resp|al|[Ee]\.g|[Ii]\.e)$")
_BEFORE_NUMBER = re.compile(r"\b(?:nos?|vol|sec|ch|pp?|figs?|eqs?|thm|ca|approx)$", re.IGNORECASE)
_MARKER = re.compile(r"(?:^|[\n.?!])\s*[*#]*\s*\(?(?:\d{1,2}|[a-z])$|\b(?:step|case|part)\s+\d+$", re.IGNORECASE)
_FACTORIAL = re.compile(r"\d$|(?:^|[^A-Za-z])[A-Za-z]$")
_SEEN_BACK = 24
"""Characters before a full stop that tell an abbreviation or the marker of an item."""


def cut_text(text: str, segmenter: str, answer: re.Pattern[str]) -> list[tuple[int, int]]:
    r"""Spans of the steps of a text, one after the other from its first character to its last; none of a blank text.

    Args:
        text: Any text.
        segmenter: A name in `SEGMENTERS`.
        answer: A line that only gives the answer.

    >>> text = "He has 2.5 m, e.g. a rope. He cuts it.\n#### 2"
    >>> [text[start:stop] for start, stop in cut_text(text, "sentences", re.compile("####.*"))]
    ['He has 2.5 m, e.g. a rope.', ' He cuts it.\n', '#### 2']
    """
    kept = kept_whole(text)
    cuts = set[int]()
    for start, stop, stands_apart in _parts(text, kept, answer):
        cuts.add(start)
        cuts.update([] if stands_apart else SEGMENTERS[segmenter](text, start, stop, kept))
    return _tiled(text, sorted(cut for cut in cuts if not _inside(cut, kept)))


def kept_whole(text: str) -> list[Kept]:
    r"""What no cut falls inside, in order.

    >>> text = r"so \[x. Y\] and $5. He"
    >>> [text[kept.start : kept.stop] for kept in kept_whole(text)]
    ['\\[x. Y\\]']
    """
    marks = [(found.start(), found.end(), found[0].strip()) for found in _MARK.finditer(text)]
    places = defaultdict[str, list[tuple[int, int]]](list)
    for start, stop, mark in marks:
        places[mark].append((start, stop))
    blanks = [found.start() for found in _BLANK.finditer(text)]
    kept: list[Kept] = []
    for start, stop, mark in marks:
        if not kept or start >= kept[-1].stop:
            closing = _CLOSING.get(mark) or (mark.replace("\\begin", "\\end") if mark.startswith("\\begin") else "")
            place = bisect_left(places.get(closing, []), (stop, 0))
            end = places[closing][place][1] if closing and place < len(places[closing]) else None
            kept += _kept(text, start, stop, end, mark, blanks)
    return kept


def _kept(text: str, start: int, stop: int, end: int | None, mark: str, blanks: Sequence[int]) -> list[Kept]:
    """What a mark opens, if anything, given where the next one that closes it ends."""
    if mark in ("```", "~~~"):
        newline = text.find("\n", end) if end is not None else -1
        return [Kept(start, newline + 1 or len(text), is_code=True)]
    if end is None:
        return []
    if mark not in ("$", "\\("):
        return [Kept(start, end, is_code=mark == "[asy]")]
    # A dollar is money and opens nothing where a space follows it, or where the next one has a space before or a digit after.
    money = mark == "$" and (text[stop].isspace() or text[end - 2].isspace() or text[end : end + 1].isdigit())
    crosses = bisect_left(blanks, start) < bisect_left(blanks, end)
    return [] if money or crosses else [Kept(start, end)]


def _inside(place: int, kept: Sequence[Kept]) -> bool:
    found = bisect_right(kept, (place,)) - 1
    return found >= 0 and kept[found].start < place < kept[found].stop


def _parts(text: str, kept: Sequence[Kept], answer: re.Pattern[str]) -> Iterator[tuple[int, int, bool]]:
    """Start, stop, and whether the part is a step as it is; they tile the text."""
    apart = [(each.start, each.stop) for each in kept if each.is_code]
    lines = [
        (line.start, line.start + len(line.text)) for line in _lines(text, 0, len(text), kept) if answer.fullmatch(line.text)
    ]
    ends = [place for span in (*apart, *lines) for place in span] + [found.end() for found in _THINK.finditer(text)]
    cuts = sorted({0, len(text), *(_after_gap(text, place) for place in ends if not _inside(place, kept))})
    alone = {_after_gap(text, start) for start, _ in (*apart, *lines)}
    yield from ((start, stop, start in alone) for start, stop in pairwise(cuts))


def _after_gap(text: str, place: int) -> int:
    """Past the last newline of the white space that begins here."""
    gap = _GAP.match(text, place)
    return place + (gap[0].rfind("\n") + 1 if gap else 0)


def _lines(text: str, start: int, stop: int, kept: Sequence[Kept]) -> Iterator[Line]:
    begins, apart, place = list[tuple[int, bool]](), False, start
    for line in text[start:stop].split("\n"):
        if line.strip() and not _inside(place, kept):
            begins.append((place, apart))
        apart = not line.strip()
        place += len(line) + 1
    for (begin, apart), (end, _) in pairwise([*begins, (stop, False)]):
        own = text[begin:end]
        yield Line(begin, own.strip(), len(own) - len(own.lstrip()), apart)


def _line_starts(text: str, start: int, stop: int, kept: Sequence[Kept]) -> Iterator[int]:
    yield from (line.start for line in _lines(text, start, stop, kept))


def _sentence_starts(text: str, start: int, stop: int, kept: Sequence[Kept]) -> Iterator[int]:
    """Sentences, and lines that do not go on from the line before."""
    lines = list(_lines(text, start, stop, kept))
    yield from (line.start for before, line in pairwise(lines) if _ITEM.match(line.text) or not _goes_on(before.text, line))
    for found in _SENTENCE_END.finditer(text, start, stop):
        if _ends_sentence(text, found):
            yield _after_gap(text, found.end())


def _marked_starts(text: str, start: int, stop: int, kept: Sequence[Kept]) -> Iterator[int]:
    """Items with all that belongs to them, and other lines; or sentences, where that would be one step."""
    cuts = list(_block_starts(list(_lines(text, start, stop, kept))))
    yield from cuts[1:] or _sentence_starts(text, start, stop, kept)


def _block_starts(lines: Sequence[Line]) -> Iterator[int]:
    """An item owns the lines below it up to a blank one, and all that are indented deeper than it is."""
    before, item = "", -1
    for line in lines:
        nested = 0 <= item < line.indent
        begins_item = bool(_ITEM.match(line.text)) and not nested
        goes_on = nested or (item >= 0 and not line.apart) or (bool(before) and _goes_on(before, line))
        if begins_item or not goes_on:
            item = line.indent if begins_item else -1
            yield line.start
        before = line.text


def _goes_on(before: str, line: Line) -> bool:
    """Whether a line belongs to the one before: a lead-in, a display in a sentence, a derivation."""
    end = before[-_SEEN_BACK:]
    if (
        end.endswith((":", "：", "<think>"))
        or line.text.startswith("</think>")
        or _HEADING.fullmatch(before)
        or _RELATION.match(line.text)
    ):
        return True
    if _DISPLAY.match(line.text):
        return not end.endswith((".", "?", "!"))
    return line.text[0].islower() and (end.endswith(",") or bool(_DISPLAY_END.search(end)))


def _ends_sentence(text: str, found: re.Match[str]) -> bool:
    mark, gap = found[0], _GAP.match(text, found.end())
    following = text[gap.end() : gap.end() + 1] if gap else ""
    if not mark or mark[0] in "。？！":
        return True
    if following.islower() or (gap and text.startswith("</think>", gap.end())):
        return False
    before = text[max(0, found.start() - _SEEN_BACK) : found.start()]
    short = (
        _ABBREVIATION.search(before) or _MARKER.search(before) or (following in "(0123456789" and _BEFORE_NUMBER.search(before))
    )
    return not (short if mark[0] == "." else mark == "!" and _FACTORIAL.search(before))


def _tiled(text: str, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Spans between cuts, a blank one joined to the one before it, or to the one after if it is the first."""
    starts: list[int] = []
    for start, stop in pairwise([*cuts, len(text)]):
        if text[start:stop].strip():
            starts.append(start if starts else 0)
    return list(pairwise([*starts[:MOST_STEPS], len(text)])) if starts else []


SEGMENTERS: Mapping[str, Callable[[str, int, int, Sequence[Kept]], Iterator[int]]] = {
    "rules": _marked_starts,
    "sentences": _sentence_starts,
    "lines": _line_starts,
}
"""Where steps begin in a part of a text.

``rules``: as the text itself marks them, by items and lines, or by sentences if it is one line. ``sentences``: every sentence,
and every line that does not go on from the one before. ``lines``: every line.
"""
