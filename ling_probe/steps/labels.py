r"""What a step does, read from its text.

The first rule that fits names the step:

1. ``answer`` only gives the answer, in a form of the record's format; ``code`` is fenced code.
2. ``backtrack`` or ``check``, where the step opens with it ("Wait, ...", "Let me verify ...") or says so outright.
3. The operation of the equations it writes: ``add``, ``subtract``, ``multiply``, ``divide``, or ``calculate`` for several.
4. ``ask``, where it ends in a question mark.
5. The first of `_CUES` whose words are in it, from ``conclude`` to ``recall``.
6. ``plan`` or ``deduce``, where it opens so ("Let x be ...", "Therefore ..."); ``calculate`` for any other equation.
7. ``plan``, ``deduce`` or ``calculate`` by weaker words; else ``other``.

The words are English; a step in another language is named by its equations or is ``other``. Whether a step holds is not asked.
"""

import re
from collections.abc import Mapping

from ling_probe.benchmarks.operations import OTHER, SEVERAL, Labelled, read_operations

LABELS = (
    "add", "subtract", "multiply", "divide", "calculate", "compare", "substitute", "simplify", "count",
    "plan", "recall", "deduce", "check", "backtrack", "conclude", "ask", "code", "answer", OTHER,
)  # fmt: skip
"""Every label that the rules give."""

_NOTATION = (
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|__|\{,\}|\\(?:left|right|displaystyle|[,;!])(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:text|mathrm|mbox)\{[^{}]*\}|\\quad"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]"), "\n"),
    (re.compile(r"\\[dt]?frac\{(\d[\d,.]*)\}\{(\d[\d,.]*)\}"), r"\1/\2"),
)
_BEFORE = re.compile(
    r"(?:[\s>#*_]|</?think>)*+(?:(?:(?:step|case|part)\s*\d+|\(?\d{1,2}[.)]|\([a-z]\)|[-•])[\s:.*_–-]+)?+", re.IGNORECASE
)
"""What a step may begin with before it says anything."""
_EQUATION = re.compile(r"(?<![<>=!:])=(?![=>])|≈|\\approx\b")


def _words(*patterns: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(patterns)})", re.IGNORECASE)


_LET = r"let(?:['’]s| us| me)"
_SHALL = r"(?:we|(?-i:I))(?:['’]ll| will| can| could| should| must| need(?: to)?| have to| want to)"
_WE = rf"(?:{_LET}|{_SHALL}|we|(?-i:I))"
_OPENING = {
    "backtrack": _words(
        r"(?:(?:but|oh|ah|okay|ok|so|no)[,. ]+){0,2}(?:wait|actually|hold on|hmm+|oops|scratch that|alternatively)\b",
        r"no[,.] ",
        r"on second thought",
        rf"{_WE} (?:re-?(?:think|consider|start|do|examine|evaluate)|try (?:again|another|a different))",
    ),
    "check": _words(
        rf"(?:(?:now|so|first|finally|next)[, ]+)?(?:{_WE} |to )?(?:also |quickly )?(?:double[- ]?check|verify|check|confirm)",
        r"checking|verif(?:ication|ying)|as a check",
    ),
}
_ANYWHERE = {
    "backtrack": _words(
        r"(?:that|this)(?:['’]s| is) (?:not right|wrong|incorrect|a mistake)", r"i (?:think i )?made (?:a|an) (?:mistake|error)"
    ),
    "check": _words(r"double[- ]?check", rf"{_WE} (?:verify|check|confirm)\b", r"sanity check"),
}
_CUES = {
    "conclude": _words(
        r"answer(?: \w+){0,3} (?:is|should be|must be|would be)\b",
        r"final answer|altogether\b|boxed\b",
        r"in (?:conclusion|summary)|to (?:conclude|summari[sz]e)",
        r"(?:solution|answer) to the (?:problem|question)",
    ),
    "compare": _words(
        r"compar(?:e|es|ed|ing|ison)\b",
        r"(?:is|are) (?:\w+ )?(?:greater|larger|smaller|less|bigger|higher|lower|fewer) than",
        r"\d\s*(?:[<>≤≥]|\\[lg]eq?\b)\s*\d",
    ),
    "substitute": _words(
        r"substitut", r"plug(?:s|ging)? (?:\S+ ){0,4}(?:in|into|back)\b", r"replac(?:e|es|ing) (?:\S+ ){1,6}(?:with|by)\b"
    ),
    "simplify": _words(
        r"simplif|expand|cancel|(?:rearrang|rewrit|isolat)(?:e|es|ing)\b",
        r"factor(?:ed|ing|i[sz]\w+)\b|factors? (?:out|as|into|the|\S+ (?:as|into))\b",
        r"combin(?:e|ing) (?:the )?(?:like )?terms",
        r"both sides|solv(?:e|ing) for\b",
    ),
    "count": _words(
        r"count(?:s|ed|ing)?\b|ways\b|possibilities|how many \w+ (?:are|there)",
        r"(?:number of|there (?:are|is)) (?:\S+ ){0,3}(?:choices|combinations|arrangements|permutations|outcomes|cases)\b",
    ),
    "recall": _words(
        r"recall\b|remember\b|according to|we (?:already )?know|(?:it is|is well) known",
        r"(?:we are|is|are) given(?! by)|given (?:that|:|information)",
        r"the (?:problem|question) (?:says|states|asks|tells|gives)",
        r"by (?:definition|the (?:\S+ ){1,4}(?:theorem|formula|law|rule|identity|inequality|property|lemma))",
        r"(?:theorem|law|formula) (?:for|is)\b|(?:theorem|law|formula|inequality|identity|property|lemma) (?:states|says)\b",
    ),
}
"""By how seldom the words are said by the way."""
_OPENS = {
    "plan": _words(
        rf"(?:(?:so|now|then|next|first|finally)[, ]+)*(?:{_LET}\b|let\b)",
        r"(?:(?:then|next|now|first|second|third|finally)[, ]+)*(?:find|determine|consider|identify|choose|use|set up)\b",
        r"(?:define|denote|assume|suppose)\b",
        r"without loss of generality",
    ),
    "deduce": _words(r"so\b|therefore|thus|hence|since\b|because|consequently|it follows|this (?:means|implies)"),
}
_WEAK = {
    "plan": _words(
        rf"{_LET}\b|{_SHALL} (?!(?:also )?(?:see|note|say|conclude|observe)\b)",
        r"we (?:now|first|start|begin)\b|(?:need|have|want|going) to\b",
        r"to (?:find|solve|determine|calculate|compute|figure|do|get|answer)\b",
        r"(?:our|the|my) (?:goal|plan|idea|approach|strategy)",
    ),
    "deduce": _words(
        r"so\b|therefore|thus|hence|since\b|because|impl(?:y|ies)|must be\b|(?:which|this) means",
        r"we (?:can |must )?(?:also )?(?:get|have|obtain|see|find|conclude|note|observe)\b|if\b(?=.{0,200}\bthen\b)",
    ),
    SEVERAL: _words(r"calculat|comput|evaluat"),
}


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
    if said.startswith(("```", "~~~", "[asy]")):
        return Labelled("code")
    found, before = read_operations(_plain(said)), _BEFORE.match(said)
    return found._replace(label=_label(said[before.end() if before else 0 :], found.label))


def _label(said: str, operation: str) -> str:
    for label, opening in _OPENING.items():
        if opening.match(said) or _ANYWHERE[label].search(said):
            return label
    if operation != OTHER:
        return operation
    if said.endswith(("?", "？")):
        return "ask"
    if label := _first(_CUES, said):
        return label
    if label := next((label for label, opening in _OPENS.items() if opening.match(said)), ""):
        return label
    return SEVERAL if _EQUATION.search(said) else _first(_WEAK, said) or OTHER


def _first(cues: Mapping[str, re.Pattern[str]], said: str) -> str:
    return next((label for label, cue in cues.items() if cue.search(said)), "")


def _plain(text: str) -> str:
    r"""Mathematics as `read_operations` reads it: without markup, and with ``\frac{1}{2}`` as 1/2."""
    for pattern, plain in _NOTATION:
        text = pattern.sub(plain, text)
    return text
