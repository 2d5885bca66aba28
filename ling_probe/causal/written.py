"""What the model writes itself under a change: its final answers and its steps, problem by problem."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from ling_probe import stats
from ling_probe.benchmarks import Record
from ling_probe.capture import capture
from ling_probe.causal.effects import compared, problem_weights
from ling_probe.interventions import Intervention
from ling_probe.model.load import LoadedLing

SOLVED, STEPS_RIGHT, STEPS_OWN = "solved", "steps_right", "steps_own"
"""Share of problems whose final answer is right, of judged steps that are right, of steps that have the label asked about."""
WRITTEN = "written"
_SHARES = {SOLVED: ("solved", "problems"), STEPS_RIGHT: ("right", "judged"), STEPS_OWN: ("own", "steps")}

Written = Mapping[str, Float64[np.ndarray, " P"]]
"""Counts by problem: problems (1 each), solved, steps, own (of the label), judged and right among them."""
Rank = Callable[[float, Float64[np.ndarray, " D"]], float]
"""P of an effect among those of its matched draws."""


def spread(records: Sequence[Record], most: int) -> list[Record]:
    """At most so many of the records that have an answer, from all parts of the list."""
    judged = [record for record in records if record.answer]
    places = np.linspace(0, len(judged) - 1, min(most, len(judged))).round().astype(int)
    return [judged[place] for place in places]


def write(
    loaded: LoadedLing,
    records: Sequence[Record],
    interventions: Sequence[Intervention],
    *,
    label: str = "",
    max_new_tokens: int = 300,
    batch_tokens: int = 8192,
) -> dict[str, dict[str, Float64[np.ndarray, " P"]]]:
    """Let the model complete every prompt greedily, with the change in force at every token, and count what is right.

    The counts stand under `WRITTEN`, as they are kept.

    Raises:
        InterventionError: The model, or generation, cannot carry the change out.
    """
    traces = capture(
        loaded,
        records,
        interventions=interventions,
        max_new_tokens=max_new_tokens,
        keep=("experts",),
        batch_tokens=batch_tokens,
    )
    rows = []
    for trace in traces:
        judged = [step.correct for step in trace.steps if step.correct is not None]
        own = sum(step.label == label for step in trace.steps)
        rows.append((1, bool(trace.correct), len(trace.steps), own, len(judged), sum(judged)))
    counts = np.array(rows, float).reshape(-1, 6).T
    return {WRITTEN: dict(zip(("problems", "solved", "steps", "own", "judged", "right"), counts, strict=True))}


def written_rows(
    before: Written,
    target: Written,
    controls: Sequence[Written],
    rank: Rank,
    *,
    measures: Sequence[str] = (SOLVED, STEPS_RIGHT),
    draws: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """One row a measure: how a share changes, beside how matched changes change it (`compared`).

    `before` is the model as it is. `p` is the rank among the matched draws. For solved problems `p_unchanged` is exact and
    two-sided of as many lost as gained (McNemar 1947), the interval is `stats.paired_interval`, and that of the excess is no
    narrower: where nothing changed a bootstrap has no width.
    """
    weights = problem_weights(len(before["solved"]), draws=draws, seed=seed)
    for name in measures:
        effect, *others = (_share(name, each, weights) - _share(name, before, weights) for each in (target, *controls))
        control = np.stack(others)
        row = compared(effect, control, seed=seed) | {"p": rank(float(effect[0]), control[:, 0]), "p_unchanged": np.nan}
        yield {"measure": name, "problems": len(before["solved"])} | (_paired(row, before, target) if name == SOLVED else row)


def _paired(row: dict[str, Any], before: Written, target: Written) -> dict[str, Any]:
    """A row of solved problems with what pairs say."""
    old, new = before["solved"], target["solved"]
    lost, gained = int((old > new).sum()), int((old < new).sum())
    low, high = stats.paired_interval(lost, gained, len(old))
    half = (high - low) / 2
    return row | {
        "ci_low": low,
        "ci_high": high,
        "excess_low": min(row["excess_low"], row["excess"] - half),
        "excess_high": max(row["excess_high"], row["excess"] + half),
        "p_unchanged": stats.mcnemar_p(lost, gained),
    }


def _share(name: str, written: Written, weights: Float64[np.ndarray, "B P"]) -> Float64[np.ndarray, " B"]:
    part, whole = _SHARES[name]
    return (weights @ written[part]) / np.maximum(weights @ written[whole], 1.0)
