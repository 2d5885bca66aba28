"""Two loads of one layer that come in matched units, and whether they differ.

A unit is a bundle of sequences, seen under both conditions (two runs, or prompt and completion) or, where nothing is matched,
under one. If the condition made no difference, the two sides of a unit could be exchanged: its part of the difference would as
often have the other sign. So p values and what chance makes of a divergence come from random signs.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Integer, Real

from ling_probe import metrics, stats
from ling_probe.analysis.counting import Owner
from ling_probe.run import Run

FLIPS = 9999
"""Sign flips of a test; no p is below 1 in 10,000."""
_NULL_DIVERGENCES = 499


@dataclass(frozen=True, eq=False)
class LoadContrast:
    """Choices by unit and expert, or weighted ones, under two conditions."""

    one: Real[np.ndarray, "U E"]
    other: Real[np.ndarray, "U E"]

    @property
    def shares(self) -> Float64[np.ndarray, "2 E"]:
        """Load under either condition."""
        return metrics.load_share(np.stack([self.one.sum(axis=0), self.other.sum(axis=0)]))

    @property
    def differences(self) -> Float64[np.ndarray, "U E"]:
        """What each unit adds to the difference of the two loads, net of its size; they sum to it."""
        middle = self.shares.mean(axis=0)
        one, other = ((side - side.sum(axis=1, keepdims=True) * middle) / side.sum() for side in (self.one, self.other))
        return one - other

    def p(self, *, flips: int = FLIPS, seed: int = 0) -> Float64[np.ndarray, " E"]:
        """Two-sided p of each expert's difference by sign flips; NaN where nobody chose it."""
        p = stats.permutation_p(stats.count_flipped(self.differences, draws=flips, seed=seed), flips)
        return np.where(self.one.sum(axis=0) + self.other.sum(axis=0) > 0, p, np.nan)

    def log2_ratio(self, weights: Float64[np.ndarray, "B U"]) -> Float64[np.ndarray, "B E"]:
        """Load of the first over that of the second, half a choice added to each, in samples of the units."""
        one, other = weights @ self.one, weights @ self.other
        n_one, n_other = one.sum(axis=1, keepdims=True), other.sum(axis=1, keepdims=True)
        return np.log2((one + 0.5) / (n_one + 0.5)) - np.log2((other + 0.5) / (n_other + 0.5))

    def divergence(self, weights: Float64[np.ndarray, "B U"], *, seed: int = 0) -> "Divergence":
        """Jensen-Shannon divergence of the two loads, its bias taken out."""
        drawn = metrics.jensen_shannon(*(metrics.load_share(weights @ side) for side in (self.one, self.other)))
        raw = float(metrics.jensen_shannon(*self.shares))
        null, centred = self._null(self.differences, seed), self._null(_centred(self.differences), seed)
        bias = float(centred.mean())
        low, high = (float(bound) for bound in stats.percentile_interval(drawn - drawn.mean() + raw - bias))
        p = float(stats.permutation_p(np.array((null >= raw * (1 - 1e-6)).sum()), len(null)))
        return Divergence(raw=raw, bias=bias, ci_low=low, ci_high=high, p=p)

    def _null(self, differences: Float64[np.ndarray, "U E"], seed: int) -> Float64[np.ndarray, " B"]:
        middle = self.shares.mean(axis=0)
        drawn = [
            _apart(middle, signs @ differences)
            for signs in stats.random_signs(len(differences), draws=_NULL_DIVERGENCES, seed=seed)
        ]
        return np.concatenate(drawn)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Jensen-Shannon divergence of two loads, in bits."""

    raw: float
    bias: float
    """What so few units make of no difference at all."""
    ci_low: float
    """95 % interval of `net`."""
    ci_high: float
    p: float

    @property
    def net(self) -> float:
        """Without the bias; may be below 0."""
        return self.raw - self.bias


def _centred(differences: Float64[np.ndarray, "U E"]) -> Float64[np.ndarray, "U E"]:
    return differences - differences.mean(axis=0)


def _apart(middle: Float64[np.ndarray, " E"], difference: Float64[np.ndarray, "B E"]) -> Float64[np.ndarray, " B"]:
    """Divergence of two loads that lie so far apart about a middle."""
    sides = (np.maximum(middle + sign * difference / 2, 0.0) for sign in (1, -1))
    return metrics.jensen_shannon(*(metrics.load_share(side) for side in sides))


def count_layers(run: Run, owner: Owner, n_owners: int) -> Integer[np.ndarray, "M O E"]:
    """How often the tokens of each owner chose each expert of every layer; for few owners, as all layers are held."""
    counts = np.zeros((run.spec.n_rows, n_owners * run.spec.n_experts), dtype=np.int64)
    for batch in run.batches():
        owners = owner(batch)
        kept = owners >= 0
        first = (owners[kept] * run.spec.n_experts).astype(np.int64)[:, None]
        for row, total in enumerate(counts):
            total += np.bincount((first + batch.expert_ids[kept, row]).ravel(), minlength=len(total))
    return counts.reshape(run.spec.n_rows, n_owners, run.spec.n_experts)
