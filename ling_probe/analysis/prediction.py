"""What predicts routing: how well the experts of held-out tokens follow from token, neighbours, place, label and other experts.

For each layer, with whole sequences split into two halves, count on one half and predict tokens of the other, then swap:

1. load: how often each expert is chosen at all;
2. token, position, step label: how often in each class, smoothed towards the load by `PSEUDO_TOKENS`;
3. token with the one before, with position, with label: the same, smoothed towards the token;
4. experts of the token before, or of the layer before: a ridge regression on which they were.

A prediction is a probability for every expert; it is scored in bits (yes or no for each expert, summed, per chosen expert) and
by recall, the share of the K chosen that are among its K most probable.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.question import Analysis, Finding, in_order, judge_held_out, percent
from ling_probe.analysis.sample import (
    TokenSample,
    interval_text,
    label_codes,
    numbered,
    resampled_interval,
    said,
    sample_tokens,
    two_halves,
)
from ling_probe.run import Run

LOAD, TOKEN, BIGRAM, TOKEN_LABEL = "load", "token", "token and the one before", "token and step label"
BEFORE, BELOW = "experts of the token before", "experts of the layer before"
PSEUDO_TOKENS = 4.0
"""Tokens that the coarser prediction counts for."""
LEAST_EFFECT = 0.02
"""Bits per chosen expert that are worth having."""
PENALTIES = (10.0, 1e3, 1e5)
"""Of the regressions, to choose from; the last leaves little but the load."""
LEAST_SEEN = 0.5
"""Share of tokens whose class was counted, below which a class that adds nothing says nothing."""
_LOAD_PART, _FITTED = 0.05, 10_000
"""How much of the load is mixed into a regression, so that no probability is 0, and the tokens it is fitted to."""


def routing_prediction(run: Run, *, tested: int = 2000, most: int = 100_000, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How well the chosen experts of held-out tokens are predicted, by what is known of the token.

    One row a layer and predictor (`known`). `recall` share of the chosen among the K most probable, with its 95 % bootstrap
    interval over sequences (`recall_low`, `recall_high`); `loss` in bits per chosen expert; `saved` bits that it saves over
    load alone (`saved_low`, `saved_high`), and `beyond_token` over the token (`beyond_low`, `beyond_high`). `seen` is the share
    of tokens whose class the other half holds (what is not seen is predicted by the coarser). `tested` tokens were predicted,
    from counts over `tokens` in `sequences`, each from the half it is not in.

    Args:
        run: Any run.
        tested: Tokens drawn from each half.
        most: Tokens of whole sequences to draw from a longer run.
        draws: Bootstrap samples.
        seed: Of halves, samples and everything drawn.
    """
    sample = sample_tokens(run, most=most, seed=seed)
    splits, bundle, weights = held_out_tokens(sample, tested, draws=draws, seed=seed)
    classes, tables = known_classes(run, sample), []
    for place, layer in enumerate(sample.layers):
        scores = [dict(_scores(sample, place, split, classes)) for split in splits]
        whole = {known: np.concatenate([each[known] for each in scores]) for known in scores[0]}
        tables.append(_layer_table(whole, bundle, weights).assign(layer=layer))
    table = pd.concat(tables, ignore_index=True)
    seen = {known: _seen(splits, codes) for known, (codes, _) in classes.items()}
    table["seen"] = table["known"].map(seen).fillna(1.0)
    table.insert(0, "layer", table.pop("layer"))
    return table.assign(tested=len(bundle), tokens=sample.n_tokens, sequences=sample.n_sequences, seed=seed)


@dataclass(frozen=True, eq=False)
class Split:
    """Tokens to count, tokens to fit regressions to, and tokens to predict."""

    train: Bool[np.ndarray, " N"]
    fitted: Integer[np.ndarray, " F"]
    test: Integer[np.ndarray, " T"]


def held_out_tokens(
    sample: TokenSample, tested: int, *, draws: int, seed: int
) -> tuple[list[Split], Integer[np.ndarray, " T"], Float64[np.ndarray, "B U"]]:
    """Both halves in turn held out, the bundle of sequences of each tested token, and how often samples hold each bundle."""
    first, rng = two_halves(sample.sequence, seed=seed), np.random.default_rng(seed)
    splits = [split_tokens(sample, ~half, half, tested, rng) for half in (first, ~first)]
    unit = numbered(sample.sequence[np.concatenate([split.test for split in splits])])
    bundle = stats.bundles(int(unit.max()) + 1, seed=seed)[unit]
    return splits, bundle, stats.bootstrap_weights(int(bundle.max()) + 1, draws=draws, seed=seed)


def split_tokens(
    sample: TokenSample, train: Bool[np.ndarray, " N"], held: Bool[np.ndarray, " N"], tested: int, rng: np.random.Generator
) -> Split:
    """Tokens of one half to count and to fit to, and some of the other to predict."""
    rows, out = np.flatnonzero(train), np.flatnonzero(held)
    fitted = rng.choice(rows, min(_FITTED, len(rows)), replace=False)
    return Split(train, fitted[sample.follows[fitted]], np.sort(rng.choice(out, min(tested, len(out)), replace=False)))


def known_classes(run: Run, sample: TokenSample) -> dict[str, tuple[Integer[np.ndarray, " N"], str]]:
    """Class of each token by what is known, and the coarser prediction it is smoothed towards."""
    token, label = sample.token_id, label_codes(run, sample)
    edges = np.quantile(sample.position, np.linspace(0, 1, 11)[1:-1])
    position = np.searchsorted(edges, sample.position, side="right")
    classes = {
        "position": (position, LOAD),
        TOKEN: (numbered(token), LOAD),
        "token and position": (numbered(token, position), TOKEN),
        BIGRAM: (numbered(token, sample.previous_id), TOKEN),
    }
    if (label >= 0).any():
        classes |= {"step label": (numbered(label), LOAD), TOKEN_LABEL: (numbered(token, label), TOKEN)}
    return classes


def _seen(splits: list[Split], codes: Integer[np.ndarray, " N"]) -> float:
    """Share of tested tokens whose class the counted half holds."""
    return float(np.mean([np.isin(codes[split.test], codes[split.train]).mean() for split in splits]))


def predictions(
    sample: TokenSample, place: int, split: Split, classes: dict[str, tuple[Integer[np.ndarray, " N"], str]]
) -> Iterator[tuple[str, Float64[np.ndarray, "T E"]]]:
    """Probability of each expert of a layer for every tested token, by what is known; the load comes first."""
    everyone = np.zeros(sample.n_tokens, dtype=np.int64)
    load = (sample.counts(place, everyone, 1, split.train) + 0.5) / (split.train.sum() + 1.0)
    predicted = {LOAD: np.broadcast_to(load, (len(split.test), sample.n_experts))}
    yield LOAD, predicted[LOAD]
    for known, (codes, coarser) in classes.items():
        found = _smoothed(sample, place, split, codes, predicted[coarser])
        predicted |= {known: found} if known == TOKEN else {}
        yield known, found
    yield BEFORE, _regressed(sample, place, split, load[0], place, -1)
    if place:
        yield BELOW, _regressed(sample, place, split, load[0], place - 1, 0)


def _scores(
    sample: TokenSample, place: int, split: Split, classes: dict[str, tuple[Integer[np.ndarray, " N"], str]]
) -> Iterator[tuple[str, Float64[np.ndarray, "T 2"]]]:
    """Loss and recall of every tested token, by what is known."""
    chosen = sample.take(split.test, place)
    for known, found in predictions(sample, place, split, classes):
        yield known, _scored(found, chosen)


def _smoothed(
    sample: TokenSample, place: int, split: Split, codes: Integer[np.ndarray, " N"], coarser: Float64[np.ndarray, "T E"]
) -> Float64[np.ndarray, "T E"]:
    seen, mine = np.unique(codes[split.test], return_inverse=True)
    number = np.full(int(codes.max()) + 1, -1)
    number[seen] = np.arange(len(seen))
    group = number[codes]
    tokens = np.bincount(group[split.train & (group >= 0)], minlength=len(seen))[mine, None]
    counts = sample.counts(place, group, len(seen), split.train)[mine]
    return (counts + PSEUDO_TOKENS * coarser) / (tokens + PSEUDO_TOKENS)


def _regressed(
    sample: TokenSample, place: int, split: Split, load: Float64[np.ndarray, " E"], source: int, shift: int
) -> Float64[np.ndarray, "T E"]:
    """From which experts the layer at `source` chose, for the token itself or (shift -1) the one before."""
    known, target = _chosen(sample, source, split.fitted + shift), _chosen(sample, place, split.fitted)
    effect = _ridge(known, target, load, _penalty(known, target, load))
    there = np.ones(len(split.test), dtype=bool) if shift == 0 else sample.follows[split.test]
    predicted = np.tile(load, (len(there), 1))
    predicted[there] += _chosen(sample, source, split.test[there] + shift) @ effect
    return (1 - _LOAD_PART) * np.clip(predicted, 0, 1) + _LOAD_PART * load


def _ridge(
    known: sparse.csr_array, target: sparse.csr_array, load: Float64[np.ndarray, " E"], penalty: float
) -> Float64[np.ndarray, "E E"]:
    gram = (known.T @ known).toarray() + penalty * np.eye(known.shape[1])
    together = (known.T @ target).toarray() - np.asarray(known.sum(axis=0)).reshape(-1, 1) * load
    return np.linalg.solve(gram, together)


def _penalty(known: sparse.csr_array, target: sparse.csr_array, load: Float64[np.ndarray, " E"]) -> float:
    """The penalty that, fitted to every other token, errs least on the rest."""
    out, rest = target[1::2].toarray() - load, known[1::2]
    errors = [((out - rest @ _ridge(known[::2], target[::2], load, each)) ** 2).sum() for each in PENALTIES]
    return PENALTIES[int(np.argmin(errors))]


def _chosen(sample: TokenSample, place: int, rows: Integer[np.ndarray, " R"]) -> sparse.csr_array:
    """Rows by experts, 1 where chosen."""
    ids = sample.take(rows, place)
    start = np.arange(len(rows) + 1) * ids.shape[1]
    return sparse.csr_array((np.ones(ids.size), ids.ravel(), start), shape=(len(rows), sample.n_experts))


def _scored(predicted: Float64[np.ndarray, "T E"], chosen: Integer[np.ndarray, "T K"]) -> Float64[np.ndarray, "T 2"]:
    likely = np.clip(predicted, 1e-6, 1 - 1e-6)
    rejected, taken = np.log2(1 - likely), np.take_along_axis(likely, chosen, axis=1)
    loss = -rejected.sum(axis=1) + (np.log2(1 - taken) - np.log2(taken)).sum(axis=1)
    best = np.argpartition(-predicted, chosen.shape[1] - 1, axis=1)[:, : chosen.shape[1]]
    recall = (best[:, :, None] == chosen[:, None, :]).any(axis=1).mean(axis=1)
    return np.stack([loss / chosen.shape[1], recall], axis=1)


def _layer_table(
    scores: dict[str, Float64[np.ndarray, "T 2"]], bundle: Integer[np.ndarray, " T"], weights: Float64[np.ndarray, "B U"]
) -> pd.DataFrame:
    every = np.concatenate([np.ones((1, weights.shape[1])), weights])
    there = np.maximum(every @ np.bincount(bundle, minlength=weights.shape[1]), 1e-12)
    mean = {
        known: np.stack(
            [every @ np.bincount(bundle, weights=column, minlength=weights.shape[1]) / there for column in values.T]
        )
        for known, values in scores.items()
    }
    rows = []
    for known, (loss, recall) in mean.items():
        columns = (
            ("recall", "recall", recall),
            ("saved", "saved", mean[LOAD][0] - loss),
            ("beyond_token", "beyond", mean[TOKEN][0] - loss),
        )
        row: dict[str, object] = {"known": known, "loss": loss[0]}
        for name, stem, values in columns:
            low, high = resampled_interval(values[1:], weights.shape[1])
            row |= {name: values[0], f"{stem}_low": float(low), f"{stem}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def _finding(table: pd.DataFrame) -> Finding:
    mean = table.groupby("known", sort=False)[["recall", "saved"]].mean().sort_values("saved", ascending=False).reset_index()
    means = {str(row["known"]): row for row in mean.to_dict("records")}
    listed = ", ".join(
        f"{known} {row['saved']:.2f} ({percent(row['recall'])})" for known, row in means.items() if known != LOAD
    )
    context, labels = (table[table["known"] == known] for known in (BIGRAM, TOKEN_LABEL))
    weakest = context.iloc[int(np.argmin(context["beyond_token"]))]
    return Finding(
        sentence=(
            f"Bits saved per chosen expert over load, and recall (load {percent(means[LOAD]['recall'])}), mean over layers: "
            f"{listed}. To the token, the token before adds least in {_beyond(weakest)}, of "
            f"{percent(weakest['seen'])} pairs seen"
            + (
                f"; the step label most in {_beyond(labels.iloc[int(np.argmax(labels['beyond_token']))])}"
                if len(labels)
                else ""
            )
            + f" ({said(table)})."
        ),
        verdict=judge_held_out(
            weakest["beyond_low"], weakest["beyond_high"], least=LEAST_EFFECT, enough=weakest["seen"] >= LEAST_SEEN
        ),
        rung=4 if weakest["beyond_low"] > 0 else 0,
        effect=float(weakest["beyond_token"]),
        unit="bits per chosen expert beyond the token, weakest layer",
        ci_low=float(weakest["beyond_low"]),
        ci_high=float(weakest["beyond_high"]),
        token_effect=float(means[TOKEN]["saved"]),
    )


def _beyond(row: pd.Series) -> str:
    interval = interval_text(row["beyond_low"], row["beyond_high"], "+.3f")
    return f"layer {row['layer']}: {row['beyond_token']:+.3f} bits ({interval})"


ROUTING_PREDICTION = Analysis(
    function=routing_prediction,
    question="What predicts which experts are chosen?",
    claim="In every layer the token before predicts the choice beyond the token itself.",
    method=(
        "Probability of each expert from smoothed counts (for sets of experts a ridge regression) on one half of the "
        "sequences, scored on tokens of the other in bits and recall. Null: load alone, and token alone; intervals from a "
        "bootstrap over sequences."
    ),
    order=in_order,
    finding=_finding,
)
