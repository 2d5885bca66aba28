"""Whether experts fall into kinds, by which steps of which families they prefer.

Each expert's profile is its token-adjusted log2 ratio for every (family, step label) that occurs; the experts of all layers
are put together into k clusters by k-means, with the k from 2 to 8 of the highest mean silhouette. k-means finds clusters in
anything, so two numbers stand beside each answer: how well the clusters come back when sequences are drawn anew (`stability`,
mean adjusted Rand index; 0 is chance, 1 is the same), and how high the silhouette gets on profiles whose classes were
shuffled over steps (`silhouette_floor`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, silhouette_samples, silhouette_score

from ling_probe import stats
from ling_probe.analysis.classified import classified_steps, expected_choices
from ling_probe.analysis.counting import sum_by
from ling_probe.analysis.question import Analysis, Finding, Verdict
from ling_probe.errors import UsageError
from ling_probe.run import Run

PRIOR = 5.0
"""Choices added to both sides of a profile's ratio: without them the rarest experts, all noise, would be the clusters."""
MAX_CLUSTERS = 8
SHUFFLES = 5
"""Shuffles of the classes whose best silhouettes are averaged for the floor."""


def expert_clusters(run: Run, *, draws: int = 20, seed: int = 0) -> pd.DataFrame:
    """Group experts of all layers by what they prefer, and say how far to trust the groups.

    One row a layer and expert: `cluster` (0 is the largest), `silhouette` (how much nearer its own cluster than the next,
    -1..1), `x` and `y` (first two principal components of the profiles, in log2 units), and the same for every row:
    `n_clusters`, `mean_silhouette`, `silhouette_floor`, `stability`.

    Args:
        run: A run whose benchmark has step labels.
        draws: Bootstrap samples of the stability.
        seed: Of k-means, the bootstrap and the shuffles.

    Raises:
        UsageError: No step labels, or too few experts or classes to cluster.
    """
    profiles = _profiles(run, draws, seed)
    if min(profiles.found.shape) < 2 or len(np.unique(profiles.found, axis=0)) < 3:
        raise UsageError("too few experts or step classes in this run to cluster: at least 3 different profiles are needed")
    clusters, mean = _best_clusters(profiles.found, seed)
    n_clusters = int(clusters.max()) + 1
    layers, experts = np.divmod(np.arange(len(clusters)), run.spec.n_experts)
    place = PCA(n_components=2, random_state=seed).fit_transform(profiles.found)
    return pd.DataFrame(
        {
            "layer": np.asarray(run.spec.routed_layers)[layers],
            "expert": experts,
            "cluster": clusters,
            "silhouette": silhouette_samples(profiles.found, clusters),
            "x": place[:, 0],
            "y": place[:, 1],
            "n_clusters": n_clusters,
            "mean_silhouette": mean,
            "silhouette_floor": np.mean([_best_clusters(each, seed)[1] for each in profiles.shuffled]),
            "stability": np.mean([adjusted_rand_score(clusters, _k_means(each, n_clusters, seed)) for each in profiles.drawn]),
        }
    )


class Profiles(NamedTuple):
    """Profiles of all experts, X = layers times experts, over C classes."""

    found: Float64[np.ndarray, "X C"]
    drawn: Float64[np.ndarray, "B X C"]
    """From bootstrap samples of the sequences."""
    shuffled: Float64[np.ndarray, "B X C"]
    """With the classes shuffled over all steps."""


def _profiles(run: Run, draws: int, seed: int) -> Profiles:
    steps = classified_steps(run)
    family = run.sequences["family"].to_numpy(dtype=str)[steps.sequence]
    _, codes = np.unique(np.stack([family, np.asarray(steps.names)[steps.codes]]), axis=1, return_inverse=True)
    weights = stats.bootstrap_weights(len(run.sequences), draws=draws, seed=seed)[:, steps.sequence]
    even = np.ones(len(codes))
    views = [(codes, even), *((codes, weight) for weight in weights)]
    views += [(shuffled, even) for shuffled in stats.permute_labels(codes, draws=SHUFFLES, seed=seed)]
    layers = []
    for layer in run.spec.routed_layers:
        choices = expected_choices(run, layer, steps)
        layers.append(np.stack(list(_ratios(choices.observed, choices.expected, views, int(codes.max()) + 1))))
    stacked = np.concatenate(layers, axis=1)
    return Profiles(stacked[0], stacked[1 : draws + 1], stacked[draws + 1 :])


def _ratios(
    observed: Float64[np.ndarray, "O E"],
    expected: Float64[np.ndarray, "O E"],
    views: list[tuple[Integer[np.ndarray, " O"], Float64[np.ndarray, " O"]]],
    n_classes: int,
) -> Iterator[Float64[np.ndarray, "E C"]]:
    for codes, weight in views:
        found = sum_by(observed * weight[:, None], codes, n_classes)
        null = np.maximum(sum_by(expected * weight[:, None], codes, n_classes), 0)
        yield np.log2((found + PRIOR) / (null + PRIOR)).T


def _best_clusters(profiles: Float64[np.ndarray, "X C"], seed: int) -> tuple[Integer[np.ndarray, " X"], float]:
    """Clusters of the k with the highest mean silhouette, largest cluster first, and that silhouette."""
    most = min(MAX_CLUSTERS, len(np.unique(profiles, axis=0)) - 1)
    tried = [_k_means(profiles, k, seed) for k in range(2, most + 1)]
    scores = [float(silhouette_score(profiles, clusters)) for clusters in tried]
    best = int(np.argmax(scores))
    by_size = np.argsort(-np.bincount(tried[best]), kind="stable")
    return np.argsort(by_size)[tried[best]], scores[best]


def _k_means(profiles: Float64[np.ndarray, "X C"], k: int, seed: int) -> Integer[np.ndarray, " X"]:
    return KMeans(n_clusters=k, n_init=4, random_state=seed).fit_predict(profiles)


def most_typical_first(table: pd.DataFrame) -> pd.DataFrame:
    """Cluster by cluster, the experts that fit their cluster best first."""
    return table.sort_values(["cluster", "silhouette"], ascending=[True, False], kind="stable")


def _finding(table: pd.DataFrame) -> Finding:
    row = table.iloc[0]
    trusted = row["mean_silhouette"] > row["silhouette_floor"] and row["stability"] >= 0.5
    verdict = "they may be read as kinds" if trusted else "so they should not be read as kinds of expert"
    return Finding(
        sentence=(
            f"{row['n_clusters']:.0f} clusters fit best: mean silhouette {row['mean_silhouette']:.2f} against "
            f"{row['silhouette_floor']:.2f} for shuffled classes, stability {row['stability']:.2f} (1 is the same clusters "
            f"whenever problems are drawn anew); {verdict}."
        ),
        verdict=Verdict.SUPPORTED if trusted else Verdict.NOT_SUPPORTED,
        rung=2 if trusted else 0,
        effect=float(row["mean_silhouette"]),
        unit="mean silhouette",
    )


EXPERT_CLUSTERS = Analysis(
    function=expert_clusters,
    question="Do experts fall into kinds by what they prefer?",
    claim="Experts fall into kinds that come back when problems are drawn anew.",
    method=(
        "k-means on token-adjusted preferences for every family and step label. Null: the silhouette that shuffled classes "
        "reach; stability is the mean adjusted Rand index over bootstraps of the sequences."
    ),
    order=most_typical_first,
    finding=_finding,
)
