r"""What a step does, read from its text.

The first rule that fits names the step:

1. ``answer`` only gives the answer, in a form of the record's format; ``code`` is fenced code.
2. ``backtrack`` or ``check``, where the step opens with it ("Wait, ...", "Let me verify ...") or says so outright.
3. The operation of the equations it writes: ``add``, ``subtract``, ``multiply``, ``divide``, or ``calculate`` for several.
4. The first of `_CUES` whose words are in it.
5. ``calculate`` for any other equation; ``plan`` and ``deduce`` by weaker words; else ``other``.

Words are English; a step in another language is named by its equations or is ``other``. Nobody is asked whether a step holds.
"""

import re

from ling_probe.benchmarks.operations import OTHER, SEVERAL, Labelled, read_operations

LABELS = (
    "add", "subtract", "multiply", "divide", "calculate", "compare", "substitute", "simplify", "count",
    "plan", "recall", "deduce", "check", "backtrack", "conclude", "ask", "code", "answer", OTHER,
)  # fmt: skip
"""Every label that the rules give."""

_NOTATION = (
    (re.compile(r"\*\*|__|(?<!\\)\\[()\[\]]|\$\$?(?=[\d\\])"), lambda found: "\n" if found[0][0] == "\\" else ""),
    (re.compile(r"\\[dt]?frac\{(\d[\d,.]*)\}\{(\d[\d,.]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:left|right|,|;|!|quad|displaystyle)(?![a-zA-Z])|\{,\}"), ""),
    (re.compile(r"\\(?:text|mathrm|mbox)\{[^{}]*\}"), " "),
)
_MARKER = re.compile(
    r"(?:[\s>#*_]|</?think>)*+(?:(?:(?:step|case|part)\s*\d+|\(?\d{1,2}[.)]|\([a-z]\)|[-•])(?:[\s:.*_–-])+)?", re.IGNORECASE
)
"""What a step may begin with before it says anything."""


def _cue(*words: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(words)})", re.IGNORECASE)


_LET = r"(?:let(?:'s|’s| us| me)|(?:we|i)(?:'ll| will| can| should| need to)?)"
_OPENINGS = {
    "backtrack": _cue(
        r"(?:(?:but|oh|ah|okay|ok|so|no)[,. ]+){0,2}(?:wait|actually|hold on|hmm+|oops|scratch that|on second thought|alternatively)\b",
        r"no[,.] ", rf"{_LET} (?:re-?(?:think|consider|start|do|examine|evaluate)|try (?:again|another|a different))",
    ),
    "check": _cue(
        rf"(?:(?:now|so|first|finally|next)[, ]+)?(?:{_LET} |to )?(?:also |quickly )?(?:double[- ]?check|verify|check|sanity|confirm)",
        r"checking|verif(?:ication|ying)|as a check",
    ),
}  # fmt: skip
_OUTRIGHT = {
    "backtrack": _cue(
        r"(?:that|this)(?:'s|’s| is) (?:not right|wrong|incorrect|a mistake)",
        r"i (?:made|think i made) (?:a|an) (?:mistake|error)",
    ),
    "check": _cue(r"double[- ]?check", rf"{_LET} (?:verify|check|confirm)", r"sanity check"),
}
_CUES = {
    "conclude": _cue(
        r"(?:final |correct )?answer(?: \w+){0,3} (?:is|should be|must be|would be)\b", r"final answer", r"in (?:conclusion|summary)",
        r"to (?:conclude|summari[sz]e)", r"altogether\b", r"(?:solution|answer) to the (?:problem|question)",
    ),
    "compare": _cue(
        r"compar(?:e|es|ed|ing|ison)\b", r"(?:is|are) (?:\w+ )?(?:greater|larger|smaller|less|bigger|higher|lower|fewer) than",
        r"\d\s*(?:[<>≤≥]|\\[lg]eq?\b)\s*\d",
    ),
    "substitute": _cue(r"substitut", r"plug(?:s|ging)? (?:\S+ ){0,4}(?:in|into|back)\b", r"replac(?:e|es|ing) (?:\S+ ){1,6}(?:with|by)\b"),
    "simplify": _cue(
        r"simplif", r"expand", r"factor(?:s|ed|ing|i[sz]\w+)\b", r"cancel", r"rearrang", r"rewrit", r"combin(?:e|ing) (?:the )?(?:like )?terms",
        r"both sides", r"isolat(?:e|ing)", r"solv(?:e|ing) for\b",
    ),
    "count": _cue(r"count(?:s|ed|ing)?\b", r"(?:number of |\d+ |\w+ )ways\b", r"possibilities", r"how many \w+ (?:are|there)"),
    "recall": _cue(
        r"recall\b", r"remember\b", r"we (?:already )?know", r"(?:it is|is well) known", r"(?:we are|is|are) given", r"given (?:that|:|information)",
        r"the (?:problem|question) (?:says|states|asks|tells|gives)", r"according to", r"by (?:definition|the (?:\S+ ){1,4}(?:theorem|formula|law|rule"
        r"|identity|inequality|property|lemma))", r"(?:theorem|law|formula) (?:states|says|for|is)\b",
    ),
}  # fmt: skip
"""Ascending in how easily the words are said by the way."""
_EQUATION = re.compile(r"(?<![<>=!:])=(?![=>])")
_PLAN = _cue(
    r"(?:first|next|now|then|to start|to begin)?,?\s*" + _LET + r"\b", r"(?:need|have|want|going) to\b",
    r"to (?:find|solve|determine|calculate|compute|figure|do|get|answer)\b", r"(?:our|the|my) (?:goal|plan|idea|approach|strategy)", r"start by\b",
)  # fmt: skip
_DEDUCE = _cue(
    r"so\b", r"therefore", r"thus", r"hence", r"since\b", r"because", r"impl(?:y|ies)", r"which means", r"this means", r"it follows", r"consequently",
    r"we (?:get|have|obtain|see|find|conclude)\b", r"if\b(?=.*\bthen\b)", r"must be\b",
)  # fmt: skip
_CALCULATE = _cue(r"calculat", r"comput", r"evaluat")


def label_text(text: str, answer: re.Pattern[str]) -> Labelled:
    r"""The label of a step by the rules of this file, with what its equations use and establish.

    >>> label_text("So they pay 3*4=12 dollars.", re.compile("####.*"))
    Labelled(label='multiply', inputs=('3', '4'), result='12')
    >>> [label_text(text, re.compile("####.*")).label for text in ("Wait, 3*4=12.", "Recall that a cat purrs.", "#### 12")]
    ['backtrack', 'recall', 'answer']
    """
    said = text.strip()
    if answer.fullmatch(said):
        return Labelled("answer")
    if said.startswith(("```", "~~~")):
        return Labelled("code")
    found = read_operations(_plainly(said))
    return found._replace(label=_label(said[_opening(said) :], found.label))


def _opening(text: str) -> int:
    match = _MARKER.match(text)
    return match.end() if match else 0


def _label(said: str, operation: str) -> str:
    for label, cue in _OPENINGS.items():
        if cue.match(said) or _OUTRIGHT[label].search(said):
            return label
    if operation != OTHER:
        return operation
    if said.endswith(("?", "？")):
        return "ask"
    for label, cue in _CUES.items():
        if cue.search(said):
            return label
    if _EQUATION.search(said):
        return SEVERAL
    if _DEDUCE.match(said):
        return "deduce"
    weak = (("plan", _PLAN), ("deduce", _DEDUCE), (SEVERAL, _CALCULATE))
    return next((label for label, cue in weak if cue.search(said)), OTHER)


def _plainly(text: str) -> str:
    r"""Mathematics as `read_operations` reads it: without markup, ``\frac{1}{2}`` as 1/2."""
    for pattern, plain in _NOTATION:
        text = pattern.sub(plain, text)
    return text
