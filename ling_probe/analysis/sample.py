"""Completion tokens of a seeded sample of whole sequences, all routed layers at once, for questions that need tokens together.

Memory and time are those of the sample, whatever the length of the run; a run of up to `MOST` tokens is taken whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.classified import COMPLETION
from ling_probe.analysis.counting import require_sequences, segment_mask
from ling_probe.errors import UsageError
from ling_probe.run import Run

MOST = 200_000
"""Tokens of a sample, unless said otherwise."""
LEAST_UNITS = 10
"""Sequences, or bundles of them, that an interval is resampled from."""


@dataclass(frozen=True, eq=False)
class TokenSample:
    """N tokens, sequence after sequence, in order of position."""

    sequence: Integer[np.ndarray, " N"]
    """Row in `Run.sequences`."""
    position: Integer[np.ndarray, " N"]
    token_id: Integer[np.ndarray, " N"]
    previous_id: Integer[np.ndarray, " N"]
    """Id of the token before, prompts included; -1 at the start of a sequence."""
    step: Integer[np.ndarray, " N"]
    expert_ids: Integer[np.ndarray, "N M K"]
    layers: tuple[int, ...]
    """Decoder layers of the M axis."""
    n_experts: int

    @property
    def n_tokens(self) -> int:
        """Tokens held."""
        return len(self.sequence)

    @property
    def n_sequences(self) -> int:
        """Sequences held."""
        return len(np.unique(self.sequence))

    @cached_property
    def follows(self) -> Bool[np.ndarray, " N"]:
        """Whether the row before holds the token before."""
        same = self.sequence[1:] == self.sequence[:-1]
        return np.concatenate([[False], same & (np.diff(self.position) == 1)])

    @cached_property
    def next_id(self) -> Integer[np.ndarray, " N"]:
        """Id of the token after, -1 where the sample does not hold it."""
        return np.append(np.where(self.follows[1:], self.token_id[1:], -1), -1)

    def only(self, kept: Bool[np.ndarray, " N"] | Integer[np.ndarray, " R"]) -> "TokenSample":
        """The tokens kept."""
        names = ("sequence", "position", "token_id", "previous_id", "step", "expert_ids")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})

    def take(self, rows: Bool[np.ndarray, " N"] | Integer[np.ndarray, " R"], layer: int) -> Integer[np.ndarray, "R K"]:
        """Chosen experts of some rows in the layer at a place of `layers`."""
        return self.expert_ids[rows, layer].astype(np.int64)

    def counts(
        self, layer: int, group: Integer[np.ndarray, " N"], n_groups: int, rows: Bool[np.ndarray, " N"] | None = None
    ) -> Float64[np.ndarray, "n_groups E"]:
        """Choices of each expert by the tokens of each group; -1 counts nowhere.

        Args:
            layer: Place in `layers`.
            group: Of each token.
            n_groups: How many.
            rows: Only these tokens.
        """
        kept = group >= 0 if rows is None else rows & (group >= 0)
        cells = group[kept, None].astype(np.int64) * self.n_experts + self.expert_ids[kept, layer]
        return np.bincount(cells.ravel(), minlength=n_groups * self.n_experts).reshape(n_groups, self.n_experts).astype(float)


def sample_tokens(run: Run, *, most: int = MOST, seed: int = 0) -> TokenSample:
    """Completion tokens of whole sequences drawn at random until they hold `most`; prompts of a run that has nothing else.

    Args:
        run: Any run.
        most: Tokens at most; two sequences are taken whatever their length.
        seed: Of the draw.

    Raises:
        UsageError: The run has fewer than two sequences: nothing can be held out.
    """
    require_sequences(run)
    if len(run.sequences) < 2:
        raise UsageError("one sequence only in this run; holding some out needs two")
    lengths = np.zeros((2, len(run.sequences)), dtype=np.int64)
    for batch in run.batches(layers=[]):
        kept = segment_mask(batch, COMPLETION)
        lengths += np.array([np.bincount(batch.sequence[side], minlength=lengths.shape[1]) for side in (kept, ~kept)])
    segments = COMPLETION if lengths[0].any() else ("prompt",)
    taken = _drawn(lengths[0] if lengths[0].any() else lengths[1], most, seed)
    return read_sample(run, lambda batch: segment_mask(batch, segments) & taken[batch.sequence])


def _drawn(lengths: Integer[np.ndarray, " S"], most: int, seed: int) -> Bool[np.ndarray, " S"]:
    order = np.random.default_rng(seed).permutation(len(lengths))
    fits = np.cumsum(lengths[order]) <= most
    fits[:2] = True
    taken = np.zeros(len(lengths), dtype=bool)
    taken[order[fits]] = True
    return taken


def read_sample(run: Run, chosen: Callable[..., Bool[np.ndarray, " B"]]) -> TokenSample:
    """The tokens of each batch that `chosen` marks, prompts too."""
    names = ("sequence", "position", "token_id", "previous_id", "step", "expert_ids")
    parts: list[tuple[np.ndarray, ...]] = []
    for batch in run.batches():
        kept = chosen(batch)
        previous = np.where(batch.position > 0, np.concatenate([[-1], batch.token_id[:-1]]), -1)
        values = (batch.sequence, batch.position, batch.token_id, previous, batch.step, batch.expert_ids)
        parts.append(tuple(value[kept] for value in values))
    columns = {name: np.concatenate(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}
    return TokenSample(**columns, layers=run.spec.routed_layers, n_experts=run.spec.n_experts)


def two_halves(unit: Integer[np.ndarray, " N"], *, seed: int = 0) -> Bool[np.ndarray, " N"]:
    """Which tokens stand in the first of two halves that split whole units (sequences) at random."""
    _, place = np.unique(unit, return_inverse=True)
    n_units = int(place.max()) + 1
    return np.random.default_rng([seed, 1]).permutation(np.arange(n_units) % 2 == 0)[place]


def label_codes(run: Run, sample: TokenSample) -> Integer[np.ndarray, " N"]:
    """Place of the label of each token's step among the run's labels, sorted; -1 outside steps."""
    steps = run.steps
    ids = np.full(sample.n_tokens, -1)
    if len(steps) and (sample.step >= 0).any():
        first = np.searchsorted(steps["sequence"].to_numpy(), np.arange(len(run.sequences)))
        codes = np.unique(steps["label"].to_numpy(dtype=str), return_inverse=True)[1]
        inside = sample.step >= 0
        ids[inside] = codes[first[sample.sequence[inside]] + sample.step[inside]]
    return ids


def frequent(ids: Integer[np.ndarray, " N"], first: Bool[np.ndarray, " N"], least: int) -> Integer[np.ndarray, " N"]:
    """Number of each token's id among those seen at least so often in both halves; -1 of the rest, and of negative ids."""
    code = numbered(ids)
    seen = np.minimum(*(np.bincount(code[half], minlength=int(code.max()) + 1) for half in (first, ~first)))
    kept = (seen[code] >= least) & (ids >= 0)
    group = np.full(len(ids), -1)
    group[kept] = numbered(ids[kept])
    return group


def numbered(*columns: np.ndarray) -> Integer[np.ndarray, " N"]:
    """Classes of rows that share all their values, numbered from 0.

    >>> numbered(np.array([5, 7, 5]), np.array([1, 1, 1])).tolist()
    [0, 1, 0]
    """
    _, code = np.unique(columns[0], return_inverse=True)
    for column in columns[1:]:
        values, place = np.unique(column, return_inverse=True)
        _, code = np.unique(code * len(values) + place, return_inverse=True)
    return code


def indicator(group: Integer[np.ndarray, " N"], n_groups: int) -> sparse.csr_array:
    """Groups by rows, 1 where a row is of a group; times values it sums them by group. -1 is of none."""
    rows = np.flatnonzero(group >= 0)
    return sparse.csr_array((np.ones(len(rows)), (group[rows], rows)), shape=(n_groups, len(group)))


def resampled_interval(
    replicates: Float64[np.ndarray, "B *rest"], n_units: int
) -> tuple[Float64[np.ndarray, "*rest"], Float64[np.ndarray, "*rest"]]:
    """As `stats.percentile_interval`; NaN where fewer than `LEAST_UNITS` were resampled, for it would be too narrow."""
    low, high = stats.percentile_interval(replicates)
    return (low, high) if n_units >= LEAST_UNITS else (np.full_like(low, np.nan), np.full_like(high, np.nan))


def interval_text(low: float, high: float, form: str = ".3f") -> str:
    """An interval in words.

    >>> interval_text(0.1, 0.25, ".0%"), interval_text(float("nan"), float("nan"))
    ('95 % interval 10 % to 25 %', 'too few sequences for an interval')
    """
    if np.isnan(low):
        return "too few sequences for an interval"
    bounds = f"{low:{form}} to {high:{form}}".replace("%", " %")
    return f"95 % interval {bounds}"


def said(table: pd.DataFrame) -> str:
    """How much a table of a sample was computed from: columns `tokens` and `sequences`."""
    return f"{int(table['tokens'].max()):,} tokens of {int(table['sequences'].max()):,} sequences"
