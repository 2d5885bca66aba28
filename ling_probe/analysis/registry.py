"""Every analysis by name: its function, the question it answers, how, and which rows to read first."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float64

from ling_probe.analysis.clusters import expert_clusters
from ling_probe.analysis.coactivation import coactivation
from ling_probe.analysis.load import expert_load, load_balance
from ling_probe.analysis.specialisation import DISCOVERY, family_specialisation, label_specialisation


def sure_effect(table: pd.DataFrame) -> Float64[np.ndarray, " N"]:
    """How far each row's interval lies from 0; 0 if it holds 0.

    >>> sure_effect(pd.DataFrame({"ci_low": [0.5, -2.0, -1.0], "ci_high": [1.0, -1.5, 1.0]}))
    array([0.5, 1.5, 0. ])
    """
    return np.maximum(np.nan_to_num(np.maximum(table["ci_low"].to_numpy(), -table["ci_high"].to_numpy())), 0.0)


def surest_first(table: pd.DataFrame) -> pd.DataFrame:
    """Discoveries (q < 0.05) before the rest, preferences before aversions, each by how far their interval lies from 0."""
    found = (table["q"] < DISCOVERY).to_numpy()
    liked = (table["ci_low"] > 0).to_numpy()
    return table.iloc[np.lexsort((-sure_effect(table), ~liked, ~found))]


def most_uneven_first(table: pd.DataFrame) -> pd.DataFrame:
    """By distance from the even share."""
    return table.iloc[np.argsort(-table["log2_ratio"].abs().to_numpy(), kind="stable")]


def most_typical_first(table: pd.DataFrame) -> pd.DataFrame:
    """Cluster by cluster, the experts that fit their cluster best first."""
    return table.sort_values(["cluster", "silhouette"], ascending=[True, False], kind="stable")


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """As it is."""
    return table


class Analysis(NamedTuple):
    """A question and the function that answers it."""

    function: Callable[..., pd.DataFrame]
    question: str
    method: str
    """How it is answered, and against which null."""
    order: Callable[[pd.DataFrame], pd.DataFrame]
    """Puts the rows worth reading first at the top."""


ANALYSES: dict[str, Analysis] = {
    "label_specialisation": Analysis(
        label_specialisation,
        "Which experts prefer which kind of reasoning step?",
        "Choices over what the same tokens would choose in other steps of the same family, log2. Null: labels shuffled over "
        "whole steps inside each problem; p corrected over all layers, experts and labels (Benjamini-Hochberg); intervals from "
        "a bootstrap over sequences.",
        surest_first,
    ),
    "family_specialisation": Analysis(
        family_specialisation,
        "Which experts prefer which family of problems?",
        "Choices over what the same tokens would choose in other families, log2. Null: families shuffled over whole sequences; "
        "p corrected over all layers, experts and families (Benjamini-Hochberg); intervals from a bootstrap over sequences.",
        surest_first,
    ),
    "expert_load": Analysis(
        expert_load,
        "How much work does each expert do?",
        "Share of all (token, slot) choices over the even share, log2, prompts included; intervals from a bootstrap over "
        "sequences.",
        most_uneven_first,
    ),
    "load_balance": Analysis(
        load_balance,
        "How evenly is the work spread over the experts of a layer?",
        "Gini coefficient and maximal violation of the load. Null: a simulated router without any preference, limited to "
        "groups as the model's is, after as many independent tokens.",
        in_order,
    ),
    "coactivation": Analysis(
        coactivation,
        "Which experts are chosen together, beyond what groups and load make of it?",
        "Tokens that chose both over the expected, log2. Null: independence given how many experts a token takes from each "
        "group, and quasi-independence inside a group; p from a jackknife over blocks of sequences, corrected over all pairs.",
        surest_first,
    ),
    "expert_clusters": Analysis(
        expert_clusters,
        "Do experts fall into kinds by what they prefer?",
        "k-means on token-adjusted preferences for every family and step label. Null: the silhouette that shuffled classes "
        "reach; stability is the mean adjusted Rand index over bootstraps of the sequences.",
        most_typical_first,
    ),
}
"""Every analysis by name, in the order a report tells them."""
