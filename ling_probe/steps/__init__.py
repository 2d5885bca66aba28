"""From a text to its reasoning steps and its answer, and from a step's characters to tokens.

Steps are annotated by their benchmark, or found by rules that any text can be cut and labelled by.
"""

from ling_probe.steps.boundaries import SEGMENTERS
from ling_probe.steps.choice import CHOICES, RULES_VERSION, check_steps, segment
from ling_probe.steps.labels import LABELS
from ling_probe.steps.places import answer_start, judge, token_spans

__all__ = [
    "CHOICES",
    "LABELS",
    "RULES_VERSION",
    "SEGMENTERS",
    "answer_start",
    "check_steps",
    "judge",
    "segment",
    "token_spans",
]
