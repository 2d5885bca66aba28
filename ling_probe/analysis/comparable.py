"""Which runs may be compared, and the sequences they share.

Every comparison reads several runs, and is refused where its numbers would mean nothing:

- routers of another geometry, or another tokenizer, have nothing to line up;
- tokens can be compared one by one only where both runs read the same text;
- expert 5 of one model is expert 5 of another only if both are checkpoints of one training (or one was tuned from the other).
  Checkpoints that share a name up to its "@" are taken at their word. For others it is tested: if the numbering were unrelated,
  any relabelling of the second model's experts would agree with the first as well as the true one does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.counting import require_sequences
from ling_probe.errors import UsageError
from ling_probe.run import Run

GEOMETRY = {
    "routed_layers": "routed layers",
    "n_experts": "experts",
    "top_k": "top-k",
    "n_groups": "groups",
    "topk_groups": "chosen groups",
    "vocab_size": "vocabulary",
}
"""What must be the same in every compared run, and what messages call it."""
RELABELLINGS = 999


@dataclass(frozen=True, eq=False)
class Shared:
    """Sequences that two runs have in common, in the order of the first."""

    rows: Integer[np.ndarray, " P"]
    """In `sequences` of the first run."""
    others: Integer[np.ndarray, " P"]
    """In those of the other."""


def require_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs that no comparison can take.

    Raises:
        UsageError: Fewer than two, an empty one, one given twice, or another geometry or tokenizer than the first's.
    """
    if len(runs) < 2:
        raise UsageError("a comparison needs two runs; name another one with --against")
    for run in runs:
        require_sequences(run)
    first = runs[0]
    for other in runs[1:]:
        if first.folder.resolve() == other.folder.resolve():
            raise UsageError(f"{first.folder} is compared with itself; name another run")
        _check_pair(first, other)


def _check_pair(first: Run, other: Run) -> None:
    for name, word in GEOMETRY.items():
        here, there = getattr(first.spec, name), getattr(other.spec, name)
        if here != there:
            raise UsageError(
                f"{first.folder} has {word} {_told(here)} and {other.folder} {_told(there)}; only runs of one geometry compare"
            )
    digests = [run.manifest.model.get("tokenizer_digest") for run in (first, other)]
    if None not in digests and digests[0] != digests[1]:
        raise UsageError(f"{first.folder} and {other.folder} were read by other tokenizers; only runs of one tokenizer compare")


def _told(value: int | tuple[int, ...]) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def shared_sequences(first: Run, other: Run) -> Shared:
    """Sequences of the same id; there may be none."""
    others = pd.Index(other.sequences["sequence_id"]).get_indexer(first.sequences["sequence_id"])
    rows = np.flatnonzero(others >= 0)
    return Shared(rows, others[rows])


def require_shared(first: Run, other: Run) -> Shared:
    """The shared sequences, of which there must be some.

    Raises:
        UsageError: None is shared.
    """
    shared = shared_sequences(first, other)
    if not len(shared.rows):
        raise UsageError(
            f"{first.folder} and {other.folder} share none of their {len(first.sequences)} and {len(other.sequences)} "
            "sequences; capture the same problems with both models"
        )
    return shared


def run_names(runs: Sequence[Run]) -> list[str]:
    """What tables call the runs: their models, or their folders where two have the same model."""
    for names in ([str(run.manifest.model.get("name", run.spec.name)) for run in runs], [run.folder.name for run in runs]):
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def same_training(first: Run, other: Run) -> bool:
    """Whether two runs are of one model, or of snapshots of one by their names."""
    models = [run.manifest.model for run in (first, other)]
    digests = [model.get("digest") for model in models]
    names = [str(model.get("name", run.spec.name)).partition("@")[0] for model, run in zip(models, (first, other), strict=True)]
    return names[0] == names[1] or (digests[0] is not None and digests[0] == digests[1])


def require_same_experts(first: Run, other: Run, together: Float64[np.ndarray, "M E E"] | None) -> None:
    """Refuse two models whose expert numbers have nothing to do with each other.

    Args:
        first: A run.
        other: A comparable one.
        together: How often tokens that both read chose an expert of the first and one of the other; None if they share none.

    Raises:
        UsageError: Another model's name, and no sign that its experts are numbered alike.
    """
    if same_training(first, other):
        return
    names = " and ".join(str(run.manifest.model.get("name", run.spec.name)) for run in (first, other))
    if together is None:
        raise UsageError(
            f"{names} share no text, so nothing tells whether their experts are numbered alike; capture the same one"
        )
    if numbering_p(together) > 0.01:
        raise UsageError(
            f"{names} choose as if the experts of one were numbered at random by the other; expert numbers compare only within "
            "one training"
        )


def numbering_p(together: Float64[np.ndarray, "M E E"], *, relabellings: int = RELABELLINGS, seed: int = 0) -> float:
    """P value of the numbering that two models share: of random ones, how many agree as well over all layers."""
    rng = np.random.default_rng(seed)
    layers, n_experts = len(together), together.shape[-1]
    observed = sum(float(np.trace(layer)) for layer in together)
    experts = np.arange(n_experts)
    random = [
        sum(float(together[row, experts, rng.permutation(n_experts)].sum()) for row in range(layers))
        for _ in range(relabellings)
    ]
    return float(stats.permutation_p(np.array((np.array(random) >= observed).sum()), relabellings))
