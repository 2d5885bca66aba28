"""What the chosen experts added: norms of contributions kept by a capture, summed by layer and bundle of sequences.

A contribution is weight times output, and its norm is all that is kept: norms of single contributions, never of their sum. The
norm of an output is that of its contribution over its weight.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.counting import require_sequences
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch

LEAST_WEIGHT = 1e-3
"""Weights below this say too little, in 16 bits, to divide by."""


def require_extra(run: Run, name: str, keep: str) -> None:
    """Refuse a run that did not keep something.

    Raises:
        UsageError: There are no sequences, or what was kept is something else.
    """
    require_sequences(run)
    if name not in (extras := run.manifest.parts[0].extras):
        raise UsageError(f"{run.folder} kept {', '.join(extras) or 'no extras'}, and not {name}; capture it with --keep {keep}")


def bundled(run: Run, seed: int) -> tuple[Integer[np.ndarray, " S"], int]:
    """The bundle of each sequence, and how many there are."""
    bundle = stats.bundles(len(run.sequences), seed=seed)
    return bundle, int(bundle.max()) + 1


def layer_batches(
    run: Run, layer: int, names: Sequence[str], *, weights: bool = False
) -> Iterator[tuple[TokenBatch, np.ndarray]]:
    """The tokens of one layer, and the first extra named [N K] or [N]."""
    for batch in run.batches(layers=[layer], weights=weights, columns=names):
        yield batch, batch.extra[names[0]][:, 0]


def sums_by_bundle(
    bundle: Integer[np.ndarray, " N"], ids: Integer[np.ndarray, "N K"], values: np.ndarray, shape: tuple[int, int]
) -> Float64[np.ndarray, "B E"]:
    """Sum a value of every choice by bundle and expert."""
    cells = (bundle[:, None].astype(np.int64) * shape[1] + ids).ravel()
    return np.bincount(cells, weights=values.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
