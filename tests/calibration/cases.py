"""What is calibrated: an analysis, the world in which its claim is false, and what is counted over many runs of that world.

To add a test, add a line to `CASES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats
from worlds import World

from ling_probe.analysis import ANALYSES
from ling_probe.analysis.question import DISCOVERY, Verdict

LEVEL = 0.05
SECOND_LOOK, OTHER = 1_000_000, 10_000_000
"""Where the seeds of a second look begin, and those of a run that another is compared with."""

WORDS = World(words=0.7)
WORDS_ALONE = World(words=0.7, drift=0.0, trend=0.0, sequence=0.0)
NO_WORDS = World(token=0.0)
LOADS = World(token=0.0, drift=0.0, trend=0.0, sequence=0.0)
WORLDS = {
    "words": WORDS,
    "words alone": WORDS_ALONE,
    "longer is harder": replace(WORDS, n_sequences=96, longer_is_harder=0.5),
    "many problems": replace(WORDS, n_sequences=96),
    "labels in order": replace(WORDS, ordered=True),
    "labels in order, strong trend": replace(WORDS, ordered=True, trend=1.5),
    "same words": World(),
    "same words, no order": World(drift=0.0, trend=0.0),
    "same words, no trend": World(trend=0.0),
    "words do not route": NO_WORDS,
    "loads": LOADS,
    "even": replace(LOADS, skew=0.0),
    "balanced": replace(LOADS, skew=0.0, bias=0.0),
}
"""Everything but labels: skew, words that route and that labels use unequally, drift, trend, problems that differ; and less."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A test and a world in which what it tests for is not there."""

    analysis: str
    world: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Of the analysis, instead of its defaults."""
    quick: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """More of them where only few runs can be afforded."""
    quick_runs: int = 100
    note: str = ""
    """What is special about the options."""
    pair: Literal["other problems", "same problems"] = "other problems"
    """What a comparison compares: two runs of other problems, or two that route the same problems anew."""
    null: float = 0.0
    """What intervals should hold."""
    rows: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table
    """The rows of its table that hold tests."""
    reason: str = ""
    """Why fewer rejections than 5 % are to be expected, where they are; nothing excuses more."""
    wrong: str = ""
    """What is wrong with the test in this world, where it is known to reject too often: counted, not excused."""

    def __str__(self) -> str:
        pair = self.pair if ANALYSES[self.analysis].compares else ""
        return ", ".join(filter(None, (self.analysis, self.world, self.note, pair)))

    def table(self, seed: int, **options: Any) -> pd.DataFrame:
        """The analysis of fresh runs."""
        world, analysis = WORLDS[self.world], ANALYSES[self.analysis]
        options = {**self.options, **options}
        if not analysis.compares:
            return analysis.function(world.run(seed), **options)
        other = world.run(seed, routing=1) if self.pair == "same problems" else world.run(OTHER + seed)
        return analysis.function([world.run(seed), other], **options)


FEW = MappingProxyType({"draws": 50, "permutations": 499})
FEW_DRAWS = MappingProxyType({"draws": 50})
MOMENTS = MappingProxyType({"permutations": 10**9})
"""More permutations than are ever drawn: every p is then from exact moments, as in large runs."""
FOUR_STATES = MappingProxyType({"states": 4})
OWN_MEANS = "the mean of a pair of tokens holds each of them: in a small run it takes from paths with the same words"
RARE_WORDS = (
    "a word that a label has nearly to itself is expected to do what it did there: that takes from the observed sum, and less "
    "from shuffled ones"
)
CAREFUL = "the law fitted to the moments has a heavier tail than shuffles of few steps"
IN_ORDER = "labels that keep their place have many words of a third of the solution to themselves; these say nothing"
FEW_NAMED = "the jackknife is wide where the count of a name is skewed"
WORSE = "what knows nothing makes a decoder worse, and the test is one-sided"
VERDICT_ONLY = "the verdict is a rule of several conditions, not a test at 5 %"


def label_given_token(table: pd.DataFrame) -> pd.DataFrame:
    """What routing tells about the label, given the token at least."""
    return table[(table["about"] == "label") & (table["given"] != "nothing")]


def beyond_words(table: pd.DataFrame) -> pd.DataFrame:
    """With the interval of what is left beyond the words."""
    return table.assign(ci_low=table["beyond_low"], ci_high=table["beyond_high"])


def beyond_tokens(table: pd.DataFrame) -> pd.DataFrame:
    """Levels at which tokens are equal."""
    return table[~table["level"].isin(["words", "raw"])]


def left_of_tokens(table: pd.DataFrame) -> pd.DataFrame:
    """States of what is left of routing without the tokens."""
    return table[table["source"] == "routing beyond tokens"]


def beyond_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Paths of what is left of routing without pairs of tokens."""
    return table[table["source"] == "routing beyond pairs of tokens"]


def routing_and_text(table: pd.DataFrame) -> pd.DataFrame:
    """With the interval of what routing adds to the text so far."""
    return table[table["p"].notna()].assign(ci_low=table["gain_low"], ci_high=table["gain_high"])


def experts(table: pd.DataFrame) -> pd.DataFrame:
    """Experts alone."""
    return table[table["kind"] == "expert"]


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """With the interval and the p of what routing adds to words and place."""
    return table[table["q"].notna()].assign(p=table["gain_p"], ci_low=table["gain_low"], ci_high=table["gain_high"])


def none(table: pd.DataFrame) -> pd.DataFrame:
    """No row: the verdict alone counts."""
    return table[:0]


CASES = (
    Case(analysis="label_specialisation", world="words", quick=FEW, reason=RARE_WORDS),
    Case(analysis="label_specialisation", world="same words", quick=FEW),
    Case(analysis="label_specialisation", world="words", options=MOMENTS, note="moments", quick=FEW_DRAWS, reason=CAREFUL),
    Case(analysis="label_specialisation", world="labels in order", quick=FEW, reason=IN_ORDER),
    Case(analysis="label_specialisation", world="labels in order, strong trend", quick=FEW, reason=IN_ORDER),
    Case(analysis="family_specialisation", world="words", quick=FEW, reason=RARE_WORDS),
    Case(analysis="family_specialisation", world="same words", quick=FEW),
    Case(analysis="family_specialisation", world="same words", options=MOMENTS, note="moments", quick=FEW_DRAWS),
    Case(analysis="correctness_specialisation", world="words", quick=FEW, reason=RARE_WORDS),
    Case(analysis="step_similarity", world="words", rows=beyond_tokens, quick_runs=50),
    Case(analysis="answer_prediction", world="longer is harder", quick_runs=20),
    Case(analysis="risk_difference", world="same words"),
    Case(analysis="routing_information", world="words", rows=label_given_token, quick_runs=50),
    Case(analysis="label_decoding", world="words", rows=none, quick_runs=10, reason=VERDICT_ONLY),
    Case(analysis="label_onset", world="words", rows=routing_and_text, quick_runs=10, reason=WORSE),
    Case(analysis="label_carriers", world="words", rows=experts, quick_runs=20, reason=WORSE),
    Case(analysis="operation_transfer", world="words", rows=gains, quick_runs=10, reason=WORSE),
    Case(analysis="first_wrong_step", world="many problems"),
    Case(analysis="wrong_step_localisation", world="many problems", quick_runs=20, reason=WORSE),
    Case(analysis="routing_prediction", world="words alone", rows=none, quick_runs=50, reason=VERDICT_ONLY),
    Case(analysis="vocabulary_specialisation", world="words do not route", rows=none, reason=VERDICT_ONLY),
    Case(analysis="token_overlap", world="words do not route", rows=none, reason=VERDICT_ONLY),
    Case(analysis="enrichment", world="loads", reason=FEW_NAMED),
    Case(analysis="expert_load", world="balanced", rows=none),
    Case(analysis="load_curve", world="balanced", rows=none, quick_runs=40, reason=VERDICT_ONLY),
    Case(analysis="coverage", world="balanced", rows=none, quick_runs=40, reason=VERDICT_ONLY),
    Case(analysis="router_confidence", world="words", rows=beyond_words, quick=FEW, reason=RARE_WORDS),
    Case(analysis="expert_affinity", world="same words"),
    Case(analysis="repeat_choice", world="same words, no order", null=1.0),
    Case(analysis="segment_routing", world="same words, no order"),
    Case(analysis="routing_churn", world="words"),
    Case(analysis="prompt_rollout", world="same words, no trend"),
    Case(analysis="layer_transition", world="loads"),
    Case(analysis="load_shift", world="words"),
    Case(analysis="load_shift", world="words", pair="same problems"),
    Case(analysis="coactivation", world="even", quick_runs=50),
    Case(
        analysis="coactivation", world="loads", quick_runs=50,
        wrong="independence inside and across groups is not exactly what a router makes of unequal loads",
    ),
    Case(analysis="expert_clusters", world="words", quick_runs=20, reason=VERDICT_ONLY),
    Case(
        analysis="routing_states", world="words", options=FOUR_STATES, note="beyond tokens", rows=left_of_tokens, quick_runs=20,
    ),
    Case(analysis="state_profiles", world="words", options=FOUR_STATES, quick_runs=20, reason=CAREFUL),
    Case(analysis="step_boundaries", world="words", options=FOUR_STATES, rows=none, quick_runs=20, reason=VERDICT_ONLY),
    Case(analysis="path_alignment", world="words", options=FOUR_STATES, rows=beyond_pairs, quick_runs=20, reason=OWN_MEANS),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Counts:
    """What was counted over the runs: one number of each, so runs are the independent trials of everything here."""

    drawn: np.ndarray
    """p of one test drawn at random among the run's; how many are at most 0.05 is binomial."""
    share: np.ndarray
    """Share of all tests of the run with p at most 0.05; not binomial, its spread is between runs."""
    discovery: np.ndarray
    """Whether any q is below 0.05; how many are is binomial."""
    supported: np.ndarray
    """Whether the verdict is "supported"; how many are is binomial."""
    missed: np.ndarray
    """Whether the interval of that test, or of a row drawn so, misses what it should hold; NaN without one."""

    def __len__(self) -> int:
        return len(self.drawn)

    @property
    def tested(self) -> bool:
        """Whether the analysis has p values."""
        return not np.isnan(self.drawn).all()

    @property
    def rejected(self) -> int:
        """Runs whose drawn test rejects at 5 %."""
        return int((self.drawn <= LEVEL).sum())

    def rate(self) -> tuple[float, float, float]:
        """Mean share of rejecting tests, with its 95 % interval from the spread between runs (Student)."""
        return mean_interval(self.share)

    def faults(self, *, may_be_low: bool) -> list[str]:
        """What does not fit a rate of 5 %; for discoveries and verdicts, of 5 % at most."""
        low, high = binomial_band(len(self))
        found = {"discoveries": int(self.discovery.sum()) > high, "verdicts": int(self.supported.sum()) > high}
        if not self.tested:
            found["intervals"] = int(np.nansum(self.missed)) > high
        else:
            _, least, most = self.rate()
            found |= {"drawn tests, too many": self.rejected > high, "all tests, too many": least > LEVEL}
            found |= {"drawn tests, too few": self.rejected < low, "all tests, too few": most < LEVEL} if not may_be_low else {}
        return [name for name, wrong in found.items() if wrong]


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean with its 95 % interval, from the spread between independent values."""
    values = values[~np.isnan(values)]
    reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - reach), float(values.mean() + reach)


def binomial_band(n: int, rate: float = LEVEL, level: float = 0.95) -> tuple[int, int]:
    """Least and most successes of n that a rate gives at this level, both ends included.

    >>> binomial_band(200)
    (4, 16)
    """
    low, high = stats.binom.interval(level, n, rate)
    return int(low), int(high)


def count(case: Case, n_runs: int, *, first: int = 0, quick: bool = False) -> Counts:
    """Ask the case's question of `n_runs` independent runs, with seeds from `first` on."""
    found, finding = [], ANALYSES[case.analysis].finding
    for seed in range(first, first + n_runs):
        table = case.table(seed, **(case.quick if quick else {}))
        supported = finding(table).verdict is Verdict.SUPPORTED
        found.append((*_one(case.rows(table), case.null, np.random.default_rng(seed)), supported))
    drawn, share, discovery, missed, supported = np.array(found, dtype=float).T
    return Counts(drawn, share, discovery, supported, missed)


def _one(table: pd.DataFrame, null: float, rng: np.random.Generator) -> tuple[float, float, bool, float]:
    """p of a test drawn at random, the share that reject, whether anything is found, whether that interval misses the null."""
    has_p = "p" in table
    tested = table[table["p" if has_p else "ci_low"].notna()] if has_p or "ci_low" in table else table[:0]
    if tested.empty:
        return np.nan, np.nan, False, np.nan
    drawn = tested.iloc[rng.integers(len(tested))]
    interval = "ci_low" in drawn and not np.isnan(drawn["ci_low"])
    missed = not drawn["ci_low"] <= null <= drawn["ci_high"] if interval else np.nan
    if not has_p:
        return np.nan, np.nan, False, missed
    return drawn["p"], (tested["p"] <= LEVEL).mean(), (tested["q"] < DISCOVERY).any(), missed


def calibrate(case: Case, n_runs: int, *, quick: bool = False) -> tuple[Counts, list[str]]:
    """Counts, and what is wrong by two looks.

    One row in twenty falls outside a 95 % band by chance. What is off in the first look is looked at again in as many fresh
    runs; only what is off there too is a fault, and the counts are then those of the second look.
    """
    first = count(case, n_runs, quick=quick)
    faults = first.faults(may_be_low=bool(case.reason))
    if not faults:
        return first, []
    second = count(case, n_runs, first=SECOND_LOOK, quick=quick)
    return second, [fault for fault in second.faults(may_be_low=bool(case.reason)) if fault in faults]
