"""What a step is, told from its routing, from its words, from its place, and from all of them, on held-out problems.

1. describe every step by the share of each expert in each layer (square roots, so that layers weigh alike; principal components
   where there are many experts), by its token ids and pairs of ids (tf-idf), and by its number, place and length (deciles);
2. fit a logistic regression to each description on four fifths of the problems, its regularisation chosen inside them;
3. score it on the fifth left out, in bits gained over the classes' frequencies, and in balanced accuracy;
4. the gain of all three over words and place is what routing adds.

Experts have read all that stands before a step, words of the step alone have not: a gain says that routing holds more than
these words, not that it understands them.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from ling_probe import stats
from ling_probe.analysis.question import Analysis, Finding, in_order, judge_held_out, percent
from ling_probe.analysis.sample import TokenSample, interval_text, label_codes, numbered, resampled_interval, sample_tokens
from ling_probe.errors import UsageError
from ling_probe.run import Run

POSITION, TOKENS, ROUTING, TEXT, ALL = DESCRIPTIONS = (
    "position",
    "tokens",
    "routing",
    "tokens and position",
    "tokens, position and routing",
)
LEAST_EFFECT = 0.05
"""Bits per step that are worth having."""
LEAST_PROBLEMS = 50
"""With fewer to learn from, that routing adds nothing says nothing."""
STRENGTHS = (0.1, 3.0, 100.0)
"""Inverse regularisation strengths to choose from."""
_FOLDS, _COMPONENTS, _TOKENS = 5, 128, 100_000
_LEAST_STEPS = 3
"""Steps that a token id or pair must stand in: what stands in fewer tells nothing about other problems."""
_FLOOR = 0.01
"""Part of a class's frequency mixed into every prediction, so that one step cannot cost without bound."""


def label_decoding(run: Run, *, steps: int = 3000, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How well a step's label and family can be told from its routing, its tokens, its position, and all together.

    One row a class of text (`about`: "label", "family") and description (`features`). `bits` per step gained over guessing by
    frequency, on held-out problems; below 0 is worse than guessing; `ci_low` and `ci_high` its 95 % bootstrap interval over
    problems; `entropy` is what there was to gain. `accuracy` balanced over `classes`, with its interval (`accuracy_low`,
    `accuracy_high`) and `chance`. `gain` in bits over tokens, with position or without, whichever tells more, with its
    interval (`gain_low`, `gain_high`). All from `steps` in `sequences`.

    Args:
        run: A run with step labels.
        steps: Steps of whole sequences to draw from a longer run.
        draws: Bootstrap samples.
        seed: Of folds, samples and the sequences drawn.

    Raises:
        UsageError: The run has no step labels, one class of text only, or fewer than 5 problems.
    """
    world = _world(run, steps, seed)
    tables = []
    for about, codes in world.asked.items():
        losses, hits = {}, {}
        fallback, majority = _by_frequency(world, codes)
        for name in DESCRIPTIONS:
            predicted = _held_out(world, name, codes, fallback)
            losses[name] = -np.log2(predicted[np.arange(len(codes)), codes])
            hits[name] = predicted.argmax(axis=1) == codes
        tables.append(_table(world, codes, majority, losses, hits, draws, seed).assign(about=about))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "about", table.pop("about"))
    return table.assign(steps=len(world.sequence), sequences=int(world.sequence.max()) + 1, seed=seed)


@dataclass(frozen=True, eq=False)
class _World:
    """Steps and their descriptions."""

    features: dict[str, sparse.csr_array]
    sequence: Integer[np.ndarray, " U"]
    """Of each step, numbered."""
    fold: Integer[np.ndarray, " U"]
    """Of each step; whole sequences."""
    asked: dict[str, Integer[np.ndarray, " U"]]
    """Class of each step by what is asked."""


def _world(run: Run, most: int, seed: int) -> _World:
    if run.steps.empty:
        raise UsageError("no step labels in this run")
    sample = sample_tokens(run, most=_TOKENS, seed=seed)
    sample = _with_steps(sample.only(sample.step >= 0), most, seed)
    unit = numbered(sample.sequence, sample.step)
    rows = np.unique(unit, return_index=True)[1]
    sequence = numbered(sample.sequence[rows])
    if sequence.max() + 1 < _FOLDS:
        raise UsageError(f"{sequence.max() + 1} problems with steps in this run; holding a fifth out needs {_FOLDS}")
    labels = label_codes(run, sample)[rows]
    families = run.sequences["family"].to_numpy(dtype=str)[sample.sequence[rows]]
    asked = {name: numbered(values) for name, values in (("label", labels), ("family", families)) if len(set(values)) > 1}
    if not asked:
        raise UsageError("one step label and one family only in this run; telling apart needs two")
    fold = _folds(sequence, _FOLDS, seed)
    return _World(_features(sample, unit, rows, seed), sequence, fold, asked)


def _with_steps(sample: TokenSample, most: int, seed: int) -> TokenSample:
    """Sequences drawn until they hold `most` steps."""
    sequence = numbered(sample.sequence)
    n_steps = np.bincount(sequence[np.unique(numbered(sequence, sample.step), return_index=True)[1]])
    order = np.random.default_rng(seed).permutation(len(n_steps))
    taken = np.zeros(len(n_steps), dtype=bool)
    taken[order[np.cumsum(n_steps[order]) <= most]] = True
    return sample.only(taken[sequence])


def _folds(sequence: Integer[np.ndarray, " U"], n_folds: int, seed: int) -> Integer[np.ndarray, " U"]:
    fold = np.zeros(len(sequence), dtype=np.int64)
    splitter = GroupKFold(n_folds, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(splitter.split(sequence, groups=sequence)):
        fold[held] = number
    return fold


def _features(
    sample: TokenSample, unit: Integer[np.ndarray, " N"], rows: Integer[np.ndarray, " U"], seed: int
) -> dict[str, sparse.csr_array]:
    """Descriptions; what is fitted to make them knows no class."""
    words, pairs = numbered(sample.token_id), numbered(sample.token_id, np.where(_inside(unit), sample.previous_id, -1))
    bag = sparse.hstack([_bag(unit, words), _bag(unit, pairs)], format="csr")
    position, length = sample.position[rows], np.bincount(unit)
    last = pd.Series(sample.step[rows]).groupby(sample.sequence[rows]).transform("max").to_numpy()
    numbers = (sample.step[rows], sample.step[rows] / np.maximum(last, 1), position, length)
    place = sparse.hstack([_deciles(each) for each in numbers], format="csr") / np.sqrt(len(numbers))
    tokens, routing = sparse.csr_array(TfidfTransformer(sublinear_tf=True).fit_transform(bag)), _profile(sample, unit, seed)
    text = sparse.hstack([tokens, place], format="csr")
    described = {
        POSITION: place,
        TOKENS: tokens,
        ROUTING: routing,
        TEXT: text,
        ALL: sparse.hstack([text, routing], format="csr"),
    }
    return {name: _narrow(values) for name, values in described.items()}


def _narrow(values: sparse.csr_array) -> sparse.csr_array:
    """With indices of the width that scikit-learn takes."""
    return sparse.csr_array((values.data, values.indices.astype(np.int32), values.indptr.astype(np.int32)), shape=values.shape)


def _inside(unit: Integer[np.ndarray, " N"]) -> np.ndarray:
    """Whether the token before stands in the same step."""
    return np.concatenate([[False], unit[1:] == unit[:-1]])


def _bag(unit: Integer[np.ndarray, " N"], words: Integer[np.ndarray, " N"]) -> sparse.csr_array:
    """Steps by words, how often; the words of enough steps alone."""
    bag = sparse.csr_array((np.ones(len(unit)), (unit, words)), shape=(int(unit.max()) + 1, int(words.max()) + 1))
    kept = bag[:, (bag > 0).sum(axis=0) >= _LEAST_STEPS]
    return kept if kept.shape[1] else sparse.csr_array((kept.shape[0], 1))


def _deciles(values: np.ndarray) -> sparse.csr_array:
    edges = np.unique(np.quantile(values, np.linspace(0, 1, 11)[1:-1]))
    place = np.searchsorted(edges, values, side="right")
    return sparse.csr_array((np.ones(len(values)), (np.arange(len(values)), place)), shape=(len(values), len(edges) + 1))


def _profile(sample: TokenSample, unit: Integer[np.ndarray, " N"], seed: int) -> sparse.csr_array:
    """Square root of each expert's share in each layer, centred and of unit length on average, as rows of the others are."""
    n_units, tokens = int(unit.max()) + 1, np.bincount(unit)
    layers = [sample.counts(place, unit, n_units) / tokens[:, None] for place in range(len(sample.layers))]
    values = np.sqrt(np.concatenate(layers, axis=1).astype(np.float32))
    values -= values.mean(axis=0)
    if values.shape[1] > _COMPONENTS < n_units:
        values = TruncatedSVD(_COMPONENTS, n_iter=2, random_state=seed).fit_transform(values)
    return sparse.csr_array(values / max(np.sqrt((values**2).sum(axis=1).mean()), 1e-12))


def _by_frequency(
    world: _World, codes: Integer[np.ndarray, " U"]
) -> tuple[Float64[np.ndarray, "U C"], Float64[np.ndarray, " U"]]:
    """Frequencies of the classes in the other folds, half a step added to each, and the loss of guessing by them."""
    n_classes, predicted = int(codes.max()) + 1, np.zeros((len(codes), int(codes.max()) + 1))
    for fold in range(_FOLDS):
        counts = np.bincount(codes[world.fold != fold], minlength=n_classes) + 0.5
        predicted[world.fold == fold] = counts / counts.sum()
    return predicted, -np.log2(predicted[np.arange(len(codes)), codes])


def _held_out(
    world: _World, name: str, codes: Integer[np.ndarray, " U"], fallback: Float64[np.ndarray, "U C"]
) -> Float64[np.ndarray, "U C"]:
    """Predicted probability of every class for each step, by a model that saw no step of its problem."""
    features, predicted = world.features[name], fallback.copy()
    strength = _strength(world, features, codes)
    for fold in range(_FOLDS):
        held = world.fold == fold
        predicted[held] = _FLOOR * fallback[held] + (1 - _FLOOR) * _fit(features, codes, ~held, held, strength[fold], fallback)
    return predicted


def _strength(world: _World, features: sparse.csr_array, codes: Integer[np.ndarray, " U"]) -> list[float]:
    """For each fold, the strength that tells the next fold best from the three others."""
    chosen = []
    for fold in range(_FOLDS):
        inner = world.fold == (fold + 1) % _FOLDS
        train = ~inner & (world.fold != fold)
        share = np.tile(np.bincount(codes[train], minlength=int(codes.max()) + 1) + 0.5, (len(codes), 1))
        loss = [
            -np.log(
                np.maximum(_fit(features, codes, train, inner, each, share)[np.arange(inner.sum()), codes[inner]], 1e-3)
            ).mean()
            for each in STRENGTHS
        ]
        chosen.append(STRENGTHS[int(np.argmin(loss))])
    return chosen


def _fit(
    features: sparse.csr_array,
    codes: Integer[np.ndarray, " U"],
    train: np.ndarray,
    held: np.ndarray,
    strength: float,
    fallback: Float64[np.ndarray, "U C"],
) -> Float64[np.ndarray, "H C"]:
    classes = np.unique(codes[train])
    if len(classes) < 2:
        return fallback[held]
    model = LogisticRegression(C=strength, max_iter=100, tol=1e-3)
    with warnings.catch_warnings():
        # A fit stopped early is judged by what it predicts, as any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features[train], codes[train])
    predicted = np.zeros((int(held.sum()), fallback.shape[1]))
    predicted[:, classes] = model.predict_proba(features[held])
    return predicted


def _table(
    world: _World,
    codes: Integer[np.ndarray, " U"],
    majority: Float64[np.ndarray, " U"],
    losses: dict[str, Float64[np.ndarray, " U"]],
    hits: dict[str, np.ndarray],
    draws: int,
    seed: int,
) -> pd.DataFrame:
    weights = stats.bootstrap_weights(int(world.sequence.max()) + 1, draws=draws, seed=seed)
    every = np.concatenate([np.ones((1, weights.shape[1])), weights])
    text, rows = min((losses[name] for name in (TOKENS, TEXT)), key=np.mean), []
    for name in DESCRIPTIONS:
        numbers = {
            ("bits", "ci"): _mean(world, majority - losses[name], every),
            ("accuracy", "accuracy"): _balanced(world, codes, hits[name], every),
            ("gain", "gain"): _mean(world, text - losses[name], every),
        }
        told = {
            column: value
            for names, values in numbers.items()
            for column, value in _with_interval(*names, values, weights.shape[1]).items()
        }
        rows.append({"features": name, **told})
    n_classes = int(codes.max()) + 1
    return pd.DataFrame(rows).assign(entropy=float(majority.mean()), chance=1 / n_classes, classes=n_classes)


def _mean(world: _World, values: Float64[np.ndarray, " U"], every: Float64[np.ndarray, "B S"]) -> Float64[np.ndarray, " B"]:
    return (every @ np.bincount(world.sequence, weights=values)) / (every @ np.bincount(world.sequence))


def _balanced(
    world: _World, codes: Integer[np.ndarray, " U"], hits: np.ndarray, every: Float64[np.ndarray, "B S"]
) -> Float64[np.ndarray, " B"]:
    """Mean over classes of the share of their steps that were told right; a class that a sample lacks is left out."""
    cells, n = world.sequence * (int(codes.max()) + 1) + codes, (every.shape[1], int(codes.max()) + 1)
    right, there = (
        every @ np.bincount(cells, weights=each, minlength=n[0] * n[1]).reshape(n) for each in (hits, np.ones(len(hits)))
    )
    recall = np.divide(right, there, out=np.full(there.shape, np.nan), where=there > 0)
    return np.nanmean(recall, axis=1)


def _with_interval(name: str, stem: str, values: Float64[np.ndarray, " B"], n_units: int) -> dict[str, float]:
    low, high = resampled_interval(values[1:], n_units)
    return {name: float(values[0]), f"{stem}_low": float(low), f"{stem}_high": float(high)}


def _finding(table: pd.DataFrame) -> Finding:
    about = table["about"].iloc[0]
    told = table[table["about"] == about].set_index("features")
    row = told.loc[ALL]
    text = told.loc[max((TOKENS, TEXT), key=lambda name: told.loc[name, "bits"])]
    return Finding(
        sentence=(
            f"Of the {row['entropy']:.2f} bits of a step's {about}, held-out problems yield {told.loc[ROUTING, 'bits']:.2f} to "
            f"routing, {told.loc[TOKENS, 'bits']:.2f} to tokens, {told.loc[POSITION, 'bits']:.2f} to position, "
            f"{told.loc[TEXT, 'bits']:.2f} to tokens and position, {row['bits']:.2f} to all. Words and place leave "
            f"{row['entropy'] - text['bits']:.2f} bits to gain; routing adds {row['gain']:+.3f} "
            f"({interval_text(row['gain_low'], row['gain_high'], '+.3f')}). Balanced accuracy "
            f"{percent(told.loc[ROUTING, 'accuracy'])} by routing, {percent(text['accuracy'])} by text, "
            f"{percent(row['accuracy'])} by all, {percent(row['chance'])} by chance ({int(row['steps']):,} steps of "
            f"{int(row['sequences']):,} problems)."
        ),
        verdict=judge_held_out(
            row["gain_low"], row["gain_high"], least=LEAST_EFFECT, enough=row["sequences"] >= LEAST_PROBLEMS
        ),
        rung=4 if row["gain_low"] > 0 else 0,
        effect=float(row["gain"]),
        unit="bits per step beyond tokens and position",
        ci_low=float(row["gain_low"]),
        ci_high=float(row["gain_high"]),
        token_effect=float(text["bits"]),
    )


LABEL_DECODING = Analysis(
    function=label_decoding,
    question="Can the kind of a step be told from its routing, beyond its words and its place?",
    claim="Routing tells a step's label better than its tokens and position alone.",
    method=(
        "Logistic regressions on expert shares, on token ids and pairs, and on position, five folds of whole problems; bits "
        "gained over guessing by frequency. Null: the same regression without routing; intervals from a bootstrap over "
        "problems."
    ),
    order=in_order,
    finding=_finding,
)
