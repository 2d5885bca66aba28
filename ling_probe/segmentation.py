"""How well two segmentations of one text agree.

A text of n units (words or tokens) has n - 1 places for a boundary; boundary b says that a segment begins at unit b, 0 < b < n.
Boundaries are ascending arrays without repeats. Nothing here knows a record, a label's meaning or a table.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Integer
from sklearn.metrics import cohen_kappa_score

Boundaries = Integer[np.ndarray, " N"]


class Score(NamedTuple):
    """Precision, recall, and their harmonic mean; NaN where there is nothing to divide by."""

    precision: float
    recall: float
    f1: float


def matched(reference: Boundaries, found: Boundaries, *, tolerance: int = 0) -> int:
    """How many boundaries can be paired, one to one, with one at most ``tolerance`` units away.

    Pairing the first two that reach each other, again and again, is a largest pairing of points on a line.

    >>> matched(np.array([3, 4]), np.array([4, 9])), matched(np.array([3, 4]), np.array([4, 5]), tolerance=1)
    (1, 2)
    """
    pairs = left = right = 0
    while left < len(reference) and right < len(found):
        apart = int(found[right]) - int(reference[left])
        pairs += abs(apart) <= tolerance
        left += apart >= -tolerance
        right += apart <= tolerance
    return pairs


def score(matches: float, n_reference: float, n_found: float) -> Score:
    """Precision, recall and F1 from counts, of one text or summed over many.

    >>> score(2, 4, 2)
    Score(precision=1.0, recall=0.5, f1=0.6666666666666666)
    """
    precision, recall, half = (matches / n if n else np.nan for n in (n_found, n_reference, n_found + n_reference))
    return Score(precision, recall, 2 * half)


def window(n_units: int, n_boundaries: int) -> int:
    """Half the mean length of a reference segment, rounded half up and at least 1: the reach of `pk` and `window_diff`.

    >>> window(20, 3), window(3, 2)
    (3, 1)
    """
    return max(1, int(n_units / (2 * (n_boundaries + 1)) + 0.5))


def pk(reference: Boundaries, found: Boundaries, n_units: int) -> float:
    """Share of pairs of units, half a segment apart, of which only one segmentation says that they lie in one segment.

    0 agrees everywhere. Beeferman, Berger & Lafferty 1999. NaN where the text is too short for a pair.

    >>> pk(np.array([2]), np.array([2]), 4), pk(np.array([2]), np.array([], int), 4)
    (0.0, 0.3333333333333333)
    """
    ours, theirs = _inside_windows(reference, found, n_units)
    return float(((ours > 0) != (theirs > 0)).mean()) if len(ours) else np.nan


def window_diff(reference: Boundaries, found: Boundaries, n_units: int) -> float:
    """Share of windows, half a segment long, in which the two segmentations have different numbers of boundaries.

    0 agrees everywhere; unlike `pk` it sees every boundary too many. Pevzner & Hearst 2002. NaN as for `pk`.

    >>> window_diff(np.array([4]), np.array([3, 4]), 8), pk(np.array([4]), np.array([3, 4]), 8)
    (0.3333333333333333, 0.16666666666666666)
    """
    ours, theirs = _inside_windows(reference, found, n_units)
    return float((ours != theirs).mean()) if len(ours) else np.nan


def _inside_windows(reference: Boundaries, found: Boundaries, n_units: int) -> tuple[np.ndarray, np.ndarray]:
    """Boundaries between each unit and the one a window further on, of both [n - k]."""
    k = window(n_units, len(reference))
    return _counted(reference, n_units, k), _counted(found, n_units, k)


def _counted(boundaries: Boundaries, n_units: int, k: int) -> np.ndarray:
    before = np.searchsorted(boundaries, np.arange(n_units), side="right")
    return before[k:] - before[:-k]


def even_boundaries(n_units: int, n_boundaries: int) -> Boundaries:
    """So many boundaries at equal distances, rounded down; never more than there are places.

    >>> even_boundaries(10, 3)
    array([2, 5, 7])
    """
    count = min(n_boundaries, n_units - 1)
    return np.arange(1, count + 1) * n_units // (count + 1) if count > 0 else np.zeros(0, dtype=np.int64)


def random_boundaries(n_units: int, n_boundaries: int, rng: np.random.Generator) -> Boundaries:
    """So many different boundaries, every set of them as likely; never more than there are places."""
    count = max(0, min(n_boundaries, n_units - 1))
    return np.sort(rng.choice(max(n_units - 1, 0), count, replace=False)) + 1


def kappa(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Cohen's kappa of two labellings of the same items: agreement beyond what their label counts give by chance.

    1 is full agreement, 0 is chance. NaN without items, or where one side gives all of them the same label.

    >>> round(kappa(["a", "a", "b", "b"], ["a", "b", "b", "b"]), 6)
    0.5
    """
    return float(cohen_kappa_score(ours, theirs)) if min(len({*ours}), len({*theirs})) > 1 else np.nan


def micro_score(counts: Float64[np.ndarray, "R 3"], weights: Float64[np.ndarray, "B R"]) -> Float64[np.ndarray, " B"]:
    """F1 over records drawn with weights, from each record's matches, reference boundaries and found ones.

    >>> micro_score(np.array([[1.0, 2.0, 1.0], [3.0, 3.0, 3.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])).round(3).tolist()
    [0.889, 0.667]
    """
    matches, reference, found = (weights @ counts).T
    return 2 * matches / np.where(reference + found > 0, reference + found, np.nan)
