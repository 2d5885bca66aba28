"""Whether routing tells where a step ends and the next begins, beyond what the words there tell.

Six ways to say so, of which the first three have never seen a boundary:

    distance        how far the experts of the 4 tokens before lie from those of the 4 from here on, where that is a peak
    token distance  the same from what the identity of each token makes of its routing
    state change    where the routing state (see `hidden`) changes
    routing         a logistic regression on the routing of the token and of the one before, and on the distance
    words           a logistic regression on the two token ids, and on what these, and those near, make of routing by themselves
    both            one on all of these

Regressions learn on two thirds of the first half of the problems; on the last third of it, thresholds are chosen that find as
many boundaries as there are; and everything is measured on the second half. Words can be all there is to know: where each step
ends with its line, nothing is left to gain.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ling_probe import segmentation, stats
from ling_probe.analysis.hidden import Fitted, Halves, fit
from ling_probe.analysis.question import Analysis, Finding, in_order, judge_held_out
from ling_probe.analysis.sample import interval_text, numbered, resampled_interval
from ling_probe.errors import UsageError
from ling_probe.run import Run

DISTANCE, TOKENS, CHANGE, ROUTING, WORDS, BOTH = SOURCES = (
    "distance", "token distance", "state change", "routing", "words", "both",
)  # fmt: skip
REACH = 4
"""Tokens on each side of a place that are compared."""
LEAST_EFFECT = 0.02
"""F1 that is worth having."""
LEAST_PROBLEMS = 40
_PEAK = 2


def step_boundaries(
    run: Run, *, states: int | None = None, fitted: Fitted | None = None, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """How well boundaries of steps can be told from routing, from words, and from both, on held-out problems.

    One row a way to tell (`source`, see above), with the `threshold` above which it says boundary: `marked` boundaries and
    `found` ones, `precision`, `recall`, `f1` over all problems together with its interval (`ci_low`, `ci_high`: bootstrap over
    problems), `chance_f1` and `p` when the found ones are shifted round within their problem, `q` corrected over sources;
    `near_f1`, where one token off counts; `pk` and `window_diff`, means over problems, of which 0 is best; `gain` over words
    in F1 above chance, with its interval (`gain_low`, `gain_high`). `problems` were measured, `learnt` taught.

    Args:
        run: A run whose benchmark has steps.
        states: How many routing states; None takes as many as tell held-out problems of the fitted half best.
        fitted: States fitted to the run before.
        draws: Bootstrap samples.
        seed: Of the sample, the halves, the start and the bootstrap.

    Raises:
        UsageError: The run has no steps, or too few problems.
    """
    if run.steps.empty:
        raise UsageError("no step labels in this run")
    fitted = fitted or fit(run, states=states, seed=seed)
    places = Places.of(fitted.halves, seed=seed)
    scores = _scores(fitted, places)
    found = {name: _Measured.of(places, score, _threshold(places, score)) for name, score in scores.items()}
    weights = stats.bootstrap_weights(found[WORDS].n_problems, draws=draws, seed=seed)
    table = pd.DataFrame([{"source": name} | found[name].row(found[WORDS], weights) for name in SOURCES])
    table.insert(list(table.columns).index("p") + 1, "q", stats.benjamini_hochberg(table["p"].to_numpy()))
    return table.assign(problems=found[WORDS].n_problems, learnt=len(np.unique(places.problem[places.learn])), seed=seed)


def distance_thresholds(fitted: Fitted) -> dict[str, float]:
    """From which distance of routing a place is a boundary, and of what tokens alone make of it; for `routing_distance`.

    Raises:
        UsageError: The run has too few problems with steps.
    """
    places = Places.of(fitted.halves, seed=fitted.seed)
    series = {DISTANCE: fitted.halves.values, TOKENS: fitted.halves.expected}
    return {name: _threshold(places, routing_distance(each[places.rows], places.lengths)) for name, each in series.items()}


@dataclass(frozen=True, eq=False)
class Places:
    """Tokens inside steps, of which every one but a problem's first may begin a step."""

    rows: Integer[np.ndarray, " N"]
    """In the sample."""
    problem: Integer[np.ndarray, " N"]
    """Numbered; ascending."""
    marked: Bool[np.ndarray, " N"]
    """Whether a step begins here that is not the problem's first."""
    learn: Bool[np.ndarray, " N"]
    choose: Bool[np.ndarray, " N"]
    """Problems that teach, and those that thresholds are chosen on; the rest is measured."""

    @classmethod
    def of(cls, halves: Halves, *, seed: int) -> "Places":
        """The places of a sample."""
        sample = halves.sample
        rows = np.flatnonzero(sample.step >= 0)
        if len(np.unique(sample.sequence[rows])) < 4:
            raise UsageError("too few problems with steps in this run; learning where they end needs 4")
        problem, step = numbered(sample.sequence[rows]), sample.step[rows]
        marked = np.concatenate([[False], (problem[1:] == problem[:-1]) & (step[1:] != step[:-1])])
        first = halves.first[rows]
        order = np.random.default_rng([seed, 3]).permutation(int(problem.max()) + 1)
        choose = first & (order % 3 == 0)[problem]
        return cls(rows, problem, marked, first & ~choose, choose)

    @property
    def follows(self) -> Bool[np.ndarray, " N"]:
        """Whether the row before is of the same problem."""
        return np.concatenate([[False], self.problem[1:] == self.problem[:-1]])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each problem."""
        return np.bincount(self.problem).tolist()


def routing_distance(values: Float64[np.ndarray, "N D"], lengths: Sequence[int]) -> Float64[np.ndarray, " N"]:
    """How far the mean of the `REACH` rows before lies from that of as many from here on; minus infinity where it is no peak.

    Rows are those of sequences of some lengths; at the first of each there is nothing before.
    """
    start = np.repeat(np.cumsum([0, *lengths])[:-1], lengths)
    stop, rows = start + np.repeat(lengths, lengths), np.arange(len(values))
    low, high = np.maximum(rows - REACH, start), np.minimum(rows + REACH, stop)
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
    before = (total[rows] - total[low]) / np.maximum(rows - low, 1)[:, None]
    distance = np.linalg.norm(before - (total[high] - total[rows]) / (high - rows)[:, None], axis=1)
    distance[rows == start] = -np.inf
    peak = rows > start
    for step in range(1, _PEAK + 1):
        earlier, later = rows - step >= start, rows + step < stop
        peak[earlier] &= distance[earlier] > distance[rows[earlier] - step]
        peak[later] &= distance[later] >= distance[rows[later] + step]
    return np.where(peak, distance, -np.inf)


def _scores(fitted: Fitted, places: Places) -> dict[str, Float64[np.ndarray, " N"]]:
    """How much each place looks like a boundary; of a problem's first token, nothing does."""
    halves, rows = fitted.halves, places.rows
    values, expected, path = halves.values[rows], halves.expected[rows], fitted.path[rows]
    distance, token_distance = (routing_distance(each, places.lengths) for each in (values, expected))
    change = np.where(path != np.roll(path, 1), 1.0, -np.inf)
    routing = _standard(np.roll(values, 1, axis=0), values, np.maximum(distance, 0), change > 0)
    ids = numbered(halves.sample.token_id[rows])
    made = _standard(np.roll(expected, 1, axis=0), expected, np.maximum(token_distance, 0))
    words = sparse.hstack([_one_hot(np.roll(ids, 1)), _one_hot(ids), made], format="csr")
    scores = {
        DISTANCE: distance,
        TOKENS: token_distance,
        CHANGE: change,
        ROUTING: _learnt(routing, places),
        WORDS: _learnt(words, places),
        BOTH: _learnt(sparse.hstack([words, routing], format="csr"), places),
    }
    return {name: np.where(places.follows, score, -np.inf) for name, score in scores.items()}


def _standard(*columns: np.ndarray) -> sparse.csr_array:
    values = np.column_stack(columns)
    return sparse.csr_array((values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-9))


def _one_hot(codes: Integer[np.ndarray, " N"]) -> sparse.csr_array:
    rows = np.arange(len(codes))
    return sparse.csr_array((np.ones(len(codes)), (rows, codes)), shape=(len(codes), int(codes.max()) + 1))


def _learnt(features: sparse.csr_array, places: Places) -> Float64[np.ndarray, " N"]:
    """Log odds of a boundary, learnt where it may be."""
    teaches = places.learn & places.follows
    if len(np.unique(places.marked[teaches])) < 2:
        raise UsageError("the steps of this run have no boundaries to learn from, or nothing else")
    features = sparse.csr_array(
        (features.data, features.indices.astype(np.int32), features.indptr.astype(np.int32)), shape=features.shape
    )
    with warnings.catch_warnings():
        # A fit stopped early is judged by what it predicts, as any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=10.0, max_iter=200, tol=1e-3).fit(features[teaches], places.marked[teaches])
    return model.decision_function(features)


def _threshold(places: Places, score: Float64[np.ndarray, " N"]) -> float:
    """The score from which as many boundaries are found as there are, or as near as it gets, on the problems to choose on.

    The threshold that is best for F1 would call every place a boundary where a score knows nothing.
    """
    here = places.choose & np.isfinite(score)
    values, counts = np.unique(score[here], return_counts=True)
    if not len(values):
        return np.inf
    found = np.cumsum(counts[::-1])[::-1]
    return float(values[int(np.argmin(np.abs(found - places.marked[places.choose].sum())))])


@dataclass(frozen=True, eq=False)
class _Measured:
    """Found boundaries against the marked ones, by held-out problem."""

    threshold: float
    counts: Float64[np.ndarray, "P 3"]
    """Matches, marked and found."""
    near: Float64[np.ndarray, "P 3"]
    distances: Float64[np.ndarray, "P 2"]
    """Pk and WindowDiff."""
    chance: Float64[np.ndarray, " P"]
    """Matches to expect when the found are shifted round."""
    p: float

    @classmethod
    def of(cls, places: Places, score: Float64[np.ndarray, " N"], threshold: float) -> "_Measured":
        found = places.follows & (score >= threshold)
        measured = np.unique(places.problem[~places.learn & ~places.choose])
        bounds = np.searchsorted(places.problem, [measured, measured + 1]).T
        counts, near, distances, laws = [], [], [], []
        for start, stop in bounds:
            ours, theirs, n = np.flatnonzero(places.marked[start:stop]), np.flatnonzero(found[start:stop]), int(stop - start)
            counts.append((segmentation.matched(ours, theirs), len(ours), len(theirs)))
            near.append((segmentation.matched(ours, theirs, tolerance=1), len(ours), len(theirs)))
            distances.append((segmentation.pk(ours, theirs, n), segmentation.window_diff(ours, theirs, n)))
            if n > 1:
                inside = slice(start + 1, stop)
                laws.append(stats.shift_moments(found[inside, None].astype(float), places.marked[inside, None].astype(float)))
        told, law = np.array(counts, float), sum(laws[1:], laws[0])
        sizes = np.maximum(bounds[:, 1] - bounds[:, 0] - 1, 1)
        return cls(
            threshold, told, np.array(near, float), np.array(distances, float), told[:, 1] * told[:, 2] / sizes,
            float(law.p(least=1e-9).item()),
        )  # fmt: skip

    @property
    def n_problems(self) -> int:
        return len(self.counts)

    def above_chance(self, weights: Float64[np.ndarray, "B P"]) -> Float64[np.ndarray, " B"]:
        """F1 minus that to expect when the found are shifted round."""
        shifted = np.column_stack([self.chance, self.counts[:, 1:]])
        return segmentation.micro_score(self.counts, weights) - segmentation.micro_score(shifted, weights)

    def row(self, words: "_Measured", weights: Float64[np.ndarray, "B P"]) -> dict[str, float]:
        """Columns of one source."""
        total, n = self.counts.sum(axis=0), self.n_problems
        every = np.concatenate([np.ones((1, n)), weights])
        low, high = resampled_interval(segmentation.micro_score(self.counts, weights), n)
        gain = self.above_chance(every) - words.above_chance(every)
        gain_low, gain_high = resampled_interval(gain[1:], n)
        return {
            "threshold": self.threshold,
            "marked": int(total[1]),
            "found": int(total[2]),
            **segmentation.score(*total)._asdict(),
            "ci_low": float(low),
            "ci_high": float(high),
            "chance_f1": segmentation.score(self.chance.sum(), total[1], total[2]).f1,
            "p": self.p,
            "near_f1": segmentation.score(*self.near.sum(axis=0)).f1,
            "pk": float(np.nanmean(self.distances[:, 0])),
            "window_diff": float(np.nanmean(self.distances[:, 1])),
            "gain": float(gain[0]),
            "gain_low": float(gain_low),
            "gain_high": float(gain_high),
        }


def _finding(table: pd.DataFrame) -> Finding:
    by: dict[object, pd.Series] = {name: rows.iloc[0] for name, rows in table.groupby("source")}
    row, words = by[BOTH], by[WORDS]
    return Finding(
        sentence=(
            f"Words tell the {int(words['marked']):,} boundaries of {int(words['problems']):,} held-out problems with an F1 of "
            f"{words['f1']:.3f} (chance {words['chance_f1']:.3f}), routing with {by[ROUTING]['f1']:.3f}, both with "
            f"{row['f1']:.3f}: routing adds {row['gain']:+.3f} ({interval_text(row['gain_low'], row['gain_high'], '+.3f')}). "
            f"Without having seen one, peaks of the distance in routing give {by[DISTANCE]['f1']:.3f} "
            f"(chance {by[DISTANCE]['chance_f1']:.3f}), {by[TOKENS]['f1']:.3f} with what tokens alone make of it, and "
            f"changes of state {by[CHANGE]['f1']:.3f}."
        ),
        verdict=judge_held_out(
            row["gain_low"], row["gain_high"], least=LEAST_EFFECT, enough=bool(row["learnt"] >= LEAST_PROBLEMS)
        ),
        rung=4 if row["gain_low"] > 0 else 0,
        effect=float(row["gain"]),
        unit="F1 beyond words",
        ci_low=float(row["gain_low"]),
        ci_high=float(row["gain_high"]),
        token_effect=float(words["f1"]),
    )


STEP_BOUNDARIES = Analysis(
    function=step_boundaries,
    question="Does routing tell where a step ends, beyond the words there?",
    claim="Boundaries of steps are told better from words and routing than from words alone.",
    method=(
        "Peaks of the distance between the experts of 4 tokens and the 4 before, changes of routing state, and logistic "
        "regressions on routing, on the two token ids with what tokens alone make of routing, and on both; thresholds "
        "chosen on other problems than measured. Null: "
        "found boundaries shifted round within their problem, by its exact law; intervals from a bootstrap over problems."
    ),
    order=in_order,
    finding=_finding,
)
