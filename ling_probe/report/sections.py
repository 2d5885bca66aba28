"""The questions of a report, and how many of them each depth tells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import pandas as pd
import plotly.graph_objects as go

from ling_probe import charts
from ling_probe.analysis import ANALYSES, SINGLE, Analysis, Finding, finding
from ling_probe.claims import SOURCES
from ling_probe.errors import UsageError
from ling_probe.report.tables import kept_rows
from ling_probe.spec import ModelSpec


class Depth(StrEnum):
    """How much a report tells."""

    summary = "summary"
    """One page: what was claimed and found, and the figures that matter most."""
    full = "full"
    """Every question, and one problem step by step."""
    expert = "expert"
    """That, and the most specialised experts one by one."""


KEY = (
    "routing_information",
    "label_specialisation",
    "routing_prediction",
    "load_balance",
    "logit_attribution",
    "causal_effects",
)
"""Analyses whose first figures a summary shows, where the run can answer them."""
COMPARING = tuple(name for name in ANALYSES if name not in SINGLE)
"""Analyses that ask how runs differ."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question of the report and its answer."""

    analysis: Analysis
    finding: Finding
    """Computed from the table, or why there is none."""
    rows: int = 0
    """Rows of the table files."""
    total_rows: int = 0
    """Rows of the analysis; more than `rows` where the table was cut."""
    figures: tuple[go.Figure, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether the run can answer the question."""
        return self.total_rows > 0


def asked(depth: Depth, *, comparing: bool = False) -> tuple[str, ...]:
    """Names of the analyses that a depth needs."""
    every = tuple(name for name in SINGLE if depth is not Depth.summary or name in (*KEY, *SOURCES))
    return (*every, *COMPARING) if comparing else every


def sections_of(spec: ModelSpec, tables: Mapping[str, pd.DataFrame | UsageError], depth: Depth) -> Sequence[Section]:
    """A section an answer, in their order; a summary keeps one figure of each that matters most."""
    return [_section(spec, name, answer, depth) for name, answer in tables.items()]


def _section(spec: ModelSpec, name: str, answer: pd.DataFrame | UsageError, depth: Depth) -> Section:
    analysis, found = ANALYSES[name], finding(name, answer)
    if isinstance(answer, UsageError):
        return Section(analysis=analysis, finding=found)
    drawn = depth is not Depth.summary or name in (*KEY, *COMPARING)
    figures = tuple(charts.FIGURES[name](answer, spec)) if drawn else ()
    kept = figures[:1] if depth is Depth.summary else figures
    return Section(analysis=analysis, finding=found, rows=kept_rows(answer), total_rows=len(answer), figures=kept)
