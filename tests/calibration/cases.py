"""What is calibrated: an analysis, the world in which its claim is false, and what is counted over many runs of that world.

To add a test, add a line to `CASES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from worlds import World

from ling_probe.analysis import ANALYSES
from ling_probe.analysis.question import DISCOVERY, Verdict

LEVEL = 0.05

WORDS = World(words=0.7)
"""Everything but labels: skew, words that route and that labels use unequally, drift, trend, problems that differ."""
WORDS_ALONE = World(words=0.7, drift=0.0, trend=0.0, sequence=0.0)
"""Routing follows words and noise: tokens of a sequence are independent given their words."""
LOADS = World(token=0.0, drift=0.0, trend=0.0, sequence=0.0)
"""Experts differ in load alone."""
EVEN = replace(LOADS, skew=0.0)
"""No preference of any kind."""
WORLDS = {"words": WORDS, "words alone": WORDS_ALONE, "loads": LOADS, "even": EVEN}


@dataclass(frozen=True)
class Case:
    """A test and a world in which what it tests for is not there."""

    analysis: str
    world: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    runs: int = 1
    """Runs that one answer takes; a comparison takes two."""
    rows: Callable[[pd.DataFrame], pd.DataFrame] = field(default=lambda table: table)
    """Rows of the table that hold tests."""
    reason: str = ""
    """Why fewer rejections than 5 % are to be expected, where they are; nothing excuses more."""

    def table(self, seed: int) -> pd.DataFrame:
        """The analysis of fresh runs."""
        world, analysis = WORLDS[self.world], ANALYSES[self.analysis]
        runs = [world.run(self.runs * seed + number) for number in range(self.runs)]
        return analysis.function(runs if analysis.compares else runs[0], **self.options)


CASES = (
    Case("label_specialisation", "words"),
    Case("label_specialisation", "words alone"),
    Case("family_specialisation", "words"),
    Case("family_specialisation", "words alone"),
    Case("coactivation", "loads"),
    Case("coactivation", "even"),
    Case("expert_clusters", "words"),
)


@dataclass(frozen=True, eq=False)
class Counts:
    """What was counted over the runs; each is one yes or no of every run, so binomial over runs, unless it says otherwise."""

    drawn: np.ndarray
    """p of one test drawn at random among the run's."""
    share: np.ndarray
    """Share of all tests of the run with p at most 0.05: not binomial, its spread is between runs."""
    discovery: np.ndarray
    """Whether any q is below 0.05."""
    supported: np.ndarray
    """Whether the verdict is "supported"."""
    covered: np.ndarray
    """Whether the drawn test's interval holds 0; NaN without one."""

    @property
    def rejected(self) -> int:
        """Runs whose drawn test rejects at 5 %."""
        return int((self.drawn <= LEVEL).sum())

    def rate(self) -> tuple[float, float, float]:
        """Mean share of rejecting tests, with its 95 % interval from the spread between runs (Student)."""
        return mean_interval(self.share)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean with its 95 % interval, from the spread between independent values."""
    reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - reach), float(values.mean() + reach)


def binomial_band(n: int, rate: float = LEVEL, level: float = 0.95) -> tuple[int, int]:
    """Least and most successes of n that a rate gives at this level, both ends included.

    >>> binomial_band(200)
    (5, 16)
    """
    low, high = stats.binom.interval(level, n, rate)
    return int(low), int(high)


def count(case: Case, n_runs: int, *, first: int = 0) -> Counts:
    """Ask the case's question of `n_runs` independent runs, with seeds from `first` on."""
    return counted(lambda seed: case.rows(case.table(seed)), ANALYSES[case.analysis].finding, range(first, first + n_runs))


def counted(tests: Callable[[int], pd.DataFrame], finding, seeds) -> Counts:
    found = [_one(tests(seed), finding, np.random.default_rng(seed)) for seed in seeds]
    return Counts(*(np.array(column, dtype=float) for column in zip(*found, strict=True)))


def _one(table: pd.DataFrame, finding, rng: np.random.Generator) -> tuple[float, float, bool, bool, float]:
    supported = finding(table).verdict is Verdict.SUPPORTED
    if "p" not in table or not len(tested := table[table["p"].notna()]):
        return np.nan, np.nan, False, supported, np.nan
    drawn = tested.iloc[rng.integers(len(tested))]
    covered = np.nan if "ci_low" not in drawn or np.isnan(drawn["ci_low"]) else drawn["ci_low"] <= 0 <= drawn["ci_high"]
    return drawn["p"], (tested["p"] <= LEVEL).mean(), (tested["q"] < DISCOVERY).any(), supported, covered
