"""How well the rules agree with steps that people, or the generator of a benchmark, marked.

Boundaries are places between words, so a text has the same ones with its layout and without. As many benchmarks write a step a
line, or are written so by their readers, line ends give the steps away; in the layout ``removed`` all words are on one line.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ling_probe import segmentation as seg
from ling_probe.benchmarks import Record, Step
from ling_probe.errors import UsageError
from ling_probe.stats import bootstrap_weights, percentile_interval
from ling_probe.steps.boundaries import SEGMENTERS
from ling_probe.steps.choice import segment

_COMPARED = (*(("written", segmenter) for segmenter in SEGMENTERS), ("removed", "sentences"))
"""Layouts and segmenters; a text on one line has one line, and rules cut it by sentences."""
OPERATIONS = ("add", "subtract", "multiply", "divide", "calculate", "compare")
"""Labels that the rules and benchmarks share."""
_NONE = "none"


class _Text(NamedTuple):
    """One annotated solution, in words."""

    n: int
    marked: np.ndarray
    found: np.ndarray
    labels: list[tuple[str, str]]
    """The annotated label and the found one of each step that both cut alike."""


def segmenter_agreement(records: Iterable[Record], *, draws: int = 20, seed: int = 0) -> pd.DataFrame:
    """Agreement of every segmenter with the annotated steps, with the layout of the text and without.

    Columns: ``layout``, ``segmenter``, ``records``, ``steps`` (annotated boundaries) and ``found`` ones; their ``precision``,
    ``recall`` and ``f1``, over all records together, with the 95 % interval of the F1 over records, ``ci_low`` to ``ci_high``;
    ``near_f1``, where one word off counts; ``pk`` and ``window_diff``, means over records, of which 0 is best. Beside each of
    these four stands what as many boundaries give at random (``_random``) and at equal distances (``_even``). Of the steps that
    both cut alike, Cohen's ``kappa`` over the ``both_named`` that both call an operation; the share ``named`` of those that the
    annotation calls one; and ``kappa_none``, where no operation is a label too.

    Args:
        records: Records; those without annotated steps are left out.
        draws: Random segmentations of each record.
        seed: Of these and of the interval.

    Raises:
        UsageError: No record has annotated steps.
    """
    marked = [record for record in records if record.steps]
    if not marked:
        raise UsageError("no record has annotated steps to compare with; stepbench, GSM8K, ProcessBench or EntailmentBank have")
    return pd.DataFrame(
        {"layout": layout, "segmenter": segmenter, "records": len(marked)}
        | _measured([_compared(record, segmenter, layout) for record in marked], draws, seed)
        for layout, segmenter in _COMPARED
    )


def _compared(record: Record, segmenter: str, layout: str) -> _Text:
    written = record.solution
    words = [found.span() for found in re.finditer(r"\S+", written)]
    text = written if layout == "written" else " ".join(written.split())
    starts = [start for start, _ in words] if layout == "written" else [found.start() for found in re.finditer(r"\S+", text)]
    marked = _spans(record.steps, [start for start, _ in words])
    found = _spans(segment(record, text, steps=segmenter), starts)
    labels = [(marked[span], found[span]) for span in marked.keys() & found.keys()]
    return _Text(len(words), _boundaries(marked, len(words)), _boundaries(found, len(words)), labels)


def _spans(steps: Sequence[Step], starts: Sequence[int]) -> dict[tuple[int, int], str]:
    """The label of each step by its first word and one past its last."""
    return {(bisect_left(starts, step.start), bisect_left(starts, step.stop)): step.label for step in steps}


def _boundaries(spans: Iterable[tuple[int, int]], n: int) -> np.ndarray:
    return np.array(sorted({place for span in spans for place in span if 0 < place < n}), dtype=np.int64)


def _measured(texts: Sequence[_Text], draws: int, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    own = [_distances(text, text.found) for text in texts]
    even = [_distances(text, seg.even_boundaries(text.n, len(text.found))) for text in texts]
    chance = [[_distances(text, seg.random_boundaries(text.n, len(text.found), rng)) for _ in range(draws)] for text in texts]
    counts, near, pk, wd = _summed(own)
    row: dict[str, float] = {"steps": int(counts[:, 1].sum()), "found": int(counts[:, 2].sum())}
    row |= seg.score(*counts.sum(axis=0))._asdict()
    weights = bootstrap_weights(len(texts), seed=seed)
    row["ci_low"], row["ci_high"] = map(float, percentile_interval(seg.micro_score(counts, weights)))
    row |= {"near_f1": seg.score(*near.sum(axis=0)).f1, "pk": pk, "window_diff": wd}
    for name, found in (("random", [each for text in chance for each in text]), ("even", even)):
        counts, near, pk, wd = _summed(found)
        f1, near_f1 = (seg.score(*part.sum(axis=0)).f1 for part in (counts, near))
        row |= {f"f1_{name}": f1, f"near_f1_{name}": near_f1, f"pk_{name}": pk, f"window_diff_{name}": wd}
    return row | _label_agreement([pair for text in texts for pair in text.labels])


class _Distance(NamedTuple):
    matches: int
    near: int
    marked: int
    found: int
    pk: float
    window_diff: float


def _distances(text: _Text, found: np.ndarray) -> _Distance:
    exact, near = (seg.matched(text.marked, found, tolerance=tolerance) for tolerance in (0, 1))
    diff = seg.window_diff(text.marked, found, text.n)
    return _Distance(exact, near, len(text.marked), len(found), seg.pk(text.marked, found, text.n), diff)


def _summed(found: Sequence[_Distance]) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Matches, marked and found of each [R 3], exact and near, and the means of the two distances."""
    values = np.array(found, dtype=float)
    return values[:, [0, 2, 3]], values[:, [1, 2, 3]], float(np.nanmean(values[:, 4])), float(np.nanmean(values[:, 5]))


def _label_agreement(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    named = [pair for pair in pairs if pair[0] in OPERATIONS]
    both = [pair for pair in named if pair[1] in OPERATIONS]
    some = [(ours if ours in OPERATIONS else _NONE, theirs if theirs in OPERATIONS else _NONE) for ours, theirs in pairs]
    return {
        "both_named": len(both),
        "kappa": seg.kappa(*map(list, zip(*both, strict=True))) if both else np.nan,
        "named": len(both) / len(named) if named else np.nan,
        "kappa_none": seg.kappa(*map(list, zip(*some, strict=True))) if named else np.nan,
    }
