"""Which experts one run uses more than another.

Where the runs share problems, only those count, and each is its own control: the two may have answered it in other words. Where
they share none, their sequences are two samples, and a difference may as well come from the texts.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Integer

from ling_probe import stats
from ling_probe.analysis.aligned import chosen_together
from ling_probe.analysis.comparable import require_comparable, require_same_experts, run_names, same_training, shared_sequences
from ling_probe.analysis.contrast import FLIPS, LoadContrast, count_layers
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, fold, fold_interval, sure_effect, surest_first
from ling_probe.run import Run

LEAST_EFFECT = 0.585
"""Log2 ratio below which a shift is not worth having: one and a half times as much."""


def load_shift(runs: Sequence[Run], *, draws: int = 1000, flips: int = FLIPS, seed: int = 0) -> pd.DataFrame:
    """Share of each expert in the first run against its share in the others.

    One row a run compared with (`against`), layer and expert: `share` of the layer's choices in the first run and
    `share_against` in the other, `log2_ratio` of the two (half a choice added to each) with its 95 % bootstrap interval over
    problems (`ci_low`, `ci_high`), two-sided `p` from sign flips of whole problems (of bundles of them in long runs), none
    below 1 / (`flips` + 1), `q` corrected over all rows of the table (Benjamini-Hochberg). `sequences` of the first run
    that count, and whether they are `paired`: the same problems in both. Per layer, the same in all its rows: `divergence`, the
    Jensen-Shannon divergence of the two loads in bits less its bias, and its interval (`divergence_low`, `divergence_high`).

    Args:
        runs: The one asked about, then those it is compared with.
        draws: Bootstrap samples.
        flips: Sign flips.
        seed: Of samples and flips.

    Raises:
        UsageError: The runs cannot be compared, or are of models trained apart.
    """
    require_comparable(runs)
    names = run_names(runs)
    tables = [
        _shift(runs[0], other, draws, flips, seed).assign(against=name) for name, other in zip(names[1:], runs[1:], strict=True)
    ]
    table = pd.concat(tables, ignore_index=True).assign(seed=seed)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    front = ["against", "layer", "expert"]
    return table[[*front, *(name for name in table.columns if name not in front)]]


def _shift(first: Run, other: Run, draws: int, flips: int, seed: int) -> pd.DataFrame:
    units, paired = _units(first, other, seed)
    n_units = 1 + max(int(unit.max()) for unit in units)
    weights = stats.bootstrap_weights(n_units, draws=draws, seed=seed)
    rows, counts = [], [_counts(run, unit, n_units) for run, unit in zip((first, other), units, strict=True)]
    for layer, *sides in zip(first.spec.routed_layers, *counts, strict=True):
        contrast = LoadContrast(*sides)
        low, high = stats.percentile_interval(contrast.log2_ratio(weights))
        apart = contrast.divergence(weights, seed=seed)
        columns = {
            "layer": layer,
            "expert": np.arange(first.spec.n_experts),
            "share": contrast.shares[0],
            "share_against": contrast.shares[1],
            "log2_ratio": contrast.log2_ratio(np.ones((1, n_units)))[0],
            "ci_low": low,
            "ci_high": high,
            "p": contrast.p(flips=flips, seed=seed),
            "sequences": int((units[0] >= 0).sum()),
            "paired": paired,
            "divergence": apart.net,
            "divergence_low": apart.ci_low,
            "divergence_high": apart.ci_high,
        }
        rows.append(pd.DataFrame(columns))
    return pd.concat(rows, ignore_index=True)


def _counts(run: Run, unit: Integer[np.ndarray, " S"], n_units: int) -> Integer[np.ndarray, "M U E"]:
    return count_layers(run, lambda batch: unit[batch.sequence], n_units)


def _units(first: Run, other: Run, seed: int) -> tuple[tuple[Integer[np.ndarray, " S"], Integer[np.ndarray, " s"]], bool]:
    """Unit of every sequence of either run, -1 where it does not count, and whether units are the same problems."""
    shared = shared_sequences(first, other)
    n_shared, n_first, n_other = len(shared.rows), len(first.sequences), len(other.sequences)
    if not same_training(first, other):
        require_same_experts(first, other, chosen_together(first, other, shared) if n_shared else None)
    if not n_shared:
        # No more units than elsewhere, and none with sequences of both runs.
        here, there = stats.bundles(n_first, most=200, seed=seed), stats.bundles(n_other, most=200, seed=seed)
        return (here, there + int(here.max()) + 1), False
    unit = stats.bundles(n_shared, seed=seed)
    here, there = np.full(n_first, -1), np.full(n_other, -1)
    here[shared.rows], there[shared.others] = unit, unit
    return (here, there), True


def _finding(table: pd.DataFrame) -> Finding:
    found, last = table[table["q"] < DISCOVERY], table.iloc[int(np.argmax(table["divergence"]))]
    sample = "shared problems, each compared with itself" if last["paired"] else "problems, none of them in both runs"
    tested = (
        f"{len(found):,} of {table['p'].count():,} (layer, expert) cells have another share (q below 0.05, "
        f"{last['sequences']:,} {sample}); layer {last['layer']} differs most from {last['against']}, by "
        f"{last['divergence']:.4f} bits beyond chance (95 % interval {last['divergence_low']:.4f} to "
        f"{last['divergence_high']:.4f})"
    )
    if found.empty:
        return Finding(sentence=f"{tested}.", verdict=_verdict(table), rung=0)
    row = surest_first(found).iloc[0]
    return Finding(
        sentence=(
            f"{tested}; the surest is layer {row['layer']}, expert {row['expert']}, used {fold(row['log2_ratio'])} times as "
            f"much as in {row['against']} (95 % interval {fold_interval(row)})."
        ),
        verdict=_verdict(table),
        rung=1,
        effect=float(row["log2_ratio"]),
        unit="log2 ratio",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
    )


def _verdict(table: pd.DataFrame) -> Verdict:
    """A shift that is there but too small to matter does not support the claim: in a large run every shift is there."""
    tested = table[table["q"].notna()]
    found, small = tested["q"] < DISCOVERY, (tested["ci_low"] > -LEAST_EFFECT) & (tested["ci_high"] < LEAST_EFFECT)
    if (found & (sure_effect(tested) >= LEAST_EFFECT)).any():
        return Verdict.SUPPORTED
    return Verdict.NOT_SUPPORTED if small[found].all() and small.mean() >= 0.95 else Verdict.CANNOT_TELL


LOAD_SHIFT = Analysis(
    function=load_shift,
    question="Which experts does this run use more, or less, than another?",
    claim="Some expert's share of the work is one and a half times what it is in the other run, or less than two thirds.",
    method=(
        "Share of a layer's choices over that in the other run, log2. Null: the sides of a whole problem are exchanged (sign "
        "flips); p corrected over all layers and experts (Benjamini-Hochberg); intervals from a bootstrap over problems. The "
        "divergence of the loads (Jensen-Shannon) is what is left after that of random signs."
    ),
    order=surest_first,
    finding=_finding,
    compares=True,
)
