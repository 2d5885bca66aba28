"""Whether tokens with the same id are routed alike wherever they stand, and how much of that is their context.

For each layer, pairs of tokens of different sequences:

1. draw tokens at random, and to each a partner of the same id, of the same id after the same token, of the same id after
   another token, and of another id;
2. take the Jaccard index of the two sets of chosen experts, |A and B| / |A or B|;
3. set it beside chance: two sets of K drawn independently with the layer's loads, and the same with even loads.

Partners come from the same bundle of sequences, so that bundles are independent and can be resampled.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer
from scipy import stats as scipy_stats

from ling_probe import stats
from ling_probe.analysis.question import Analysis, Finding, in_order, judge_gain
from ling_probe.analysis.sample import MOST, TokenSample, interval_text, numbered, resampled_interval, said, sample_tokens
from ling_probe.errors import UsageError
from ling_probe.run import Run

SAME, SAME_BIGRAM, SAME_ELSEWHERE, DIFFERENT = PAIRS = (
    "same token",
    "same token, same one before",
    "same token, another before",
    "different token",
)
LEAST_EFFECT = 0.02
"""Difference of mean Jaccard indices that is worth having."""
_BUNDLES = 100
_ATTEMPTS = 20
"""Draws of a partner before a token counts as having none."""
_SETS = 4000
"""Independent pairs simulated for chance."""


def token_overlap(run: Run, *, pairs: int = 5000, most: int = MOST, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How alike two tokens of different sequences are routed, by what they share.

    One row a layer and kind of pair (`pair`): mean Jaccard index (`jaccard`, 0 to 1) with its 95 % bootstrap interval over
    bundles of sequences (`ci_low`, `ci_high`); `chance` for sets drawn independently with the layer's loads, and `uniform`
    with even loads; `difference` from pairs of different tokens, on the same first tokens, with its interval
    (`difference_low`, `difference_high`). `pairs` were found, of `tokens` in `sequences`. Tokens are drawn as often as they
    occur.

    Args:
        run: Any run.
        pairs: First tokens drawn; one without a partner is left out.
        most: Tokens of whole sequences to draw from a longer run.
        draws: Bootstrap samples.
        seed: Of everything drawn.

    Raises:
        UsageError: No two sequences share a token.
    """
    sample, rng = sample_tokens(run, most=most, seed=seed), np.random.default_rng(seed)
    bundle = _bundle(sample, seed)
    anchors = rng.choice(sample.n_tokens, min(pairs, sample.n_tokens), replace=False)
    partners = _partners(sample, bundle, anchors, rng)
    if (partners[SAME] < 0).all():
        raise UsageError("no token id occurs in two sequences of this run; capture more")
    weights = stats.bootstrap_weights(int(bundle.max()) + 1, draws=draws, seed=seed)
    rows = []
    for place, layer in enumerate(sample.layers):
        chance, uniform = independent_jaccard(_inclusion(sample, place), rng), uniform_jaccard(sample.n_experts, _top_k(sample))
        alike = {name: _jaccard(sample, place, anchors, partners[name]) for name in PAIRS}
        for name in PAIRS:
            columns = _mean_and_difference(alike[name], alike[DIFFERENT], bundle[anchors], weights)
            found = int((partners[name] >= 0).sum())
            rows.append({"layer": layer, "pair": name, **columns, "chance": chance, "uniform": uniform, "pairs": found})
    return pd.DataFrame(rows).assign(tokens=sample.n_tokens, sequences=sample.n_sequences, seed=seed)


def _bundle(sample: TokenSample, seed: int) -> Integer[np.ndarray, " N"]:
    _, unit = np.unique(sample.sequence, return_inverse=True)
    n_units = int(unit.max()) + 1
    return stats.bundles(n_units, most=max(1, min(_BUNDLES, n_units // 4)), seed=seed)[unit]


def _partners(
    sample: TokenSample, bundle: Integer[np.ndarray, " N"], anchors: Integer[np.ndarray, " P"], rng: np.random.Generator
) -> dict[str, Integer[np.ndarray, " P"]]:
    token, before, sequence = sample.token_id, sample.previous_id, sample.sequence
    apart = lambda a, b: sequence[a] != sequence[b]  # noqa: E731
    kinds: dict[str, tuple[Integer[np.ndarray, " N"], Callable[..., Bool[np.ndarray, " P"]]]] = {
        SAME: (numbered(bundle, token), apart),
        SAME_BIGRAM: (numbered(bundle, token, before), apart),
        SAME_ELSEWHERE: (numbered(bundle, token), lambda a, b: apart(a, b) & (before[a] != before[b])),
        DIFFERENT: (bundle, lambda a, b: apart(a, b) & (token[a] != token[b])),
    }
    return {name: _drawn(group, fits, anchors, rng) for name, (group, fits) in kinds.items()}


def _drawn(
    group: Integer[np.ndarray, " N"],
    fits: Callable[..., Bool[np.ndarray, " P"]],
    anchors: Integer[np.ndarray, " P"],
    rng: np.random.Generator,
) -> Integer[np.ndarray, " P"]:
    """A partner of the same group for each token, drawn evenly among those that fit; -1 where none was met."""
    order = np.argsort(group, kind="stable")
    size = np.bincount(group)
    start = np.cumsum(size) - size
    found = np.full(len(anchors), -1)
    for _ in range(_ATTEMPTS):
        missing = np.flatnonzero(found < 0)
        mine = group[anchors[missing]]
        drawn = order[start[mine] + rng.integers(size[mine])]
        good = fits(anchors[missing], drawn)
        found[missing[good]] = drawn[good]
    return found


def _jaccard(
    sample: TokenSample, place: int, anchors: Integer[np.ndarray, " P"], partners: Integer[np.ndarray, " P"]
) -> Float64[np.ndarray, " P"]:
    """Jaccard index of each pair, NaN without a partner."""
    one, other = sample.take(anchors, place), sample.take(partners, place)
    shared = (one[:, :, None] == other[:, None, :]).sum(axis=(1, 2))
    return np.where(partners >= 0, shared / (2 * one.shape[1] - shared), np.nan)


def _mean_and_difference(
    alike: Float64[np.ndarray, " P"],
    baseline: Float64[np.ndarray, " P"],
    bundle: Integer[np.ndarray, " P"],
    weights: Float64[np.ndarray, "B U"],
) -> dict[str, float]:
    both = np.isfinite(alike) & np.isfinite(baseline)
    values = np.stack([both, np.where(both, alike, 0), np.where(both, alike - baseline, 0)])
    totals = np.stack([np.bincount(bundle, weights=each, minlength=weights.shape[1]) for each in values], axis=1)
    count, *sums = totals.sum(axis=0)
    drawn = weights @ totals
    bounds = resampled_interval(drawn[:, 1:] / np.maximum(drawn[:, :1], 1e-12), len(totals))
    mean, difference = (each / count if count else np.nan for each in sums)
    return {
        "jaccard": mean,
        "ci_low": bounds[0][0],
        "ci_high": bounds[1][0],
        "difference": difference,
        "difference_low": bounds[0][1],
        "difference_high": bounds[1][1],
    }


def _top_k(sample: TokenSample) -> int:
    return sample.expert_ids.shape[2]


def _inclusion(sample: TokenSample, place: int) -> Float64[np.ndarray, " E"]:
    """How likely a token is to choose each expert."""
    return sample.counts(place, np.zeros(sample.n_tokens, np.int64), 1)[0] / sample.n_tokens


def independent_jaccard(inclusion: Float64[np.ndarray, " E"], rng: np.random.Generator, *, sets: int = _SETS) -> float:
    """Mean Jaccard index of two independent sets of one size, each expert as likely to be in one as `inclusion` says.

    Sets are drawn by systematic sampling in random order, which keeps the size and every probability exactly.

    Args:
        inclusion: Probabilities that sum to the size.
        rng: Source of the draws.
        sets: Pairs.
    """
    one, other = draw_sets(inclusion, sets, rng), draw_sets(inclusion, sets, rng)
    return float(((one & other).sum(axis=1) / (one | other).sum(axis=1)).mean())


def draw_sets(inclusion: Float64[np.ndarray, " E"], n: int, rng: np.random.Generator) -> Bool[np.ndarray, "n E"]:
    """Sets of `inclusion.sum()` experts, one a row."""
    order = np.argsort(rng.random((n, len(inclusion))), axis=1)
    reached = np.cumsum(inclusion[order], axis=1)
    ticks = np.ceil(reached - rng.random((n, 1)))
    taken = np.diff(ticks, axis=1, prepend=0) > 0
    sets = np.zeros_like(taken)
    np.put_along_axis(sets, order, taken, axis=1)
    return sets


def uniform_jaccard(n_experts: int, top_k: int) -> float:
    """Mean Jaccard index of two independent sets of `top_k` of `n_experts`, all alike (hypergeometric).

    >>> round(uniform_jaccard(256, 8), 4)
    0.0169
    """
    shared = np.arange(top_k + 1)
    return float((scipy_stats.hypergeom(n_experts, top_k, top_k).pmf(shared) * shared / (2 * top_k - shared)).sum())


def _finding(table: pd.DataFrame) -> Finding:
    same, elsewhere, different = (table[table["pair"] == name].reset_index() for name in (SAME, SAME_ELSEWHERE, DIFFERENT))
    places = [int(pick(same["difference"])) for pick in (np.argmax, np.argmin)]
    weakest = same.iloc[places[-1]]
    told = "; ".join(
        f"in layer {same['layer'][place]} {same['jaccard'][place]:.3f} "
        f"({interval_text(same['ci_low'][place], same['ci_high'][place])}) for the same token, "
        f"{elsewhere['jaccard'][place]:.3f} when another token stands before it, {different['jaccard'][place]:.3f} for "
        f"different tokens, {same['chance'][place]:.3f} by chance"
        for place in places
    )
    return Finding(
        sentence=f"Two tokens of different sequences share experts: mean Jaccard index {told} ({said(table)}).",
        verdict=judge_gain(weakest["difference_low"], weakest["difference_high"], least=LEAST_EFFECT),
        rung=1 if weakest["difference_low"] > 0 else 0,
        effect=float(weakest["difference"]),
        unit="Jaccard index over that of different tokens, weakest layer",
        ci_low=float(weakest["difference_low"]),
        ci_high=float(weakest["difference_high"]),
        token_effect=float(weakest["difference"]),
    )


TOKEN_OVERLAP = Analysis(
    function=token_overlap,
    question="Is the same token routed alike in different contexts?",
    claim="In every layer two tokens of the same id share more experts than two of different ids.",
    method=(
        "Mean Jaccard index of the chosen sets over pairs of tokens of different sequences. Null: sets drawn independently "
        "with the layer's loads, and the hypergeometric law for even loads; intervals from a bootstrap over bundles of "
        "sequences."
    ),
    order=in_order,
    finding=_finding,
)
