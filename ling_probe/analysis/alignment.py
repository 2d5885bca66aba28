"""Whether problems solved by the same operations take the same path through the experts.

1. Give every held-out problem two paths: the routing of its steps, one after the other (mean components over the tokens of each
   step), and its routing states, one after the other, each change once.
2. Compare all pairs of problems of one family with as many steps: paths of steps by dynamic time warping, the cheapest way to
   walk through both in order; paths of states by edit distance over the longer one's length.
3. Compare their operations by the edit distance of their labels in order, over the number of steps.
4. Correlate the two, each less its mean in the family and number of steps; and where some pairs have the same operations, see
   how much nearer their paths lie.
5. Do so for routing, for what the identity of each token makes of it, for what is left without, and for what is left without
   what each token and the one before it make of it together; and shuffle whole sequences of labels among problems of one family
   and number of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer

from ling_probe import stats
from ling_probe.analysis.hidden import Fitted, fit
from ling_probe.analysis.pairwise import drawn_means
from ling_probe.analysis.question import Analysis, Finding, Verdict, in_order, judge_gain
from ling_probe.analysis.sample import indicator, interval_text, label_codes, numbered, resampled_interval
from ling_probe.errors import UsageError
from ling_probe.run import Run

STEPS, STATES = "steps", "states"
ROUTING, TOKENS, LEFT, PAIRS = "routing", "tokens", "routing beyond tokens", "routing beyond pairs of tokens"
PROBLEMS = 300
"""Problems compared at most, all with all."""
LEAST_EFFECT = 0.1
"""Correlation that is worth having."""


def path_alignment(
    run: Run, *, states: int | None = None, fitted: Fitted | None = None, shuffles: int = 499, draws: int = 500, seed: int = 0
) -> pd.DataFrame:
    """How paths of problems through the experts lie apart, against how their operations do.

    One row a kind of path (`path`: steps or states) and what it is made of (`source`): `correlation` over pairs of problems of
    the distance of their paths with that of their labels, with its interval (`ci_low`, `ci_high`: bootstrap over problems),
    one-sided `p` when label sequences are shuffled among problems of one family and number of steps, and `q` corrected over
    rows; `same` and `different`, the mean distances of pairs with the same and with other operations, and `nearer`, the
    share by which the first lies below the second, with its interval (`near_low`, `near_high`); NaN where no pair has the same.
    `pairs` of `problems`, `same_pairs` of them with the same operations.

    Args:
        run: A run whose benchmark has step labels.
        states: How many routing states; None takes as many as tell held-out problems of the fitted half best.
        fitted: States fitted to the run before.
        shuffles: Of label sequences.
        draws: Bootstrap samples.
        seed: Of the sample, the halves, the start, the shuffles and the bootstrap.

    Raises:
        UsageError: The run has no step labels, too few problems, or no two with different operations to compare.
    """
    if run.steps.empty:
        raise UsageError("no step labels in this run")
    fitted = fitted or fit(run, states=states, seed=seed)
    problems = _Problems.of(run, fitted, seed)
    compared = _Compared(problems, shuffles, draws, seed)
    halves = fitted.halves
    series = {ROUTING: halves.values, TOKENS: halves.expected, LEFT: halves.left, PAIRS: halves.left_by_pairs}
    rows = [{"path": STEPS, "source": name} | compared.row(problems.step_distance(each)) for name, each in series.items()]
    paths = {ROUTING: fitted.path, TOKENS: fitted.token_path}
    rows += [{"path": STATES, "source": name} | compared.row(problems.state_distance(each)) for name, each in paths.items()]
    table = pd.DataFrame(rows)
    table.insert(list(table.columns).index("p") + 1, "q", stats.benjamini_hochberg(table["p"].to_numpy()))
    return table.assign(seed=seed)


@dataclass(frozen=True, eq=False)
class _Problems:
    """Held-out problems with steps, and the tokens inside these."""

    rows: Integer[np.ndarray, " N"]
    """In the sample."""
    problem: Integer[np.ndarray, " N"]
    step: Integer[np.ndarray, " N"]
    """Numbered over all problems."""
    owner: Integer[np.ndarray, " O"]
    """Problem of each step."""
    labels: list[tuple[int, ...]]
    """Of each problem's steps, in order."""
    block: Integer[np.ndarray, " P"]
    """Family and number of steps."""

    @classmethod
    def of(cls, run: Run, fitted: Fitted, seed: int) -> "_Problems":
        sample = fitted.halves.sample
        codes = label_codes(run, sample)
        rows = np.flatnonzero(~fitted.halves.first & (codes >= 0))
        held = np.unique(sample.sequence[rows])
        kept = np.random.default_rng(seed).permutation(held)[:PROBLEMS]
        rows = rows[np.isin(sample.sequence[rows], kept)]
        if not len(rows):
            raise UsageError("no steps among the held-out problems of this run")
        step = numbered(sample.sequence[rows], sample.step[rows])
        first = np.unique(step, return_index=True)[1]
        problem = numbered(sample.sequence[rows])
        owner = problem[first]
        bounds = np.searchsorted(owner, np.arange(int(owner.max()) + 2))
        labels = [tuple(codes[rows][first][start:stop].tolist()) for start, stop in pairwise(bounds)]
        family = run.sequences["family"].to_numpy(dtype=str)[sample.sequence[rows][np.unique(problem, return_index=True)[1]]]
        return cls(rows, problem, step, owner, labels, numbered(family, np.diff(bounds)))

    @property
    def pairs(self) -> Bool[np.ndarray, "P P"]:
        """Pairs of different problems of one family and number of steps."""
        return (self.block[:, None] == self.block) & ~np.eye(len(self.block), dtype=bool)

    def step_distance(self, values: Float64[np.ndarray, "T D"]) -> Float64[np.ndarray, "P P"]:
        """Warped distance of the steps' mean values, per step."""
        tokens = np.bincount(self.step)[:, None]
        profiles = (indicator(self.step, len(tokens)) @ values[self.rows]) / tokens
        distance = np.zeros((len(self.block), len(self.block)))
        for block in np.unique(self.block):
            members = np.flatnonzero(self.block == block)
            if len(members) > 1:
                inside = profiles[np.isin(self.owner, members)].reshape(len(members), -1, profiles.shape[1])
                one, other = np.triu_indices(len(members), 1)
                found = warped(inside[one], inside[other])
                distance[members[one], members[other]] = distance[members[other], members[one]] = found
        return distance

    def state_distance(self, path: Integer[np.ndarray, " T"]) -> Float64[np.ndarray, "P P"]:
        """Edit distance of the states, each change once."""
        mine = path[self.rows]
        starts = np.flatnonzero(np.concatenate([[True], (mine[1:] != mine[:-1]) | (self.problem[1:] != self.problem[:-1])]))
        bounds = np.searchsorted(self.problem[starts], np.arange(len(self.block) + 1))
        return self.edited([tuple(mine[starts][start:stop].tolist()) for start, stop in pairwise(bounds)])

    def edited(self, sequences: Sequence[tuple[int, ...]]) -> Float64[np.ndarray, "P P"]:
        """Edit distance of each pair's sequences over the length of the longer."""
        one, other = np.nonzero(np.triu(self.pairs))
        found = edit_distance(*([sequences[int(place)] for place in side] for side in (one, other)))
        distance = np.zeros((len(sequences), len(sequences)))
        distance[one, other] = distance[other, one] = found
        return distance


def warped(one: Float64[np.ndarray, "N n D"], other: Float64[np.ndarray, "N n D"]) -> Float64[np.ndarray, " N"]:
    """Cost of the cheapest way through both of each pair of sequences in order, over their length (dynamic time warping).

    >>> warped(np.array([[[0.0], [1.0]]]), np.array([[[0.0], [3.0]]])).tolist()
    [1.0]
    """
    n = one.shape[1]
    best = np.full((len(one), n + 1, n + 1), np.inf)
    best[:, 0, 0] = 0.0
    for row in range(n):
        cost = np.linalg.norm(one[:, row, None] - other, axis=-1)
        for column in range(n):
            before = np.minimum(np.minimum(best[:, row, column + 1], best[:, row + 1, column]), best[:, row, column])
            best[:, row + 1, column + 1] = cost[:, column] + before
    return best[:, n, n] / n


def edit_distance(one: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]]) -> Float64[np.ndarray, " N"]:
    """Edit distance of each pair of sequences of numbers from 0 on, over the length of the longer (Levenshtein).

    >>> edit_distance([(1, 2, 3), (1,)], [(1, 3), (1,)]).round(3).tolist()
    [0.333, 0.0]
    """
    sizes = np.array([[len(sequence) for sequence in side] for side in (one, other)]).reshape(2, -1)
    if not sizes.size:
        return np.zeros(0)
    left, right = (_padded(side, filler) for side, filler in ((one, -1), (other, -2)))
    rows = np.arange(len(left))
    line = np.tile(np.arange(right.shape[1] + 1.0), (len(left), 1))
    found = line[rows, sizes[1]]
    for place in range(left.shape[1]):
        replaced = line[:, :-1] + (left[:, place, None] != right)
        line = np.concatenate([line[:, :1] + 1, np.minimum(replaced, line[:, 1:] + 1)], axis=1)
        # What is inserted costs one each from any earlier column: a running minimum once the columns' own cost is off.
        columns = np.arange(line.shape[1])
        line = np.minimum.accumulate(line - columns, axis=1) + columns
        found = np.where(sizes[0] == place + 1, line[rows, sizes[1]], found)
    return found / np.maximum(sizes.max(axis=0), 1)


def _padded(side: Sequence[tuple[int, ...]], filler: int) -> Integer[np.ndarray, "N L"]:
    width = max(len(sequence) for sequence in side)
    return np.array([(*sequence, *([filler] * (width - len(sequence)))) for sequence in side])


class _Compared:
    """The pairs, how their operations lie apart, and what shuffles and draws make of it."""

    def __init__(self, problems: _Problems, shuffles: int, draws: int, seed: int) -> None:
        self.pairs, self.block = problems.pairs, problems.block
        self.operations = problems.edited(problems.labels)
        if not (self.pairs & (self.operations > 0)).any():
            raise UsageError("no two held-out problems of one family and number of steps have different operations to compare")
        self.same = self.pairs & (self.operations == 0)
        self.weights = stats.bootstrap_weights(len(self.block), draws=draws, seed=seed)
        places = np.arange(len(self.block))
        self.shuffled = stats.permute_labels(places, blocks=self.block, draws=shuffles, seed=seed)
        self.far = self._centred(self.operations)

    def _centred(self, values: Float64[np.ndarray, "P P"]) -> Float64[np.ndarray, "P P"]:
        """Less the mean of the block's pairs; 0 for what is no pair."""
        member = indicator(self.block, int(self.block.max()) + 1)
        total, number = (
            np.diagonal(member @ (member @ each).T).astype(float)
            for each in (np.where(self.pairs, values, 0.0), self.pairs * 1.0)
        )
        return np.where(self.pairs, values - (total / np.maximum(number, 1))[self.block][:, None], 0.0)

    def row(self, distance: Float64[np.ndarray, "P P"]) -> dict[str, float]:
        """Columns of one path and source."""
        mine, n = self._centred(distance), len(self.block)
        scale = np.sqrt((mine**2).sum() * (self.far**2).sum())
        observed = (mine * self.far).sum()
        null = np.array([(mine * self.far[np.ix_(order, order)]).sum() for order in self.shuffled])
        exceeding = (null >= observed - 1e-9 * scale).sum()
        products = [self._drawn(each, self.pairs) for each in (mine * self.far, mine**2, self.far**2)]
        low, high = resampled_interval(products[0] / np.sqrt(np.maximum(products[1] * products[2], 1e-24)), n)
        flat = scale <= 1e-9 * np.abs(distance).sum()
        found = {
            "correlation": np.nan if flat else float(observed / scale),
            "ci_low": np.nan if flat else float(low),
            "ci_high": np.nan if flat else float(high),
            "p": np.nan if flat else float(stats.permutation_p(exceeding, len(null))),
        }
        sizes = {"pairs": int(self.pairs.sum()) // 2, "same_pairs": int(self.same.sum()) // 2, "problems": n}
        return found | self._nearer(distance) | sizes

    def _nearer(self, distance: Float64[np.ndarray, "P P"]) -> dict[str, float]:
        """Of pairs in blocks that have both kinds, how much nearer those with the same operations lie."""
        both = np.unique(self.block[self.same.any(axis=1)])
        other = self.pairs & ~self.same & np.isin(self.block, both)[:, None]
        names = ("same", "different", "nearer", "near_low", "near_high")
        if not (self.same.any() and other.any()):
            return dict.fromkeys(names, np.nan)
        same, different = float(distance[self.same].mean()), float(distance[other].mean())
        drawn = [self._drawn(distance, pairs) for pairs in (self.same, other)]
        low, high = resampled_interval(1 - drawn[0] / np.maximum(drawn[1], 1e-12), len(self.block))
        return dict(zip(names, (same, different, 1 - same / max(different, 1e-12), float(low), float(high)), strict=True))

    def _drawn(self, values: Float64[np.ndarray, "P P"], pairs: Bool[np.ndarray, "P P"]) -> Float64[np.ndarray, " D"]:
        return drawn_means(values.astype(np.float32), pairs, np.arange(len(self.block)), self.weights)


def _finding(table: pd.DataFrame) -> Finding:
    by: dict[object, pd.Series] = {names: rows.iloc[0] for names, rows in table.groupby(["path", "source"])}
    row, raw, words, left = (by[STEPS, name] for name in (PAIRS, ROUTING, TOKENS, LEFT))
    states = by[STATES, ROUTING]
    verdict = judge_gain(row["ci_low"], row["ci_high"], least=LEAST_EFFECT, q=row["q"])
    near = (
        ""
        if np.isnan(row["nearer"])
        else f" Pairs with the same operations lie {100 * raw['nearer']:.0f} % nearer than others, "
        f"{100 * row['nearer']:.0f} % beyond pairs of tokens."
    )
    return Finding(
        sentence=(
            f"Over {int(row['pairs']):,} pairs of {int(row['problems']):,} held-out problems of one family and number of "
            f"steps, the "
            f"distance of paths through the experts goes with that of their operations by a correlation of "
            f"{raw['correlation']:.3f}, where tokens alone make it {words['correlation']:.3f}; beyond the tokens it is "
            f"{left['correlation']:.3f}, beyond pairs of tokens {row['correlation']:.3f} "
            f"({interval_text(row['ci_low'], row['ci_high'])}), by states {states['correlation']:.3f}.{near}"
        ),
        verdict=verdict,
        rung=(4 if verdict is Verdict.SUPPORTED else 0),
        effect=float(row["correlation"]),
        unit="correlation over pairs of problems, beyond pairs of tokens",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
        token_effect=float(words["correlation"]),
    )


PATH_ALIGNMENT = Analysis(
    function=path_alignment,
    question="Do problems solved by the same operations take the same path through the experts, beyond their words?",
    claim="The more the operations of two problems differ, the further apart lie their paths, beyond pairs of tokens.",
    method=(
        "Paths of steps by dynamic time warping, paths of routing states by edit distance, against the edit distance of "
        "labels in "
        "order, over pairs of held-out problems of one family and number of steps; raw, from each token's mean routing, and "
        "from "
        "what is left without the mean of the token, or of it and the one before. Null: label sequences shuffled among "
        "problems of one family and number of steps; corrected "
        "over rows; intervals from a bootstrap over problems."
    ),
    order=in_order,
    finding=_finding,
)
