"""Whether experts fall into kinds, in four views: what they prefer, their company, what they listen to and what they write.

For each view (`views`), within each layer and, where experts of different layers can be compared, over all layers:

1. put the experts into k clusters by k-means, with the k from 2 to 8 of the highest mean silhouette;
2. compare that silhouette with the one that a single cloud reaches: the points' own axes and distances, in random directions,
   k chosen anew. k-means cuts any cloud into parts, and parts of a long thin one look well apart;
3. see how well the clusters come back when the data are drawn anew: mean adjusted Rand index between these clusters and those
   of resampled sequences (for weights, of resampled dimensions); 0 is chance, 1 is the same;
4. call them kinds only if the silhouette is above the cloud's (corrected over all clusterings), the clusters come back
   (stability of a half or more), and they are apart (mean silhouette of a quarter or more; Kaufman & Rousseeuw 1990 see no
   substantial structure below). What is above the cloud and stable but not apart is a gradient.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Float64, Integer
from scipy.stats import t
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from ling_probe import stats
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict
from ling_probe.analysis.views import VIEWS, Points
from ling_probe.errors import UsageError
from ling_probe.run import Run

MAX_CLUSTERS = 8
CLOUDS = 5
"""Clouds of which the mean and spread of the best silhouette are taken."""
STABLE = 0.5
"""Mean adjusted Rand index from which clusters count as coming back."""
APART = 0.25
"""Mean silhouette from which clusters count as apart."""
LEAST_ABOVE = 0.1
"""Silhouette above the cloud's below which clusters are not worth having."""


def expert_clusters(run: Run, *, views: Sequence[str] | None = None, draws: int = 10, seed: int = 0) -> pd.DataFrame:
    """Group experts by view, within each layer and over all, and say how far to trust the groups.

    One row a view, scope ("one layer", "all layers") and expert (`layer`, `expert`): its `cluster` (0 is the largest),
    `silhouette` (how much nearer its own cluster than the next, -1..1), `x` and `y` (first two principal components of what
    was clustered, without a unit). The same for every row of a clustering: `n_clusters`, `mean_silhouette`,
    `silhouette_floor` (mean of `CLOUDS` single clouds), `p` (Student's t of one more cloud being as high), `q` (corrected over
    all clusterings), `stability`, `kinds` (whether all of it makes them kinds), `seed`.

    Args:
        run: Any run of two sequences or more; profiles need step labels, gate and output the weights of its experts.
        views: Of `views.VIEWS`; every one that the run has, by default.
        draws: Resampled data for the stability; four at most for weights over all layers.
        seed: Of k-means, clouds and resampling.

    Raises:
        UsageError: The run cannot answer a view that was named, or any at all.
    """
    found = [_judged(points, run, seed) for points in points_of(run, views, draws, seed)]
    table = pd.concat(found, ignore_index=True)
    once = pd.concat([each.head(1) for each in found])
    q = stats.benjamini_hochberg(once["p"].to_numpy())
    table["q"] = np.repeat(q, [len(each) for each in found])
    apart = (table["mean_silhouette"] >= APART) & (table["stability"] >= STABLE)
    return table.assign(kinds=apart & (table["q"] < DISCOVERY), seed=seed)


def points_of(run: Run, views: Sequence[str] | None, draws: int, seed: int) -> Iterator[Points]:
    """Every view asked for, or every one the run has.

    Raises:
        UsageError: No such view, the run cannot answer one that was named, or any at all.
    """
    if unknown := [name for name in views or () if name not in VIEWS]:
        raise UsageError(f'no view "{unknown[0]}" of experts; these there are: {", ".join(VIEWS)}')
    refused, answered = [], False
    for name in views or VIEWS:
        try:
            for points in VIEWS[name](run, draws, seed):
                _check(points)
                answered = True
                yield points
        except UsageError as error:
            refused.append(str(error))
            if views:
                raise
    if not answered:
        raise UsageError("; ".join(dict.fromkeys(refused)))


def _check(points: Points) -> None:
    if len(np.unique(points.found, axis=0)) < 3:
        raise UsageError(f"too few experts to cluster by {points.view}: at least 3 that differ are needed")


def _judged(points: Points, run: Run, seed: int) -> pd.DataFrame:
    seen = points.seen(points.found)
    clusters, silhouette = best_clusters(seen, seed)
    clouds = [best_clusters(points.seen(cloud), seed)[1].mean() for cloud in _clouds(seen, seed)]
    n_clusters, floor, spread = int(clusters.max()) + 1, np.mean(clouds), np.std(clouds, ddof=1) * np.sqrt(1 + 1 / CLOUDS)
    layers, experts = np.divmod(np.arange(len(clusters)), run.spec.n_experts)
    place = _principal(seen)
    again = [adjusted_rand_score(clusters, _k_means(points.seen(drawn), n_clusters, seed)) for drawn in points.drawn]
    return pd.DataFrame(
        {
            "view": points.view,
            "scope": points.scope,
            "layer": np.asarray(points.layers)[layers],
            "expert": experts,
            "cluster": clusters,
            "silhouette": silhouette,
            "x": place[:, 0],
            "y": place[:, 1],
            "n_clusters": n_clusters,
            "mean_silhouette": silhouette.mean(),
            "silhouette_floor": floor,
            "p": t.sf((silhouette.mean() - floor) / max(spread, 1e-12), CLOUDS - 1),
            "stability": np.mean(again) if again else np.nan,
        }
    )


def best_clusters(points: Float[np.ndarray, "X C"], seed: int) -> tuple[Integer[np.ndarray, " X"], Float64[np.ndarray, " X"]]:
    """Clusters of the k with the highest mean silhouette, largest cluster first, and every point's silhouette."""
    most = min(MAX_CLUSTERS, len(np.unique(points, axis=0)) - 1)
    tried = [_k_means(points, k, seed) for k in range(2, most + 1)]
    scores = silhouettes(points, tried)
    best = int(np.argmax(scores.mean(axis=1)))
    by_size = np.argsort(-np.bincount(tried[best]), kind="stable")
    return np.argsort(by_size)[tried[best]], scores[best]


def silhouettes(
    points: Float[np.ndarray, "X C"], clusterings: Sequence[Integer[np.ndarray, " X"]]
) -> Float64[np.ndarray, "N X"]:
    """Every point's silhouette in each of several clusterings, whose distances are measured once."""
    members = [np.eye(clusters.max() + 1, dtype=np.float32)[clusters] for clusters in clusterings]
    totals = np.split(_distances(points) @ np.hstack(members), np.cumsum([each.shape[1] for each in members])[:-1], axis=1)
    found = []
    for clusters, inside, total in zip(clusterings, members, totals, strict=True):
        size, here = inside.sum(axis=0), inside > 0
        own = total[here] / np.maximum(size[clusters] - 1, 1)
        other = np.where(here, np.inf, total / size).min(axis=1)
        larger = np.maximum(own, other)
        found.append(np.where((size[clusters] > 1) & (larger > 0), (other - own) / np.where(larger > 0, larger, 1), 0.0))
    return np.stack(found).astype(float)


def _distances(points: Float[np.ndarray, "X C"]) -> Float32[np.ndarray, "X X"]:
    centred = (points - points.mean(axis=0)).astype(np.float32)
    distance = centred @ centred.T
    square = distance.diagonal().copy()
    distance *= -2
    distance += square
    distance += square[:, None]
    np.sqrt(np.maximum(distance, 0, out=distance), out=distance)
    np.fill_diagonal(distance, 0)
    return distance


def _clouds(points: Float[np.ndarray, "X C"], seed: int) -> Iterator[Float64[np.ndarray, "X C"]]:
    """Points as far out as these along the same axes, each in a direction of its own: one elliptical cloud."""
    rng, mean = np.random.default_rng(seed), points.mean(axis=0)
    left, scale, axes = np.linalg.svd(points - mean, full_matrices=False)
    left, scale, axes = (each[..., scale > 1e-9 * scale[0]] for each in (left, scale, axes.T))
    radius = np.linalg.norm(left, axis=1, keepdims=True)
    for _ in range(CLOUDS):
        direction = rng.normal(size=left.shape)
        yield mean + rng.permutation(radius) * direction / np.linalg.norm(direction, axis=1, keepdims=True) * scale @ axes.T


def _principal(points: Float[np.ndarray, "X C"]) -> Float64[np.ndarray, "X 2"]:
    left, scale, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    place = np.zeros((len(points), 2))
    place[:, : min(2, len(scale))] = (left * scale)[:, :2]
    return place


def _k_means(points: Float[np.ndarray, "X C"], k: int, seed: int) -> Integer[np.ndarray, " X"]:
    return KMeans(n_clusters=k, n_init=2, random_state=seed).fit_predict(points)


def most_typical_first(table: pd.DataFrame) -> pd.DataFrame:
    """The surest clusterings first; in each, cluster by cluster, the experts that fit their cluster best first."""
    ranked = table.assign(above=table["silhouette_floor"] - table["mean_silhouette"], other=~table["kinds"])
    names = ["other", "q", "above", "view", "scope", "cluster", "silhouette"]
    order = ranked.sort_values(names, ascending=[True] * 6 + [False], kind="stable")
    return table.loc[order.index]


def clusterings(table: pd.DataFrame) -> pd.DataFrame:
    """One row a clustering of `expert_clusters`: view, scope, layer (0 for all), and what is the same for all its rows."""
    names = ["n_clusters", "mean_silhouette", "silhouette_floor", "p", "q", "stability", "kinds"]
    layer = table["layer"].where(table["scope"] == "one layer", 0)
    return table.assign(layer=layer).groupby(["view", "scope", "layer"], sort=False)[names].first().reset_index()


def clustering_told(table: pd.DataFrame, view: str, layer: int | None) -> str:
    """Whether the experts of one view and layer, or of all (None), fall into kinds, in a sentence or two; empty without one.

    Args:
        table: Of `expert_clusters`.
        view: Of its views.
        layer: One layer, or all.
    """
    each = clusterings(table)
    rows = each[(each["view"] == view) & (each["layer"] == (layer or 0))]
    if rows.empty:
        return ""
    row, place = rows.iloc[0], "all layers" if layer is None else f"layer {layer}"
    told = (
        f"mean silhouette {row['mean_silhouette']:.2f} against {row['silhouette_floor']:.2f} for one cloud of the same spread "
        f"(q {row['q']:.2g}), stability {row['stability']:.2f}"
    )
    if row["kinds"]:
        return f"By {view}, experts of {place} fall into {row['n_clusters']} kinds: {told}."
    return (
        f"By {view}, the {row['n_clusters']} clusters of {place} are no kinds beyond chance: {told}. Colours cut a cloud into "
        "parts; do not read more into them."
    )


def _finding(table: pd.DataFrame) -> Finding:
    each = clusterings(table)
    each = each.assign(above=each["mean_silhouette"] - each["silhouette_floor"])
    kinds = each[each["kinds"]]
    row = (each if kinds.empty else kinds).sort_values("above", ascending=False).iloc[0]
    counts = ", ".join(f"{name} {int(rows['kinds'].sum())} of {len(rows)}" for name, rows in each.groupby("view", sort=False))
    missing = [name for name in VIEWS if name not in set(each["view"])]
    place = "all layers" if row["scope"] == "all layers" else f"layer {row['layer']:.0f}"
    return Finding(
        sentence=(
            f"Clusterings that are kinds, by view: {counts}. The most clustered, {row['view']} of {place}, has "
            f"{row['n_clusters']:.0f} clusters: mean silhouette {row['mean_silhouette']:.2f} against "
            f"{row['silhouette_floor']:.2f} for one cloud of the same spread, stability {row['stability']:.2f} (1 is the same "
            f"clusters whenever the data are drawn anew)"
            + (f". This run cannot show {' and '.join(missing)}." if missing else ".")
        ),
        verdict=_verdict(each),
        rung=1 if len(kinds) else 0,
        effect=float(row["above"]),
        unit="mean silhouette above one cloud's",
        q=float(row["q"]),
    )


def _verdict(each: pd.DataFrame) -> Verdict:
    if each["kinds"].any():
        return Verdict.SUPPORTED
    gradient = (each["above"] < LEAST_ABOVE) | (each["mean_silhouette"] < APART)
    return Verdict.NOT_SUPPORTED if gradient.all() else Verdict.CANNOT_TELL


EXPERT_CLUSTERS = Analysis(
    function=expert_clusters,
    question="Do experts fall into kinds: by what they prefer, by their company, by their weights?",
    claim="In some view experts fall into kinds that are apart and come back when the data are drawn anew.",
    method=(
        "k-means with the k of the highest mean silhouette, by view and layer. Null: the silhouette of one elliptical cloud of "
        "the same spread, corrected over all clusterings; stability is the mean adjusted Rand index over bootstraps of bundles "
        "of sequences (for weights: of dimensions)."
    ),
    order=most_typical_first,
    finding=_finding,
)
