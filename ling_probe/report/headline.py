"""What a reader wants to know first about a run."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ling_probe import stats
from ling_probe.analysis import held_out, surest_first, surest_picked
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.shown import records


def headline(run: Run, tables: Mapping[str, pd.DataFrame | UsageError]) -> dict[str, Any]:
    """What a reader wants to know first, as plain values: what ran, how well it did, and the most specialised experts.

    `specialised` holds at most three distinct experts picked on one half of the problems (q below 0.05 there, the surest
    preference first: the interval's end nearest to 0 decides), with effect, interval and q on the other half. Where no half
    is enough to pick by, they are picked and measured on all problems. `specialised_note` says which, or why there are none.

    Args:
        run: The run.
        tables: Tables by analysis name; `label_specialisation` is read. A refusal says why there is no table.
    """
    manifest = run.manifest
    experts, note = _most_specialised(tables.get("label_specialisation", UsageError("label_specialisation was not asked for")))
    return {
        "model": str(manifest.model.get("name", run.spec.name)),
        "benchmark": " ".join(str(manifest.benchmark[key]) for key in ("name", "split") if manifest.benchmark.get(key)),
        "state": manifest.state,
        "sequences": len(run.sequences),
        "tokens": sum(part.tokens for part in manifest.parts),
        "steps": sum(part.steps for part in manifest.parts),
        "interventions": [each.to_dict() for each in manifest.interventions],
        "accuracy": _accuracy(run.sequences),
        "verification": dict(manifest.model.get("verification") or {}),
        "specialised": experts,
        "specialised_note": note,
    }


def _most_specialised(table: pd.DataFrame | UsageError) -> tuple[list[dict[str, Any]], str]:
    if isinstance(table, UsageError):
        return [], f"Not applicable: {table}."
    liked = table[(table["q"] < 0.05) & (table["ci_low"] > 0)]
    if liked.empty:
        return [], f"No expert's preference for a step label is significant (q below 0.05, {table['p'].count():,} tests)."
    picked = surest_picked(table)
    picked = picked[(picked["picked_low"] > 0) & picked["held_out_q"].notna()]
    experts = (surest_first(liked) if picked.empty else held_out(picked)).drop_duplicates(["layer", "expert"]).head(3)
    columns = ["layer", "expert", "label", "log2_ratio", "ci_low", "ci_high", "raw_log2_ratio", "q", "replicated"]
    note = f"{len(liked):,} of {table['p'].count():,} tested (layer, expert, label) cells are preferences beyond chance"
    if picked.empty:
        how = "Half of the problems are too few to pick by: these are picked and measured on the same, and will tend to shrink."
    else:
        how = (
            f"{len(picked):,} were picked on a random half of the problems, and {int(picked['replicated'].sum()):,} of them "
            "hold on the other; the first are told with their effects there."
        )
    return records(experts[columns]), f"{note} (q below 0.05). {how}"


def _accuracy(sequences: pd.DataFrame) -> list[dict[str, Any]]:
    """Share of correct answers with its Wilson interval by family, and over all where there are several."""
    judged = sequences[sequences["correct"].notna()]
    groups = [(str(family), rows) for family, rows in judged.groupby("family")]
    if len(groups) > 1:
        groups.append(("all", judged))
    return [_proportion(family, int(rows["correct"].sum()), len(rows)) for family, rows in groups]


def _proportion(family: str, correct: int, judged: int) -> dict[str, Any]:
    low, high = stats.wilson_interval(correct, judged)
    return {"family": family, "correct": correct, "judged": judged, "share": correct / judged, "ci_low": low, "ci_high": high}
