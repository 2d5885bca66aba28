"""How far the choice of experts follows the token: vocabulary specialisation, measured where noise cannot read as preference.

The largest share of a token id's choices, max_e N_xe / N_x, is high for rare ids whatever the router does (Muennighoff et al.
2024, arXiv 2409.02060, define it on the same tokens). Here, for each layer:

1. split whole sequences into two halves;
2. note the favourite expert of each token id on one half;
3. measure on the other half how many of the id's tokens choose it; swap, and average;
4. do the same with token ids shuffled over all tokens: chance, load included.
"""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer

from ling_probe import stats
from ling_probe.analysis.question import Analysis, Finding, in_order, judge_gain, percent
from ling_probe.analysis.sample import (
    MOST,
    TokenSample,
    frequent,
    interval_text,
    resampled_interval,
    said,
    sample_tokens,
    two_halves,
)
from ling_probe.errors import UsageError
from ling_probe.run import Run

LEAST_EFFECT = 0.05
"""Share of an id's tokens above chance that is worth having."""


def vocabulary_specialisation(run: Run, *, least: int = 10, most: int = MOST, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How many tokens of an id choose the id's favourite expert, on sequences that had no part in finding the favourite.

    One row a layer and token that counts (`of`: "input", what is routed, or "next", what follows it). `share` is the mean over
    token ids, each counted once, between 0 and 1; `ci_low` and `ci_high` its 95 % bootstrap interval over sequences, favourites
    held fixed; `chance` the same with token ids shuffled; `same_tokens` the share measured on the tokens that found the
    favourite, which noise lifts. `ids` token ids were seen `least` times in each half, of `tokens` in `sequences`.

    Args:
        run: Any run.
        least: Tokens that an id needs in each half.
        most: Tokens of whole sequences to draw from a longer run.
        draws: Bootstrap samples.
        seed: Of halves, shuffle, samples and the sequences drawn.

    Raises:
        UsageError: No id is frequent enough.
    """
    sample = sample_tokens(run, most=most, seed=seed)
    first = two_halves(sample.sequence, seed=seed)
    rng, rows = np.random.default_rng(seed), []
    for of, ids in (("input", sample.token_id), ("next", sample.next_id)):
        words = frequent(ids, first, least)
        if (words < 0).all():
            raise UsageError(
                f"no token id is seen {least} times in each half of this run; capture more, or ask for fewer with `least`"
            )
        shuffled = _shuffled(words, first, rng)
        for place, layer in enumerate(sample.layers):
            share, low, high, same = _held_out(sample, place, words, first, draws, seed)
            chance = _held_out(sample, place, shuffled, first, 0, seed)[0]
            rows.append((layer, of, share, low, high, chance, same, int(words.max()) + 1))
    columns = ["layer", "of", "share", "ci_low", "ci_high", "chance", "same_tokens", "ids"]
    return pd.DataFrame(rows, columns=columns).assign(tokens=sample.n_tokens, sequences=sample.n_sequences, seed=seed)


def _shuffled(
    words: Integer[np.ndarray, " N"], first: Bool[np.ndarray, " N"], rng: np.random.Generator
) -> Integer[np.ndarray, " N"]:
    """Classes dealt anew inside each half, so that each keeps its number of tokens there."""
    dealt = words.copy()
    for half in (first, ~first):
        rows = np.flatnonzero(half & (words >= 0))
        dealt[rows] = rng.permutation(words[rows])
    return dealt


def _held_out(
    sample: TokenSample, place: int, words: Integer[np.ndarray, " N"], first: Bool[np.ndarray, " N"], draws: int, seed: int
) -> tuple[float, float, float, float]:
    """Held-out share with the bounds of its interval (NaN without draws), and the share on the same tokens."""
    n_words = int(words.max()) + 1
    counts = [sample.counts(place, words, n_words, half) for half in (first, ~first)]
    seen = [np.bincount(words[half & (words >= 0)], minlength=n_words) for half in (first, ~first)]
    favourite = [each.argmax(axis=1) for each in counts]
    every = np.arange(n_words)
    out = [(counts[1 - half][every, favourite[half]] / seen[1 - half]).mean() for half in (0, 1)]
    same = [(counts[half].max(axis=1) / seen[half]).mean() for half in (0, 1)]
    if not draws:
        return float(np.mean(out)), np.nan, np.nan, float(np.mean(same))
    rows = np.flatnonzero(words >= 0)
    word, other = words[rows], first[rows].astype(int)
    hit = (sample.take(rows, place) == np.where(other, favourite[1][word], favourite[0][word])[:, None]).any(axis=1)
    weight = 0.5 / n_words / np.where(other, seen[0][word], seen[1][word])
    low, high = _interval(sample.sequence[rows], hit, weight, draws, seed)
    return float(np.mean(out)), low, high, float(np.mean(same))


def _interval(
    sequence: Integer[np.ndarray, " N"], hit: Bool[np.ndarray, " N"], weight: Float64[np.ndarray, " N"], draws: int, seed: int
) -> tuple[float, float]:
    """Interval of a weighted share of hits, over bundles of sequences."""
    _, unit = np.unique(sequence, return_inverse=True)
    bundle = stats.bundles(int(unit.max()) + 1, seed=seed)[unit]
    totals = np.stack([np.bincount(bundle, weights=weight * hit), np.bincount(bundle, weights=weight)], axis=1)
    drawn = stats.bootstrap_weights(len(totals), draws=draws, seed=seed) @ totals
    low, high = resampled_interval(drawn[:, 0] / np.maximum(drawn[:, 1], 1e-12), len(totals))
    return float(low), float(high)


def _finding(table: pd.DataFrame) -> Finding:
    given, following = (table[table["of"] == of].set_index("layer") for of in ("input", "next"))
    least = given.iloc[int(np.argmin(given["share"] - given["chance"]))]
    first, last = given.index[0], given.index[-1]
    return Finding(
        sentence=(
            f"An id's favourite expert takes {_interval_of(given.loc[first])} of its tokens on held-out sequences in layer "
            f"{first} and {_interval_of(given.loc[last])} in layer {last}; for the token that follows it is "
            f"{percent(following.loc[first, 'share'])} and {percent(following.loc[last, 'share'])}. Chance is at most "
            f"{percent(table['chance'].max())}; the layer least above it is {least.name} ({percent(least['share'])}); "
            f"{int(least['ids']):,} ids, {said(table)}."
        ),
        verdict=judge_gain(least["ci_low"] - least["chance"], least["ci_high"] - least["chance"], least=LEAST_EFFECT),
        rung=4 if least["ci_low"] > least["chance"] else 0,
        effect=float(least["share"] - least["chance"]),
        unit="share of tokens above chance, weakest layer",
        ci_low=float(least["ci_low"] - least["chance"]),
        ci_high=float(least["ci_high"] - least["chance"]),
        token_effect=float(least["share"] - least["chance"]),
    )


def _interval_of(row: pd.Series) -> str:
    return f"{percent(row['share'])} ({interval_text(row['ci_low'], row['ci_high'], '.2%')})"


VOCABULARY_SPECIALISATION = Analysis(
    function=vocabulary_specialisation,
    question="How far does the token itself decide which experts are chosen?",
    claim="In every layer the choice follows the token id.",
    method=(
        "Share of an id's tokens that choose the id's favourite expert, N_xe / N_x, the favourite found on one half of the "
        "sequences and the share measured on the other, mean over ids. Null: token ids shuffled over tokens; intervals from a "
        "bootstrap over sequences."
    ),
    order=in_order,
    finding=_finding,
)
