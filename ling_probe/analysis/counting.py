"""Stream a run and count which experts its tokens chose, by any owner of tokens: sequence, step, token class.

One layer is read at a time, so memory holds owners by experts of one layer, whatever the length of the run.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import sparse

from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch
from ling_probe.trace import SEGMENTS

Owner = Callable[[TokenBatch], Integer[np.ndarray, " N"]]
"""Maps the tokens of a batch to the row they count for; -1 counts nowhere."""


def require_sequences(run: Run) -> None:
    """Refuse a run without sequences.

    Raises:
        UsageError: There are none.
    """
    if run.sequences.empty:
        raise UsageError(f"{run.folder} holds no sequences yet; capture some first")


def segment_mask(batch: TokenBatch, segments: Sequence[str] | None) -> Bool[np.ndarray, " N"]:
    """Which tokens stand in one of these segments; None is all of them.

    Raises:
        UsageError: A segment does not exist.
    """
    if segments is None:
        return np.ones(len(batch.segment), dtype=bool)
    unknown = [name for name in segments if name not in SEGMENTS]
    if unknown:
        raise UsageError(f'no segment "{unknown[0]}"; these there are: {", ".join(SEGMENTS)}')
    return np.isin(batch.segment, [SEGMENTS.index(name) for name in segments])


def count_choices(run: Run, layer: int, owner: Owner, n_owners: int) -> Integer[np.ndarray, "O E"]:
    """How often the tokens of each owner chose each expert of a layer."""
    counts = np.zeros(n_owners * run.spec.n_experts, dtype=np.int64)
    for batch in run.batches(layers=[layer]):
        owners = owner(batch)
        kept = owners >= 0
        cells = owners[kept, None].astype(np.int64) * run.spec.n_experts + batch.expert_ids[kept, 0]
        counts += np.bincount(cells.ravel(), minlength=len(counts))
    return counts.reshape(n_owners, run.spec.n_experts)


def sum_by(values: Float[np.ndarray, "O C"], owner: Integer[np.ndarray, " O"], n_owners: int) -> Float[np.ndarray, "N C"]:
    """Sum rows that share an owner."""
    rows = np.arange(len(owner))
    return sparse.csr_array((np.ones(len(owner), values.dtype), (owner, rows)), shape=(n_owners, len(owner))) @ values
