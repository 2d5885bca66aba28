"""Whether the clusters of two views are the same: of experts that prefer alike, keep company, listen or write alike.

For each layer, and over all layers, the clusters that `clusters` finds in every view are compared pair by pair:

1. the adjusted Rand index (0 is chance, 1 is the same clusters) and the adjusted mutual information;
2. against experts dealt anew inside their layer and router group, so that what groups alone have in common is taken off;
3. with the router's own groups as one more view, experts are dealt anew inside their layer.

Profile and co-activation come from the same choices: some agreement of these two is in the data, not in the experts.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer
from sklearn.metrics import adjusted_mutual_info_score

from ling_probe import stats
from ling_probe.analysis.clusters import best_clusters, points_of
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict
from ling_probe.analysis.views import ALL_LAYERS
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.spec import ModelSpec

GROUP = "router group"
LEAST_AGREEMENT = 0.1
"""Adjusted Rand index above chance below which agreement is not worth having."""


def cluster_agreement(run: Run, *, views: Sequence[str] | None = None, permutations: int = 999, seed: int = 0) -> pd.DataFrame:
    """How far the clusters of two views are the same, beside what dealing experts anew makes of it.

    One row a scope ("one layer", "all layers"), `layer` (0 for all layers) and pair of views (`view`, `other`; "router group"
    is the router's own): `experts`, adjusted Rand index `ari`, its mean `ari_null` and 95 % band (`null_low`,
    `null_high`) under the permutations, adjusted mutual information `ami`, one-sided `p`, `q` over all rows,
    `permutations` and `seed`.

    Args:
        run: As for `expert_clusters`.
        views: As for `expert_clusters`.
        permutations: Deals.
        seed: Of k-means and deals.

    Raises:
        UsageError: There are no two views to compare.
    """
    found: dict[tuple[str, tuple[int, ...]], dict[str, np.ndarray]] = {}
    for points in points_of(run, views, 0, seed):
        clusters, _ = best_clusters(points.seen(points.found), seed)
        found.setdefault((points.scope, points.layers), {})[points.view] = clusters
    rows = [
        {"scope": scope, "layer": 0 if scope == ALL_LAYERS else layers[0], **row}
        for (scope, layers), by_view in found.items()
        for row in _compared(by_view, run.spec, permutations, seed)
    ]
    if not rows:
        raise UsageError("one view of experts only in this run, and no router groups; agreement needs two")
    table = pd.DataFrame(rows).assign(permutations=permutations, seed=seed)
    return table.assign(q=stats.benjamini_hochberg(table["p"].to_numpy()))


def _compared(
    by_view: Mapping[str, Integer[np.ndarray, " X"]], spec: ModelSpec, permutations: int, seed: int
) -> Iterator[dict[str, float | str]]:
    place = np.arange(len(next(iter(by_view.values()))))
    layer, group = place // spec.n_experts, place // spec.group_size
    inside = {name: stats.permute_labels(place, blocks=blocks, draws=permutations, seed=seed) for name, blocks in
              (("group", group), ("layer", layer))}  # fmt: skip
    views = {**by_view, **({GROUP: group % spec.n_groups} if spec.n_groups > 1 else {})}
    for one, two in itertools.combinations(views, 2):
        deals = inside["layer" if two == GROUP else "group"]
        ari, null = rand_indices(views[two], views[one], np.concatenate([place[None], deals]))
        low, high = stats.percentile_interval(null)
        yield {
            "view": one,
            "other": two,
            "experts": len(place),
            "ari": ari,
            "ari_null": float(null.mean()),
            "null_low": float(low),
            "null_high": float(high),
            "ami": float(adjusted_mutual_info_score(views[one], views[two])),
            "p": float(stats.permutation_p(np.array((null >= ari - 1e-12).sum()), permutations)),
        }


def rand_indices(
    one: Integer[np.ndarray, " X"], two: Integer[np.ndarray, " X"], orders: Integer[np.ndarray, "B X"]
) -> tuple[float, Float64[np.ndarray, " B-1"]]:
    """Adjusted Rand index of two clusterings, the second in each of these orders; that of the first order, and the others."""
    n_cells = int(one.max() + 1) * int(two.max() + 1)
    cells = one * int(two.max() + 1) + two[orders] + n_cells * np.arange(len(orders))[:, None]
    table = np.bincount(cells.ravel(), minlength=n_cells * len(orders)).reshape(len(orders), n_cells)
    same = _pairs(table)
    here, there, every = _pairs(np.bincount(one)), _pairs(np.bincount(two)), len(one) * (len(one) - 1) / 2
    chance, most = here * there / every, (here + there) / 2
    found = (same - chance) / (most - chance) if most > chance else np.ones(len(orders))
    return float(found[0]), found[1:]


def _pairs(counts: Integer[np.ndarray, "*rest N"]) -> Float64[np.ndarray, "*rest"]:
    return (counts * (counts - 1) / 2).sum(axis=-1)


def most_alike_first(table: pd.DataFrame) -> pd.DataFrame:
    """By how far the index lies above chance."""
    return table.iloc[np.argsort((table["ari_null"] - table["ari"]).to_numpy(), kind="stable")]


def _finding(table: pd.DataFrame) -> Finding:
    above = table["ari"] - table["ari_null"]
    found = (table["q"] < DISCOVERY) & (above >= LEAST_AGREEMENT)
    row = table.iloc[int(np.argmax(np.where(found, 2, 0) + above))]
    place = "over all layers" if row["scope"] == ALL_LAYERS else f"in layer {row['layer']}"
    pair = table["view"] + " and " + table["other"]
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in above.groupby(pair, sort=False).mean().items())
    return Finding(
        sentence=(
            f"{int(found.sum())} of {len(table)} comparisons agree beyond chance (q below 0.05, adjusted Rand index at least "
            f"{LEAST_AGREEMENT} above it); most alike are {row['view']} and {row['other']} {place}: {row['ari']:.2f} against "
            f"{row['ari_null']:.2f} by chance (95 % of deals up to {row['null_high']:.2f}, {row['experts']} experts). "
            f"Mean index above chance: {means}."
        ),
        verdict=_verdict(table, above, found=bool(found.any())),
        rung=1 if found.any() else 0,
        effect=float(row["ari"] - row["ari_null"]),
        unit="adjusted Rand index above chance",
        q=float(row["q"]),
    )


def _verdict(table: pd.DataFrame, above: pd.Series, *, found: bool) -> Verdict:
    if found:
        return Verdict.SUPPORTED
    # A band as wide as the least agreement cannot tell it from none.
    sharp = (table["null_high"] - table["ari_null"] < LEAST_AGREEMENT) & (above < LEAST_AGREEMENT)
    return Verdict.NOT_SUPPORTED if sharp.all() else Verdict.CANNOT_TELL


CLUSTER_AGREEMENT = Analysis(
    function=cluster_agreement,
    question="Do different views of the experts find the same clusters?",
    claim="Clusters of some two views agree beyond what router groups make of it.",
    method=(
        "Adjusted Rand index and adjusted mutual information of the clusters of two views, by layer. Null: experts dealt anew "
        "inside their layer and router group (inside their layer against the groups), corrected over all comparisons."
    ),
    order=most_alike_first,
    finding=_finding,
)
