"""Arrays in, arrays out: how evenly a router spreads its tokens over its experts.

Every function reduces the last axis, experts, and keeps the others. A row without tokens gives NaN, never a made-up zero.
Nothing here knows a run, a table or a figure; how sure a number is belongs to `stats`.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Integer, Real, UInt8

RARE = 0.1
"""An expert is rare below this part of the even share."""
_SIMULATED_TOKENS = 4096
"""Above this many tokens the floors shrink as one over the square root of the tokens; the error is under 4 %."""
_SIMULATED_VALUES = 2**25
"""Random numbers spent on a floor, shared among its repeats."""
_SLICE = 32_768
"""Choices compared at a time: what fits into a processor's cache."""


def load_share(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows E"]:
    """Share of all choices that went to each expert.

    >>> load_share(np.array([3, 1, 0, 0]))
    array([0.75, 0.25, 0.  , 0.  ])
    """
    total = counts.sum(axis=-1, keepdims=True).astype(float)
    return counts / np.where(total > 0, total, np.nan)


def log2_load_ratio(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows E"]:
    """Load over the even share, in log2; half a choice is added to both so that an unused expert stays finite.

    >>> log2_load_ratio(np.array([10, 10])).tolist()
    [0.0, 0.0]
    """
    total = counts.sum(axis=-1, keepdims=True).astype(float)
    even = np.where(total > 0, total, np.nan) / counts.shape[-1]
    return np.log2((counts + 0.5) / (even + 0.5))


def load_entropy(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    """Entropy of the load as a fraction of its maximum, log E: 1 is perfectly even, 0 is one expert taking every token.

    >>> load_entropy(np.array([[1, 1, 1, 1], [4, 0, 0, 0]]))
    array([1., 0.])
    """
    return _entropy(counts) / np.log(counts.shape[-1])


def effective_experts(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    """Number of evenly used experts with the same entropy, exp H; between 1 and E.

    >>> effective_experts(np.array([5, 5, 0, 0])).round(6)
    np.float64(2.0)
    """
    return np.exp(_entropy(counts))


def gini(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    """Gini coefficient of the load: 0 is perfectly even, 1 - 1/E is one expert taking every token.

    >>> gini(np.array([[2, 2, 2, 2], [8, 0, 0, 0]]))
    array([0.  , 0.75])
    """
    n = counts.shape[-1]
    rank = 2 * np.arange(1, n + 1) - n - 1
    return (np.sort(load_share(counts), axis=-1) * rank).sum(axis=-1) / n


def max_vio(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    """Maximal violation of balance: the highest load over the even share, minus 1 (Wang et al. 2024, arXiv 2408.15664).

    >>> max_vio(np.array([3, 1, 0, 0]))
    np.float64(2.0)
    """
    return load_share(counts).max(axis=-1) * counts.shape[-1] - 1


def balancedness(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    """Mean load over the largest: 1 is perfectly even, 1/E is one expert taking every token.

    >>> balancedness(np.array([3, 1, 0, 0])).round(6)
    np.float64(0.333333)
    """
    return 1 / (max_vio(counts) + 1)


def load_variation(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    """Coefficient of variation of the load: standard deviation over the experts divided by their mean.

    >>> load_variation(np.array([4, 0]))
    np.float64(1.0)
    """
    return load_share(counts).std(axis=-1) * counts.shape[-1]


def dead_experts(counts: Real[np.ndarray, "*rows E"]) -> Integer[np.ndarray, "*rows"]:
    """How many experts were never chosen.

    >>> dead_experts(np.array([[3, 1, 0, 0], [1, 1, 1, 1]]))
    array([2, 0])
    """
    return (counts == 0).sum(axis=-1)


def rare_experts(counts: Real[np.ndarray, "*rows E"]) -> Integer[np.ndarray, "*rows"]:
    """How many experts were chosen less than a tenth as often as the even share; dead ones are among them.

    >>> rare_experts(np.array([50, 48, 2, 0]))
    np.int64(2)
    """
    return (counts < RARE * counts.mean(axis=-1, keepdims=True)).sum(axis=-1)


def _entropy(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    share = load_share(counts)
    return 0.0 - (share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)


def experts_needed(counts: Real[np.ndarray, "*rows E"], share: float) -> Float64[np.ndarray, "*rows"]:
    """How many experts, the most loaded first, hold a share of the load; between two numbers, in proportion.

    >>> experts_needed(np.array([[5, 3, 2, 0], [1, 1, 1, 1]]), 0.8)
    array([2. , 3.2])
    """
    load = np.sort(load_share(counts), axis=-1)[..., ::-1]
    held = load.cumsum(axis=-1)
    # Sums that fall short of the share by rounding alone hold it.
    whole = (held < share - 1e-12).sum(axis=-1, keepdims=True)
    before = np.take_along_axis(np.concatenate([np.zeros_like(held[..., :1]), held], axis=-1), whole, axis=-1)
    last = np.take_along_axis(load, np.minimum(whole, load.shape[-1] - 1), axis=-1)
    return (whole + (share - before) / last)[..., 0]


def lorenz_curve(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows E"]:
    """Share of the load that the least loaded 1, 2, ... E experts have together.

    >>> lorenz_curve(np.array([5, 0, 3, 2]))
    array([0. , 0.2, 0.5, 1. ])
    """
    return np.sort(load_share(counts), axis=-1).cumsum(axis=-1)


def busy_share(counts: Real[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    """Share of the load that the busier half of the experts has; of an odd number, the one in the middle counts half.

    >>> busy_share(np.array([[5, 0, 3, 2], [1, 1, 1, 1]]))
    array([0.8, 0.5])
    """
    share, n = np.sort(load_share(counts), axis=-1), counts.shape[-1]
    return share[..., (n + 1) // 2 :].sum(axis=-1) + (share[..., n // 2] / 2 if n % 2 else 0.0)


class BalanceFloor(NamedTuple):
    """What sampling noise alone makes of a router with no preference at all."""

    gini: float
    max_vio: float
    entropy: float


def balance_floor(
    n_experts: int, top_k: int, tokens: int, *, n_groups: int = 1, topk_groups: int = 1, seed: int = 0
) -> BalanceFloor:
    """Mean Gini, MaxVio and entropy of a perfectly balanced router after so many tokens: a load no less even shows nothing.

    Choice scores are drawn independently and evenly and pass through the group-limited choice. Tokens are independent here;
    real ones cluster, so the floor of a real run lies somewhat higher. No tokens give NaN. Takes a second at 256 experts.
    """
    if tokens == 0:
        return BalanceFloor(np.nan, np.nan, np.nan)
    counts = balanced_loads(n_experts, top_k, tokens, n_groups=n_groups, topk_groups=topk_groups, seed=seed)
    return BalanceFloor(float(gini(counts).mean()), float(max_vio(counts).mean()), float(load_entropy(counts).mean()))


def balanced_loads(
    n_experts: int, top_k: int, tokens: int, *, n_groups: int = 1, topk_groups: int = 1, seed: int = 0
) -> Float64[np.ndarray, "repeats E"]:
    """Loads of several perfectly balanced routers after so many tokens, each summing to 1."""
    simulated = min(tokens, _SIMULATED_TOKENS)
    counts = _balanced_routers(n_experts, top_k, simulated, n_groups, topk_groups, seed)
    return 1 / n_experts + (load_share(counts) - 1 / n_experts) * np.sqrt(simulated / tokens)


@lru_cache(maxsize=64)
def _balanced_routers(
    n_experts: int, top_k: int, tokens: int, n_groups: int, topk_groups: int, seed: int
) -> Integer[np.ndarray, "repeats E"]:
    rng = np.random.default_rng(seed)
    repeats = int(np.clip(_SIMULATED_VALUES // (tokens * n_experts), 4, 400))
    return np.stack([_balanced_counts(rng, tokens, n_experts, top_k, n_groups, topk_groups) for _ in range(repeats)])


def _balanced_counts(
    rng: np.random.Generator, tokens: int, n_experts: int, top_k: int, n_groups: int, topk_groups: int
) -> Integer[np.ndarray, " E"]:
    score = rng.random((tokens, n_groups, n_experts // n_groups), dtype=np.float32)
    if topk_groups < n_groups:
        score[~_best(np.partition(score, -2, axis=-1)[..., -2:].sum(axis=-1), topk_groups)] = -1
    return _best(score.reshape(tokens, n_experts), top_k).sum(axis=0)


def _best(score: Real[np.ndarray, "T N"], k: int) -> Bool[np.ndarray, "T N"]:
    chosen = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(chosen, np.argpartition(score, -k, axis=-1)[:, -k:], values=True, axis=-1)
    return chosen


def overlap(one: Integer[np.ndarray, "*rows K"], other: Integer[np.ndarray, "*rows K"]) -> UInt8[np.ndarray, "*rows"]:
    """How many experts two choices have in common; slots do not matter.

    >>> overlap(np.array([[3, 1, 2]]), np.array([[1, 4, 3]]))
    array([2], dtype=uint8)
    """
    k, rows = one.shape[-1], one.shape[:-1]
    ones, others = one.reshape(-1, k), other.reshape(-1, k)
    found = np.zeros(len(ones), np.uint8)
    # One slot a row: comparing whole rows is many times as fast as reducing the short last axis.
    for start in range(0, len(ones), _SLICE):
        here, there = (np.ascontiguousarray(each[start : start + _SLICE].T) for each in (ones, others))
        for slot in here:
            for match in there:
                found[start : start + _SLICE] += slot == match
    return found.reshape(rows)


def jensen_shannon(one: Float64[np.ndarray, "*rows E"], other: Float64[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    """Jensen-Shannon divergence of two loads in bits: 0 is the same load, 1 is no expert in common.

    >>> jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    np.float64(1.0)
    """
    middle = (one + other) / 2
    return np.maximum(_bits(middle) - (_bits(one) + _bits(other)) / 2, 0.0)


def _bits(share: Float64[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    return 0.0 - (share * np.log2(np.where(share > 0, share, 1.0))).sum(axis=-1)
