"""The Ling 2.0 routing rule in NumPy: the yardstick that models are tested against, not a way to run them.

    1  logits   z = x W^T, operands in float32
    2  scores   s = sigmoid(z)
    3  choice   c = s + bias, used to choose only
    4  groups   score of a group = sum of its two largest c; the best `topk_groups` stay
    5  ids      the K largest c in those groups, best first
    6  weights  s of the chosen, divided by their sum, times the scale

Every function works on any number of leading axes. Sums are in float64: what differs from a model is the model's rounding.
Source: the published modeling code of BailingMoeV2.

What the rule says about a choice: `reasons` tells why each chosen expert was, `margin` how near the choice was to another,
`flip_distance` what it takes to bring an expert in or drive it out.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Float, Float64, Int8, Integer

from ling_probe.spec import ModelSpec

Choice = Float[np.ndarray, "*batch E"]
"""Logits, scores or choice scores of every expert."""
Bias = Float[np.ndarray, "*#batch E"]
"""Per-expert offset; [E], or [M E] against [T M E]."""
ExpertIds = Integer[np.ndarray, "*batch K"]
Weights = Float[np.ndarray, "*batch K"]


@dataclass(frozen=True, eq=False)
class Routing:
    """What the rule chooses."""

    ids: ExpertIds
    """Best choice score first."""
    weights: Weights
    """Aligned with `ids`."""


@dataclass(frozen=True, kw_only=True)
class RoutingDifference:
    """How a model's recorded choices compare with the rule's."""

    choices: int
    """Choices compared: one a token and layer."""
    differ: int
    """Choices that the rule does not give, near ties not counted."""
    near_ties: int
    """Choices of another set that the rule would give had the scores been off by the tolerance."""
    max_weight_error: float
    """Largest absolute difference of a weight, over the choices that do not differ; 0 if there are none."""


def router_logits(inputs: Float[np.ndarray, "*batch D"], weight: Float[np.ndarray, "E D"]) -> Float64[np.ndarray, "*batch E"]:
    """Router logits of the residual stream after its norm; operands are rounded to float32 first, as the model's are."""
    return inputs.astype(np.float32).astype(np.float64) @ weight.astype(np.float32).astype(np.float64).T


def scores(logits: Choice) -> Choice:
    """Sigmoid of the logits, without overflow at either end.

    >>> scores(np.array([0.0, -1000.0, 1000.0]))
    array([0.5, 0. , 1. ])
    """
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def choice_scores(scores: Choice, bias: Bias) -> Choice:
    """Scores plus the per-expert offset; what experts are chosen by, never what they are weighted by."""
    return scores.astype(np.float64) + bias


def kept_groups(choice: Choice, spec: ModelSpec) -> Bool[np.ndarray, "*batch G"]:
    """The `topk_groups` groups with the largest sum of their two best choice scores; ties go to the lower group."""
    if spec.n_groups == 1:
        return np.ones((*choice.shape[:-1], 1), bool)
    score = _group_scores(choice, spec)
    kept = np.zeros(score.shape, bool)
    np.put_along_axis(kept, _largest(score, spec.topk_groups), values=True, axis=-1)
    return kept


def choose(choice: Choice, spec: ModelSpec) -> ExpertIds:
    """Ids of the K best experts of the kept groups, best first; ties go to the lower id."""
    allowed = np.repeat(kept_groups(choice, spec), spec.group_size, axis=-1)
    return _largest(np.where(allowed, choice, -np.inf), spec.top_k).astype(spec.id_dtype)


def chosen_weights(scores: Choice, ids: ExpertIds, spec: ModelSpec, eps: float = 1e-20) -> Weights:
    """Unbiased scores of the chosen, divided by their sum plus `eps`, times the scale."""
    chosen = np.take_along_axis(scores, ids.astype(np.int64), axis=-1)
    return chosen / (chosen.sum(axis=-1, keepdims=True) + eps) * spec.scale


def route(logits: Choice, bias: Bias, spec: ModelSpec) -> Routing:
    """The rule from logits on."""
    score = scores(logits.astype(np.float64))
    ids = choose(choice_scores(score, bias), spec)
    return Routing(ids=ids, weights=chosen_weights(score, ids, spec))


def chosen(choice: Choice, spec: ModelSpec) -> Bool[np.ndarray, "*batch E"]:
    """Which experts `choose` chooses, as a mask: the same set in half the time, without their order."""
    allowed = choice
    if spec.n_groups > 1:
        allowed = np.where(np.repeat(kept_groups(choice, spec), spec.group_size, axis=-1), choice, -np.inf)
    least = np.partition(allowed, -spec.top_k, axis=-1)[..., -spec.top_k, None]
    above, ties = allowed > least, allowed == least
    room = spec.top_k - above.sum(axis=-1, keepdims=True)
    return above | (ties & (ties.cumsum(axis=-1) <= room))


class Reason(IntEnum):
    """Why a chosen expert was chosen: what it takes for it to be."""

    AFFINITY = 0
    """Neither: it is chosen without the bias, and it is chosen without the group limit."""
    BIAS = 1
    """The bias: from scores alone, groups limited as they are, it is not chosen."""
    GROUPS = 2
    """The group limit: without it, bias as it is, it is not chosen; a better expert of a group not kept stepped aside."""
    BOTH = 3
    """Both: it is chosen neither without the one nor without the other."""


def ungrouped(spec: ModelSpec) -> ModelSpec:
    """The same router without its group limit."""
    return replace(spec, n_groups=1, topk_groups=1)


def reasons(ids: ExpertIds, scores: Choice, bias: Bias, spec: ModelSpec) -> Int8[np.ndarray, "*batch K"]:
    """Why each chosen expert was chosen, as codes of `Reason`.

    With A(c, groups) the set that the rule chooses by c = s + bias, an expert of it needs the bias if it is not in A(s, groups)
    and the group limit if it is not in A(c, no groups). A token with B experts that need the bias has
    B = K - |A(c, groups) ∩ A(s, groups)|, and so for the groups.

    Args:
        ids: The chosen, A(c, groups); they are taken as they are.
        scores: Sigmoid of the logits.
        bias: The router's bias.
        spec: Its geometry.
    """
    places = ids.astype(np.int64)
    without_bias = np.take_along_axis(chosen(scores.astype(np.float64), spec), places, axis=-1)
    without_groups = np.take_along_axis(chosen(choice_scores(scores, bias), ungrouped(spec)), places, axis=-1)
    return (Reason.BIAS * ~without_bias + Reason.GROUPS * ~without_groups).astype(np.int8)


def margin(choice: Choice, spec: ModelSpec) -> Float64[np.ndarray, "*batch"]:
    """Choice score of the least chosen over that of the best not chosen, both in kept groups: c_(K) - c_(K+1).

    Infinite where the kept groups hold no more than K experts.
    """
    best = _two_around(_of_kept_groups(choice, spec), spec.top_k)
    return best[..., 1] - best[..., 0]


def flip_distance(choice: Choice, spec: ModelSpec) -> Float64[np.ndarray, "*batch E"]:
    """How far the choice score of each expert must move to change whether it is chosen, all others fixed; never negative.

    An expert that is not chosen enters just above

        c_(K)                       in a kept group: the least chosen
        max(S - a, t)               in another: S is the score of the last kept group, a the best of the others in the expert's
                                    own, so that a + c > S lets its group in, for the last; and t the K-th best of the other
                                    experts in the groups that are then kept

    A chosen expert leaves just below

        max(c_(K+1), S' - a)        S' is the score of the best group not kept, which takes the place of the expert's own;
                                    where the group stays without the expert's help, c_(K+1) alone

    Infinite where nothing brings it in or out. Costs one partition of the experts per group.
    """
    in_choice, distance = chosen(choice, spec), np.full(choice.shape, np.inf)
    kept = kept_groups(choice, spec)
    least = _two_around(_of_kept_groups(choice, spec), spec.top_k)
    inside = np.repeat(kept, spec.group_size, axis=-1)
    distance = np.where(inside, least[..., 1:] - choice, distance)
    leave_at = np.broadcast_to(least[..., :1], choice.shape)
    if spec.topk_groups < spec.n_groups:
        first, second = _best_others(choice, spec)
        score = _group_scores(choice, spec)
        last_kept = np.where(kept, score, np.inf).min(axis=-1, keepdims=True)
        best_out = np.where(kept, -np.inf, score).max(axis=-1, keepdims=True)
        enter_at = np.maximum(last_kept - first, _least_after_swap(choice, kept, score, spec))
        distance = np.where(inside, distance, enter_at - choice)
        leave_at = np.where(first + second < best_out, np.maximum(leave_at, best_out - first), leave_at)
    return np.maximum(np.where(in_choice, choice - leave_at, distance), 0.0)


def compare_routing(
    ids: ExpertIds, weights: Weights, logits: Choice, bias: Bias, spec: ModelSpec, *, tolerance: float = 1e-5
) -> RoutingDifference:
    """Compare a model's recorded choices with the rule's.

    A choice differs if its set of experts is not the rule's, its slots are not in order of choice score up to `tolerance`, or
    an id is no expert. Another set is a near tie instead if the rule gives it once the chosen are raised and all others lowered
    by `tolerance`. Weights are compared with those the rule gives the model's own experts.

    Args:
        ids: The model's experts in its slot order.
        weights: The model's weights, aligned with `ids`.
        logits: The model's router logits.
        bias: The model's bias.
        spec: The model's geometry.
        tolerance: In units of choice score.
    """
    score = scores(logits.astype(np.float64))
    choice = choice_scores(score, bias)
    exists = np.all((ids >= 0) & (ids < spec.n_experts), axis=-1, keepdims=True)
    safe = np.where(exists, ids, 0).astype(np.int64)
    same = _same_set(safe, choose(choice, spec))
    near = ~same & _same_set(safe, choose(_favour(choice, safe, tolerance), spec))
    agree = exists[..., 0] & _ordered(choice, safe, tolerance) & (same | near)
    error = np.abs(weights - chosen_weights(score, safe, spec))[agree]
    return RoutingDifference(
        choices=agree.size,
        differ=int((~agree).sum()),
        near_ties=int((near & agree).sum()),
        max_weight_error=float(error.max()) if error.size else 0.0,
    )


def _largest(values: Float[np.ndarray, "*batch N"], count: int) -> Integer[np.ndarray, "*batch n"]:
    """Places of the largest values, largest first; a stable sort gives ties to the lower place."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :count]


def _group_scores(choice: Choice, spec: ModelSpec) -> Float[np.ndarray, "*batch G"]:
    grouped = choice.reshape(*choice.shape[:-1], spec.n_groups, spec.group_size)
    return np.partition(grouped, -2, axis=-1)[..., -2:].sum(axis=-1)


def _of_kept_groups(choice: Choice, spec: ModelSpec) -> Choice:
    """Choice scores of the experts that may be chosen, -inf of the others."""
    return np.where(np.repeat(kept_groups(choice, spec), spec.group_size, axis=-1), choice, -np.inf)


def _two_around(allowed: Choice, count: int) -> Float[np.ndarray, "*batch 2"]:
    """The next best after `count` experts, -inf if there is none, and the last of them."""
    padded = np.concatenate([np.full((*allowed.shape[:-1], 1), -np.inf), allowed], axis=-1)
    return np.partition(padded, (-count - 1, -count), axis=-1)[..., -count - 1 : padded.shape[-1] - count + 1]


def _best_others(choice: Choice, spec: ModelSpec) -> tuple[Choice, Choice]:
    """For each expert the best and the second best of the others in its group; -inf where there is no second."""
    grouped = choice.reshape(*choice.shape[:-1], spec.n_groups, spec.group_size)
    padded = np.concatenate([np.full((*grouped.shape[:-1], 1), -np.inf), grouped], axis=-1)
    third, second, first = np.moveaxis(np.sort(padded, axis=-1)[..., -3:, None], -2, 0)
    best = np.where(grouped >= first, second, first)
    return best.reshape(choice.shape), np.where(grouped >= second, third, second).reshape(choice.shape)


def _least_after_swap(
    choice: Choice, kept: Bool[np.ndarray, "*batch G"], score: Float[np.ndarray, "*batch G"], spec: ModelSpec
) -> Choice:
    """For each expert the K-th best of the others, once its group is kept in place of the last kept one."""
    last = np.where(kept, score, np.inf)
    # Of kept groups with the same score the higher goes first.
    place = spec.n_groups - 1 - np.argmin(last[..., ::-1], axis=-1, keepdims=True)
    stay = kept & (np.arange(spec.n_groups) != place)
    least = np.empty(choice.shape)
    for group in range(spec.n_groups):
        mine = slice(group * spec.group_size, (group + 1) * spec.group_size)
        allowed = np.repeat(stay | (np.arange(spec.n_groups) == group), spec.group_size, axis=-1)
        after = _two_around(np.where(allowed, choice, -np.inf), spec.top_k)
        # Among the K best itself, an expert meets the next one; else the last of them.
        least[..., mine] = np.where(choice[..., mine] >= after[..., 1:], after[..., :1], after[..., 1:])
    return least


def _same_set(ids: ExpertIds, others: ExpertIds) -> Bool[np.ndarray, "*batch"]:
    return np.all(np.sort(ids, axis=-1) == np.sort(others, axis=-1), axis=-1)


def _favour(choice: Choice, ids: ExpertIds, tolerance: float) -> Choice:
    favoured = choice - tolerance
    np.put_along_axis(favoured, ids, np.take_along_axis(choice, ids, axis=-1) + tolerance, axis=-1)
    return favoured


def _ordered(choice: Choice, ids: ExpertIds, tolerance: float) -> Bool[np.ndarray, "*batch"]:
    chosen = np.take_along_axis(choice, ids, axis=-1)
    return np.all(chosen[..., 1:] <= chosen[..., :-1] + tolerance, axis=-1)
