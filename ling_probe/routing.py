"""The Ling 2.0 routing rule in NumPy: the yardstick that models are tested against, not a way to run them.

    1  logits   z = x W^T, operands in float32
    2  scores   s = sigmoid(z)
    3  choice   c = s + bias, used to choose only
    4  groups   score of a group = sum of its two largest c; the best `topk_groups` stay
    5  ids      the K largest c in those groups, best first
    6  weights  s of the chosen, divided by their sum, times the scale

Every function works on any number of leading axes. Sums are in float64: what differs from a model is the model's rounding.
Source: the published modeling code of BailingMoeV2.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer

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
    grouped = choice.reshape(*choice.shape[:-1], spec.n_groups, spec.group_size)
    two_best = np.partition(grouped, -2, axis=-1)[..., -2:].sum(axis=-1)
    kept = np.zeros(two_best.shape, bool)
    np.put_along_axis(kept, _largest(two_best, spec.topk_groups), values=True, axis=-1)
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


def _same_set(ids: ExpertIds, others: ExpertIds) -> Bool[np.ndarray, "*batch"]:
    return np.all(np.sort(ids, axis=-1) == np.sort(others, axis=-1), axis=-1)


def _favour(choice: Choice, ids: ExpertIds, tolerance: float) -> Choice:
    favoured = choice - tolerance
    np.put_along_axis(favoured, ids, np.take_along_axis(choice, ids, axis=-1) + tolerance, axis=-1)
    return favoured


def _ordered(choice: Choice, ids: ExpertIds, tolerance: float) -> Bool[np.ndarray, "*batch"]:
    chosen = np.take_along_axis(choice, ids, axis=-1)
    return np.all(chosen[..., 1:] <= chosen[..., :-1] + tolerance, axis=-1)
