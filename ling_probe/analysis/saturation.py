"""How early in training a router settled: checkpoints against the run asked about, the last of them.

The measure of OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): the share of a token's final experts that an earlier
checkpoint chose already. Two routers that know nothing of each other share some, the more the less even their loads are; and
routers that only read the token share more without having learnt to read the context. Both stand beside it.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ling_probe.analysis.agreement import agreement_columns, measure_agreement
from ling_probe.analysis.comparable import require_comparable, require_shared, run_names
from ling_probe.analysis.question import Analysis, Finding, Verdict, in_order, percent
from ling_probe.run import Run

SETTLED = 0.8
"""Agreement with the last checkpoint from which a layer counts as settled."""


def router_saturation(runs: Sequence[Run], *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Share of the final experts that each earlier checkpoint chose for the same tokens.

    One row a checkpoint and layer, earlier checkpoints first: `checkpoint`, `step` of training (from a name that ends in
    "@step-N", else missing), and as in `route_agreement` `tokens`, `sequences`, `agreement` (the saturation) with `ci_low` and
    `ci_high`, `chance`, `token_agreement`, `beyond_token` with `beyond_low` and `beyond_high`; `above_chance` is the agreement
    on a scale from chance (0) to all (1).

    Args:
        runs: The final model, then its checkpoints.
        draws: Bootstrap samples.
        seed: Of samples and random places.

    Raises:
        UsageError: The runs cannot be compared, or are of models trained apart.
    """
    require_comparable(runs)
    final, names = runs[0], run_names(runs)
    tables = []
    for name, checkpoint in zip(names[1:], runs[1:], strict=True):
        shared = require_shared(final, checkpoint)
        total = measure_agreement(final, checkpoint, shared, seed=seed)
        table = pd.DataFrame(agreement_columns(total, shared, draws=draws, seed=seed))
        above = (table["agreement"] - table["chance"]) / (1 - table["chance"])
        tables.append(table.assign(checkpoint=name, step=snapshot_step(checkpoint), above_chance=above))
    table = pd.concat(tables, ignore_index=True).assign(seed=seed).astype({"step": "Int64"})
    table = table.sort_values(["step", "layer"], kind="stable", ignore_index=True)
    front = ["checkpoint", "step", "layer"]
    return table[[*front, *(name for name in table.columns if name not in front)]]


def snapshot_step(run: Run) -> int | None:
    """Step of training of a run's model, if its name ends in "@step-N"."""
    found = re.search(r"@step-(\d+)$", str(run.manifest.model.get("name", "")))
    return int(found[1]) if found else None


def _finding(table: pd.DataFrame) -> Finding:
    first = table[table["checkpoint"] == table["checkpoint"].iloc[0]]
    slow, fast = (first.iloc[int(place(first["agreement"]))] for place in (np.argmin, np.argmax))
    curve = table.groupby("checkpoint", sort=False)[["agreement", "chance", "token_agreement"]].mean()
    told = "; ".join(f"{name} {percent(share)}" for name, share in curve["agreement"].items())
    beyond = (table["beyond_low"] > 0).groupby(table["checkpoint"], sort=False).mean()
    return Finding(
        sentence=(
            f"Share of the final experts, mean over layers: {told} (loads alone {percent(curve['chance'].iloc[-1])}, the same "
            f"token elsewhere {percent(curve['token_agreement'].iloc[-1])} at the last). At {slow['checkpoint']} layer "
            f"{slow['layer']} is the least settled ({percent(slow['agreement'])}, 95 % interval {percent(slow['ci_low'])} to "
            f"{percent(slow['ci_high'])}), layer {fast['layer']} the most ({percent(fast['agreement'])})."
        ),
        verdict=_verdict(first),
        rung=2 if beyond.iloc[0] == 1 else 1,
        effect=float(slow["agreement"]),
        unit="share of the final experts",
        ci_low=float(slow["ci_low"]),
        ci_high=float(slow["ci_high"]),
        token_effect=float(slow["token_agreement"]),
    )


def _verdict(first: pd.DataFrame) -> Verdict:
    if (first["ci_low"] >= SETTLED).all():
        return Verdict.SUPPORTED
    return Verdict.NOT_SUPPORTED if (first["ci_high"] < SETTLED).any() else Verdict.CANNOT_TELL


ROUTER_SATURATION = Analysis(
    function=router_saturation,
    question="How early in training did the router settle?",
    claim="At the earliest checkpoint compared, every layer chooses at least 80 % of the final experts.",
    method=(
        "Experts that a checkpoint and the final model both chose over K, on the tokens of shared sequences; intervals from a "
        "bootstrap over sequences. Nulls: independent routers of these loads, and the same token in another sequence."
    ),
    order=in_order,
    finding=_finding,
    compares=True,
)
