"""Totals by bundle of sequences, in one pass over a run: what means and intervals of every layer are made of.

Sequences are dealt to bundles (`stats.bundles`) inside their family, and bundles are resampled inside their family. Memory
holds bundles by classes, whatever the length of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer, Real
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.classified import REASONING
from ling_probe.analysis.counting import require_sequences, segment_mask
from ling_probe.run import Run, TokenBatch

BUNDLES = 400
"""Most bundles of a run; each family has its part of them."""


@dataclass(frozen=True)
class Bundles:
    """Bundles of sequences, each inside one family."""

    of_sequence: Integer[np.ndarray, " S"]
    """Bundle of each sequence."""
    family: Integer[np.ndarray, " U"]
    """Family of each bundle, an index into `families`."""
    families: tuple[str, ...]
    n_sequences: Integer[np.ndarray, " F"]
    """Sequences of each family."""

    @classmethod
    def of(cls, run: Run, *, most: int = BUNDLES, seed: int = 0) -> "Bundles":
        """Deal the sequences of a run.

        Raises:
            UsageError: The run has none.
        """
        require_sequences(run)
        names, codes = np.unique(run.sequences["family"].to_numpy(dtype=str), return_inverse=True)
        of_sequence = np.empty(len(codes), dtype=np.int64)
        family: list[int] = []
        for code in range(len(names)):
            mine = np.flatnonzero(codes == code)
            dealt = stats.bundles(len(mine), most=max(2, most // len(names)), seed=seed)
            of_sequence[mine] = dealt + len(family)
            family += [code] * (dealt.max() + 1)
        return cls(of_sequence, np.array(family), tuple(map(str, names)), np.bincount(codes))

    def weights(self, *, draws: int, seed: int) -> Float64[np.ndarray, "B U"]:
        """How often each bundle is drawn in each bootstrap sample; every family keeps its number of bundles."""
        weights = np.empty((draws, len(self.family)))
        for code in range(len(self.families)):
            mine = self.family == code
            weights[:, mine] = stats.bootstrap_weights(int(mine.sum()), draws=draws, seed=seed + code)
        return weights

    def parts(self) -> list[tuple[str, int, Bool[np.ndarray, " U"]]]:
        """All sequences ("all"), then those of each family where there are several: name, sequences, and whose bundles."""
        whole = ("all", int(self.n_sequences.sum()), np.ones(len(self.family), dtype=bool))
        each = [(name, int(self.n_sequences[code]), self.family == code) for code, name in enumerate(self.families)]
        return [whole, *(each if len(each) > 1 else [])]


@dataclass(frozen=True)
class Totals:
    """What the experts of every routed layer did."""

    counts: Float64[np.ndarray, "U M E"]
    """Choices by owner of the sequence."""
    weights: Float64[np.ndarray, "M E"]
    """Routing weight over all owners; zeros unless asked for."""


def count_layers(
    run: Run, of_sequence: Integer[np.ndarray, " S"], *, segments: Sequence[str] | None = None, weights: bool = False
) -> Totals:
    """Choices of every expert of every routed layer by owner of the sequence, and with `weights` the weight each received."""
    spec, n_owners = run.spec, int(of_sequence.max()) + 1
    counts = np.zeros((spec.n_rows, n_owners * spec.n_experts))
    received = np.zeros((spec.n_rows, spec.n_experts))
    for batch in run.batches(weights=weights):
        counted = None if segments is None else np.flatnonzero(segment_mask(batch, segments))
        base = _some(of_sequence[batch.sequence] * spec.n_experts, counted)[:, None]
        for row in range(spec.n_rows):
            ids = _some(batch.expert_ids[:, row], counted)
            counts[row] += np.bincount((base + ids).ravel(), minlength=counts.shape[1])
            if batch.weights is not None:
                each = _some(batch.weights[:, row], counted)
                received[row] += np.bincount(ids.ravel(), weights=each.ravel(), minlength=spec.n_experts)
    return Totals(counts.reshape(spec.n_rows, n_owners, spec.n_experts).swapaxes(0, 1), received)


def _some(values: np.ndarray, rows: Integer[np.ndarray, " n"] | None) -> np.ndarray:
    return values if rows is None else values[rows]


@dataclass(frozen=True)
class Means:
    """Means of some measures over the tokens of each class, with bootstrap intervals over bundles."""

    classes: pd.DataFrame
    """`kind` ("all", "family" or "label"), `name`, `tokens` and `sequences` of each class."""
    value: Float64[np.ndarray, "C P"]
    low: Float64[np.ndarray, "C P"]
    high: Float64[np.ndarray, "C P"]

    def table(self, place: int) -> pd.DataFrame:
        """A row a class: the classes' columns, `value`, `ci_low` and `ci_high` of one measure."""
        return self.classes.assign(value=self.value[:, place], ci_low=self.low[:, place], ci_high=self.high[:, place])


@dataclass(frozen=True)
class Cells:
    """Every token by bundle of its sequence and label of its step; families and labels are unions of cells."""

    bundles: Bundles
    labels: tuple[str, ...]
    label: Integer[np.ndarray, " O"]
    """Label of each step, an index into `labels`."""
    sequence: Integer[np.ndarray, " O"]
    first: Integer[np.ndarray, " S"]
    """First step of each sequence."""

    @classmethod
    def of(cls, run: Run, *, most: int = BUNDLES, seed: int = 0) -> "Cells":
        """The cells of a run, of at most so many bundles and fewer where there are many labels.

        Raises:
            UsageError: The run has no sequences.
        """
        steps = run.steps
        labels, label = np.unique(steps["label"].to_numpy(dtype=str), return_inverse=True)
        sequence = steps["sequence"].to_numpy()
        first = np.searchsorted(sequence, np.arange(len(run.sequences)))
        most = min(most, max(40, 20_000 // (len(labels) + 1)))
        return cls(Bundles.of(run, most=most, seed=seed), tuple(map(str, labels)), label, sequence, first)

    @property
    def size(self) -> int:
        """How many cells there are."""
        return len(self.bundles.family) * (len(self.labels) + 1)

    def zeros(self, n_values: int) -> Float64[np.ndarray, "cells P1"]:
        """Where `totals` of so many values add up."""
        return np.zeros((self.size, n_values + 1))

    def of_tokens(self, batch: TokenBatch) -> Integer[np.ndarray, " N"]:
        """Cell of each token; the last label of a bundle is none."""
        label = np.full(len(batch.step), len(self.labels))
        inside = (batch.step >= 0) & segment_mask(batch, REASONING)
        label[inside] = self.label[self.first[batch.sequence[inside]] + batch.step[inside]]
        return self.bundles.of_sequence[batch.sequence] * (len(self.labels) + 1) + label

    def totals(
        self, batch: TokenBatch, values: Real[np.ndarray, "N P"], counted: Bool[np.ndarray, " N"] | None = None
    ) -> Float64[np.ndarray, "cells P1"]:
        """Sums of values over the tokens of each cell, and in the last column how many there are."""
        cells = self.of_tokens(batch)
        kept = np.ones(len(cells), dtype=np.float32) if counted is None else counted.astype(np.float32)
        sums = sparse.csr_array((kept, (cells, np.arange(len(cells)))), shape=(self.size, len(cells))) @ values
        return np.column_stack([sums, np.bincount(cells, weights=kept, minlength=self.size)])

    def means(self, totals: Float64[np.ndarray, "cells P1"], *, draws: int, seed: int) -> Means:
        """Means of each class that has tokens, from totals as `totals` gives them."""
        classes, parts = self._classes(totals)
        weights = self.bundles.weights(draws=draws, seed=seed)
        value, low, high = [], [], []
        for part in parts:
            total = part.sum(axis=0)
            value.append(total[:-1] / total[-1])
            drawn = weights @ part
            held = drawn[:, -1] > 0
            sure = np.count_nonzero(part[:, -1]) > 1
            bounds = stats.percentile_interval(drawn[held, :-1] / drawn[held, -1:])
            low.append(bounds[0] if sure else np.full(len(total) - 1, np.nan))
            high.append(bounds[1] if sure else np.full(len(total) - 1, np.nan))
        return Means(classes, np.array(value), np.array(low), np.array(high))

    def _classes(self, totals: Float64[np.ndarray, "cells P1"]) -> tuple[pd.DataFrame, list[Float64[np.ndarray, "U P1"]]]:
        by_label = totals.reshape(len(self.bundles.family), len(self.labels) + 1, -1)
        whole = by_label.sum(axis=1)
        holding = [len(np.unique(self.sequence[self.label == code])) for code in range(len(self.labels))]
        parts = self.bundles.parts()
        found = [("family" if place else "all", name, n, whole * mine[:, None]) for place, (name, n, mine) in enumerate(parts)]
        found += [("label", name, holding[code], by_label[:, code]) for code, name in enumerate(self.labels)]
        found = [each for each in found if each[3][:, -1].any()]
        table = pd.DataFrame({"kind": [each[0] for each in found], "name": [each[1] for each in found]})
        table["tokens"] = [int(each[3][:, -1].sum()) for each in found]
        table["sequences"] = [int(each[2]) for each in found]
        return table, [each[3] for each in found]
