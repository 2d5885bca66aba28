"""Hidden states of routing: a state for every token, learnt from which experts were chosen and from nothing else.

1. draw whole problems and deal them to two halves;
2. turn the choices of every token, over all layers, into a few numbers: the principal components of its experts, averaged over
   the token and its nearest neighbours, for single tokens change their experts faster than anyone reasons;
3. on the first half, fit a hidden Markov chain to them: each state is normally distributed with variances of its own, and has
   a chance to stay, so states last as long as the routing says;
4. read the states of any problem off its most likely path (Viterbi).

Words route, so states of routing are largely states of the words. Three more series make that visible: what the identity of
each token makes of its components (their mean over all its tokens), what is left of them without it, and routing as it would be
if it followed the tokens alone: each token with the components of another that has its id.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from hmmlearn.hmm import GaussianHMM
from jaxtyping import Bool, Float64, Integer
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from ling_probe.analysis.sample import TokenSample, indicator, numbered, sample_tokens, two_halves
from ling_probe.errors import UsageError
from ling_probe.run import Run

MOST = 24_000
"""Tokens of a sample."""
REACH = 4
"""Neighbours on each side that a token's components are averaged with."""
COMPONENTS = 16
"""Numbers that stand for the experts of a token."""
CANDIDATES = (2, 4, 6, 8)
"""Numbers of states tried."""
LEAST_PROBLEMS = 12
"""With fewer there is nothing to fit on one half and to look at in the other."""
RESAMPLES = 4
_ROUNDS, _LEAST_VARIANCE = 20, 1e-3


@dataclass(frozen=True, eq=False)
class Space:
    """Where a token's experts lie: D principal components of which were chosen, over M layers of E experts."""

    components: Float64[np.ndarray, "ME D"]
    centre: Float64[np.ndarray, " D"]
    layers: tuple[int, ...]
    n_experts: int
    token_ids: Integer[np.ndarray, " U"]
    """Ids whose mean is known, ascending."""
    token_means: Float64[np.ndarray, "U D"]

    @classmethod
    def of(cls, sample: TokenSample, *, seed: int) -> "Space":
        """The components of a sample's choices, and the mean of each of its token ids."""
        chosen = one_hot(sample.expert_ids, sample.n_experts)
        size = min(COMPONENTS + 1, min(chosen.shape) - 1)
        components = TruncatedSVD(size, n_iter=2, random_state=seed).fit(chosen).components_.T.astype(float)
        values = chosen @ components
        centre = values.mean(axis=0)
        ids, code = np.unique(sample.token_id, return_inverse=True)
        means = (indicator(code, len(ids)) @ (values - centre)) / np.bincount(code)[:, None]
        return cls(components, centre, sample.layers, sample.n_experts, ids, means)

    def place(self, expert_ids: Integer[np.ndarray, "T M K"]) -> Float64[np.ndarray, "T D"]:
        """Components of the choices of some tokens."""
        return one_hot(expert_ids, self.n_experts) @ self.components - self.centre

    def expected(self, token_ids: Integer[np.ndarray, " T"]) -> Float64[np.ndarray, "T D"]:
        """Mean components of each token's id; 0, the mean of all, for an id that the sample did not hold."""
        place = np.minimum(np.searchsorted(self.token_ids, token_ids), len(self.token_ids) - 1)
        return np.where((self.token_ids[place] == token_ids)[:, None], self.token_means[place], 0.0)


@dataclass(frozen=True, eq=False)
class Chain:
    """A hidden Markov chain of S states with normal emissions; state 0 is the one most often seen where it was fitted."""

    start: Float64[np.ndarray, " S"]
    transition: Float64[np.ndarray, "S S"]
    means: Float64[np.ndarray, "S D"]
    variances: Float64[np.ndarray, "S D"]

    @classmethod
    def fit(cls, values: Float64[np.ndarray, "T D"], lengths: Sequence[int], n_states: int, *, seed: int) -> "Chain":
        """Fit by expectation and maximisation, from clusters of the values.

        Averages of neighbours cannot change faster than these leave them. Counted as seen beforehand is so often that a state
        stayed; else two states take turns to stand for one that is not normally distributed.
        """
        stayed = 2 * REACH * len(values) / n_states
        model = GaussianHMM(
            n_states, covariance_type="diag", min_covar=_LEAST_VARIANCE, n_iter=_ROUNDS, tol=0.1, random_state=seed,
            transmat_prior=1 + stayed * np.eye(n_states),
        )  # fmt: skip
        log = logging.getLogger("hmmlearn.base")
        quiet, log.disabled = log.disabled, True
        try:
            model.fit(values, list(lengths))
        finally:
            log.disabled = quiet
        variances = np.maximum(np.diagonal(model.covars_, axis1=1, axis2=2), _LEAST_VARIANCE)
        chain = cls(model.startprob_, model.transmat_, model.means_, variances)
        return chain.in_order(np.argsort(-np.bincount(chain.decode(values, lengths), minlength=n_states), kind="stable"))

    @property
    def n_states(self) -> int:
        """Number of states."""
        return len(self.start)

    def in_order(self, order: Integer[np.ndarray, " S"]) -> "Chain":
        """The same chain, its states numbered anew."""
        return Chain(self.start[order], self.transition[np.ix_(order, order)], self.means[order], self.variances[order])

    def decode(self, values: Float64[np.ndarray, "T D"], lengths: Sequence[int]) -> Integer[np.ndarray, " T"]:
        """The most likely path of each sequence; `lengths` sum to T."""
        return self._model.decode(values, list(lengths))[1] if len(values) else np.zeros(0, dtype=np.int64)

    def log_likelihood(self, values: Float64[np.ndarray, "T D"], lengths: Sequence[int]) -> Float64[np.ndarray, " P"]:
        """Of each sequence, in nats."""
        return np.array([self._model.score(part) for part in np.split(values, np.cumsum(lengths)[:-1])])

    @cached_property
    def _model(self) -> GaussianHMM:
        model = GaussianHMM(self.n_states, covariance_type="diag")
        model.n_features = self.means.shape[1]
        model.startprob_, model.transmat_, model.means_, model.covars_ = self.start, self.transition, self.means, self.variances
        return model


@dataclass(frozen=True, eq=False)
class RoutingStates:
    """What gives every token a state; made by `fit_states`."""

    space: Space
    chain: Chain

    @property
    def n_states(self) -> int:
        """Number of states."""
        return self.chain.n_states

    def decode(
        self, expert_ids: Integer[np.ndarray, "T M K"], lengths: Sequence[int] | None = None
    ) -> Integer[np.ndarray, " T"]:
        """State of each token of one sequence, or of several of some lengths."""
        sizes = [len(expert_ids)] if lengths is None else list(lengths)
        return self.chain.decode(smoothed(self.space.place(expert_ids), sizes), sizes)


@dataclass(frozen=True, eq=False)
class Halves:
    """Tokens of whole problems with their components; chains are fitted to the first half."""

    sample: TokenSample
    space: Space
    values: Float64[np.ndarray, "N D"]
    """Of single tokens."""
    expected: Float64[np.ndarray, "N D"]
    """What the identity of each token makes of them."""
    first: Bool[np.ndarray, " N"]

    @property
    def left(self) -> Float64[np.ndarray, "N D"]:
        """What is left without it."""
        return self.values - self.expected

    def resampled(self, *, seed: int | Sequence[int]) -> Float64[np.ndarray, "N D"]:
        """Components of other tokens with the same ids, each once; an id seen once keeps its own."""
        ids, values = self.sample.token_id, np.empty_like(self.values)
        drawn = np.lexsort((np.random.default_rng(seed).random(len(ids)), ids))
        values[np.argsort(ids, kind="stable")] = self.values[drawn]
        return values

    @cached_property
    def left_by_pairs(self) -> Float64[np.ndarray, "N D"]:
        """What is left without the mean of each token and the one before it; of a pair seen once, nothing."""
        pair = numbered(self.sample.previous_id, self.sample.token_id)
        return self.values - ((indicator(pair, int(pair.max()) + 1) @ self.values) / np.bincount(pair)[:, None])[pair]

    @cached_property
    def all_lengths(self) -> list[int]:
        """Tokens of each problem."""
        return self.lengths(np.ones(len(self.first), dtype=bool))

    def lengths(self, rows: Bool[np.ndarray, " N"]) -> list[int]:
        """Tokens of each problem among some rows."""
        return np.unique(self.sample.sequence[rows], return_counts=True)[1].tolist()

    def chain(self, values: Float64[np.ndarray, "N D"], states: int | None, *, seed: int) -> Chain:
        """A chain fitted to the averages of the first half, of as many states as said, or as tell its problems best."""
        known, lengths = smoothed(values, self.all_lengths)[self.first], self.lengths(self.first)
        return Chain.fit(known, lengths, chosen_number(known, lengths, seed=seed) if states is None else states, seed=seed)

    def path(self, chain: Chain, values: Float64[np.ndarray, "N D"]) -> Integer[np.ndarray, " N"]:
        """State of each token, those of the first half included."""
        return chain.decode(smoothed(values, self.all_lengths), self.all_lengths)


def one_hot(expert_ids: Integer[np.ndarray, "T M K"], n_experts: int) -> sparse.csr_array:
    """Tokens by experts of all layers, 1 where chosen."""
    n, m, k = expert_ids.shape
    cells = (expert_ids + np.arange(m, dtype=np.int32)[:, None] * n_experts).reshape(-1)
    return sparse.csr_array((np.ones(n * m * k, np.float32), cells, np.arange(n + 1) * m * k), shape=(n, m * n_experts))


def smoothed(values: Float64[np.ndarray, "T D"], lengths: Sequence[int], *, reach: int = REACH) -> Float64[np.ndarray, "T D"]:
    """Mean of each row and those of its sequence at most `reach` rows away.

    >>> smoothed(np.array([[0.0], [3.0], [6.0], [1.0]]), [3, 1], reach=1).ravel().tolist()
    [1.5, 3.0, 4.5, 1.0]
    """
    start = np.repeat(np.cumsum([0, *lengths])[:-1], lengths)
    stop = start + np.repeat(lengths, lengths)
    rows = np.arange(len(values))
    low, high = np.maximum(rows - reach, start), np.minimum(rows + reach + 1, stop)
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
    return (total[high] - total[low]) / (high - low)[:, None]


def draw_halves(run: Run, *, most: int = MOST, seed: int = 0) -> Halves:
    """Problems of a run in two halves.

    Raises:
        UsageError: Too few problems.
    """
    sample = sample_tokens(run, most=most, seed=seed)
    if sample.n_sequences < LEAST_PROBLEMS:
        raise UsageError(f"{sample.n_sequences} problems in this run; fitting states on half of them needs {LEAST_PROBLEMS}")
    space = Space.of(sample, seed=seed)
    return Halves(
        sample, space, space.place(sample.expert_ids), space.expected(sample.token_id), two_halves(sample.sequence, seed=seed)
    )


def chosen_number(values: Float64[np.ndarray, "T D"], lengths: Sequence[int], *, seed: int) -> int:
    """How many states tell a third of the problems best after fitting to the rest; of those as good, the fewest.

    As good is within one standard error, over problems, of the difference to the best.
    """
    problem = np.repeat(np.arange(len(lengths)), lengths)
    held = np.random.default_rng([seed, 2]).permutation(np.arange(len(lengths)) % 3 == 0)
    inside, sizes = held[problem], np.array(lengths)
    scores = []
    for states in CANDIDATES:
        if states * 10 > (~inside).sum():
            break
        chain = Chain.fit(values[~inside], sizes[~held].tolist(), states, seed=seed)
        scores.append(chain.log_likelihood(values[inside], sizes[held].tolist()) / sizes[held].mean())
    if not scores:
        return CANDIDATES[0]
    best = scores[int(np.argmax([score.mean() for score in scores]))]
    near = [(best - score).mean() <= (best - score).std(ddof=1) / np.sqrt(len(score)) for score in scores]
    return CANDIDATES[int(np.argmax(near))]


@dataclass(frozen=True, eq=False)
class Fitted:
    """Routing states, and the problems they were fitted to and may be looked at in."""

    halves: Halves
    states: RoutingStates
    seed: int

    @property
    def n_states(self) -> int:
        """Number of states."""
        return self.states.n_states

    @cached_property
    def path(self) -> Integer[np.ndarray, " N"]:
        """State of each token, those of the first half included."""
        return self.halves.path(self.states.chain, self.halves.values)

    @cached_property
    def resampled_paths(self) -> list[Integer[np.ndarray, " N"]]:
        """The same states if routing followed the tokens alone, some times over."""
        drawn = (self.halves.resampled(seed=[self.seed, 4, draw]) for draw in range(RESAMPLES))
        return [self.halves.path(self.states.chain, values) for values in drawn]

    @cached_property
    def token_path(self) -> Integer[np.ndarray, " N"]:
        """The same states, from the mean of each token."""
        return self.halves.path(self.states.chain, self.halves.expected)


def fit(run: Run, *, states: int | None = None, seed: int = 0) -> Fitted:
    """Routing states with their sample; arguments as for `fit_states`."""
    if states is not None and states < 2:
        raise UsageError(f"{states} routing states asked for; there must be 2 at least")
    halves = draw_halves(run, seed=seed)
    return Fitted(halves, RoutingStates(halves.space, halves.chain(halves.values, states, seed=seed)), seed)


def fit_states(run: Run, *, states: int | None = None, seed: int = 0) -> RoutingStates:
    """Routing states of a run, fitted to half of its problems, or of a sample of them.

    Args:
        run: Any run with at least 12 sequences.
        states: How many; None takes as many as tell held-out problems of that half best.
        seed: Of the sample, the halves and the start.

    Raises:
        UsageError: Too few problems, or fewer than two states.
    """
    return fit(run, states=states, seed=seed).states
