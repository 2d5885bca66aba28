"""Experts worth a page of their own, and what the run tells about each: tables cut to one expert, and tokens in context."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ling_probe.analysis import surest_first, surest_picked
from ling_probe.analysis.causal_effects import deciding
from ling_probe.errors import UsageError
from ling_probe.report.strongest import strongest_tokens, written_tokens
from ling_probe.run import Run
from ling_probe.shown import records
from ling_probe.spec import ModelSpec

MOST = 60
"""Experts of a report, which keeps the page small whatever the model."""
PER_LAYER = 3
SHOWN = 5
"""Rows of each table of an expert."""
Tables = Mapping[str, pd.DataFrame | UsageError]
Expert = tuple[int, int]
"""Layer and number."""


def named_experts(names: Sequence[str], spec: ModelSpec) -> list[Expert]:
    """Experts from names such as 4.20, layer before the dot.

    Raises:
        UsageError: A name is none, there is no such expert, or there are more than `MOST`.
    """
    if len(names) > MOST:
        raise UsageError(f"{len(names)} experts named; a report tells of {MOST} at most")
    return [_named(name, spec) for name in names]


def chosen_experts(spec: ModelSpec, tables: Tables, named: Sequence[Expert] = ()) -> list[Expert]:
    """The experts named, and the most specialised of each layer, in the order of layers.

    Those picked on one half of the problems come first, surest first by that half; then those that prefer a label or family on
    all, then those whose load is furthest from the even share.
    """
    each = max(1, min(PER_LAYER, MOST // spec.n_rows))
    ranked = _ranked(tables)
    picked = [row for layer in spec.routed_layers for row in [row for row in ranked if row[0] == layer][:each]]
    return sorted(dict.fromkeys([*named, *picked[: MOST - len(named)]]))


def told_experts(run: Run, tables: Tables, experts: Sequence[Expert]) -> list[dict[str, Any]]:
    """What the tables and the tokens tell of each expert, as plain values."""
    contexts = strongest_tokens(run, experts, n=SHOWN)
    written = written_tokens(run, experts, n=SHOWN)
    return [_told(tables, expert, contexts[expert], written.get(expert, {})) for expert in experts]


def _named(name: str, spec: ModelSpec) -> Expert:
    layer, _, expert = name.partition(".")
    if not (layer.isdecimal() and expert.isdecimal()):
        raise UsageError(f'no expert "{name}"; write layer and expert with a dot between, such as {spec.routed_layers[0]}.0')
    spec.row(int(layer))
    if int(expert) >= spec.n_experts:
        raise UsageError(f"no expert {expert} in layer {layer}; {spec.name} has {spec.n_experts} a layer, counted from 0")
    return int(layer), int(expert)


def _ranked(tables: Tables) -> list[Expert]:
    found = []
    for name in ("label_specialisation", "family_specialisation"):
        table = tables.get(name)
        if isinstance(table, pd.DataFrame):
            picked = surest_picked(table)
            found += [picked[picked["picked_low"] > 0], surest_first(table[(table["q"] < 0.05) & (table["ci_low"] > 0)])]
    load = tables.get("expert_load")
    if isinstance(load, pd.DataFrame):
        found.append(load.iloc[np.argsort(-load["log2_ratio"].abs().to_numpy(), kind="stable")])
    pairs = [pair for rows in found for pair in zip(rows["layer"].tolist(), rows["expert"].tolist(), strict=True)]
    return list(dict.fromkeys(pairs))


def _told(tables: Tables, expert: Expert, contexts: list[dict[str, Any]], written: dict[str, Any]) -> dict[str, Any]:
    labels = _preferences(tables, "label", expert)
    return {
        "layer": expert[0],
        "expert": expert[1],
        "load": next(iter(records(_of(tables, "expert_load", expert).head(1))), None),
        "labels": labels,
        "families": _preferences(tables, "family", expert),
        "neighbours": _neighbours(tables, expert),
        "tokens": contexts,
        "promoted": written.get("promoted", []),
        "demoted": written.get("demoted", []),
        "effects": _effects(tables, labels[0]["name"]) if labels and labels[0]["ci_low"] > 0 else [],
    }


def _of(tables: Tables, name: str, expert: Expert) -> pd.DataFrame:
    table = tables.get(name)
    if not isinstance(table, pd.DataFrame):
        return pd.DataFrame()
    return table[(table["layer"] == expert[0]) & (table["expert"] == expert[1])]


def _preferences(tables: Tables, kind: str, expert: Expert) -> list[dict[str, Any]]:
    rows = _of(tables, f"{kind}_specialisation", expert)
    if rows.empty:
        return []
    tested = surest_first(rows[rows["q"].notna()]).head(SHOWN).rename(columns={kind: "name"})
    columns = ["name", "log2_ratio", "ci_low", "ci_high", "q", "raw_log2_ratio", "held_out_log2_ratio", "replicated"]
    return records(tested[columns])


def _neighbours(tables: Tables, expert: Expert) -> list[dict[str, Any]]:
    table = tables.get("coactivation")
    if not isinstance(table, pd.DataFrame):
        return []
    here = table[(table["layer"] == expert[0]) & ((table["expert"] == expert[1]) | (table["other"] == expert[1]))]
    other = np.where(here["expert"] == expert[1], here["other"], here["expert"])
    tested = here.assign(other=other)[here["q"].notna().to_numpy()]
    return records(tested.nlargest(SHOWN, "ci_low")[["other", "count", "lift", "ci_low", "ci_high", "q"]])


def _effects(tables: Tables, label: str) -> list[dict[str, Any]]:
    """Causal effects on steps of a label: of its experts together, not of one."""
    table = tables.get("causal_effects")
    if not isinstance(table, pd.DataFrame):
        return []
    rows = deciding(table)
    columns = ["label", "kind", "dose", "measure", "excess", "excess_low", "excess_high", "q"]
    return records(rows[rows["label"] == label][columns].head(SHOWN))
