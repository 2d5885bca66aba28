"""From what one condition does, and matched ones do, to effects with intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from ling_probe import stats
from ling_probe.causal.measure import ANSWER, Scores, Solutions

MEASURES = ("own", "other", "selectivity", "answer")
"""Rise of the loss in steps of the label, in the others of the same problems, the first minus the second, and in the answer."""


@dataclass(frozen=True, eq=False)
class Rises:
    """Rise over the model's own router by problem, on the problems that count [P]."""

    loss: dict[str, Float64[np.ndarray, " P"]]
    """Sum over tokens in nats, by part: own, other, answer."""
    right: dict[str, Float64[np.ndarray, " P"]]
    """Units with every token right, fewer or more than before."""


class Parts:
    """Units of some problems: the steps asked about, the other steps, the answers."""

    def __init__(self, solutions: Solutions, own: Bool[np.ndarray, " U"], among: Bool[np.ndarray, " P"] | None = None) -> None:
        """Cut.

        Args:
            solutions: What was given.
            own: Units that are asked about; answers among them are not counted as such.
            among: Problems of the solutions that count; those with such a unit if left out.
        """
        self._solutions = solutions
        labels, problem = solutions.labels, solutions.problem
        own = own & (labels != ANSWER)
        here = np.unique(problem[own]) if among is None else np.flatnonzero(among)
        self._row = np.full(problem.max() + 1, -1)
        self._row[here] = np.arange(len(here))
        inside = np.isin(problem, here)
        self.members = {
            "own": inside & own,
            "other": inside & ~own & (labels != ANSWER),
            "answer": inside & (labels == ANSWER) & (solutions.tokens > 0),
        }
        self.problems = here
        """Places of the problems that count, in the solutions' records."""
        self.tokens = {name: self._sum(name, solutions.tokens) for name in self.members}
        self.units = {name: self._sum(name, np.ones(len(labels))) for name in self.members}

    @property
    def n_problems(self) -> int:
        """How many count."""
        return len(self.problems)

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
    """One row a measure: the effect in nats a token, beside that of matched conditions (`compared`).

    `p` is the share of matched draws, the change itself among them, that reach the effect: one-sided, towards harm.
    """
    weights = problem_weights(parts.n_problems, draws=draws, seed=seed)
    effects = loss_measures(parts, target, weights)
    others = [loss_measures(parts, control, weights) for control in controls]
    right = {name: target.right[name].sum() / max(parts.units[name].sum(), 1) for name in parts.members}
    for name in MEASURES:
        control = np.stack([each[name] for each in others])
        yield {"measure": name, "problems": parts.n_problems} | compared(effects[name], control, seed=seed) | {
            "right_change": float(right.get(name, np.nan)), "p": stats.rank_p(float(effects[name][0]), control[:, 0], side=1),
            "p_unchanged": np.nan,
        }  # fmt: skip


def problem_weights(n_problems: int, *, draws: int, seed: int) -> Float64[np.ndarray, "B P"]:
    """Every problem once, and below it `draws` bootstrap samples of the problems."""
    return np.concatenate([np.ones((1, n_problems)), stats.bootstrap_weights(n_problems, draws=draws, seed=seed)])


def compared(effects: Float64[np.ndarray, " B"], controls: Float64[np.ndarray, "D B"], *, seed: int) -> dict[str, Any]:
    """An effect, that of matched conditions, and the excess over their mean, with 95 % intervals.

    Those of the effect and the excess are from a bootstrap over problems, and that of the excess also draws controls anew.
    Those of the control are the middle 95 % of the draws.

    Args:
        effects: On the problems as they are, and on each bootstrap sample.
        controls: The same of each matched condition.
        seed: Of the draws of controls.
    """
    n, draws = len(controls), len(effects) - 1
    drawn = np.random.default_rng(seed).integers(n, size=(draws, n))
    mean = controls[:, 1:][drawn, np.arange(draws)[:, None]].mean(axis=1)
    (low, high), (c_low, c_high) = stats.percentile_interval(effects[1:]), stats.percentile_interval(controls[:, 0])
    e_low, e_high = stats.percentile_interval(effects[1:] - mean)
    return {
        "effect": float(effects[0]),
        "ci_low": float(low),
        "ci_high": float(high),
        "control": float(controls[:, 0].mean()),
        "control_low": float(c_low),
        "control_high": float(c_high),
        "excess": float(effects[0] - controls[:, 0].mean()),
        "excess_low": float(e_low),
        "excess_high": float(e_high),
        "draws": n,
    }


def loss_measures(parts: Parts, rises: Rises, weights: Float64[np.ndarray, "B P"]) -> dict[str, Float64[np.ndarray, " B"]]:
    """Each of `MEASURES` in nats a token, for every row of weights."""
    found = {
        name: (weights @ rises.loss[name]) / np.maximum(weights @ parts.tokens[name], 1.0)
        for name in ("own", "other", "answer")
    }
    return found | {"selectivity": found["own"] - found["other"]}
