"""Choices beyond those expected, and what two halves of a sample agree on: information without the bias of noise.

Squared noise never cancels, so a plug-in information is too high, the more so the more experts and groups. The product of the
noise of two independent halves does cancel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Float64, Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.sample import TokenSample, indicator, numbered, resampled_interval


def deviations(
    sample: TokenSample, layer: int, classes: Integer[np.ndarray, " N"], owner: Integer[np.ndarray, " N"], n_owners: int
) -> Float64[np.ndarray, "O E"]:
    """Choices by the tokens of each owner beyond those expected of their classes, over an expert's standard deviation.

    Divided by sqrt(2 ln 2 p (1 - p)), so that a product over tokens squared is in bits. Tokens alone in their class deviate
    from nothing and are left out.

    Args:
        sample: The tokens.
        layer: Place in its `layers`.
        classes: What is expected of a token is the mean of its class.
        owner: Of each token; -1 is none, though it counts for its class.
        n_owners: How many.
    """
    size = np.bincount(classes)
    company = size[classes] > 1
    kept = company & (owner >= 0)
    number = (np.cumsum(size > 1) - 1)[classes]
    rates = sample.counts(layer, number, int((size > 1).sum()), company) / size[size > 1, None]
    held = sparse.csr_array((np.ones(int(kept.sum())), (owner[kept], number[kept])), shape=(n_owners, len(rates)))
    chosen = sample.counts(layer, np.zeros(sample.n_tokens, dtype=np.int64), 1)[0] / sample.n_tokens
    spread = np.clip(chosen, 0.5 / sample.n_tokens, 1 - 0.5 / sample.n_tokens)
    return (sample.counts(layer, owner, n_owners, kept) - held @ rates) / np.sqrt(2 * np.log(2) * spread * (1 - spread))


def half_weights(
    group: Integer[np.ndarray, " O"], length: Float64[np.ndarray, " O"], half: Bool[np.ndarray, " O"], n_groups: int
) -> Float64[np.ndarray, "2 C"]:
    """Square root of a group's share of tokens, over its tokens in each half; 0 for a group that a half does not have."""
    tokens = np.array([np.bincount(group, weights=length * mine, minlength=n_groups) for mine in (half, ~half)])
    share = np.where((tokens > 0).all(axis=0), tokens.sum(axis=0) / length.sum(), 0.0)
    return np.sqrt(share) / np.maximum(tokens, 1)


@dataclass(frozen=True, eq=False)
class Labelling:
    """Units with a label each, in two halves of whole sequences, and the same with labels shuffled."""

    about: str
    codes: Integer[np.ndarray, "P U"]
    """Label of each unit, as it is and then shuffled."""
    centre: Integer[np.ndarray, " U"]
    """Units whose common deviation is taken out."""
    length: Float64[np.ndarray, " U"]
    """Tokens of each unit."""
    half: Bool[np.ndarray, " U"]
    bundle: Integer[np.ndarray, " U"]
    """Of sequences, numbered in each half."""

    @cached_property
    def n_codes(self) -> int:
        """Labels there are."""
        return int(self.codes.max()) + 1

    def centred(self, values: Float64[np.ndarray, "U E"]) -> Float64[np.ndarray, "U E"]:
        """Deviations less the share that each unit has, by its tokens, in those of all units of its centre and half."""
        block = numbered(self.centre, self.half)
        sums = indicator(block, int(block.max()) + 1)
        return values - (sums @ values / (sums @ self.length)[:, None])[block] * self.length[:, None]

    def pairs(self, values: Float64[np.ndarray, "U E"]) -> Float64[np.ndarray, "B B"]:
        """Bits that each bundle of one half and each of the other agree on; they add up to the information."""
        codes, n_bundles = self.codes[0], int(self.bundle.max()) + 1
        sides = [
            indicator(np.where(mine, self.bundle * self.n_codes + codes, -1), n_bundles * self.n_codes) @ values
            for mine in (self.half, ~self.half)
        ]
        one, other = (
            (effects @ side.reshape(n_bundles, self.n_codes, -1)).reshape(n_bundles, -1)
            for effects, side in zip(self._effects(codes), sides, strict=True)
        )
        return one @ other.T

    def by_shuffle(self, values: Float64[np.ndarray, "U E"]) -> Float64[np.ndarray, " P"]:
        """Information under each labelling, the first as it is."""
        one, other = (
            sides @ values[mine].astype(np.float32) for sides, mine in zip(self._sides, (self.half, ~self.half), strict=True)
        )
        return (one * other).sum(axis=1, dtype=float).reshape(len(self.codes), -1).sum(axis=1)

    @cached_property
    def _sides(self) -> Sequence[Float32[np.ndarray, "PC H"]]:
        effects = np.stack([self._effects(each) for each in self.codes]).astype(np.float32)
        return [
            np.stack([per[side][:, each[mine]] for per, each in zip(effects, self.codes, strict=True)]).reshape(
                -1, int(mine.sum())
            )
            for side, mine in enumerate((self.half, ~self.half))
        ]

    def _effects(self, codes: Integer[np.ndarray, " U"]) -> Float64[np.ndarray, "2 C C"]:
        """What makes effects of labels out of their summed deviations in each half, times the root of the label's share.

        Least squares of labels beside the centres: without it an effect would shrink with the part that a unit has in its
        centre. What varies between centres alone (labels of two families) has no effect.
        """
        shares = half_weights(codes, self.length, self.half, self.n_codes)
        solved = []
        for mine, root in zip((self.half, ~self.half), shares, strict=True):
            tokens = np.zeros((int(self.centre.max()) + 1, self.n_codes))
            np.add.at(tokens, (self.centre[mine], codes[mine]), self.length[mine])
            tokens = tokens[tokens.any(axis=1)]
            per_label = np.maximum(tokens.sum(axis=0), 1e-9)
            within = np.diag(per_label) - tokens.T @ (tokens / tokens.sum(axis=1, keepdims=True))
            scale = 1 / np.sqrt(per_label)
            # Roots of shares over tokens, as for a single centre, and then the labels' overlap within centres.
            solved.append(
                (root * per_label * scale)[:, None] * np.linalg.pinv(within * scale[:, None] * scale, 0.01, True) * scale
            )
        return np.stack(solved)


def token_pairs(
    sample: TokenSample,
    layer: int,
    classes: Integer[np.ndarray, " N"],
    group: Integer[np.ndarray, " N"],
    half: Bool[np.ndarray, " N"],
    bundle: Integer[np.ndarray, " N"],
) -> Float64[np.ndarray, "B B"]:
    """As `Labelling.pairs`, for groups of single tokens; -1 is of none and tells nothing."""
    n_groups, n_bundles, kept = int(group.max()) + 1, int(bundle.max()) + 1, group >= 0
    if not n_groups:
        return np.zeros((n_bundles, n_bundles))
    weights = half_weights(group[kept], np.full(int(kept.sum()), 1.0), half[kept], n_groups) * np.sqrt(kept.mean())
    sides = []
    for weight, mine in zip(weights, (half, ~half), strict=True):
        owner = np.where(mine & kept, bundle * n_groups + group, -1)
        values = deviations(sample, layer, classes, owner, n_bundles * n_groups).reshape(n_bundles, n_groups, -1)
        sides.append((values * weight[:, None]).reshape(n_bundles, -1).astype(np.float32))
    return (sides[0] @ sides[1].T).astype(float)


def bundle_interval(
    pairs: Float64[np.ndarray, "M B B"], *, draws: int, seed: int
) -> tuple[Float64[np.ndarray, " L"], Float64[np.ndarray, " L"]]:
    """Interval of the sum over pairs of bundles, for each layer and then for the mean over layers."""
    one, other = (stats.bootstrap_weights(pairs.shape[1], draws=draws, seed=seed + side) for side in (0, 1))
    return _with_mean(np.stack([((one @ each) * other).sum(axis=1) for each in pairs]), pairs.shape[1])


def diagonal_interval(
    values: Float64[np.ndarray, "M B"], *, draws: int, seed: int
) -> tuple[Float64[np.ndarray, " L"], Float64[np.ndarray, " L"]]:
    """As `bundle_interval`, where every bundle stands in both halves and agrees with itself alone."""
    return _with_mean(values @ stats.bootstrap_weights(values.shape[1], draws=draws, seed=seed).T, values.shape[1])


def _with_mean(
    replicates: Float64[np.ndarray, "M D"], n_units: int
) -> tuple[Float64[np.ndarray, " L"], Float64[np.ndarray, " L"]]:
    return resampled_interval(np.concatenate([replicates, replicates.mean(axis=0, keepdims=True)]).T, n_units)
