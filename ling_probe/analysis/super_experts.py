"""Whether a few experts write outputs far larger than all others ("super experts", arXiv 2507.23279).

The published rule takes the largest entry that an expert's down projection ever puts out; a run keeps norms, so the largest
norm of an output stands in for it. An expert qualifies in the first three quarters of the layers if its largest is above the
99.5th percentile of all experts' and above a tenth of the largest of all. Some expert nearly always does: the rule names the
largest. What makes it super is that it stands apart, many times above the middle expert, in most sequences.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float64

from ling_probe.analysis.contributions import LEAST_WEIGHT, bundled, layer_batches, require_extra
from ling_probe.analysis.question import Analysis, Finding, Verdict
from ling_probe.run import Run

PERCENTILE, SHARE_OF_MAX, DEPTH = 99.5, 0.1, 0.75
"""Of the published rule."""
APART = 10.0
"""Times the middle expert's largest norm from which an expert stands apart."""
RECURS = 0.5
"""Share of the bundles of sequences from which an expert stands apart regularly."""


def super_experts(run: Run, *, seed: int = 0) -> pd.DataFrame:
    """The largest output norm of every expert, and which pass the rule for super experts.

    One row a layer and expert: `count` choices, `max_norm` and `mean_norm` of its outputs (contribution over weight, choices of
    weight below `contributions.LEAST_WEIGHT` left out; in units of the residual stream), `times_median` (largest norm over the
    median of all experts' largest), `recurs` (share of the bundles of sequences that used it in which its largest norm is at
    least `APART` times that median), `passes` the published rule, `stands_apart` (passes, and `APART` and `RECURS` too).
    Experts that were never chosen have no norms.

    Args:
        run: A run captured with --keep contribution.
        seed: Of the bundles.

    Raises:
        UsageError: The contributions were not kept.
    """
    require_extra(run, "contribution", "contribution")
    bundle, n_bundles = bundled(run, seed)
    spec = run.spec
    largest, total, count = (np.zeros((spec.n_rows, n_bundles * spec.n_experts)) for _ in range(3))
    for row, layer in enumerate(spec.routed_layers):
        for batch, norms in layer_batches(run, layer, ["contribution"], weights=True):
            assert batch.weights is not None
            weight, owner = batch.weights[:, 0], np.broadcast_to(bundle[batch.sequence][:, None], norms.shape)
            kept = weight >= LEAST_WEIGHT
            place, output = (
                owner[kept].astype(np.int64) * spec.n_experts + batch.expert_ids[:, 0][kept],
                norms[kept] / weight[kept],
            )
            np.maximum.at(largest[row], place, output.astype(float))
            total[row] += np.bincount(place, weights=output, minlength=total.shape[1])
            count[row] += np.bincount(place, minlength=total.shape[1])
    shape = (spec.n_rows, n_bundles, spec.n_experts)
    return _table(run, *(each.reshape(shape) for each in (largest, total, count))).assign(seed=seed)


def _table(
    run: Run, largest: Float64[np.ndarray, "M B E"], total: Float64[np.ndarray, "M B E"], count: Float64[np.ndarray, "M B E"]
) -> pd.DataFrame:
    spec, used = run.spec, count.sum(axis=1).ravel()
    most = np.where(used > 0, largest.max(axis=1).ravel(), np.nan)
    median = np.nanmedian(most)
    recurs = ((largest >= APART * median) & (count > 0)).sum(axis=1).ravel() / np.maximum((count > 0).sum(axis=1).ravel(), 1)
    layer = np.repeat(spec.routed_layers, spec.n_experts)
    passes = (
        (most > np.nanpercentile(most, PERCENTILE)) & (most > SHARE_OF_MAX * np.nanmax(most)) & (layer < DEPTH * spec.n_layers)
    )
    return pd.DataFrame(
        {
            "layer": layer,
            "expert": np.tile(np.arange(spec.n_experts), spec.n_rows),
            "count": used.astype(np.int64),
            "max_norm": most,
            "mean_norm": np.divide(total.sum(axis=1).ravel(), used, out=np.full(len(used), np.nan), where=used > 0),
            "times_median": most / median,
            "recurs": recurs,
            "passes": passes,
            "stands_apart": passes & (most >= APART * median) & (recurs >= RECURS),
        }
    )


def largest_first(table: pd.DataFrame) -> pd.DataFrame:
    """By the largest norm."""
    return table.sort_values("max_norm", ascending=False, kind="stable")


def _finding(table: pd.DataFrame) -> Finding:
    row, passes, apart = largest_first(table).iloc[0], int(table["passes"].sum()), int(table["stands_apart"].sum())
    return Finding(
        sentence=(
            f"{passes} of {len(table):,} experts pass the published rule, {apart} of them stand apart ({APART:.0f} times the "
            f"middle expert in half the sequences or more). The largest output of any layer is of expert "
            f"{row['expert']:.0f} of layer {row['layer']:.0f}: norm {row['max_norm']:.3g}, {row['times_median']:.1f} times the "
            "middle expert's largest. Norms stand in for the largest entry of an output."
        ),
        verdict=Verdict.SUPPORTED if apart else Verdict.NOT_SUPPORTED,
        rung=0,
        effect=float(row["times_median"]),
        unit="times the middle expert's largest norm",
    )


SUPER_EXPERTS = Analysis(
    function=super_experts,
    question="Do a few experts write outputs far larger than all others?",
    claim="Some experts are super experts: their largest outputs stand far apart from those of all others.",
    method=(
        "Largest norm of each expert's output, above the 99.5th percentile and a tenth of the largest, in the first 75 % of "
        "layers (arXiv 2507.23279, with norms for largest entries); apart is ten times the median, in half the sequences."
    ),
    order=largest_first,
    finding=_finding,
)
