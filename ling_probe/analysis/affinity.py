"""Which experts a family of problems leans on, and how few it would take to serve it (ESFT, arXiv 2407.01906).

Two measures of an expert's relevance to a family: `gate`, its share of the routing weight, and `token`, its share of the
choices, each the mean over the family's sequences of the mean over their tokens. Shares sum to 1 over the experts of a layer.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.classified import COMPLETION
from ling_probe.analysis.counting import require_sequences, segment_mask
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, fold, fold_interval, judge_cells, surest_first
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.spec import ModelSpec

COVERED = (0.1, 0.2, 0.5)
"""Shares of a family's weight that a set of experts is to hold."""
BLOCKS = 20
"""Blocks of sequences that a jackknife leaves out in turn."""


def expert_affinity(run: Run, *, segments: Sequence[str] = COMPLETION, seed: int = 0) -> pd.DataFrame:
    """How much each family of problems leans on each expert, against the other families, and the smallest sets that serve it.

    One row a layer, expert and family: `gate` and `token` share, `rank` by gate (1 is the most), `cumulative` gate of this
    expert and those before it, `set` the smallest of 0.1, 0.2 and 0.5 for which the expert is in the smallest set of its layer
    that holds such a share of the gate (NaN if none). `log2_ratio` is its gate over the mean of the other families (half a
    choice added to each), with a 95 % interval (`ci_low`, `ci_high`) and `p` from a jackknife over blocks of sequences, `q`
    corrected over all rows (Benjamini-Hochberg); NaN in a run of one family. Words are not matched: see
    `family_specialisation`.

    Args:
        run: Any run.
        segments: Only tokens of these; those of the completion by default.
        seed: Of how sequences are dealt to blocks.

    Raises:
        UsageError: The run has no sequences, or no tokens of these segments.
    """
    require_sequences(run)
    names, family = np.unique(run.sequences["family"].to_numpy(dtype=str), return_inverse=True)
    block = stats.bundles(len(family), most=BLOCKS, seed=seed)
    n_blocks = int(block.max()) + 1
    sums, n_sequences = _sums(run, family * n_blocks + block, len(names) * n_blocks, segments)
    if not n_sequences.any():
        raise UsageError("no tokens of these segments in this run; name others with `segments`")
    sums = sums.reshape(len(names), n_blocks, 2, run.spec.n_rows, run.spec.n_experts)
    n_sequences = n_sequences.reshape(len(names), n_blocks)
    tables = [
        _family_rows(run.spec, sums, n_sequences, code).assign(family=name)
        for code, name in enumerate(map(str, names))
        if n_sequences[code].any()
    ]
    table = pd.concat(tables, ignore_index=True).sort_values(["layer", "family", "expert"], kind="stable", ignore_index=True)
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    front = ["layer", "expert", "family"]
    return table[[*front, *table.columns.drop(front)]].assign(seed=seed)


def _sums(
    run: Run, owner: Integer[np.ndarray, " S"], n_owners: int, segments: Sequence[str]
) -> tuple[Float64[np.ndarray, "O 2 M E"], Float64[np.ndarray, " O"]]:
    """Shares of gate and choices, summed over the sequences of each owner, and how many those are."""
    spec = run.spec
    totals = np.zeros((2, spec.n_rows, n_owners * spec.n_experts))
    n_sequences = np.zeros(n_owners)
    for batch in run.batches(weights=True):
        assert batch.weights is not None
        counted = np.flatnonzero(segment_mask(batch, segments))
        sequences, local, length = np.unique(batch.sequence[counted], return_inverse=True, return_counts=True)
        n_sequences += np.bincount(owner[sequences], minlength=n_owners)
        base = (owner[batch.sequence[counted]] * spec.n_experts)[:, None]
        part = np.repeat(1 / length[local], spec.top_k)
        for row in range(spec.n_rows):
            cells = (base + batch.expert_ids[counted, row]).ravel()
            gate = batch.weights[counted, row].ravel() * part / spec.scale
            totals[0, row] += np.bincount(cells, weights=gate, minlength=totals.shape[-1])
            totals[1, row] += np.bincount(cells, weights=part / spec.top_k, minlength=totals.shape[-1])
    return np.moveaxis(totals.reshape(2, spec.n_rows, n_owners, spec.n_experts), 2, 0), n_sequences


def _family_rows(
    spec: ModelSpec, sums: Float64[np.ndarray, "F J 2 M E"], n_sequences: Float64[np.ndarray, "F J"], code: int
) -> pd.DataFrame:
    gate, token = _mean(sums[code].sum(axis=0), n_sequences[code].sum())
    ratio = _log2_ratio(sums[:, :, 0].sum(axis=1), n_sequences.sum(axis=1), code)
    without = [
        _log2_ratio(sums[:, :, 0].sum(axis=1) - sums[:, block, 0], n_sequences.sum(axis=1) - n_sequences[:, block], code)
        for block in range(n_sequences.shape[1])
    ]
    low, high, p = stats.jackknife_interval(ratio, np.stack(without))
    order = np.argsort(-gate, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1) + 1
    cumulative = np.take_along_axis(np.take_along_axis(gate, order, axis=-1).cumsum(axis=-1), rank - 1, axis=-1)
    held = np.full(gate.shape, np.nan)
    for share in sorted(COVERED, reverse=True):
        held[cumulative - gate < share - 1e-12] = share
    values = {"gate": gate, "token": token, "rank": rank, "cumulative": cumulative, "set": held}
    values |= {"log2_ratio": ratio, "ci_low": low, "ci_high": high, "p": p}
    return pd.DataFrame(
        {
            "layer": np.repeat(spec.routed_layers, spec.n_experts),
            "expert": np.tile(np.arange(spec.n_experts), spec.n_rows),
            **{name: value.ravel() for name, value in values.items()},
            "sequences": int(n_sequences[code].sum()),
        }
    )


def _mean(sums: Float64[np.ndarray, "*rest"], n: float) -> Float64[np.ndarray, "*rest"]:
    return sums / max(n, 1.0)


def _log2_ratio(
    gates: Float64[np.ndarray, "F M E"], n_sequences: Float64[np.ndarray, " F"], code: int
) -> Float64[np.ndarray, "M E"]:
    """Gate of one family over the mean of the others; NaN without others."""
    held = np.flatnonzero(n_sequences)
    others = [_mean(gates[other], n_sequences[other]) for other in held if other != code]
    if not others or code not in held:
        return np.full(gates.shape[1:], np.nan)
    little = 0.5 / (gates.shape[-1] * n_sequences[code])
    return np.log2((_mean(gates[code], n_sequences[code]) + little) / (np.mean(others, axis=0) + little))


def affinity_sets(table: pd.DataFrame) -> pd.DataFrame:
    """Sizes of the smallest sets, a row a layer, family and `share` held: `experts` in it, and `even`, what equal use needs.

    Args:
        table: Of `expert_affinity`.
    """
    n_experts = table["expert"].nunique()
    tables = [
        (table["set"] <= share)
        .groupby([table["layer"], table["family"]])
        .sum()
        .rename("experts")
        .reset_index()
        .assign(share=share)
        for share in COVERED
    ]
    sizes = pd.concat(tables, ignore_index=True)
    return sizes.assign(even=np.ceil(sizes["share"] * n_experts - 1e-9).astype(int))


LEAST_EFFECT = 0.585
"""Log2 ratio below which a preference is not worth having: one and a half times as much."""


def _finding(table: pd.DataFrame) -> Finding:
    fifth = affinity_sets(table).query("share == 0.2")
    least = fifth.iloc[int(np.argmin(fifth["experts"]))]
    sets = (
        f"A fifth of a family's weight lies with {fifth['experts'].mean():.1f} experts of a layer (equal use: "
        f"{fifth['even'].iloc[0]}), with the fewest in layer {least['layer']}, {least['family']} ({least['experts']})."
    )
    found = table[table["q"] < DISCOVERY]
    verdict = judge_cells(table, least=LEAST_EFFECT)
    if found.empty:
        alone = " There is one family only, so nothing to compare with." if table["family"].nunique() < 2 else ""
        none = alone or " No family leans on an expert more than the others do (q below 0.05)."
        return Finding(sentence=sets + none, verdict=Verdict.CANNOT_TELL if alone else verdict, rung=0)
    row = surest_first(found).iloc[0]
    return Finding(
        sentence=(
            f"{sets} {len(found):,} of {len(table):,} (layer, expert, family) cells differ from the other families (q below "
            f"0.05); the surest is layer {row['layer']}, expert {row['expert']}, with {fold(row['log2_ratio'])} times the "
            f"weight in {row['family']} (95 % interval {fold_interval(row)}), words not matched."
        ),
        verdict=verdict,
        rung=1,
        effect=float(row["log2_ratio"]),
        unit="log2 ratio",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
    )


EXPERT_AFFINITY = Analysis(
    function=expert_affinity,
    question="Which experts does a family of problems lean on?",
    claim="Some family leans on an expert more, or less, than the other families do, its words included.",
    method=(
        "Share of the routing weight, mean over sequences, over the mean of the other families, log2; words are not matched. p "
        "and intervals from a jackknife over blocks of sequences, corrected over all layers, experts and families "
        "(Benjamini-Hochberg)."
    ),
    order=surest_first,
    finding=_finding,
)
