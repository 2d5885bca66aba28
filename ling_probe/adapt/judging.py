"""What an adaptation brought: answers, loss and balance on some tasks before and after, and how far routing moved."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from ling_probe import metrics
from ling_probe.benchmarks import Record, read_benchmark
from ling_probe.capture import capture
from ling_probe.errors import UsageError
from ling_probe.evaluate import evaluate
from ling_probe.model.load import LoadedLing
from ling_probe.stepbench import generate, shipped_prompts

UNSEEN_SEED = 1
"""Of problems drawn to adapt on; the shipped splits and the training of ling-tiny have 0."""


@dataclass(frozen=True)
class Task:
    """Problems that a model is judged on."""

    name: str
    records: tuple[Record, ...]

    @classmethod
    def named(cls, name: str, limit: int | None = None) -> "Task":
        """A benchmark file, or ``stepbench:SPLIT`` or ``stepbench:SPLIT:FAMILY`` of the shipped one.

        Raises:
            UsageError: There is no such benchmark, split or family.
        """
        if not name.startswith("stepbench:"):
            return cls(name, tuple(read_benchmark(name, limit=limit).records))
        _, split, *family = name.split(":")
        found = [each for each in read_benchmark("stepbench", split=split).records if not family or each.family == family[0]]
        if not found:
            raise UsageError(f"{name}: no such family; name it as in stepbench:test:arithmetic")
        # Families stand one after the other: every n-th problem is of all of them.
        step = max(1, len(found) // limit) if limit else 1
        return cls(name, tuple(found[::step][:limit]))


def task_problems(family: str, split: str) -> Iterator[Record]:
    """Endless stepbench problems of a split's kind, none of them shipped."""
    shipped = shipped_prompts(family)
    return (record for index in count() if (record := generate(family, split, index, UNSEEN_SEED)).prompt not in shipped)


class Judge:
    """Judges one model twice: as it comes, and after it was adapted."""

    def __init__(self, loaded: LoadedLing, tasks: Sequence[Task], *, max_new_tokens: int = 300) -> None:
        self._loaded, self._tasks, self._longest = loaded, tasks, max_new_tokens
        self._before: dict[str, list[np.ndarray]] = {}

    def rows(self, when: str) -> list[dict[str, Any]]:
        """One row a task: exact answers by greedy generation, loss on its given solutions, and routing there.

        `agreement` is the mean share of a token's experts that are the same as when this was first asked, `max_vio` the
        largest of all layers, `ci_low` and `ci_high` the 95 % Wilson interval of `share`.
        """
        return [self._row(when, task) for task in self._tasks]

    def _row(self, when: str, task: Task) -> dict[str, Any]:
        accuracy = evaluate(self._loaded, task.records, max_new_tokens=self._longest).accuracy.iloc[-1]
        traces = list(capture(self._loaded, [each for each in task.records if each.solution]))
        ids = [trace.expert_ids for trace in traces]
        first = self._before.setdefault(task.name, ids)
        spec = self._loaded.spec
        chosen = np.concatenate(ids)
        counts = np.stack([np.bincount(chosen[:, row].ravel(), minlength=spec.n_experts) for row in range(spec.n_rows)])
        losses = np.concatenate([trace.loss[trace.segment > 0] for trace in traces])
        return {
            "when": when,
            "task": task.name,
            "problems": len(task.records),
            "correct": int(accuracy["correct"]),
            "share": float(accuracy["share"]),
            "ci_low": float(accuracy["ci_low"]),
            "ci_high": float(accuracy["ci_high"]),
            "loss": float(np.nanmean(losses)),
            "max_vio": float(metrics.max_vio(counts).max()),
            "agreement": float(np.mean([_agreement(old, new) for old, new in zip(first, ids, strict=True)])),
        }


def _agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over tokens and layers of the share of experts that both chose."""
    return float((one[..., :, None] == other[..., None, :]).any(axis=-1).mean())
