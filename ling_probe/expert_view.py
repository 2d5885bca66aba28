"""One expert of a run, and the list of all: the tables behind the explorer's page of experts.

What analyses found is picked from their tables; only the tokens an expert is surest of, and those it writes towards, are read
from the run. Texts come out as they were recorded; whoever shows them escapes them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
from jaxtyping import Integer

from ling_probe.analysis import surest_first
from ling_probe.analysis.promoted import promoted_tokens
from ling_probe.analysis.question import DISCOVERY
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch
from ling_probe.run.one import find_sequence, part_file, sequence_rows
from ling_probe.run.tables import read_table

Tables = Mapping[str, pd.DataFrame | UsageError]
"""Tables of a run by analysis name, or why the run has none."""

LISTED = (
    "expert_load",
    "label_specialisation",
    "family_specialisation",
    "expert_saliency",
    "logit_attribution",
    "causal_effects",
)
"""Analyses that `expert_list` reads; only the first must have a table."""
NEEDED = (*LISTED, "enrichment", "coactivation")
"""Analyses that `expert_facts` reads."""
AROUND = 8
"""Tokens shown on each side of one in its context."""


def expert_list(run: Run, tables: Tables) -> pd.DataFrame:
    """One row a layer and expert, in their order, with what the analyses found of it.

    - `group`, `count` choices, `load` their share of the layer's, `load_ratio` that over the even share and `load_log2` its
      log2, `load_q`, and `weight`, the mean share of a token's routing weight when chosen (even: 1/K);
    - the class it most surely prefers (q below 0.05 before the rest, then by the interval's lower end): `label` and `family`,
      each with `_log2_ratio` at equal words, `_low` and `_high` (95 % interval, not widened for the choice among classes),
      `_q`, and `_sure`, whether q is below 0.05 and the interval above 0;
    - where the run has them: `saliency` (mean norm of what it adds) and `logits` (mean direct attribution to the next token),
      each with `_low` and `_high`; `excess` with `_low`, `_high` and `_q`: what a change of the expert, with others that prefer
      the same label, costs that label's steps beyond matched experts (nats a token; the largest lower end).

    Raises:
        UsageError: There is no table of loads.
    """
    load = _required(tables, "expert_load")
    table = load[["layer", "expert", "count", "load"]].assign(
        group=load["expert"] // run.spec.group_size,
        load_ratio=load["load"] * run.spec.n_experts,
        load_log2=load["log2_ratio"],
        load_q=load["q"],
        weight=(load["importance"] / load["load"].where(load["load"] > 0)) / run.spec.top_k,
    )
    for kind in ("label", "family"):
        table = _joined(table, _preferred(tables.get(f"{kind}_specialisation"), kind))
    table = _joined(table, _measured(tables.get("expert_saliency"), "saliency", "saliency"))
    table = _joined(table, _measured(tables.get("logit_attribution"), "mean", "logits"))
    return _joined(table, _changed(tables.get("causal_effects")))


def expert_facts(
    run: Run,
    layer: int,
    expert: int,
    tables: Tables,
    *,
    largest: pd.DataFrame | None = None,
    promoted: pd.DataFrame | UsageError | None = None,
) -> dict[str, Any]:
    """All that is known of one expert, by name; what the run cannot answer is a UsageError that says why.

    - `row`: its row of `expert_list`, as plain values;
    - `labels`, `families`: its rows of the specialisations, surest first;
    - `tokens`: its rows of `enrichment` of kind token, the most enriched first;
    - `neighbours`: experts chosen with it more or less often than groups and loads explain: `other`, `same_group`, `count`,
      `expected`, `lift`, `ci_low`, `ci_high`, `p`, `q`, surest first;
    - `causal`: rows of `causal_effects` whose changed experts include it, with `together`, how many were changed;
    - `contexts`: see `in_context`;
    - `promoted`: see `promoted_tokens`.

    Args:
        run: The run.
        layer: A decoder layer.
        expert: Number of the expert in it.
        tables: See `NEEDED`.
        largest: `largest_weights` of the layer, if it is at hand; one pass over the run otherwise.
        promoted: `promoted_tokens` of the layer, if at hand, or why there are none.

    Raises:
        UsageError: There is no such expert, or no table of loads.
    """
    run.spec.row(layer)
    if not 0 <= expert < run.spec.n_experts:
        raise UsageError(f"no expert {expert} in layer {layer}; they count from 0 to {run.spec.n_experts - 1}")
    listed = expert_list(run, {name: of_layer(tables.get(name), layer) for name in LISTED})
    largest = largest_weights(run, layer) if largest is None else largest
    promoted = _promoted(run, layer) if promoted is None else promoted
    return {
        "row": listed.loc[listed["expert"] == expert].iloc[0].to_dict(),
        "labels": _its_rows(tables, "label_specialisation", layer, expert),
        "families": _its_rows(tables, "family_specialisation", layer, expert),
        "tokens": _its_tokens(tables, layer, expert),
        "neighbours": _its_neighbours(run, tables, layer, expert),
        "causal": _its_changes(tables, layer, expert),
        "contexts": in_context(run, _rows_of(largest, expert)),
        "promoted": promoted if isinstance(promoted, UsageError) else _rows_of(promoted, expert),
    }


def largest_weights(run: Run, layer: int, *, top: int = 8) -> pd.DataFrame:
    """The tokens to which each expert of a layer gave its largest weights, one a sequence at most.

    One row an expert and token, largest first: layer, expert, `sequence` (row in `Run.sequences`), `position`, `weight`. One
    pass over the layer; memory is a part's and does not grow with the run.

    Args:
        run: The run.
        layer: A decoder layer.
        top: Tokens of each expert.
    """
    n_experts = run.spec.n_experts
    best = np.full((top, n_experts), -np.inf, np.float32)
    place = np.full((2, top, n_experts), -1, np.int64)
    for batch in run.batches(layers=[layer], weights=True):
        weight, row = _largest_by_sequence(batch, n_experts)
        weight, found = np.concatenate([best, weight]), np.stack([batch.sequence[row], batch.position[row]])
        kept = np.argsort(-weight, axis=0, kind="stable")[:top]
        best = np.take_along_axis(weight, kept, 0)
        place = np.take_along_axis(np.concatenate([place, found], axis=1), kept[None], 1)
    rank, expert = np.indices(best.shape)
    rows = {"layer": layer, "expert": expert.T.ravel(), "rank": rank.T.ravel()}
    rows |= {"sequence": place[0].T.ravel(), "position": place[1].T.ravel(), "weight": best.T.ravel()}
    table = pd.DataFrame(rows)
    return table[np.isfinite(table["weight"])].drop(columns="rank").reset_index(drop=True)


def _largest_by_sequence(batch: TokenBatch, n_experts: int) -> tuple[np.ndarray, Integer[np.ndarray, "s E"]]:
    """The largest weight each sequence of a part gave each expert, and the row of the token that got it."""
    assert batch.weights is not None
    _, sequence = np.unique(batch.sequence, return_inverse=True)
    n_sequences = int(sequence.max(initial=-1)) + 1
    cell = (sequence[:, None] * n_experts + batch.expert_ids[:, 0]).ravel()
    weight = batch.weights[:, 0].ravel()
    best = np.full(n_sequences * n_experts, -np.inf, np.float32)
    np.maximum.at(best, cell, weight)
    # Written from the last to the first, so that of equals the first token stays.
    reached = np.flatnonzero(weight == best[cell])[::-1]
    row = np.zeros(len(best), np.int64)
    row[cell[reached]] = reached // batch.expert_ids.shape[2]
    return best.reshape(n_sequences, n_experts), row.reshape(n_sequences, n_experts)


def in_context(run: Run, rows: pd.DataFrame, *, around: int = AROUND) -> pd.DataFrame:
    """Tokens with a few before and after: the rows, with `problem` (its sequence's id), `token`, `label`, `before`, `after`.

    Args:
        run: The run.
        rows: With `sequence` and `position`, as `largest_weights` gives them.
        around: Tokens on each side, at most.

    Raises:
        RunError: A file is damaged.
    """
    found = [
        _context(run, sequence, position, around)
        for sequence, position in zip(rows["sequence"].tolist(), rows["position"].tolist(), strict=True)
    ]
    columns = ["problem", "token", "label", "before", "after"]
    return rows.reset_index(drop=True).join(pd.DataFrame(found, columns=columns, dtype=str))


def _context(run: Run, sequence: int, position: int, around: int) -> tuple[str, str, str, str, str]:
    part, sequence_id = find_sequence(run, sequence)
    place = ds.field("position")
    near = (place >= position - around) & (place <= position + around)
    rows = sequence_rows(part_file(run, part, "tokens"), sequence_id, ["position", "token", "step"], near).to_pandas()
    here = int(np.flatnonzero(rows["position"] == position)[0])
    texts, step = rows["token"].tolist(), int(rows["step"].iloc[here])
    label = _label(run, part, sequence_id, step) if step >= 0 else ""
    return sequence_id, texts[here], label, "".join(texts[:here]), "".join(texts[here + 1 :])


def _label(run: Run, part: str, sequence_id: str, step: int) -> str:
    steps = read_table(part_file(run, part, "steps"), ["sequence_id", "step", "label"]).to_pandas()
    return str(steps.loc[(steps["sequence_id"] == sequence_id) & (steps["step"] == step), "label"].iloc[0])


def _required(tables: Tables, name: str) -> pd.DataFrame:
    table = tables.get(name, UsageError(f"{name} was not asked for"))
    if isinstance(table, UsageError):
        raise table
    return table


def _rows_of(table: pd.DataFrame, expert: int) -> pd.DataFrame:
    return table[table["expert"] == expert].reset_index(drop=True)


def of_layer(table: pd.DataFrame | UsageError | None, layer: int) -> pd.DataFrame | UsageError:
    """The rows of one layer of a table, all of one without layers; what is missing was not asked for."""
    if table is None:
        return UsageError("not asked for")
    if isinstance(table, UsageError) or "layer" not in table:
        return table
    return table[table["layer"] == layer]


def _joined(table: pd.DataFrame, more: pd.DataFrame | None) -> pd.DataFrame:
    return table if more is None else table.merge(more, on=["layer", "expert"], how="left")


def _preferred(table: pd.DataFrame | UsageError | None, kind: str) -> pd.DataFrame | None:
    if not isinstance(table, pd.DataFrame):
        return None
    rows = table.dropna(subset="ci_low")
    sure = (rows["q"] < DISCOVERY) & (rows["ci_low"] > 0)
    rows = rows.assign(sure=sure).iloc[np.lexsort((-rows["ci_low"], ~sure))].drop_duplicates(["layer", "expert"])
    names = {"log2_ratio": f"{kind}_log2_ratio", "ci_low": f"{kind}_low", "ci_high": f"{kind}_high", "q": f"{kind}_q"}
    names["sure"] = f"{kind}_sure"
    return rows.rename(columns=names)[["layer", "expert", kind, *names.values()]]


def _measured(table: pd.DataFrame | UsageError | None, column: str, name: str) -> pd.DataFrame | None:
    if not isinstance(table, pd.DataFrame):
        return None
    names = {column: name, "ci_low": f"{name}_low", "ci_high": f"{name}_high"}
    return table.rename(columns=names)[["layer", "expert", *names.values()]]


def _changed(table: pd.DataFrame | UsageError | None) -> pd.DataFrame | None:
    """The surest change of each expert that was changed."""
    if not isinstance(table, pd.DataFrame):
        return None
    rows = table[table["measure"] == "selectivity"].rename(columns={"q": "excess_q"})
    rows = rows.assign(cell=rows["experts"].str.split()).explode("cell").dropna(subset="cell")
    for column, place in (("layer", 0), ("expert", 1)):
        rows[column] = np.array([cell.split(".")[place] for cell in rows["cell"]], dtype=np.int64)
    rows = rows.sort_values("excess_low", ascending=False, kind="stable").drop_duplicates(["layer", "expert"])
    return rows[["layer", "expert", "excess", "excess_low", "excess_high", "excess_q"]]


def _its_rows(tables: Tables, name: str, layer: int, expert: int) -> pd.DataFrame | UsageError:
    table = of_layer(tables.get(name), layer)
    if isinstance(table, UsageError):
        return table
    return surest_first(table[table["expert"] == expert]).reset_index(drop=True)


def _its_tokens(tables: Tables, layer: int, expert: int) -> pd.DataFrame | UsageError:
    table = of_layer(tables.get("enrichment"), layer)
    if isinstance(table, UsageError):
        return table
    rows = table[(table["expert"] == expert) & (table["kind"] == "token")]
    return rows.sort_values("pmi", ascending=False, kind="stable").reset_index(drop=True)


def _its_neighbours(run: Run, tables: Tables, layer: int, expert: int) -> pd.DataFrame | UsageError:
    table = of_layer(tables.get("coactivation"), layer)
    if isinstance(table, UsageError):
        return table
    rows = table[(table["expert"] == expert) | (table["other"] == expert)]
    other = rows["other"].where(rows["expert"] == expert, rows["expert"])
    rows = rows.assign(other=other, expert=expert, same_group=other // run.spec.group_size == expert // run.spec.group_size)
    return surest_first(rows).reset_index(drop=True)


def _its_changes(tables: Tables, layer: int, expert: int) -> pd.DataFrame | UsageError:
    table = tables.get("causal_effects", UsageError("not asked for"))
    if isinstance(table, UsageError):
        return table
    cells = [each.split() for each in table["experts"]]
    held = np.array([f"{layer}.{expert}" in each for each in cells], dtype=bool)
    if not held.any():
        return UsageError("the causal study of this run changed other experts")
    return table.assign(together=list(map(len, cells)))[held].reset_index(drop=True)


def _promoted(run: Run, layer: int) -> pd.DataFrame | UsageError:
    try:
        return promoted_tokens(run, layer)
    except UsageError as error:
        return error
