"""One sequence token by token: why each expert was chosen, and what it would take to choose another."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from ling_probe import routing
from ling_probe.analysis.choice_reasons import REASONS
from ling_probe.analysis.counting import require_sequences
from ling_probe.analysis.router import RouterBatch, router_bias, some_tokens
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.run.tables import read_batch


def token_reasons(run: Run, sequence: int) -> pd.DataFrame:
    """Why each expert of each token of one sequence was chosen, and how far it is from a flip.

    One row a token, layer and slot: `position`, `layer`, `slot`, `expert`, `weight`, `score` (sigmoid of the logit), `bias`,
    `reason` (one of `REASONS`, "unknown" where the stored logits give another choice than the recorded one), and `distance`,
    how far the expert's score would have to fall for it not to be chosen (NaN where unknown, infinite where nothing could).

    Args:
        run: A run captured with `--keep logits`.
        sequence: Row in `Run.sequences`.

    Raises:
        UsageError: The run kept no logits, its routing was changed, or there is no such row.
    """
    tables = [_chosen_rows(batch).assign(layer=layer) for layer, batch in _sequence(run, sequence)]
    table = pd.concat(tables).sort_values(["position", "layer", "slot"], ignore_index=True)
    return table[["position", "layer", *table.columns.drop(["position", "layer"])]]


def token_experts(run: Run, sequence: int, position: int) -> pd.DataFrame:
    """What it would take to change each expert's part in one token.

    One row a layer and expert: `group`, whether the group is `kept`, whether the expert is `chosen` (as recorded), its `score`
    and `bias`, and `distance`: how far its score must rise to bring it in, or fall to drive it out, all others fixed
    (`routing.flip_distance`; NaN where the stored logits give another choice than the recorded one).

    Args:
        run: A run captured with `--keep logits`.
        sequence: Row in `Run.sequences`.
        position: The token's place in its sequence.

    Raises:
        UsageError: The run kept no logits, its routing was changed, or there is no such row or position.
    """
    tables = []
    for layer, whole in _sequence(run, sequence):
        here = np.flatnonzero(whole.tokens.position == position)
        if not len(here):
            raise UsageError(f"no position {position} in sequence {sequence}; it has {len(whole.ids)}, counted from 0")
        batch, spec = RouterBatch(some_tokens(whole.tokens, here), whole.bias, run.spec), run.spec
        group = np.arange(spec.n_experts) // spec.group_size
        columns = {
            "layer": layer,
            "expert": np.arange(spec.n_experts),
            "group": group,
            "kept": routing.kept_groups(batch.choice, spec)[0, group],
            "chosen": batch.recorded[0],
            "score": batch.scores[0],
            "bias": batch.bias,
            "distance": routing.flip_distance(batch.choice, spec)[0] if batch.agrees[0] else np.nan,
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _sequence(run: Run, sequence: int) -> Iterator[tuple[int, RouterBatch]]:
    """Each layer with the tokens of one sequence; only the part that holds it is read."""
    require_sequences(run)
    biases = router_bias(run)
    if not 0 <= sequence < len(run.sequences):
        raise UsageError(f"no sequence {sequence} in {run.folder}; it has {len(run.sequences)}, counted from 0")
    part = np.searchsorted(np.cumsum([part.sequences for part in run.manifest.parts]), sequence, side="right")
    path = run.folder / "parts" / run.manifest.parts[part].name / "tokens.parquet"
    ids = pd.Index(run.sequences["sequence_id"])
    for layer, bias in biases.items():
        whole = read_batch(path, run.spec, ids, layers=[layer], weights=True, columns=["logits"])
        yield layer, RouterBatch(some_tokens(whole, np.flatnonzero(whole.sequence == sequence)), bias, run.spec)


def _chosen_rows(batch: RouterBatch) -> pd.DataFrame:
    ids, known = batch.ids.astype(np.int64), np.repeat(batch.agrees, batch.spec.top_k)
    why = routing.reasons(batch.ids, batch.scores, batch.bias, batch.spec).ravel()
    far = np.take_along_axis(routing.flip_distance(batch.choice, batch.spec), ids, axis=-1).ravel()
    assert batch.tokens.weights is not None
    return pd.DataFrame(
        {
            "position": np.repeat(batch.tokens.position, batch.spec.top_k),
            "slot": np.tile(np.arange(batch.spec.top_k), len(ids)),
            "expert": ids.ravel(),
            "weight": batch.tokens.weights[:, 0].ravel(),
            "score": np.take_along_axis(batch.scores, ids, axis=-1).ravel(),
            "bias": batch.bias[ids].ravel(),
            "reason": np.where(known, np.array(REASONS)[why], "unknown"),
            "distance": np.where(known, far, np.nan),
        }
    )
