"""How close a choice of experts was, and whether two runs differ where it was close."""

from itertools import pairwise

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer, Real

from ling_probe import metrics, routing, stats
from ling_probe.analysis.aligned import aligned_batches
from ling_probe.analysis.comparable import Shared
from ling_probe.run import Run
from ling_probe.spec import ModelSpec

MARGINS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Bounds between classes of margin, in units of choice score."""


def choice_margin(logits: Real[np.ndarray, "N E"], bias: Real[np.ndarray, " E"], spec: ModelSpec) -> Float64[np.ndarray, " N"]:
    """How far the choice scores of a token were from another choice.

    The smaller of two gaps: between the last chosen expert and the best one left out of the groups kept, and between the last
    group kept and the best one dropped. Infinite where there is nothing left out.

    Args:
        logits: Of the router.
        bias: Of the layer.
        spec: Geometry.
    """
    choice = routing.choice_scores(routing.scores(logits), bias)
    kept = routing.kept_groups(choice, spec)
    inside = np.where(np.repeat(kept, spec.group_size, axis=-1), choice, -np.inf)
    grouped = choice.reshape(len(choice), spec.n_groups, spec.group_size)
    group = np.partition(grouped, -2, axis=-1)[..., -2:].sum(axis=-1) if spec.n_groups > 1 else np.zeros(kept.shape)
    return np.minimum(_gap(inside, spec.top_k), _gap(group, spec.topk_groups))


def _gap(values: Float64[np.ndarray, "N n"], count: int) -> Float64[np.ndarray, " N"]:
    """Between the last of the `count` largest and the next."""
    if count >= values.shape[-1]:
        return np.full(len(values), np.inf)
    best = np.partition(values, [-count - 1, -count], axis=-1)
    return best[:, -count] - best[:, -count - 1]


def agreement_by_margin(first: Run, other: Run, shared: Shared, layer: int, *, draws: int, seed: int) -> pd.DataFrame:
    """Rows of `route_agreement` for the classes of margin that occur in a layer."""
    unit = stats.bundles(len(shared.rows), seed=seed)
    tokens, common, differ = _sums(first, other, shared, layer, unit)
    seen = tokens.sum(axis=0) > 0
    weights = stats.bootstrap_weights(len(tokens), draws=draws, seed=seed)
    with np.errstate(invalid="ignore"):
        drawn = (weights @ common / (first.spec.top_k * (weights @ tokens)))[:, seen]
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    n, bounds = tokens.sum(axis=0)[seen], np.array([-np.inf, *MARGINS, np.inf])
    names = [
        f"below {MARGINS[0]}",
        *(f"{a} to {b}" for a, b in pairwise(MARGINS)),
        f"{MARGINS[-1]} on",
    ]
    columns = {
        "layer": layer,
        "margin": np.array(names)[seen],
        "margin_low": bounds[:-1][seen],
        "margin_high": bounds[1:][seen],
        "tokens": n.astype(np.int64),
        "sequences": (tokens[:, seen] > 0).sum(axis=0) if len(tokens) == len(unit) else len(unit),
        "agreement": common.sum(axis=0)[seen] / (first.spec.top_k * n),
        "ci_low": low,
        "ci_high": high,
        "decisions_differ": differ.sum(axis=0)[seen] / n,
    }
    return pd.DataFrame(columns)


def _sums(first: Run, other: Run, shared: Shared, layer: int, unit: Integer[np.ndarray, " P"]) -> Float64[np.ndarray, "3 U C"]:
    """Tokens, experts in common and differing choices by bundle of sequences and class of margin."""
    classes = len(MARGINS) + 1
    total = np.zeros((3, (int(unit.max()) + 1) * classes))
    bias = np.array((first.manifest.model.get("expert_bias") or {}).get(str(layer), np.zeros(first.spec.n_experts)))
    for batch in aligned_batches(first, other, shared, layers=[layer], columns=["logits"]):
        margin = choice_margin(batch.extra["logits"][:, 0], bias, first.spec)
        cell = unit[batch.sequence] * classes + np.searchsorted(MARGINS, margin, side="right")
        common = metrics.overlap(batch.one, batch.other)[:, 0]
        for row, weights in enumerate((np.ones(len(cell)), common, common < first.spec.top_k)):
            total[row] += np.bincount(cell, weights=weights, minlength=total.shape[1])
    return total.reshape(3, -1, classes)
