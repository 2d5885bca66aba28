"""Stepbench: generated problems whose solutions are one local computation a line, so the steps of a reasoning text are known.

Three families (arithmetic, deduction, causal), an endless training stream, and three shipped splits: ``test``, ``longer`` (more
steps than training ever shows) and ``novel-names`` (names training never shows).
"""

from ling_probe.stepbench.essential import essential
from ling_probe.stepbench.reading import LABELS, OTHER, Reading, label_line, read_line
from ling_probe.stepbench.splits import (
    FAMILIES,
    SHIPPED,
    SPLITS,
    generate,
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
    "essential",
    "generate",
    "label_line",
    "read_line",
    "shipped_prompts",
    "shipped_records",
    "train_records",
    "write_shipped",
]
