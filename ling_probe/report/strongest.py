"""Tokens that speak for an expert: where it was strongest, in context, and what its output raised or lowered.

The run is streamed, and read a second time for texts alone.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ling_probe.run import Run, TokenBatch
from ling_probe.shown import visible

Expert = tuple[int, int]
AROUND = 10
"""Tokens shown before and after."""
TOKEN = 40
"""Letters of a token that are shown."""
LEAST = 10
"""Choices before a written token that are enough for a mean."""


def strongest_tokens(run: Run, experts: Sequence[Expert], *, n: int) -> dict[Expert, list[dict[str, Any]]]:
    """For each expert the tokens where it added most, one a sequence at most, strongest first.

    Each with `sequence_id`, `position`, `before`, `token`, `after`, `strength` and its `measure`: the norm of the weighted
    output where the run kept contributions, else the routing weight.
    """
    measure = "contribution" if "contribution" in _extras(run) else "weight"
    best: dict[Expert, pd.DataFrame] = {}
    layers = sorted({layer for layer, _ in experts})
    columns = ["contribution"] if measure == "contribution" else []
    for part, batch in enumerate(run.batches(layers=layers, weights=measure == "weight", columns=columns)):
        values = batch.extra["contribution"] if columns else batch.weights
        assert values is not None
        for expert in experts:
            row = layers.index(expert[0])
            found = _strongest(batch, batch.expert_ids[:, row] == expert[1], values[:, row]).assign(part=part)
            best[expert] = _first(pd.concat([best[expert], found]) if expert in best else found, n)
    texts, ids = _contexts(run, best.values()), run.sequences["sequence_id"]
    return {
        expert: [
            {"sequence_id": ids.iloc[sequence], "position": position, **texts[sequence, position]}
            | {"strength": strength, "measure": measure}
            for sequence, position, strength in _rows(best[expert], "sequence", "position", "strength")
        ]
        for expert in experts
    }


def written_tokens(run: Run, experts: Sequence[Expert], *, n: int) -> dict[Expert, dict[str, list[dict[str, Any]]]]:
    """For each expert the written tokens that its output `promoted` most and `demoted` most, directly and on average.

    Each with `token`, `mean` in logits and `count`, the times it was chosen for the token before, at least ten. Empty where
    the run did not keep lens.
    """
    if "lens" not in _extras(run):
        return {}
    layers = sorted({layer for layer, _ in experts})
    sums: dict[Expert, pd.DataFrame] = {}
    words: dict[int, str] = {}
    for batch in run.batches(layers=layers, columns=["lens", "token"]):
        following = np.append(batch.token_id[1:], -1)
        following[np.append(np.diff(batch.sequence) != 0, True)] = -1
        for expert in experts:
            row = layers.index(expert[0])
            here = (batch.expert_ids[:, row] == expert[1]) & (following >= 0)[:, None]
            next_id = np.broadcast_to(following[:, None], here.shape)[here]
            added = pd.DataFrame({"token_id": next_id, "total": batch.extra["lens"][:, row][here].astype(float), "count": 1})
            both = pd.concat([sums[expert], added]) if expert in sums else added
            sums[expert] = both.groupby("token_id", as_index=False).sum()
        ids, rows = np.unique(batch.token_id, return_index=True)
        words = dict(zip(ids.tolist(), batch.extra["token"][rows], strict=True)) | words
    return {expert: _extremes(table, words, n) for expert, table in sums.items()}


def _extremes(table: pd.DataFrame, words: dict[int, str], n: int) -> dict[str, list[dict[str, Any]]]:
    often = table[table["count"] >= LEAST].assign(mean=lambda rows: rows["total"] / rows["count"])
    ordered = often.sort_values(["mean", "token_id"], ascending=[False, True])
    ends = {"promoted": ordered[ordered["mean"] > 0].head(n), "demoted": ordered[ordered["mean"] < 0].tail(n)[::-1]}
    return {
        name: [
            {"token": visible(words[token_id], most=TOKEN), "mean": mean, "count": count}
            for token_id, mean, count in _rows(rows, "token_id", "mean", "count")
        ]
        for name, rows in ends.items()
    }


def _strongest(batch: TokenBatch, here: np.ndarray, values: np.ndarray) -> pd.DataFrame:
    token, slot = np.nonzero(here)
    columns = {"sequence": batch.sequence[token], "position": batch.position[token]}
    return pd.DataFrame(columns | {"strength": values[token, slot].astype(float)})


def _first(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    ordered = rows.sort_values(["strength", "sequence", "position"], ascending=[False, True, True])
    return ordered.drop_duplicates("sequence").head(n)


def _contexts(run: Run, found: Iterable[pd.DataFrame]) -> dict[tuple[int, int], dict[str, str]]:
    """Text around each (sequence, position), read from the parts that hold one."""
    places = pd.concat([rows[["part", "sequence", "position"]] for rows in found]).drop_duplicates()
    texts = {}
    for number, rows in places.groupby("part"):
        (batch,) = run.batches(layers=[], columns=["token"], parts=[int(str(number))])
        words, starts = batch.extra["token"], np.searchsorted(batch.sequence, rows["sequence"])
        ends = np.searchsorted(batch.sequence, rows["sequence"], side="right")
        for (sequence, position), start, end in zip(_rows(rows, "sequence", "position"), starts, ends, strict=True):
            here = start + position
            texts[sequence, position] = {
                "before": _joined(words[max(start, here - AROUND) : here]),
                "token": _joined(words[here : here + 1]),
                "after": _joined(words[here + 1 : min(end, here + 1 + AROUND)]),
            }
    return texts


def _joined(words: Iterable[str]) -> str:
    return "".join(visible(word, most=TOKEN) for word in words)


def _rows(table: pd.DataFrame, *names: str) -> list[tuple[Any, ...]]:
    """Columns as rows of plain values."""
    return list(zip(*(table[name].tolist() for name in names), strict=True))


def _extras(run: Run) -> tuple[str, ...]:
    return run.manifest.parts[0].extras if run.manifest.parts else ()
