"""What one table of specialisation follows from, summed while a run streams by, some layers at a time.

Every sum is kept for each half of the run, so that what is picked on one half can be measured on the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Float64, Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.classified import Classified, Part, families, problem_share, read_parts, token_rates
from ling_probe.analysis.counting import sum_by
from ling_probe.run import Run

MEMORY = 450e6
"""Bytes that the tables of layers read together may take; one layer is always read."""
HELD = 100e6
"""Bytes of expert ids held between the two passes; more are read twice."""
UNITS = 400
"""Most units of the bootstrap, as many in each half."""


@dataclass(frozen=True)
class Design:
    """How a run is cut: halves to pick and to measure on, and the units that the bootstrap draws."""

    classified: Classified
    half: Integer[np.ndarray, " O"]
    """Half of each step or sequence."""
    unit: Integer[np.ndarray, " O"]
    """Its unit, a bundle of sequences of one half."""
    unit_half: Integer[np.ndarray, " U"]
    share: Float32[np.ndarray, "3 A N"]
    """Of the tokens of each class of the first half, the second half and the whole run, the part in each class of meaning."""

    @classmethod
    def of(cls, run: Run, classified: Classified, seed: int) -> "Design":
        """Halves that are even in every family, and among right and wrong answers; units inside them."""
        strata = families(run)[1] * (len(classified.names) + 1)
        if not classified.within_sequences:
            strata[classified.sequence] += classified.codes + 1
        half = stats.halves(strata, seed=seed)
        unit, unit_half = np.empty_like(half), np.zeros(0, dtype=np.int64)
        for side in (0, 1):
            mine = stats.bundles(int((half == side).sum()), most=UNITS // 2, seed=seed)
            unit[half == side] = len(unit_half) + mine
            unit_half = np.concatenate([unit_half, np.full(int(mine.max(initial=-1)) + 1, side)])
        by_owner = half[classified.sequence]
        return cls(classified, by_owner, unit[classified.sequence], unit_half, _word_shares(run, classified, by_owner))


def _word_shares(run: Run, classified: Classified, half: Integer[np.ndarray, " O"]) -> Float32[np.ndarray, "3 A N"]:
    n_classes, n_words = len(classified.names), classified.n_words
    counts = np.zeros(2 * n_classes * n_words)
    row = half * n_classes + classified.codes
    for part in read_parts(run, classified, []):
        counts += np.bincount(row[part.rows][part.owner] * n_words + part.word, minlength=len(counts))
    first, second = counts.reshape(2, n_classes, n_words)
    three = np.stack([first, second, first + second])
    return (three / np.maximum(three.sum(axis=1, keepdims=True), 1)).astype(np.float32)


@dataclass(frozen=True)
class Matched:
    """Tokens of a part, weighted so that a class and the rest of its stratum hold the same words in the same proportions.

    With n tokens of one kind inside and m outside, each inside token weighs m/(n+m) and each outside token n/(n+m) (direct
    standardisation), and words of one side alone weigh 0. Columns Z: words of the whole run, then of the half; inside, then
    outside; class by class.
    """

    part: Part
    design: Design

    @cached_property
    def weights(self) -> Float32[np.ndarray, "n Z"]:
        """Weight of each token."""
        design, owner = self.design, self.part.owner
        code, half = design.classified.codes[self.part.rows][owner], design.half[self.part.rows][owner]
        inside = code[:, None] == np.arange(len(design.classified.names))
        columns = []
        for share in (design.share[2, :, self.part.word], design.share[half, :, self.part.word]):
            columns += [np.where(inside, 1 - share, 0), np.where(inside, 0, share)]
        return np.concatenate(columns, axis=1)

    @cached_property
    def words(self) -> sparse.csr_array:
        """Tokens of each class of each owner."""
        return self.part.words

    @cached_property
    def owner_cells(self) -> Integer[np.ndarray, " nK"]:
        """Where each choice's owner begins in a flat table of owners by experts."""
        return self.part.cells(self.part.owner)

    @cached_property
    def _units(self) -> tuple[Integer[np.ndarray, " u"], Integer[np.ndarray, " n"]]:
        return np.unique(self.design.unit[self.part.rows][self.part.owner], return_inverse=True)

    @cached_property
    def _unit_cells(self) -> Integer[np.ndarray, " nK"]:
        return self.part.cells(self._units[1]).astype(np.int32)

    def add_weight(self, weight: Float64[np.ndarray, "U Z"]) -> None:
        """Add the weight of each unit's tokens."""
        units, unit = self._units
        weight[units] += sum_by(self.weights, unit, len(units))

    def add_choices(self, place: int, choices: Float32[np.ndarray, "U E Z"]) -> None:
        """Add each unit's weighted choices in one of the layers read."""
        units, n_experts, top_k = self._units[0], choices.shape[1], self.part.expert_ids.shape[2]
        cells = self._unit_cells + self.part.chosen(place)
        starts = np.arange(0, len(cells) + 1, top_k, dtype=np.int32)
        chosen = sparse.csc_array(
            (np.ones(len(cells), np.float32), cells, starts), shape=(len(units) * n_experts, len(self.weights))
        )
        choices[units] += (chosen @ self.weights).reshape(len(units), *choices.shape[1:])


class LayerSums:
    """Sums of one layer: A classes of meaning, F strata, U units, E experts."""

    def __init__(self, design: Design, n_experts: int) -> None:
        classified = design.classified
        n_classes = len(classified.names)
        self.design = design
        self.choices = np.zeros((n_classes * classified.n_strata, n_experts))
        """Choices by class and stratum."""
        self.equal = np.zeros((len(design.unit_half), n_experts, 4 * n_classes), np.float32)
        """Choices at equal words by unit, columns as in `Matched`."""
        nothing = np.zeros((0, n_experts), np.float32)
        self._sums = [self._shuffled(nothing, slice(0, 0), np.zeros(0, bool)) for _ in (0, 1)]
        self._moments = [sums.moments() for sums in self._sums]
        self.residuals: list[Float32[np.ndarray, "o E"]] = []

    def add(self, matched: Matched, place: int, rate: Float32[np.ndarray, "N E"], *, keep: bool) -> None:
        """Add a part of the run."""
        part, classified = matched.part, self.design.classified
        rows, observed = part.rows, part.observed(place, matched.owner_cells)
        cell = classified.codes[rows] * classified.n_strata + classified.stratum[rows]
        self.choices += sum_by(observed, cell, len(self.choices))
        matched.add_choices(place, self.equal)
        residual = observed - matched.words @ rate
        if classified.within_sequences:
            residual -= problem_share(residual, classified.sequence[rows], classified.n_tokens[rows])
        for half in (0, 1):
            sums = self._shuffled(residual, rows, self.design.half[rows] == half)
            if classified.within_sequences:
                self._moments[half] += sums.moments()
            else:
                self._sums[half] += sums
        if keep:
            self.residuals.append(residual)

    def matched(self) -> Float32[np.ndarray, "Z U E"]:
        """Choices at equal words, column by column."""
        return np.ascontiguousarray(self.equal.transpose(2, 0, 1))

    def null(self, half: int) -> stats.NullMoments:
        """Moments of the summed residuals of each class [A E], classes shuffled over the steps or sequences of a half."""
        return self._moments[half] if self.design.classified.within_sequences else self._sums[half].moments()

    def _shuffled(self, residual: Float32[np.ndarray, "o E"], rows: slice, mine: Bool[np.ndarray, " o"]) -> stats.ShuffleSums:
        """Sums of a part; its problems are all its own, its strata go on in others."""
        classified = self.design.classified
        block, n_blocks = classified.stratum[rows][mine], classified.n_strata
        if classified.within_sequences:
            problems, block = np.unique(classified.sequence[rows][mine], return_inverse=True)
            n_blocks = len(problems)
        n_labels = len(classified.names)
        return stats.ShuffleSums.of(
            residual[mine], classified.codes[rows][mine], blocks=block, n_labels=n_labels, n_blocks=n_blocks
        )


@dataclass(frozen=True)
class Streamed:
    """Layers read together, and the weight of the tokens that chose in every one of them."""

    layers: dict[int, LayerSums]
    weight: Float64[np.ndarray, "U Z"]


def stream(run: Run, design: Design, *, keep: bool = False) -> Iterator[Streamed]:
    """All layers, some at a time, each group gone through twice: what words choose, then what there is beside it.

    Args:
        run: Which run.
        design: Halves, units and classes of meaning.
        keep: Whether to keep all residuals, O by experts a layer.
    """
    classified = design.classified
    columns = len(design.unit_half) * 4 * len(classified.names)
    size = max(1, int(MEMORY // (4 * run.spec.n_experts * (classified.n_words + columns))))
    for start in range(0, run.spec.n_rows, size):
        yield _stream_together(run, design, run.spec.routed_layers[start : start + size], keep=keep)


def _stream_together(run: Run, design: Design, layers: Sequence[int], *, keep: bool) -> Streamed:
    classified = design.classified
    found = {layer: LayerSums(design, run.spec.n_experts) for layer in layers}
    weight = np.zeros((len(design.unit_half), 4 * len(classified.names)))
    size = classified.n_tokens.sum() * len(layers) * run.spec.top_k * np.dtype(run.spec.id_dtype).itemsize
    # What is small is held for the second time; what is not is read again.
    held = list(read_parts(run, classified, layers)) if size < HELD else None
    rates = token_rates(run, held or read_parts(run, classified, layers), classified.n_words, len(layers))
    for part in held or read_parts(run, classified, layers):
        matched = Matched(part, design)
        matched.add_weight(weight)
        for place, (sums, rate) in enumerate(zip(found.values(), rates, strict=True)):
            sums.add(matched, place, rate, keep=keep)
    return Streamed(found, weight)
