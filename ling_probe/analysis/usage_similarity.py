"""Whether sequences use the same experts, and whether those do whose hidden states are alike.

1. Draw sequences.
2. A sequence's set of a layer: its most used experts that together hold `share` of its choices; ties fall at random.
3. Jaccard overlap of the sets of all pairs drawn; the same after the tokens' choices were exchanged across sequences: any for
   any (one load for all), or only among tokens of the same id (token identity alone decides).
4. Where router inputs or residuals were kept, rank-correlate the overlap with the cosine of the sequences' mean vectors, over
   the tokens that have vectors. Pairs that share a sequence are not independent: whole sequences are resampled and permuted.

Memory holds the tokens of the sequences drawn, and one mean vector for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer, Real
from scipy.stats import rankdata

from ling_probe import stats
from ling_probe.analysis.counting import require_sequences, segment_mask
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, in_order, judge
from ling_probe.errors import UsageError
from ling_probe.run import Run

_HELD = 1 << 26
"""Choices held at a time."""
LEAST = 0.02
"""Smallest difference in overlap worth having."""


def usage_similarity(
    run: Run, *, share: float = 0.8, segments: Sequence[str] | None = None, most: int = 300, draws: int = 1000,
    permutations: int = 999, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Overlap of the experts that pairs of sequences use most, by layer, and its correlation with that of hidden states.

    One row a layer: `sequences` drawn, mean `set_size`, mean `jaccard` of their pairs; `chance` (random sets as large),
    `pooled` (choices exchanged among all tokens), `token` (among those of the same id); `difference` jaccard -
    pooled with its 95 % interval `ci_low`, `ci_high`; `beyond` jaccard - token with `beyond_low`, `beyond_high`. Then, where
    vectors were kept: their `site`, Spearman's `correlation` of jaccard with cosine, `correlation_low`, `correlation_high`,
    `family_correlation` (after permuting sequences inside families: what families alone give), `token_correlation` (of the
    overlap that token identity gives), and p of the permutations with its corrected `q`; else NaN. `seed` of all draws.

    Args:
        run: Any run; the router's input of a layer is taken where it was kept, else the residual before or after it.
        share: Of a sequence's choices, which its set holds.
        segments: Only tokens of these; all by default.
        most: Sequences drawn.
        draws: Bootstrap samples of sequences.
        permutations: Of the sequences in each family.
        seed: Of all draws.

    Raises:
        UsageError: Fewer than three sequences have tokens.
    """
    require_sequences(run)
    sample = _draw(run, segments, most, seed)
    if sample.n < 3:
        raise UsageError(f"{run.folder} has {sample.n} sequences with tokens there; pairs to compare need 3 at least")
    weights = stats.bootstrap_weights(sample.n, draws=draws, seed=seed)
    table = pd.DataFrame(
        [
            _layer(run, layer, choices, sample, weights, share, permutations, seed)
            for layer, choices in _choices(run, sample.place)
        ]
    )
    return table.assign(q=stats.benjamini_hochberg(table["p"].to_numpy(float)), seed=seed)


@dataclass(frozen=True)
class Sample:
    """Tokens of the sequences drawn, in order, and whose choices stand for theirs."""

    sequences: Integer[np.ndarray, " S"]
    """Rows in the run."""
    owner: Integer[np.ndarray, " T"]
    """Place of each token's sequence in `sequences`."""
    position: Integer[np.ndarray, " T"]
    place: Integer[np.ndarray, " T"]
    """Among all tokens of the run; ascending."""
    pooled: Integer[np.ndarray, " T"]
    token: Integer[np.ndarray, " T"]
    """The tokens in another order: any other, or one that keeps their ids."""

    @property
    def n(self) -> int:
        """Sequences drawn."""
        return len(self.sequences)

    def counts(
        self, choices: Integer[np.ndarray, "N K"], n_experts: int, seen: Bool[np.ndarray, " T"]
    ) -> Integer[np.ndarray, "S E"]:
        """Choices of each sequence, where tokens choose so; only of tokens `seen`."""
        cells = self.owner[seen, None] * n_experts + choices[seen]
        return np.bincount(cells.ravel(), minlength=self.n * n_experts).reshape(self.n, n_experts)


def _draw(run: Run, segments: Sequence[str] | None, most: int, seed: int) -> Sample:
    rng, n_sequences = np.random.default_rng(seed), len(run.sequences)
    chosen = np.zeros(n_sequences, bool)
    chosen[rng.permutation(n_sequences)[:most]] = True
    found, start = [], 0
    for batch in run.batches(layers=[]):
        kept = np.flatnonzero(segment_mask(batch, segments) & chosen[batch.sequence])
        columns = (batch.sequence, batch.position, batch.token_id)
        found.append(np.stack([start + kept, *(column[kept] for column in columns)]))
        start += len(batch.position)
    place, sequence, position, token = np.concatenate(found, axis=1)
    sequences, owner = np.unique(sequence, return_inverse=True)
    pooled, same = (
        stats.permute_labels(np.arange(len(owner)), blocks=blocks, draws=1, seed=seed)[0] for blocks in (None, token)
    )
    return Sample(sequences, owner, position, place, pooled, same)


def _layer(
    run: Run, layer: int, choices: Integer[np.ndarray, "T K"], sample: Sample, weights: Float64[np.ndarray, "B S"],
    share: float, permutations: int, seed: int,
) -> dict[str, object]:  # fmt: skip
    rng, n_experts, every = np.random.default_rng((seed, layer)), run.spec.n_experts, np.ones(len(choices), bool)
    exchanged = {"jaccard": choices, "pooled": choices[sample.pooled], "token": choices[sample.token]}
    used = {name: top_sets(sample.counts(each, n_experts, every), share, rng) for name, each in exchanged.items()}
    overlap = {name: jaccard(sets) for name, sets in used.items()}
    means = {name: float(_pair_mean(np.ones((1, sample.n)), values)[0]) for name, values in overlap.items()}
    low, high = stats.percentile_interval(_pair_mean(weights, overlap["jaccard"] - overlap["pooled"]))
    beyond_low, beyond_high = stats.percentile_interval(_pair_mean(weights, overlap["jaccard"] - overlap["token"]))
    return {
        "layer": layer,
        "sequences": sample.n,
        "set_size": float(used["jaccard"].sum(axis=1).mean()),
        "jaccard": means["jaccard"],
        "chance": _random_overlap(used["jaccard"].sum(axis=1), n_experts),
        "pooled": means["pooled"],
        "token": means["token"],
        "difference": means["jaccard"] - means["pooled"],
        "ci_low": float(low),
        "ci_high": float(high),
        "beyond": means["jaccard"] - means["token"],
        "beyond_low": float(beyond_low),
        "beyond_high": float(beyond_high),
    } | _hidden(run, layer, sample, choices, share, weights, permutations, seed)


def _choices(run: Run, places: Integer[np.ndarray, " T"]) -> Iterator[tuple[int, Integer[np.ndarray, "T K"]]]:
    """Each layer with the experts that these tokens of the run chose; several layers are read at a time."""
    layers, together = run.spec.routed_layers, max(1, _HELD // (len(places) * run.spec.top_k))
    for some in (layers[first : first + together] for first in range(0, len(layers), together)):
        found = np.empty((len(some), len(places), run.spec.top_k), run.spec.id_dtype)
        start = 0
        for batch in run.batches(layers=some):
            first, stop = np.searchsorted(places, [start, start + len(batch.position)])
            found[:, first:stop] = batch.expert_ids[places[first:stop] - start].swapaxes(0, 1)
            start += len(batch.position)
        yield from zip(some, found, strict=True)


def top_sets(counts: Integer[np.ndarray, "S E"], share: float, rng: np.random.Generator) -> Bool[np.ndarray, "S E"]:
    """The most used experts of each row that together hold `share` of its choices; the fewest that do, ties at random.

    >>> top_sets(np.array([[5, 4, 1, 0]]), 0.8, np.random.default_rng(0))
    array([[ True,  True, False, False]])
    """
    order = np.argsort(-(counts + rng.random(counts.shape)), axis=1)
    ordered = np.take_along_axis(counts, order, axis=1)
    before = np.cumsum(ordered, axis=1) - ordered
    chosen = np.zeros(counts.shape, bool)
    # A share such as 0.8 of 10 is no exact number: what reaches it but for rounding has reached it.
    np.put_along_axis(chosen, order, before < share * counts.sum(axis=1, keepdims=True) - 1e-9, axis=1)
    return chosen


def jaccard(sets: Bool[np.ndarray, "S E"]) -> Float64[np.ndarray, "S S"]:
    """Shared members over all members, for every pair of rows; 0 on the diagonal, whose pairs are none."""
    as_numbers = sets.astype(float)
    shared, size = as_numbers @ as_numbers.T, as_numbers.sum(axis=1)
    overlap = shared / np.maximum(size[:, None] + size - shared, 1)
    np.fill_diagonal(overlap, 0)
    return overlap


def _random_overlap(size: Integer[np.ndarray, " S"], n_experts: int) -> float:
    """Mean Jaccard overlap of random sets of these sizes, to first order."""
    shared = np.outer(size, size) / n_experts
    overlap = shared / (np.add.outer(size, size) - shared)
    return float((overlap.sum() - np.trace(overlap)) / (len(size) * (len(size) - 1)))


def _pair_mean(weights: Float64[np.ndarray, "B S"], values: Float64[np.ndarray, "S S"]) -> Float64[np.ndarray, " B"]:
    """Mean over pairs of different sequences, each as often as both were drawn."""
    pairs = weights.sum(axis=1) ** 2 - (weights**2).sum(axis=1)
    return ((weights @ values) * weights).sum(axis=1) / pairs


def _hidden(
    run: Run, layer: int, sample: Sample, choices: Integer[np.ndarray, "T K"], share: float,
    weights: Float64[np.ndarray, "B S"], permutations: int, seed: int,
) -> dict[str, object]:  # fmt: skip
    """The second half of a row."""
    names = ("correlation", "correlation_low", "correlation_high", "family_correlation", "token_correlation", "p")
    site = _site(run, layer)
    nothing: dict[str, object] = {"site": site or ""} | dict.fromkeys(names, np.nan)
    if site is None:
        return nothing
    vectors, seen = _mean_vectors(run, site, sample)
    some = np.bincount(sample.owner[seen], minlength=sample.n) > 0
    if some.sum() < 3:
        return nothing
    rng = np.random.default_rng((seed, layer, 1))
    own, token = (
        pair_ranks(jaccard(top_sets(sample.counts(each, run.spec.n_experts, seen)[some], share, rng)))
        for each in (choices, choices[sample.token])
    )
    unit = vectors[some] / np.linalg.norm(vectors[some], axis=1, keepdims=True)
    alike = pair_ranks(unit @ unit.T)
    family = pd.factorize(run.sequences["family"].iloc[sample.sequences[some]])[0]
    found, null = mantel(own, alike, blocks=family, permutations=permutations, seed=seed)
    low, high = stats.percentile_interval(_correlation(weights[:, some], own, alike))
    exceeding = (np.abs(null - null.mean()) >= abs(found - null.mean()) - 1e-9).sum()
    values = (found, low, high, null.mean(), mantel(token, alike, blocks=family, permutations=0, seed=seed)[0],
              stats.permutation_p(np.array(exceeding), permutations))  # fmt: skip
    return {"site": site} | {name: float(value) for name, value in zip(names, values, strict=True)}


def _site(run: Run, layer: int) -> str | None:
    """Whose vectors stand for what the router of a layer sees: the nearest that was kept."""
    kept = run.kept_activations
    nearest = (f"router:{layer}", f"residual:{layer - 1}", f"residual:{layer}")
    return next((name for name in nearest if kept and name in kept.names), None)


def _mean_vectors(run: Run, site: str, sample: Sample) -> tuple[Float64[np.ndarray, "S D"], Bool[np.ndarray, " T"]]:
    """Mean vector of each sequence drawn, over its tokens that have one; and which tokens do."""
    slot = np.full(len(run.sequences), -1)
    slot[sample.sequences] = np.arange(sample.n)
    width = int(sample.position.max()) + 1
    keys, total, seen = (
        sample.owner * width + sample.position,
        np.zeros((sample.n, run.spec.d_model)),
        np.zeros(len(sample.owner), bool),
    )
    for piece in run.activations(site):
        key = slot[piece.sequence] * width + piece.position
        place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        mine = (slot[piece.sequence] >= 0) & (piece.position < width) & (keys[place] == key)
        seen[place[mine]] = True
        if mine.any():
            owners, first = np.unique(slot[piece.sequence[mine]], return_index=True)
            total[owners] += np.add.reduceat(piece.vectors[mine], first, axis=0, dtype=np.float64)
    return total / np.maximum(np.bincount(sample.owner[seen], minlength=sample.n), 1)[:, None], seen


def pair_ranks(values: Float64[np.ndarray, "S S"]) -> Float64[np.ndarray, "S S"]:
    """Ranks of the pairs of a symmetric matrix, centred; 0 on the diagonal."""
    upper = np.triu_indices(len(values), 1)
    ranks = np.zeros(values.shape)
    ranks[upper] = rankdata(values[upper]) - (len(upper[0]) + 1) / 2
    return ranks + ranks.T


def mantel(
    first: Float64[np.ndarray, "S S"], second: Float64[np.ndarray, "S S"], *, blocks: Integer[np.ndarray, " S"],
    permutations: int, seed: int,
) -> tuple[float, Float64[np.ndarray, " B"]]:  # fmt: skip
    """Correlation of two centred matrices over pairs, and of the same after permuting sequences inside blocks (Mantel 1967)."""
    size = np.sqrt((first**2).sum() * (second**2).sum())
    orders = stats.permute_labels(np.arange(len(first)), blocks=blocks, draws=permutations, seed=seed)
    null = np.array([(first[np.ix_(order, order)] * second).sum() for order in orders])
    size = size or np.nan
    return float((first * second).sum() / size), null / size


def _correlation(
    weights: Float64[np.ndarray, "B S"], first: Float64[np.ndarray, "S S"], second: Float64[np.ndarray, "S S"]
) -> Real[np.ndarray, " B"]:
    """Correlation over pairs of different sequences, each as often as both were drawn."""
    products = (first, second, first * second, first**2, second**2)
    x, y, xy, xx, yy = (_pair_mean(weights, values) for values in products)
    return (xy - x * y) / np.sqrt((xx - x**2) * (yy - y**2))


def _finding(table: pd.DataFrame) -> Finding:
    # An average of intervals is no narrower than the interval of the average.
    mean = table.mean(numeric_only=True)
    beyond = mean["beyond_high"] < 0 or mean["beyond_low"] > 0
    return Finding(
        sentence=(
            f"The experts that hold most of a sequence's choices overlap by {mean['jaccard']:.3f} (Jaccard, mean over layers "
            f"and pairs of {mean['sequences']:.0f} sequences; random sets {mean['chance']:.3f}); samples of one common load "
            f"would by {mean['pooled']:.3f}, a difference of {mean['difference']:.3f} (95 % interval {mean['ci_low']:.3f} to "
            f"{mean['ci_high']:.3f}), and token identity alone gives {mean['token']:.3f}. {_hidden_sentence(table)}"
        ),
        verdict=judge(mean["ci_low"], mean["ci_high"], least=LEAST),
        rung=2 if beyond else 1,
        effect=float(mean["difference"]),
        unit="Jaccard",
        ci_low=float(mean["ci_low"]),
        ci_high=float(mean["ci_high"]),
        token_effect=float(mean["token"] - mean["pooled"]),
    )


def _hidden_sentence(table: pd.DataFrame) -> str:
    told = table.dropna(subset="correlation")
    if told.empty:
        return "Whether alike hidden states go with it needs vectors: --keep activations --activations router:LAYERS."
    mean, found = told.mean(numeric_only=True), int((told["q"] < DISCOVERY).sum())
    return (
        f"Its rank correlation with the cosine of hidden states is {mean['correlation']:.2f} (mean of {len(told)} layers, "
        f"{mean['correlation_low']:.2f} to {mean['correlation_high']:.2f}); families alone give "
        f"{mean['family_correlation']:.2f} (exceeded in {found} layers, q < {DISCOVERY:g}), token identity "
        f"{mean['token_correlation']:.2f}."
    )


USAGE_SIMILARITY = Analysis(
    function=usage_similarity,
    question="Do different problems use the same experts?",
    claim="Sequences differ in the experts they use most, by more than samples of one common load would.",
    method=(
        "Jaccard overlap of the sets of most used experts that hold 80 % of a sequence's choices, over pairs of sequences, "
        "prompts included. Null: tokens exchange their choices across sequences; beside it, only tokens of the same id do. "
        "Intervals from a bootstrap over sequences. Correlation with the cosine of mean hidden states: Spearman over pairs, "
        "Mantel test by permuting sequences inside their family."
    ),
    order=in_order,
    finding=_finding,
)
