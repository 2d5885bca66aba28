"""Which layers and experts carry what routing tells of a step's label, and what of it the words do not tell.

With whole problems split into two halves:

1. learn labels from expert shares on the first half, in folds, and set one expert's share to its mean in every step held
   out: the bits that the prediction loses are what the decoder had from it; this ranks the experts;
2. learn on the whole first half, and measure on the second what is lost without each expert, each layer, the first experts
   together, and as many others of the same layers drawn at random;
3. learn from words and place, and from these with one layer or the first experts: the gain on the second half is what these
   carry that words do not.

What one expert tells another may tell too: an expert that costs nothing may still know the label.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float64, Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.decoders import (
    FOLDS,
    MOST_TOKENS,
    TEXT,
    bits,
    descriptions,
    fit,
    folds,
    frequencies,
    learnt,
    narrow,
    one_sided,
    principal_axes,
    problem_mean,
    problem_weights,
    require_steps,
    shares,
    with_interval,
    with_steps,
)
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, judge_held_out
from ling_probe.analysis.sample import indicator, interval_text, label_codes, numbered, resampled_interval, sample_tokens
from ling_probe.errors import UsageError
from ling_probe.run import Run

LAYER, EXPERT, CHOSEN, RANDOM = KINDS = ("layer", "expert", "first experts", "random experts")
FIRST = 10
"""Experts that are set to their means together."""
SETS = 20
"""Random sets of as many."""
LEAST_EFFECT = 0.05
"""Bits per step beyond words that are worth having."""
LEAST_PROBLEMS = 50
STRENGTH = 3.0
"""Inverse regularisation strength of the decoder that shares are taken from."""
_FLOOR = 0.01


def label_carriers(run: Run, *, steps: int = 1500, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """What predictions of a step's label lose when a layer or an expert is set to its mean, and what either adds to words.

    One row a layer, an expert, the first experts together, and as many random ones of the same layers (`kind`, with `layer`
    and `expert`); everything but `found` is from the half of the problems that nothing was learnt or chosen on. `lost` bits per
    step of a decoder of routing, with its 95 % bootstrap interval over problems (`ci_low`, `ci_high`). `gain` in bits of words,
    place and this layer (or these experts) over words and place alone, with `gain_low` and `gain_high`. For layers, `alone` is
    what a decoder of this layer alone gains over guessing by frequency, with `alone_low` and `alone_high`. For experts, `rank`
    is by the loss `found` on the other half, `label` the label whose steps lost most there; `p` one-sided from signs of
    problems flipped, `q` corrected over all experts (Benjamini-Hochberg). For the first experts, `more` is what they cost more
    than the random ones, with `more_low` and `more_high`. All from `steps` in `sequences`.

    Args:
        run: A run with step labels.
        steps: Steps of whole sequences to draw from a longer run.
        draws: Bootstrap samples.
        seed: Of folds, halves, samples and the sequences drawn.

    Raises:
        UsageError: No step labels, one label only, or fewer than 10 problems.
    """
    world = _world(run, steps, seed)
    losses, every = _Losses.of(world), problem_weights(world.sequence[world.measured], draws=draws, seed=seed)
    ranked = _Ranking(world, losses)
    tables = [
        _layer_rows(world, losses, every),
        _expert_rows(world, losses, ranked, every, seed),
        _set_rows(world, losses, ranked, every, seed),
    ]
    table = pd.concat(tables, ignore_index=True).astype({"layer": "Int64", "expert": "Int64", "rank": "Int64"})
    front = ["kind", "layer", "expert", "rank", "label", "found"]
    shape = {"steps": len(world.codes), "sequences": world.n_sequences, "seed": seed}
    return table[[*front, *table.columns.drop(front)]].assign(**shape)


@dataclass(frozen=True, eq=False)
class _World:
    """Steps: expert shares, components of them, the text, labels, problems."""

    shares: Float[np.ndarray, "U F"]
    """Centred; layer after layer."""
    layers: tuple[int, ...]
    text: sparse.csr_array
    codes: Integer[np.ndarray, " U"]
    names: tuple[str, ...]
    sequence: Integer[np.ndarray, " U"]
    """Numbered in each half."""
    fold: Integer[np.ndarray, " U"]
    """Of the steps to learn on; of the others the number of folds."""
    seed: int

    @property
    def measured(self) -> Bool[np.ndarray, " U"]:
        """Steps of the second half."""
        return self.fold == FOLDS

    @property
    def n_sequences(self) -> int:
        """Problems of both halves."""
        return int(self.sequence[self.measured].max() + self.sequence[~self.measured].max()) + 2

    @property
    def n_experts(self) -> int:
        """Of a layer."""
        return self.shares.shape[1] // len(self.layers)

    def of_layer(self, place: int) -> slice:
        """Columns of a layer."""
        return slice(place * self.n_experts, (place + 1) * self.n_experts)


def _world(run: Run, most: int, seed: int) -> _World:
    require_steps(run)
    sample = with_steps(sample_tokens(run, most=MOST_TOKENS, seed=seed), most, seed)
    unit = numbered(sample.sequence, sample.step)
    rows = np.unique(unit, return_index=True)[1]
    sequence, labels = numbered(sample.sequence[rows]), label_codes(run, sample)[rows]
    if sequence.max() + 1 < 2 * FOLDS:
        raise UsageError(
            f"{sequence.max() + 1} problems with steps in this run; learning on half of them, in folds, needs {2 * FOLDS}"
        )
    half = stats.halves(np.zeros(int(sequence.max()) + 1, dtype=np.int64), seed=seed)[sequence]
    fold = np.full(len(rows), FOLDS)
    fold[half == 0] = folds(sequence[half == 0], seed)
    sequence = _numbered_by_half(sequence, half)
    known = np.unique(run.steps["label"].to_numpy(dtype=str))[np.unique(labels)]
    if len(known) < 2:
        raise UsageError(f"one step label only in this run ({known[0]}); telling apart needs two")
    values = shares(sample, unit, len(rows)).astype(np.float32)
    text = descriptions(sample, unit, rows, seed)[TEXT]
    centred = values - values.mean(axis=0)
    return _World(centred, sample.layers, text, numbered(labels), tuple(map(str, known)), sequence, fold, seed)


def _numbered_by_half(sequence: Integer[np.ndarray, " U"], half: Integer[np.ndarray, " U"]) -> Integer[np.ndarray, " U"]:
    """Problems numbered anew, in each half from 0."""
    found = np.empty_like(sequence)
    for each in (0, 1):
        found[half == each] = numbered(sequence[half == each])
    return found


def _parts(world: _World) -> Iterator[tuple[Bool[np.ndarray, " U"], Bool[np.ndarray, " U"]]]:
    """Steps held out and steps to learn from: the folds of the first half, then the second half."""
    for each in range(FOLDS + 1):
        yield world.fold == each, (world.fold != each) & ~world.measured


def _guess(world: _World) -> Float64[np.ndarray, "U C"]:
    """Frequencies of the classes among the steps learnt from."""
    guess = np.zeros((len(world.codes), len(world.names)))
    for held, train in _parts(world):
        guess[held] = frequencies(world.codes[train], len(world.names))
    return guess


@dataclass(frozen=True, eq=False)
class _Losses:
    """A decoder of each fold, as a linear function of expert shares, and what held-out steps lose."""

    world: _World
    logits: Float64[np.ndarray, "U C"]
    weights: Float64[np.ndarray, "6 F C"]
    """Of each share, by fold; the last of all that is learnt from."""
    fallback: Float64[np.ndarray, "U C"]

    @classmethod
    def of(cls, world: _World) -> "_Losses":
        """Learn from the shares of all layers."""
        axes, scale = _components(world.shares, world.seed)
        features = world.shares @ axes.T / scale
        logits, weights = np.zeros((len(world.codes), len(world.names))), []
        for held, train in _parts(world):
            coefficients, intercept = _linear(features, world.codes, train, len(world.names))
            logits[held] = features[held] @ coefficients.T + intercept
            weights.append(axes.T @ coefficients.T / scale)
        return cls(world, logits, np.stack(weights), _guess(world))

    def without(self, columns: Integer[np.ndarray, " n"]) -> Float64[np.ndarray, " U"]:
        """Bits that each held-out step loses when some shares are their means together."""
        changed = self.logits.copy()
        for each, (held, _) in enumerate(_parts(self.world)):
            changed[held] -= self.world.shares[np.ix_(held, columns)] @ self.weights[each][columns]
        return self.bits(changed) - self.bits(self.logits)

    def each_without(self, place: int) -> Float64[np.ndarray, "U E"]:
        """Bits that each held-out step loses when one expert's share in a layer is its mean, for every expert."""
        columns, found = self.world.of_layer(place), np.zeros((len(self.logits), self.world.n_experts))
        for each, (held, _) in enumerate(_parts(self.world)):
            for some in np.array_split(np.flatnonzero(held), max(1, int(held.sum()) // 128)):
                moved = self.world.shares[some, columns][:, :, None] * self.weights[each][None, columns]
                log = _log_softmax(self.logits[some][:, None] - moved)
                found[some] = self._mixed(log[np.arange(len(some)), :, self.world.codes[some]], some[:, None])
        return found - self.bits(self.logits)[:, None]

    def bits(self, logits: Float64[np.ndarray, "U C"]) -> Float64[np.ndarray, " U"]:
        """Loss of every step."""
        rows = np.arange(len(logits))
        return self._mixed(_log_softmax(logits)[rows, self.world.codes], rows)

    def _mixed(self, log: Float64[np.ndarray, "*n"], rows: Integer[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
        guess = self.fallback[rows, self.world.codes[rows]]
        return -np.log2(_FLOOR * guess + (1 - _FLOOR) * np.exp(log))


def _components(values: Float[np.ndarray, "U F"], seed: int) -> tuple[Float[np.ndarray, "n F"], float]:
    """Axes to learn along, and the length that rows then have on average."""
    axes = principal_axes(values, seed)
    return axes, float(max(np.sqrt(((values @ axes.T) ** 2).sum(axis=1).mean()), 1e-12))


def _linear(
    features: Float[np.ndarray, "U n"], codes: Integer[np.ndarray, " U"], train: Bool[np.ndarray, " U"], n_classes: int
) -> tuple[Float64[np.ndarray, "C n"], Float64[np.ndarray, " C"]]:
    """Coefficients and intercept of every class; classes that were not there to learn are out of reach."""
    model = fit(features, codes, train, STRENGTH).model
    coefficients, intercept = np.zeros((n_classes, features.shape[1])), np.full(n_classes, -50.0)
    if model is None:
        return coefficients, np.zeros(n_classes)
    two = len(model.classes_) == 2
    coefficients[model.classes_] = np.concatenate([-model.coef_, model.coef_]) / 2 if two else model.coef_
    intercept[model.classes_] = np.concatenate([-model.intercept_, model.intercept_]) / 2 if two else model.intercept_
    return coefficients, intercept


def _log_softmax(logits: Float64[np.ndarray, "*rows C"]) -> Float64[np.ndarray, "*rows C"]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class _Ranking:
    """Experts ranked by what the first half of the problems lost without them."""

    def __init__(self, world: _World, losses: _Losses) -> None:
        choosing = ~world.measured
        by_label = indicator(world.codes[choosing], len(world.names))
        by_label = by_label / np.maximum(by_label.sum(axis=1), 1)[:, None]
        found, label = [], []
        for place in range(len(world.layers)):
            lost = losses.each_without(place)[choosing]
            found.append(lost.mean(axis=0))
            label.append((by_label @ lost).argmax(axis=0))
        self.found, self.label = np.concatenate(found), np.concatenate(label)
        self.order = np.argsort(-self.found, kind="stable")


def _layer_rows(world: _World, losses: _Losses, every: Float64[np.ndarray, "B S"]) -> pd.DataFrame:
    guess, text = bits(_guess(world), world.codes), _text_loss(world, None)
    rows = []
    for place, layer in enumerate(world.layers):
        columns = np.arange(world.shares.shape[1])[world.of_layer(place)]
        told = {
            ("lost", "ci"): losses.without(columns),
            ("alone", "alone"): guess - bits(_told(world, _reduced(world, columns)), world.codes),
            ("gain", "gain"): text - _text_loss(world, columns),
        }
        rows.append({"kind": LAYER, "layer": layer, **_means(world, told, every)})
    return pd.DataFrame(rows)


def _text_loss(world: _World, columns: Integer[np.ndarray, " n"] | None) -> Float64[np.ndarray, " U"]:
    """Loss of a decoder of words and place, with some expert shares or without."""
    if columns is None:
        return bits(_told(world, world.text), world.codes)
    beside = sparse.hstack([world.text, sparse.csr_array(_reduced(world, columns))], format="csr")
    return bits(_told(world, narrow(sparse.csr_array(beside))), world.codes)


def _reduced(world: _World, columns: Integer[np.ndarray, " n"]) -> Float[np.ndarray, "U c"]:
    axes, scale = _components(world.shares[:, columns], world.seed)
    return world.shares[:, columns] @ axes.T / scale


def _told(world: _World, features: sparse.csr_array | np.ndarray) -> Float64[np.ndarray, "U C"]:
    """Predictions for the second half from the first; elsewhere the frequencies."""
    predicted, held = _guess(world), world.measured
    inner = world.fold == 0
    predicted[held] = learnt(features, world.codes, ~held & ~inner, inner, held, predicted[held])
    return predicted


def _expert_rows(
    world: _World, losses: _Losses, ranked: _Ranking, every: Float64[np.ndarray, "B S"], seed: int
) -> pd.DataFrame:
    sequence = world.sequence[world.measured]
    problem, steps = indicator(sequence, every.shape[1]), every @ np.bincount(sequence)
    tables = []
    for place, layer in enumerate(world.layers):
        sums = problem @ losses.each_without(place)[world.measured]
        told, here = every @ sums / steps[:, None], world.of_layer(place)
        low, high = resampled_interval(told[1:], every.shape[1])
        tables.append(
            pd.DataFrame({
                "kind": EXPERT, "layer": layer, "expert": np.arange(world.n_experts), "found": ranked.found[here],
                "label": [world.names[code] for code in ranked.label[here]], "lost": told[0], "ci_low": low, "ci_high": high,
                "p": one_sided(stats.sign_flip_p(sums, flips=999, seed=(seed, place)), sums),
            })
        )  # fmt: skip
    table = pd.concat(tables, ignore_index=True)
    table.loc[ranked.order, "rank"] = np.arange(1, len(table) + 1)
    return table.assign(q=stats.benjamini_hochberg(table["p"].to_numpy()))


def _set_rows(world: _World, losses: _Losses, ranked: _Ranking, every: Float64[np.ndarray, "B S"], seed: int) -> pd.DataFrame:
    first, rng = ranked.order[:FIRST], np.random.default_rng(seed)
    others = [_alike(world, first, rng) for _ in range(SETS)]
    lost, random = losses.without(first), np.mean([losses.without(each) for each in others], axis=0)
    text = _text_loss(world, None)
    chosen = {("lost", "ci"): lost, ("more", "more"): lost - random, ("gain", "gain"): text - _text_loss(world, first)}
    same = {("lost", "ci"): random, ("gain", "gain"): text - _text_loss(world, others[0])}
    return pd.DataFrame([{"kind": kind, **_means(world, told, every)} for kind, told in ((CHOSEN, chosen), (RANDOM, same))])


def _alike(world: _World, first: Integer[np.ndarray, " n"], rng: np.random.Generator) -> Integer[np.ndarray, " n"]:
    """As many other experts of the same layers, or as many as there are."""
    layer = first // world.n_experts
    drawn = []
    for place in np.unique(layer):
        rest = np.setdiff1d(np.arange(world.shares.shape[1])[world.of_layer(place)], first)
        drawn.append(rng.choice(rest, min(len(rest), int((layer == place).sum())), replace=False))
    return np.concatenate(drawn)


def _means(
    world: _World, told: dict[tuple[str, str], Float64[np.ndarray, " U"]], every: Float64[np.ndarray, "B S"]
) -> dict[str, float]:
    """Means over the steps of the second half."""
    here = world.measured
    return {
        key: value
        for names, values in told.items()
        for key, value in with_interval(*names, problem_mean(values[here], world.sequence[here], every), every.shape[1]).items()
    }


def carriers_first(table: pd.DataFrame) -> pd.DataFrame:
    """Experts by their rank, after the layers and the sets."""
    return table.iloc[np.lexsort((table["rank"].fillna(0), (table["kind"] == EXPERT).to_numpy()))]


def _finding(table: pd.DataFrame) -> Finding:
    layers, experts = table[table["kind"] == LAYER], table[table["kind"] == EXPERT]
    chosen, random = (table[table["kind"] == kind].iloc[0] for kind in (CHOSEN, RANDOM))
    best = layers.iloc[int(layers["alone"].argmax())]
    top, found = experts.iloc[int(experts["rank"].argmin())], int((experts["q"] < DISCOVERY).sum())
    verdict = judge_held_out(
        chosen["gain_low"], chosen["gain_high"], least=LEAST_EFFECT, enough=bool(chosen["sequences"] >= LEAST_PROBLEMS)
    )
    return Finding(
        sentence=(
            f"Layer {best['layer']} alone tells most of a step's label, {best['alone']:.2f} bits per step. {found} of "
            f"{len(experts):,} experts cost predictions of unseen problems something (q below 0.05). The first {FIRST}, found "
            f"on the other half, cost {chosen['lost']:.3f} bits together, as many random ones of the same layers "
            f"{random['lost']:.3f}: {chosen['more']:+.3f} ({interval_text(chosen['more_low'], chosen['more_high'], '+.3f')}). "
            f"The first is layer {top['layer']} expert {top['expert']}, {top['lost']:.3f} bits, most in steps of "
            f"{top['label']}. To words and place the first {FIRST} add {chosen['gain']:+.3f} bits "
            f"({interval_text(chosen['gain_low'], chosen['gain_high'], '+.3f')}; {int(chosen['steps']):,} steps of "
            f"{int(chosen['sequences']):,} problems)."
        ),
        verdict=verdict,
        rung=4 if chosen["gain_low"] > 0 else 0,
        effect=float(chosen["gain"]),
        unit="bits per step beyond words and place",
        ci_low=float(chosen["gain_low"]),
        ci_high=float(chosen["gain_high"]),
    )


LABEL_CARRIERS = Analysis(
    function=label_carriers,
    question="Which layers and experts carry what routing tells of the kind of a step?",
    claim="A few experts tell of a step's label what its words and place do not.",
    method=(
        "Logistic regressions on expert shares; bits that held-out predictions lose when shares are set to their means. "
        "Experts are ranked on half of the problems and measured on the other. Nulls: random experts of the same layers, and "
        "words and place without experts; intervals from a bootstrap over problems."
    ),
    order=carriers_first,
    finding=_finding,
)
