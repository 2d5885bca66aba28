"""Views of the same experts as points in a space of a few dimensions, for clustering.

    profile       token-adjusted log2 ratio of an expert's choices in every (family, step label), over its standard error;
                  directions alone count, so that experts with few choices or weak preferences are not a kind of their own
    coactivation  log2 lift of its company in its layer, over the group-aware null
    gate          its router row: what it listens to
    output        the direction it writes most along: its down projection's first left singular vector, a line without a sign

All but the profile are similarities of pairs and become points by classical scaling: the eigenvectors of the largest
eigenvalues, each times the root of its own. Every view comes with the points of resampled data: bundles of sequences drawn anew
or, for weights, dimensions of the residual stream.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Integer
from scipy import sparse
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh

from ling_probe import stats
from ling_probe.analysis.coactivation import company_by_layer, expected_pairs
from ling_probe.analysis.counting import Owner, require_sequences, segment_mask
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch

BUNDLES = 40
"""Units of the bootstrap: bundles of sequences."""
PRIOR = 5.0
"""Choices added to both sides of a ratio: without them the rarest experts, all noise, would be the clusters."""
DIMENSIONS = 8
"""Of points made of similarities."""
ALL_LAYERS, ONE_LAYER = "all layers", "one layer"
_CELLS = 2**25
"""Counts held at a time, by layer, token id and expert."""
_DRAWS = 4
"""Most samples of dimensions over all layers, each of which compares every two experts of the model."""
_DENSE = 1000
"""More points than this get their eigenvectors by iteration."""


class Points(NamedTuple):
    """Experts of one layer, or of all, as points of one view."""

    view: str
    scope: str
    """`ONE_LAYER` or `ALL_LAYERS`."""
    layers: tuple[int, ...]
    """Whose experts these are, in order: X is layers times experts."""
    found: Float[np.ndarray, "X C"]
    drawn: Float[np.ndarray, "B X C"]
    """The same from resampled data."""
    directions: bool = False
    """Whether only the direction of a point from the origin counts."""

    def seen(self, points: Float[np.ndarray, "X C"]) -> Float[np.ndarray, "X C"]:
        """What is clustered of such points: themselves, or at distance 1 from the origin."""
        return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12) if self.directions else points


def profile_points(run: Run, draws: int, seed: int) -> Iterator[Points]:
    """By what each expert prefers: each layer, then all layers.

    Raises:
        UsageError: The run has no step labels, or one class of steps only.
    """
    bundle = _bundles(run, seed)
    owner, n_classes = _bundle_and_class(run, bundle)
    n_bundles = int(bundle.max()) + 1
    weights = np.concatenate([_resampled(n_bundles, draws, seed), 1 - np.eye(n_bundles)])
    layers = []
    for layer, sides in _observed_and_expected(run, owner, n_bundles * n_classes):
        chosen, expected = ((weights @ side.reshape(n_bundles, -1)).reshape(len(weights), n_classes, -1) for side in sides)
        ratio = np.log2((chosen + PRIOR) / (expected + PRIOR)).swapaxes(1, 2)
        error = np.sqrt(n_bundles - 1) * ratio[draws + 1 :].std(axis=0)  # of the jackknife over bundles
        layers.append(ratio[: draws + 1] / np.where(error > 0, error, np.inf))
        yield Points("profile", ONE_LAYER, (layer,), layers[-1][0], layers[-1][1:], directions=True)
    if len(layers) > 1:
        every = np.concatenate(layers, axis=1)
        yield Points("profile", ALL_LAYERS, run.spec.routed_layers, every[0], every[1:], directions=True)


def coactivation_points(run: Run, draws: int, seed: int) -> Iterator[Points]:
    """By the company each expert keeps, layer by layer; experts of two layers keep none.

    Raises:
        UsageError: Fewer than two sequences.
    """
    bundle = _bundles(run, seed)
    weights = _resampled(int(bundle.max()) + 1, draws, seed)
    for layer, blocks in company_by_layer(run, run.spec.routed_layers, bundle):
        company = blocks.weighted(weights)
        lift = np.log2((company.pairs + PRIOR) / (np.maximum(expected_pairs(company, run.spec), 0) + PRIOR))
        points = np.stack([_scaled(each) for each in lift])
        yield Points("coactivation", ONE_LAYER, (layer,), points[0], points[1:])


def gate_points(run: Run, draws: int, seed: int) -> Iterator[Points]:
    """By the cosines of router rows, after taking out the mean of each layer: each layer, then all layers.

    Raises:
        UsageError: The run holds no expert weights.
    """
    rows = run.expert_vectors()["gate"].astype(np.float32)
    yield from _weight_points(run, "gate", rows - rows.mean(axis=1, keepdims=True), lambda cosine: cosine, draws, seed)


def output_points(run: Run, draws: int, seed: int) -> Iterator[Points]:
    """By the squared cosines of the lines that experts write along: each layer, then all layers.

    Raises:
        UsageError: The run holds no expert weights.
    """
    yield from _weight_points(run, "output", run.expert_vectors()["output"].astype(np.float32), np.square, draws, seed)


VIEWS: Mapping[str, Callable[[Run, int, int], Iterator[Points]]] = {
    "profile": profile_points,
    "coactivation": coactivation_points,
    "gate": gate_points,
    "output": output_points,
}


def _bundles(run: Run, seed: int) -> Integer[np.ndarray, " S"]:
    require_sequences(run)
    if len(run.sequences) < 2:
        raise UsageError(f"{run.folder} holds one sequence only; whether clusters come back needs two at least")
    return stats.bundles(len(run.sequences), most=BUNDLES, seed=seed)


def _resampled(units: int, draws: int, seed: int) -> Float64[np.ndarray, "B U"]:
    """Every unit once, and then as often as each bootstrap sample draws it."""
    return np.concatenate([np.ones((1, units)), stats.bootstrap_weights(units, draws=draws, seed=seed)])


def _bundle_and_class(run: Run, bundle: Integer[np.ndarray, " S"]) -> tuple[Owner, int]:
    """Counts a reasoning token for its bundle and its (family, step label), and how many such classes there are."""
    steps = run.steps
    if steps.empty:
        raise UsageError("no step labels in this run")
    sequence = steps["sequence"].to_numpy()
    family = run.sequences["family"].to_numpy(dtype=str)[sequence]
    classes, codes = np.unique(np.stack([family, steps["label"].to_numpy(dtype=str)]), axis=1, return_inverse=True)
    n_classes, codes = classes.shape[1], codes.reshape(-1)
    if n_classes < 2:
        raise UsageError("one kind of step only in this run; a profile needs two at least")
    # Steps stand in the order of their sequences and are numbered from 0 in each.
    first = np.searchsorted(sequence, np.arange(len(run.sequences)))
    cell = bundle[sequence] * n_classes + codes

    def owner(batch: TokenBatch) -> Integer[np.ndarray, " N"]:
        counted = (batch.step >= 0) & segment_mask(batch, ("reasoning",))
        step = np.where(counted, first[batch.sequence] + batch.step, 0)
        return np.where(counted, cell[step], -1)

    return owner, n_classes


def _observed_and_expected(
    run: Run, owner: Owner, n_cells: int
) -> Iterator[tuple[int, tuple[Float64[np.ndarray, "O E"], Float64[np.ndarray, "O E"]]]]:
    """Each layer with the choices of every cell, and those that its tokens alone would make."""
    per_token, word_of = _token_shares(run, owner, n_cells)
    n_words, n_experts, layers = per_token.shape[1], run.spec.n_experts, run.spec.routed_layers
    at_a_time = max(1, _CELLS // (n_words * n_experts))
    for first in range(0, len(layers), at_a_time):
        some = layers[first : first + at_a_time]
        observed = np.zeros((len(some), n_cells * n_experts), dtype=np.int64)
        by_word = np.zeros((len(some), n_words * n_experts), dtype=np.int32)
        for batch in run.batches(layers=some):
            cell = owner(batch)
            word = np.where(cell >= 0, word_of[batch.token_id], -1)
            # Tokens of one id together: their counts lie side by side, and adding to them is ten times as fast.
            order = np.argsort(word, kind="stable")[(word < 0).sum() :]
            for place in range(len(some)):
                ids = batch.expert_ids[order, place].astype(np.int64)
                np.add.at(observed[place], (cell[order, None] * n_experts + ids).ravel(), 1)
                np.add.at(by_word[place], (word[order, None] * n_experts + ids).ravel(), np.int32(1))
        for place, layer in enumerate(some):
            expected = per_token @ by_word[place].reshape(n_words, n_experts).astype(np.float32)
            yield layer, (observed[place].reshape(n_cells, n_experts).astype(float), expected.astype(float))


def _token_shares(run: Run, owner: Owner, n_cells: int) -> tuple[sparse.csr_array, Integer[np.ndarray, " V"]]:
    """Share of the tokens of each id that each cell has, cells by ids that occur, and the column of every id."""
    tokens = sparse.csr_array((n_cells, run.spec.vocab_size), dtype=np.float32)
    for batch in run.batches(layers=[]):
        cell = owner(batch)
        place = (cell[cell >= 0], batch.token_id[cell >= 0])
        tokens += sparse.csr_array((np.ones(len(place[0]), np.float32), place), shape=tokens.shape)
    total = np.asarray(tokens.sum(axis=0)).ravel()
    if not total.any():
        raise UsageError("no completions in this run, prompts alone")
    shares = tokens @ sparse.diags_array(1 / np.maximum(total, 1))
    return shares.tocsc()[:, total > 0].tocsr(), np.cumsum(total > 0) - 1


def _weight_points(
    run: Run,
    view: str,
    vectors: Float[np.ndarray, "M E D"],
    similarity: Callable[[np.ndarray], np.ndarray],
    draws: int,
    seed: int,
) -> Iterator[Points]:
    weights = _resampled(vectors.shape[-1], draws, seed).astype(np.float32)
    scopes: list[tuple[str, tuple[int, ...], np.ndarray]]
    scopes = [(ONE_LAYER, (layer,), rows) for layer, rows in zip(run.spec.routed_layers, vectors, strict=True)]
    if len(vectors) > 1:
        scopes.append((ALL_LAYERS, run.spec.routed_layers, vectors.reshape(-1, vectors.shape[-1])))
    for scope, layers, rows in scopes:
        some = weights if scope == ONE_LAYER else weights[: _DRAWS + 1]
        points = np.stack([_scaled(similarity(_cosines(rows * np.sqrt(weight)))) for weight in some])
        yield Points(view, scope, layers, points[0], points[1:])


def _cosines(rows: Float[np.ndarray, "X D"]) -> Float[np.ndarray, "X X"]:
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return unit @ unit.T


def _scaled(similarity: Float[np.ndarray, "X X"]) -> Float64[np.ndarray, "X C"]:
    """Points whose inner products come nearest to the similarities, both from their mean (classical scaling)."""
    mean = similarity.mean(axis=0)
    centred = similarity - mean - mean[:, None] + mean.mean()
    kept = min(DIMENSIONS, len(mean) - 1)
    if len(mean) > _DENSE:
        values, vectors = eigsh(centred, k=kept, which="LA", v0=np.linspace(-1, 1, len(mean)), tol=1e-4)
    else:
        values, vectors = eigh(centred, subset_by_index=(len(mean) - kept, len(mean) - 1))
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(kept)]
    return (vectors * np.sign(largest) * np.sqrt(np.maximum(values, 0)))[:, ::-1].astype(float)
