"""The same tokens of two runs side by side, whatever parts either keeps them in.

A part of each run is held at a time, so memory does not grow with the runs. Parts of the second are read again where the runs
have their sequences in another order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Integer

from ling_probe.analysis.comparable import Shared
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch


@dataclass(frozen=True, eq=False)
class Aligned:
    """Tokens that both runs read, sequence after sequence, in order of position."""

    sequence: Integer[np.ndarray, " N"]
    """Place among the shared sequences."""
    token_id: Integer[np.ndarray, " N"]
    one: Integer[np.ndarray, "N M K"]
    """Experts chosen in the first run."""
    other: Integer[np.ndarray, "N M K"]
    """Experts chosen in the other."""
    extra: dict[str, np.ndarray]
    """Extras of the first run, as in `TokenBatch`."""


def aligned_batches(
    first: Run, second: Run, shared: Shared, *, layers: Sequence[int] | None = None, columns: Sequence[str] = ()
) -> Iterator[Aligned]:
    """Tokens of the shared sequences with what either run chose, about a part at a time.

    Args:
        first: Gives the order and the extras.
        second: Compared with it.
        shared: Sequences of both.
        layers: As for `Run.batches`.
        columns: Extras of the first run.

    Raises:
        UsageError: A shared sequence has other tokens in the second run.
    """
    place = np.full(len(first.sequences), -1)
    place[shared.rows] = np.arange(len(shared.rows))
    ends = np.cumsum([part.sequences for part in second.manifest.parts])
    home = np.searchsorted(ends, shared.others, side="right")
    held, there = -1, None
    for batch in first.batches(layers=layers, columns=columns):
        pair = place[batch.sequence]
        for part in np.unique(home[pair[pair >= 0]]):
            if part != held:
                held, there = int(part), next(second.batches(layers=layers, parts=[int(part)]))
            assert there is not None
            yield _joined(batch, there, (pair >= 0) & (home[pair] == part), pair, shared, (first, second))


def _joined(
    batch: TokenBatch,
    there: TokenBatch,
    kept: Bool[np.ndarray, " N"],
    pair: Integer[np.ndarray, " N"],
    shared: Shared,
    runs: tuple[Run, Run],
) -> Aligned:
    pair, token_id, position = pair[kept], batch.token_id[kept], batch.position[kept]
    row = shared.others[pair]
    start, stop = (np.searchsorted(there.sequence, row, side=side) for side in ("left", "right"))
    length = np.bincount(pair)[pair]
    found = np.minimum(start + position, len(there.token_id) - 1)
    same = (there.token_id[found] == token_id) & (stop - start == length)
    if not same.all():
        where = int(np.argmin(same))
        name = runs[0].sequences["sequence_id"].iloc[shared.rows[pair[where]]]
        raise UsageError(
            f"sequence {name} has other tokens in {runs[1].folder} than in {runs[0].folder}; tokens compare only where both "
            "runs read the same text: capture both without --generate"
        )
    return Aligned(pair, token_id, batch.expert_ids[kept], there.expert_ids[found], {
        name: values[kept] for name, values in batch.extra.items()
    })  # fmt: skip


def chosen_together(first: Run, second: Run, shared: Shared, *, most: int = 4000) -> Float64[np.ndarray, "M E E"]:
    """How often the first tokens that both runs read chose an expert in one run and one in the other."""
    n_experts = first.spec.n_experts
    batch = next(aligned_batches(first, second, shared))
    ones, others = (ids[:most].astype(np.int64) for ids in (batch.one, batch.other))
    pairs = ones[..., :, None] * n_experts + others[..., None, :]
    counts = [np.bincount(pairs[:, row].ravel(), minlength=n_experts**2) for row in range(first.spec.n_rows)]
    return np.stack(counts).reshape(-1, n_experts, n_experts).astype(float)
