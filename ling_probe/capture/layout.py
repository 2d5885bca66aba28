"""Where prompt, reasoning, answer and steps of one sequence lie, in tokens."""

from dataclasses import dataclass

import numpy as np

from ling_probe.capture.sequences import TokenSequence
from ling_probe.steps import answer_start, segment, token_spans
from ling_probe.trace import SEGMENTS, StepSpan

_PROMPT, _REASONING, _ANSWER, _SPECIAL, _TEMPLATE = range(len(SEGMENTS))


@dataclass(frozen=True)
class Layout:
    """Where the parts of one sequence lie, in tokens."""

    segment: np.ndarray
    step: np.ndarray
    steps: tuple[StepSpan, ...]
    completion: str


def find_layout(sequence: TokenSequence) -> Layout:
    """Segments and steps of a sequence; the answer is from where the text says it on, in a form of the record's format."""
    n, start = len(sequence.ids), sequence.n_prompt
    texts = sequence.texts[start:]
    completion = "".join(texts)
    stops = np.cumsum([len(text) for text in texts])
    offsets = [(int(stop) - len(text), int(stop)) for text, stop in zip(texts, stops, strict=True)]
    found = segment(sequence.record, completion, steps=sequence.steps)
    spans = token_spans(found, offsets, base=start)
    segments = np.full(n, _REASONING, np.uint8)
    segments[:start] = _PROMPT
    if (answer := answer_start(sequence.record, completion)) is not None:
        segments[start:][np.array([offset[0] for offset in offsets]) >= answer] = _ANSWER
    segments[sequence.special] = _SPECIAL
    segments[np.flatnonzero(sequence.template)] = _TEMPLATE
    step = np.full(n, -1, np.int16)
    for index, (first, last) in enumerate(spans):
        step[first:last] = index
    steps = tuple(
        StepSpan(step=i, label=each.label, text=each.text, start=a, stop=b, correct=each.correct)
        for i, (each, (a, b)) in enumerate(zip(found, spans, strict=True))
    )
    return Layout(segments, step, steps, completion)
