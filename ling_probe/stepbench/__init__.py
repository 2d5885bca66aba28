"""Stepbench: generated problems whose solutions are one local computation a line, so the steps of a reasoning text are known.

Three families (arithmetic, deduction, causal), an endless training stream, and four shipped splits: ``test``, ``longer`` (more
steps than training ever shows), ``novel-names`` (names training never shows) and ``pairs`` (minimal pairs).
"""

from ling_probe.stepbench.problem import FAMILIES, SHIPPED, SPLITS, generate
from ling_probe.stepbench.reading import LABELS, OTHER, Reading, label_line, read_line
from ling_probe.stepbench.splits import (
    shipped_prompts,
    shipped_records,
    train_records,
    write_shipped,
)
from ling_probe.stepbench.verify import check

__all__ = [
    "FAMILIES",
    "LABELS",
    "OTHER",
    "SHIPPED",
    "SPLITS",
    "Reading",
    "check",
    "generate",
    "label_line",
    "read_line",
    "shipped_prompts",
    "shipped_records",
    "train_records",
    "write_shipped",
]
