"""What decoders of steps share: how a step is described, and what is learnt on some problems and judged on others.

A step is described by the share of each expert in each layer (square roots, so that layers weigh alike; principal components
where there are many experts), by its token ids and pairs of ids (tf-idf), and by its number, place and length (deciles). What
is fitted to make a description knows no class. Decoders are logistic regressions whose strength is chosen on training problems.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float64, Integer
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from ling_probe import stats
from ling_probe.analysis.classified import PLACES
from ling_probe.analysis.sample import TokenSample, numbered, resampled_interval
from ling_probe.errors import UsageError
from ling_probe.run import Run

POSITION, TOKENS, ROUTING, TEXT, ALL = DESCRIPTIONS = (
    "position",
    "tokens",
    "routing",
    "tokens and position",
    "tokens, position and routing",
)
FOLDS = 5
MOST_TOKENS = 100_000
STRENGTHS = (0.1, 3.0, 100.0)
"""Inverse regularisation strengths to choose from."""
LEAST_STEPS = 3
"""Steps that a token id or pair must stand in: what stands in fewer tells nothing about other problems."""
_COMPONENTS = 128
_FLOOR = 0.01
"""Part of a class's frequency mixed into every prediction, so that one step cannot cost without bound."""


def require_steps(run: Run) -> None:
    """Refuse a run without steps.

    Raises:
        UsageError: It has none.
    """
    if run.steps.empty:
        raise UsageError("no step labels in this run")


def require_folds(sequence: Integer[np.ndarray, " U"]) -> None:
    """Refuse fewer problems than folds.

    Raises:
        UsageError: There are too few.
    """
    n = len(np.unique(sequence))
    if n < FOLDS:
        raise UsageError(f"{n} problems with steps in this run; holding a fifth out needs {FOLDS}")


def with_steps(sample: TokenSample, most: int, seed: int) -> TokenSample:
    """The tokens inside steps of sequences drawn until they hold `most` steps."""
    sample = sample.only(sample.step >= 0)
    sequence = numbered(sample.sequence)
    n_steps = np.bincount(sequence[np.unique(numbered(sequence, sample.step), return_index=True)[1]])
    order = np.random.default_rng(seed).permutation(len(n_steps))
    taken = np.zeros(len(n_steps), dtype=bool)
    taken[order[np.cumsum(n_steps[order]) <= most]] = True
    return sample.only(taken[sequence])


def folds(sequence: Integer[np.ndarray, " U"], seed: int) -> Integer[np.ndarray, " U"]:
    """Fold of each step; whole sequences."""
    fold = np.zeros(len(sequence), dtype=np.int64)
    splitter = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(splitter.split(sequence, groups=sequence)):
        fold[held] = number
    return fold


def thirds(run: Run, sequence: Integer[np.ndarray, " U"], step: Integer[np.ndarray, " U"]) -> Integer[np.ndarray, " U"]:
    """Number of each step's problem and third of the solution: where its label may be shuffled."""
    n_steps = np.bincount(run.steps["sequence"], minlength=len(run.sequences))
    return numbered(sequence, PLACES * step.astype(np.int64) // n_steps[sequence])


def descriptions(
    sample: TokenSample,
    unit: Integer[np.ndarray, " N"],
    rows: Integer[np.ndarray, " U"],
    seed: int,
    fitted: Bool[np.ndarray, " U"] | None = None,
) -> dict[str, sparse.csr_array]:
    """Descriptions of steps, by name.

    Args:
        sample: Tokens inside steps.
        unit: Step of each token, numbered.
        rows: First token of each step.
        seed: Of the principal components.
        fitted: Steps that means, components, words and deciles are taken from; all if left out.
    """
    fitted = np.ones(len(rows), dtype=bool) if fitted is None else fitted
    words, pairs = numbered(sample.token_id), numbered(sample.token_id, np.where(_inside(unit), sample.previous_id, -1))
    position, length = sample.position[rows], np.bincount(unit)
    last = pd.Series(sample.step[rows]).groupby(sample.sequence[rows]).transform("max").to_numpy()
    place = deciles((sample.step[rows], sample.step[rows] / np.maximum(last, 1), position, length), fitted)
    tokens = tfidf([bag(unit, words, fitted), bag(unit, pairs, fitted)], fitted)
    routing = profile(sample, unit, seed, fitted)
    text = sparse.hstack([tokens, place], format="csr")
    described = {
        POSITION: place,
        TOKENS: tokens,
        ROUTING: routing,
        TEXT: text,
        ALL: sparse.hstack([text, routing], format="csr"),
    }
    return {name: narrow(values) for name, values in described.items()}


def narrow(values: sparse.csr_array) -> sparse.csr_array:
    """With indices of the width that scikit-learn takes."""
    return sparse.csr_array((values.data, values.indices.astype(np.int32), values.indptr.astype(np.int32)), shape=values.shape)


def _inside(unit: Integer[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Whether the token before stands in the same step."""
    return np.concatenate([[False], unit[1:] == unit[:-1]])


def bag(unit: Integer[np.ndarray, " N"], words: Integer[np.ndarray, " N"], fitted: Bool[np.ndarray, " U"]) -> sparse.csr_array:
    """Steps by words, how often; the words of enough steps alone."""
    found = sparse.csr_array((np.ones(len(unit)), (unit, words)), shape=(len(fitted), int(words.max()) + 1))
    kept = found[:, (found[fitted] > 0).sum(axis=0) >= LEAST_STEPS]
    return kept if kept.shape[1] else sparse.csr_array((kept.shape[0], 1))


def tfidf(bags: Sequence[sparse.csr_array], fitted: Bool[np.ndarray, " U"]) -> sparse.csr_array:
    """Bags side by side, rare words raised; rows of unit length."""
    beside = narrow(sparse.hstack(bags, format="csr"))
    return sparse.csr_array(TfidfTransformer(sublinear_tf=True).fit(narrow(beside[fitted])).transform(beside))


def deciles(columns: Sequence[np.ndarray], fitted: Bool[np.ndarray, " U"]) -> sparse.csr_array:
    """Tenth of each column that each step is in; rows of unit length."""
    return sparse.hstack([_deciles(each, fitted) for each in columns], format="csr") / np.sqrt(len(columns))


def _deciles(values: np.ndarray, fitted: Bool[np.ndarray, " U"]) -> sparse.csr_array:
    edges = np.unique(np.quantile(values[fitted], np.linspace(0, 1, 11)[1:-1]))
    place = np.searchsorted(edges, values, side="right")
    return sparse.csr_array((np.ones(len(values)), (np.arange(len(values)), place)), shape=(len(values), len(edges) + 1))


def shares(sample: TokenSample, unit: Integer[np.ndarray, " N"], n_units: int) -> Float64[np.ndarray, "U M*E"]:
    """Square root of each expert's share of a step's tokens in each layer, layer after layer."""
    tokens = np.maximum(np.bincount(unit, minlength=n_units), 1)[:, None]
    layers = [np.sqrt(sample.counts(place, unit, n_units) / tokens) for place in range(len(sample.layers))]
    return np.concatenate(layers, axis=1)


def profile(
    sample: TokenSample, unit: Integer[np.ndarray, " N"], seed: int, fitted: Bool[np.ndarray, " U"]
) -> sparse.csr_array:
    """Shares, centred and of unit length on average, as rows of the other descriptions are."""
    values = shares(sample, unit, len(fitted)).astype(np.float32)
    values -= values[fitted].mean(axis=0)
    values = values @ principal_axes(values[fitted], seed).T
    return sparse.csr_array(values / max(np.sqrt((values[fitted] ** 2).sum(axis=1).mean()), 1e-12))


def principal_axes(values: Float[np.ndarray, "U F"], seed: int, *, most: int = _COMPONENTS) -> Float[np.ndarray, "n F"]:
    """Axes along which rows differ most; those of the columns where there are few of either, or nothing differs."""
    if values.shape[1] > most < len(values) and values.any():
        axes: np.ndarray = TruncatedSVD(most, n_iter=2, random_state=seed).fit(values).components_
        return axes.astype(values.dtype)
    return np.eye(values.shape[1], dtype=values.dtype)


def frequencies(codes: Integer[np.ndarray, " U"], n_classes: int) -> Float64[np.ndarray, " C"]:
    """Frequencies of the classes, half a step added to each."""
    counts = np.bincount(codes, minlength=n_classes) + 0.5
    return counts / counts.sum()


def by_frequency(
    fold: Integer[np.ndarray, " U"], codes: Integer[np.ndarray, " U"]
) -> tuple[Float64[np.ndarray, "U C"], Float64[np.ndarray, " U"]]:
    """Frequencies of the classes in the other folds, and the loss of guessing by them in bits."""
    n_classes = int(codes.max()) + 1
    predicted = np.zeros((len(codes), n_classes))
    for each in range(FOLDS):
        predicted[fold == each] = frequencies(codes[fold != each], n_classes)
    return predicted, bits(predicted, codes)


def bits(predicted: Float64[np.ndarray, "U C"], codes: Integer[np.ndarray, " U"]) -> Float64[np.ndarray, " U"]:
    """Loss of each prediction."""
    return -np.log2(predicted[np.arange(len(codes)), codes])


def held_out(
    features: sparse.csr_array,
    codes: Integer[np.ndarray, " U"],
    fold: Integer[np.ndarray, " U"],
    fallback: Float64[np.ndarray, "U C"],
) -> Float64[np.ndarray, "U C"]:
    """Predicted probability of every class for each step, by a decoder that saw no step of its problem."""
    predicted = fallback.copy()
    for each in range(FOLDS):
        held, inner = fold == each, fold == (each + 1) % FOLDS
        predicted[held] = learnt(features, codes, ~held & ~inner, inner, held, fallback[held])
    return predicted


def learnt(
    features: sparse.csr_array | np.ndarray,
    codes: Integer[np.ndarray, " U"],
    train: Bool[np.ndarray, " U"],
    inner: Bool[np.ndarray, " U"],
    held: Bool[np.ndarray, " U"],
    fallback: Float64[np.ndarray, "H C"],
) -> Float64[np.ndarray, "H C"]:
    """Predictions for the steps held out by a decoder of the rest, of the strength that tells `inner` best from `train`."""
    strength = _strength(features, codes, train, inner, fallback.shape[1])
    return _FLOOR * fallback + (1 - _FLOOR) * fit(features, codes, train | inner, strength).predict(features[held], fallback)


def _strength(
    features: sparse.csr_array | np.ndarray,
    codes: Integer[np.ndarray, " U"],
    train: Bool[np.ndarray, " U"],
    inner: Bool[np.ndarray, " U"],
    n_classes: int,
) -> float:
    share = np.tile(frequencies(codes[train], n_classes), (int(inner.sum()), 1))
    right = np.arange(len(share)), codes[inner]
    loss = [
        -np.log(np.maximum(fit(features, codes, train, each).predict(features[inner], share)[right], 1e-3)).mean()
        for each in STRENGTHS
    ]
    return STRENGTHS[int(np.argmin(loss))]


class Decoder:
    """A logistic regression, or nothing where there was one class to learn."""

    def __init__(self, model: LogisticRegression | None) -> None:
        self.model = model

    def predict(
        self, features: sparse.csr_array | np.ndarray, fallback: Float64[np.ndarray, "H C"]
    ) -> Float64[np.ndarray, "H C"]:
        """Probability of every class; `fallback` where nothing was learnt."""
        if self.model is None:
            return fallback
        predicted = np.zeros(fallback.shape)
        predicted[:, self.model.classes_] = self.model.predict_proba(features)
        return predicted


def fit(
    features: sparse.csr_array | np.ndarray, codes: Integer[np.ndarray, " U"], train: Bool[np.ndarray, " U"], strength: float
) -> Decoder:
    """A decoder of the steps marked."""
    if len(np.unique(codes[train])) < 2:
        return Decoder(None)
    model = LogisticRegression(C=strength, max_iter=100, tol=1e-3)
    with warnings.catch_warnings():
        # A fit stopped early is judged by what it predicts, as any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return Decoder(model.fit(features[train], codes[train]))


def problem_weights(sequence: Integer[np.ndarray, " U"], *, draws: int, seed: int) -> Float64[np.ndarray, "B S"]:
    """How often each problem counts: once, and then in each bootstrap sample."""
    n = int(sequence.max()) + 1
    return np.concatenate([np.ones((1, n)), stats.bootstrap_weights(n, draws=draws, seed=seed)])


def problem_mean(
    values: Float64[np.ndarray, " U"], sequence: Integer[np.ndarray, " U"], every: Float64[np.ndarray, "B S"]
) -> Float64[np.ndarray, " B"]:
    """Mean over steps, problems counting as often as told; NaN where a sample has none."""
    n = every.shape[1]
    steps = every @ np.bincount(sequence, minlength=n)
    total = every @ np.bincount(sequence, weights=values, minlength=n)
    return np.divide(total, steps, out=np.full(len(steps), np.nan), where=steps > 0)


def balanced_accuracy(
    hits: Bool[np.ndarray, " U"],
    codes: Integer[np.ndarray, " U"],
    sequence: Integer[np.ndarray, " U"],
    every: Float64[np.ndarray, "B S"],
) -> Float64[np.ndarray, " B"]:
    """Mean over classes of the share of their steps that were told right; a class that a sample lacks is left out."""
    n_classes = int(codes.max()) + 1
    cells, n = sequence * n_classes + codes, (every.shape[1], n_classes)
    right, there = (
        every @ np.bincount(cells, weights=each, minlength=n[0] * n[1]).reshape(n) for each in (hits, np.ones(len(hits)))
    )
    recall = np.divide(right, there, out=np.full(there.shape, np.nan), where=there > 0)
    return np.nanmean(recall, axis=1)


def with_interval(name: str, stem: str, values: Float64[np.ndarray, " B"], n_units: int) -> dict[str, float]:
    """The first value as column `name`, and the interval of the others as `stem`_low and `stem`_high."""
    low, high = resampled_interval(values[1:], n_units)
    return {name: float(values[0]), f"{stem}_low": float(low), f"{stem}_high": float(high)}


def shuffled_label_p(
    predicted: Float64[np.ndarray, "U C"],
    codes: Integer[np.ndarray, " U"],
    blocks: Integer[np.ndarray, " U"],
    *,
    permutations: int,
    seed: int,
) -> float:
    """One-sided p of predictions that tell labels apart, from labels shuffled over whole steps of the same block."""
    log, rows = np.log(predicted), np.arange(len(codes))
    observed = log[rows, codes].sum()
    slack = 1e-9 * np.abs(log).max() * len(codes)
    shuffled = stats.permute_labels(codes, blocks=blocks, draws=permutations, seed=seed)
    exceeding = sum(int(log[rows, each].sum() >= observed - slack) for each in shuffled)
    return float(stats.permutation_p(np.array(exceeding), permutations))


def gain_p(gain: Float64[np.ndarray, " U"], sequence: Integer[np.ndarray, " U"], *, seed: int) -> float:
    """One-sided p of one decoder's gain over another, from signs of whole problems flipped; NaN if they are the same.

    One-sided, for what knows nothing makes a decoder worse, and that is no finding.
    """
    sums = np.bincount(sequence, weights=gain)
    return float(one_sided(stats.sign_flip_p(sums[:, None], seed=seed), sums[:, None])[0])


def one_sided(p: Float64[np.ndarray, " C"], values: Float64[np.ndarray, "S C"]) -> Float64[np.ndarray, " C"]:
    """P that sums of values are above 0, from that they are not 0.

    >>> one_sided(np.array([0.02, 0.02]), np.array([[1.0, -1.0]])).tolist()
    [0.01, 0.99]
    """
    return np.where(values.sum(axis=0) > 0, p / 2, 1 - p / 2)
