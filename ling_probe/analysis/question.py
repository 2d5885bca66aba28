"""A question about a run, and what its answer comes to: a sentence, an effect with its interval, a verdict, a rung.

The rungs are those of a ladder of evidence:

    0  a raw count
    1  above sampling noise: an interval
    2  survives a null that keeps token identity and position
    3  survives the correction for many tests
    4  replicated on held-out problems
    5  causal, against matched controls
    6  holds for another model or engine

A verdict speaks about the claim, not about the number: an interval that holds both no effect and one worth having is
`CANNOT_TELL`, never evidence of absence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd
from jaxtyping import Float64

DISCOVERY = 0.05
"""Corrected p below which a row counts as found."""


class Verdict(StrEnum):
    """What the run says about a claim."""

    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    CANNOT_TELL = "cannot tell at this sample size"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer in one sentence, and the numbers behind it."""

    sentence: str
    verdict: Verdict
    rung: int | None = None
    """Of the ladder above; what was reached, not what was tried."""
    effect: float = np.nan
    unit: str = ""
    """Of `effect`, its interval and `token_effect`."""
    ci_low: float = np.nan
    ci_high: float = np.nan
    """95 % interval of `effect`."""
    q: float = np.nan
    """p, corrected over all that the analysis tested."""
    token_effect: float = np.nan
    """The same measure where token identity alone decides; NaN if the question has no such side."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A question and the function that answers it."""

    function: Callable[..., pd.DataFrame]
    """Run in, tidy table out; a comparison takes a sequence of two runs or more."""
    question: str
    claim: str
    """What the verdict is about, as a statement that may be wrong."""
    method: str
    """How it is answered, and against which null."""
    order: Callable[[pd.DataFrame], pd.DataFrame]
    """Puts the rows worth reading first at the top."""
    finding: Callable[[pd.DataFrame], Finding]
    compares: bool = False
    """Whether it takes several runs."""

    @property
    def name(self) -> str:
        """Name on the command line, of its script and of its table."""
        return self.function.__name__


def judge(low: float, high: float, *, least: float, q: float = 0.0) -> Verdict:
    """Verdict on the claim that an effect is there, from its interval and corrected p.

    Args:
        low: Lower bound of its interval; NaN where there is none.
        high: Upper bound.
        least: Smallest effect, in either direction, worth having.
        q: Corrected p; 0 where nothing was tested beside the interval.

    >>> [judge(*bounds, least=0.5).value for bounds in ((0.2, 0.9), (-0.1, 0.3), (-0.1, 0.9))]
    ['supported', 'not supported', 'cannot tell at this sample size']
    """
    if q < DISCOVERY and (low > 0 or high < 0):
        return Verdict.SUPPORTED
    return Verdict.NOT_SUPPORTED if -least < low and high < least else Verdict.CANNOT_TELL


def judge_above(low: float, high: float, *, than: float) -> Verdict:
    """Verdict on the claim that a number is above another, from its interval.

    >>> [judge_above(*bounds, than=0.5).value for bounds in ((0.6, 0.7), (0.1, 0.3), (0.4, 0.6))]
    ['supported', 'not supported', 'cannot tell at this sample size']
    """
    if low > than:
        return Verdict.SUPPORTED
    return Verdict.NOT_SUPPORTED if high < than else Verdict.CANNOT_TELL


def judge_gain(low: float, high: float, *, least: float, q: float = 0.0) -> Verdict:
    """As `judge`, for a claim that an effect is above 0: one below it is not supported.

    >>> [judge_gain(*bounds, least=0.5).value for bounds in ((0.2, 0.9), (-0.9, -0.3), (-0.1, 0.9))]
    ['supported', 'not supported', 'cannot tell at this sample size']
    """
    return judge(max(low, 0.0), max(high, 0.0), least=least, q=q)


def judge_held_out(low: float, high: float, *, least: float, enough: bool) -> Verdict:
    """As `judge_gain`, for an effect that must be learnt first: finding none says nothing where there is not enough to learn.

    >>> [judge_held_out(0.0, 0.1, least=0.5, enough=enough).value for enough in (True, False)]
    ['not supported', 'cannot tell at this sample size']
    """
    verdict = judge_gain(low, high, least=least)
    return verdict if enough or verdict is Verdict.SUPPORTED else Verdict.CANNOT_TELL


def judge_cells(table: pd.DataFrame, *, least: float) -> Verdict:
    """Verdict on the claim that some of many tested rows (columns ci_low, ci_high, q) have an effect.

    Supported if one is found. Not supported only if the intervals of 95 % of the tested rows exclude effects of `least`.
    """
    tested = table[table["q"].notna()]
    if (tested["q"] < DISCOVERY).any():
        return Verdict.SUPPORTED
    small = (tested["ci_low"] > -least) & (tested["ci_high"] < least)
    return Verdict.NOT_SUPPORTED if len(tested) and small.mean() >= 0.95 else Verdict.CANNOT_TELL


def sure_effect(table: pd.DataFrame) -> Float64[np.ndarray, " N"]:
    """How far each row's interval lies from 0; 0 if it holds 0.

    >>> sure_effect(pd.DataFrame({"ci_low": [0.5, -2.0, -1.0], "ci_high": [1.0, -1.5, 1.0]}))
    array([0.5, 1.5, 0. ])
    """
    return np.maximum(np.nan_to_num(np.maximum(table["ci_low"].to_numpy(), -table["ci_high"].to_numpy())), 0.0)


def surest_first(table: pd.DataFrame) -> pd.DataFrame:
    """Discoveries (q < 0.05) before the rest, preferences before aversions, each by how far their interval lies from 0."""
    found = (table["q"] < DISCOVERY).to_numpy()
    liked = (table["ci_low"] > 0).to_numpy()
    return table.iloc[np.lexsort((-sure_effect(table), ~liked, ~found))]


def overall_first(table: pd.DataFrame) -> pd.DataFrame:
    """Rows over all tokens (`kind` "all") before those of families and labels."""
    return table.iloc[np.argsort((table["kind"] != "all").to_numpy(), kind="stable")]


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """As it is."""
    return table


def layer_means(rows: pd.DataFrame, *names: str) -> tuple[float, ...]:
    """Means of columns over rows of one layer each.

    The means of the layers' bounds stand in for the interval of the mean: they are never closer together than it is.
    """
    return tuple(float(rows[name].mean()) for name in names)


def fold(log2: float) -> str:
    """A log2 ratio as a factor.

    >>> fold(1.0)
    '2.00'
    """
    return f"{2.0**log2:.2f}"


def fold_interval(row: pd.Series) -> str:
    """The interval of a log2 ratio, as factors."""
    return f"{fold(row['ci_low'])} to {fold(row['ci_high'])}"


def percent(share: float) -> str:
    """A share in per cent.

    >>> percent(0.125)
    '12.50 %'
    """
    return f"{100 * share:.2f} %"
