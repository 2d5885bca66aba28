"""From scores under a change, and under the same change to other experts, to effects with intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from ling_probe import stats
from ling_probe.causal.measure import ANSWER, Scores, Solutions

MEASURES = ("own", "other", "selectivity", "answer")
"""Rise of the loss in steps of the label, in the others of the same problems, the first minus the second, and in the answer."""


@dataclass(frozen=True, eq=False)
class Rises:
    """Rise over the model's own router by problem, on the problems that have a step of the label [P]."""

    loss: dict[str, Float64[np.ndarray, " P"]]
    """Sum over tokens in nats, by part: own, other, answer."""
    right: dict[str, Float64[np.ndarray, " P"]]
    """Units with every token right, fewer or more than before."""


class Parts:
    """Units of the problems that have steps of a label: those steps, the other steps, the answers."""

    def __init__(self, solutions: Solutions, label: str) -> None:
        self._solutions = solutions
        labels, problem = solutions.labels, solutions.problem
        here = np.unique(problem[labels == label])
        self._row = np.full(problem.max() + 1, -1)
        self._row[here] = np.arange(len(here))
        inside = np.isin(problem, here)
        self.members = {
            "own": inside & (labels == label),
            "other": inside & (labels != label) & (labels != ANSWER),
            "answer": inside & (labels == ANSWER) & (solutions.tokens > 0),
        }
        self.n_problems = len(here)
        self.tokens = {name: self._sum(name, solutions.tokens) for name in self.members}
        self.units = {name: self._sum(name, np.ones(len(labels))) for name in self.members}

    def rises(self, scores: Scores) -> Rises:
        """What a change does, over the model's own router."""
        before, tokens = self._solutions.unchanged, self._solutions.tokens
        solved = (scores.right == tokens).astype(float) - (before.right == tokens)
        return Rises(
            {name: self._sum(name, scores.loss - before.loss) for name in self.members},
            {name: self._sum(name, solved) for name in self.members},
        )

    def _sum(self, name: str, values: np.ndarray) -> Float64[np.ndarray, " P"]:
        mine = self.members[name]
        return np.bincount(self._row[self._solutions.problem[mine]], weights=values[mine], minlength=self.n_problems)


def effect_rows(parts: Parts, target: Rises, controls: Sequence[Rises], *, draws: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row a measure: the effect in nats a token, that of matched experts, the excess, and how rare it is among them.

    Intervals are 95 %, from a bootstrap over problems; that of the excess also draws controls anew. `p` is the share of matched
    draws, the change itself among them, that reach the effect: one-sided, towards harm.
    """
    weights = np.concatenate(
        [np.ones((1, parts.n_problems)), stats.bootstrap_weights(parts.n_problems, draws=draws, seed=seed)]
    )
    effects = _measures(parts, target, weights)
    others = [_measures(parts, control, weights) for control in controls]
    drawn = np.random.default_rng(seed).integers(len(others), size=(draws, len(others)))
    right = {name: target.right[name].sum() / max(parts.units[name].sum(), 1) for name in parts.members}
    for name in MEASURES:
        effect = effects[name]
        control = np.stack([each[name] for each in others])
        mean = control[:, 1:][drawn, np.arange(draws)[:, None]].mean(axis=1)
        reached = int((control[:, 0] >= effect[0]).sum())
        (low, high), (c_low, c_high) = stats.percentile_interval(effect[1:]), stats.percentile_interval(control[:, 0])
        e_low, e_high = stats.percentile_interval(effect[1:] - mean)
        yield {
            "measure": name,
            "problems": parts.n_problems,
            "effect": float(effect[0]),
            "ci_low": float(low),
            "ci_high": float(high),
            "control": float(control[:, 0].mean()),
            "control_low": float(c_low),
            "control_high": float(c_high),
            "excess": float(effect[0] - control[:, 0].mean()),
            "excess_low": float(e_low),
            "excess_high": float(e_high),
            "right_change": float(right.get(name, np.nan)),
            "draws": len(controls),
            "p": (1 + reached) / (1 + len(controls)),
        }


def _measures(parts: Parts, rises: Rises, weights: Float64[np.ndarray, "B P"]) -> dict[str, Float64[np.ndarray, " B"]]:
    """Each measure in nats a token; the first entry is over the problems as they are."""
    found = {
        name: (weights @ rises.loss[name]) / np.maximum(weights @ parts.tokens[name], 1.0)
        for name in ("own", "other", "answer")
    }
    return found | {"selectivity": found["own"] - found["other"]}
