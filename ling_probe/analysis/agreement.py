"""How far two runs choose the same experts for the same tokens, and how far chance and the tokens alone would take them.

For every token that both runs read, and every layer, the agreement is the share of the K experts that both chose. Beside it:

- the loads: two routers that choose independently, each expert as often as these do, share the sum over experts of the product
  of both rates. It holds with a group limit too, as a mean asks nothing about how experts go together;
- the token: the same token id at a random place of another sequence, its choice in the second run against this one's in the
  first. What agreement has beyond it, both routers read from the context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import metrics, stats
from ling_probe.analysis.aligned import Aligned, aligned_batches, chosen_together
from ling_probe.analysis.comparable import (
    Shared,
    require_comparable,
    require_same_experts,
    require_shared,
    run_names,
    same_training,
)
from ling_probe.analysis.counting import sum_by
from ling_probe.analysis.margins import agreement_by_margin
from ling_probe.analysis.question import Analysis, Finding, Verdict, in_order, percent
from ling_probe.run import Run
from ling_probe.spec import ModelSpec

ALIKE = 0.99
"""Two runs route alike when they share at least so much of every choice."""


@dataclass
class Agreement:
    """What the tokens of two runs share, summed by bundle of sequences and layer."""

    spec: ModelSpec
    n_units: int
    tokens: Float64[np.ndarray, " U"] = field(init=False)
    common: Float64[np.ndarray, "U M"] = field(init=False)
    """Experts that both runs chose."""
    differ: Float64[np.ndarray, "U M"] = field(init=False)
    """Tokens whose choice differs."""
    so_far: Float64[np.ndarray, "U M"] = field(init=False)
    """Tokens whose choice differs in the layer or an earlier one."""
    paired: Float64[np.ndarray, " U"] = field(init=False)
    """Tokens with one of the same id in another sequence."""
    here: Float64[np.ndarray, "U M"] = field(init=False)
    """Experts these have in common with themselves in the other run."""
    elsewhere: Float64[np.ndarray, "U M"] = field(init=False)
    """Experts these have in common with the other run's choice in that other place."""
    loads: Float64[np.ndarray, "2 M E"] = field(init=False)
    """Choices of either run."""

    def __post_init__(self) -> None:
        by_layer = (self.n_units, self.spec.n_rows)
        self.tokens, self.paired = np.zeros(self.n_units), np.zeros(self.n_units)
        self.common, self.differ, self.so_far, self.here, self.elsewhere = (np.zeros(by_layer) for _ in range(5))
        self.loads = np.zeros((2, self.spec.n_rows, self.spec.n_experts))

    def add(self, batch: Aligned, unit: Integer[np.ndarray, " N"], rng: np.random.Generator) -> None:
        """Count a batch; `unit` is the bundle of each token."""
        common = metrics.overlap(batch.one, batch.other)
        differ = common < self.spec.top_k
        self.tokens += np.bincount(unit, minlength=self.n_units)
        for total, values in (
            (self.common, common),
            (self.differ, differ),
            (self.so_far, np.logical_or.accumulate(differ, axis=1)),
        ):
            total += sum_by(values.astype(float), unit, self.n_units)
        partner = same_token_elsewhere(batch.token_id, batch.sequence, rng)
        kept = partner >= 0
        self.paired += np.bincount(unit[kept], minlength=self.n_units)
        self.here += sum_by(common[kept].astype(float), unit[kept], self.n_units)
        elsewhere = metrics.overlap(batch.one[kept], batch.other[partner[kept]])
        self.elsewhere += sum_by(elsewhere.astype(float), unit[kept], self.n_units)
        for side, ids in enumerate((batch.one, batch.other)):
            for row in range(self.spec.n_rows):
                self.loads[side, row] += np.bincount(ids[:, row].ravel(), minlength=self.spec.n_experts)

    @property
    def chance(self) -> Float64[np.ndarray, " M"]:
        """Agreement of two independent routers with these loads."""
        rate = self.loads / max(self.tokens.sum(), 1)
        return (rate[0] * rate[1]).sum(axis=-1) / self.spec.top_k

    def share(self, weights: Float64[np.ndarray, "B U"]) -> Float64[np.ndarray, "B M"]:
        """Agreement in samples that hold each bundle so many times."""
        return weights @ self.common / (self.spec.top_k * (weights @ self.tokens))[:, None]

    def beyond_token(self, weights: Float64[np.ndarray, "B U"]) -> Float64[np.ndarray, "B M"]:
        """Agreement less that with the same token elsewhere, over tokens that have one."""
        paired = weights @ self.paired
        paired = np.where(paired > 0, paired, np.nan)
        return weights @ (self.here - self.elsewhere) / (self.spec.top_k * paired)[:, None]


def same_token_elsewhere(
    token_id: Integer[np.ndarray, " N"], sequence: Integer[np.ndarray, " N"], rng: np.random.Generator
) -> Integer[np.ndarray, " N"]:
    """For each token the place of another of its id, drawn at random; -1 where there is none, or it is in the same sequence."""
    order = np.lexsort((rng.random(len(token_id)), token_id))
    ordered = token_id[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    last = np.append(first[1:], len(ordered)) - 1
    following = np.arange(1, len(ordered) + 1)
    following[last] = first
    partner = np.empty(len(order), np.int64)
    partner[order] = order[following]
    return np.where(sequence[partner] == sequence, -1, partner)


def measure_agreement(first: Run, other: Run, shared: Shared, *, seed: int = 0) -> Agreement:
    """Stream both runs once.

    Raises:
        UsageError: A shared sequence has other tokens, or the models number their experts at random.
    """
    together = None if same_training(first, other) else chosen_together(first, other, shared)
    require_same_experts(first, other, together)
    unit, rng = stats.bundles(len(shared.rows), seed=seed), np.random.default_rng(seed)
    total = Agreement(first.spec, int(unit.max()) + 1)
    for batch in aligned_batches(first, other, shared):
        total.add(batch, unit[batch.sequence], rng)
    return total


def agreement_columns(total: Agreement, shared: Shared, *, draws: int, seed: int) -> dict[str, object]:
    """Columns that every table of agreement has, one row a layer."""
    everything = np.ones((1, total.n_units))
    weights = stats.bootstrap_weights(total.n_units, draws=draws, seed=seed)
    low, high = stats.percentile_interval(total.share(weights))
    beyond_low, beyond_high = stats.percentile_interval(total.beyond_token(weights))
    paired = total.paired.sum()
    return {
        "layer": total.spec.routed_layers,
        "tokens": int(total.tokens.sum()),
        "sequences": len(shared.rows),
        "agreement": total.share(everything)[0],
        "ci_low": low,
        "ci_high": high,
        "chance": total.chance,
        "token_agreement": total.elsewhere.sum(axis=0) / (total.spec.top_k * paired) if paired else np.nan,
        "beyond_token": total.beyond_token(everything)[0],
        "beyond_low": beyond_low,
        "beyond_high": beyond_high,
    }


def route_agreement(runs: Sequence[Run], *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How far other runs choose the experts that the first one chose for the same tokens.

    One row a run compared with (`against`) and layer: `tokens` and `sequences` that both read, of `sequences_of_run` and
    `sequences_of_other`; `agreement`, the share of chosen experts in common, with its 95 % bootstrap interval over sequences
    (`ci_low`, `ci_high`); `chance`, what the loads alone make of it; `token_agreement`, with the same token at a random place
    of another sequence, and `beyond_token` the difference to it with its interval (`beyond_low`, `beyond_high`);
    `decisions_differ`, the share of choices that are not the same set, and `differ_so_far`, the share of tokens with one in the
    layer or an earlier one: in the last layer, in any.

    Where the first run kept logits, further rows split each layer by `margin` ("all" before): how far the last chosen expert or
    group was above the first left out, between `margin_low` and `margin_high`, in units of choice score.

    Args:
        runs: The one asked about, then those it is compared with.
        draws: Bootstrap samples.
        seed: Of samples and random places.

    Raises:
        UsageError: The runs cannot be compared.
    """
    require_comparable(runs)
    first, names = runs[0], run_names(runs)
    tables = []
    for name, other in zip(names[1:], runs[1:], strict=True):
        shared = require_shared(first, other)
        total = measure_agreement(first, other, shared, seed=seed)
        tokens = total.tokens.sum()
        parts = [pd.DataFrame(agreement_columns(total, shared, draws=draws, seed=seed) | {
            "margin": "all",
            "decisions_differ": total.differ.sum(axis=0) / tokens,
            "differ_so_far": total.so_far.sum(axis=0) / tokens,
        })]  # fmt: skip
        if "logits" in first.manifest.parts[0].extras:
            parts += [
                agreement_by_margin(first, other, shared, layer, draws=draws, seed=seed) for layer in first.spec.routed_layers
            ]
        counted = {"sequences_of_run": len(first.sequences), "sequences_of_other": len(other.sequences)}
        tables.append(pd.concat(parts, ignore_index=True).assign(against=name, **counted))
    table = pd.concat(tables, ignore_index=True).assign(seed=seed)
    front = ["against", "layer", "margin"]
    return table[[*front, *(name for name in table.columns if name not in front)]]


def _finding(table: pd.DataFrame) -> Finding:
    rows = table[table["margin"] == "all"]
    worst = rows.iloc[int(np.argmin(rows["agreement"]))]
    whole = rows[rows["against"] == worst["against"]].iloc[-1]
    text = (
        f"Against {worst['against']}, layer {worst['layer']} agrees least: {percent(worst['agreement'])} of the chosen experts "
        f"are the same (95 % interval {percent(worst['ci_low'])} to {percent(worst['ci_high'])}; {percent(worst['chance'])} "
        f"from the loads alone, {percent(worst['token_agreement'])} from the same token elsewhere), and "
        f"{percent(worst['decisions_differ'])} of its choices differ. {percent(whole['differ_so_far'])} of {whole['tokens']:,} "
        f"tokens in {whole['sequences']:,} shared sequences differ in some layer."
    )
    return Finding(
        sentence=text,
        verdict=_verdict(rows),
        rung=1,
        effect=float(worst["agreement"]),
        unit="share of chosen experts",
        ci_low=float(worst["ci_low"]),
        ci_high=float(worst["ci_high"]),
        token_effect=float(worst["token_agreement"]),
    )


def _verdict(rows: pd.DataFrame) -> Verdict:
    if (rows["ci_low"] >= ALIKE).all():
        return Verdict.SUPPORTED
    return Verdict.NOT_SUPPORTED if (rows["ci_high"] < ALIKE).any() else Verdict.CANNOT_TELL


ROUTE_AGREEMENT = Analysis(
    function=route_agreement,
    question="Do two runs choose the same experts for the same tokens?",
    claim="In every layer at least 99 % of the chosen experts are the same.",
    method=(
        "Experts that both runs chose over K, on the tokens of shared sequences; intervals from a bootstrap over sequences. "
        "Beside it what independent routers of these loads share, and what the same token shares with itself in another "
        "sequence. A repeat in another number format or batch size gives the floor of numerical noise."
    ),
    order=in_order,
    finding=_finding,
    compares=True,
)
