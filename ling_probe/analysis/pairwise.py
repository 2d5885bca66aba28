"""Means over pairs of items when the problems that own the items are drawn anew, or labels are shuffled."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float32, Float64, Integer


def drawn_means(
    values: Float32[np.ndarray, "n n"],
    pairs: Bool[np.ndarray, "n n"],
    problem: Integer[np.ndarray, " n"],
    weights: Float64[np.ndarray, "D P"],
) -> Float64[np.ndarray, " D"]:
    """Mean over pairs when problems are drawn anew: a pair of problems weighs the product of their draws."""
    size = weights.shape[1]
    member = np.zeros((size, len(problem)), np.float32)
    member[problem, np.arange(len(problem))] = 1
    total, number = (member @ each @ member.T for each in (np.where(pairs, values, 0), pairs.astype(np.float32)))
    own = np.arange(size)
    # Pairs inside a problem come as often as the problem, not as its square.
    totals = np.einsum("dp,pq,dq->d", weights, total, weights, optimize=True)
    numbers = np.einsum("dp,pq,dq->d", weights, number, weights, optimize=True)
    totals -= ((weights**2 - weights) * total[own, own]).sum(axis=1)
    numbers -= ((weights**2 - weights) * number[own, own]).sum(axis=1)
    return totals / np.maximum(numbers, 1)


def shuffled_gaps(
    values: Float32[np.ndarray, "n n"], paired: Bool[np.ndarray, "n n"], shuffled: Integer[np.ndarray, "B n"]
) -> Iterator[float]:
    """Mean over pairs of one label minus that over pairs of two, for each shuffle; values are 0 where not paired."""
    number, labels = paired.astype(np.float32), int(shuffled.max()) + 1
    sums, pairs = float(values.sum(dtype=float)), float(number.sum(dtype=float))
    for codes in shuffled:
        member = np.zeros((len(codes), labels), np.float32)
        member[np.arange(len(codes)), codes] = 1
        same, count = float((member * (values @ member)).sum(dtype=float)), float((member * (number @ member)).sum(dtype=float))
        yield same / max(count, 1.0) - (sums - same) / max(pairs - count, 1.0)
