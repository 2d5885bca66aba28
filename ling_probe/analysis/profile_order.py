"""Experts and classes of text in the order of their likeness: what a heatmap of preferences is drawn in.

The order is that of the leaves of a dendrogram: average linkage of the adjusted log2 ratios, with the leaves turned so that
neighbours are as alike as can be (Bar-Joseph et al. 2001). It is an order to look at; whether there are kinds of experts is
what `clusters` tests.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer
from scipy.cluster.hierarchy import leaves_list, linkage

from ling_probe.analysis.question import DISCOVERY, surest_first

MOST = 300
"""Experts in one heatmap, at most."""
FAR = 2.0
"""Log2 ratios beyond are taken for this: one wild cell does not make a pair of experts unlike."""


def ordered_profiles(table: pd.DataFrame, kind: str, *, layer: int | None = None) -> pd.DataFrame:
    """Rows of a specialisation with places by likeness: `place` of the expert and `class_place` of the class, both from 0.

    `found` says whether a row is significant (q below 0.05).

    Args:
        table: Of `label_specialisation` or `family_specialisation`.
        kind: Its class column, "label" or "family".
        layer: All experts of this layer; by default those of every layer with a significant row, the surest `MOST` of them.
    """
    rows = table.assign(found=table["q"] < DISCOVERY)
    rows = _surest_experts(rows) if layer is None else rows[rows["layer"] == layer]
    if rows.empty:
        return rows.assign(place=0, class_place=0)
    cells = rows.pivot(index=["layer", "expert"], columns=kind, values="log2_ratio")  # noqa: PD010
    values = np.clip(cells.fillna(0.0).to_numpy(float), -FAR, FAR)
    places = pd.Series(_places(values), index=cells.index)
    class_places = dict(zip(cells.columns, _places(values.T), strict=True))
    names = pd.MultiIndex.from_frame(rows[["layer", "expert"]])
    return rows.assign(place=places.reindex(names).to_numpy(), class_place=rows[kind].map(class_places))


def _surest_experts(rows: pd.DataFrame) -> pd.DataFrame:
    surest = surest_first(rows[rows["found"]]).drop_duplicates(["layer", "expert"]).head(MOST)
    return rows.merge(surest[["layer", "expert"]], on=["layer", "expert"])


def _places(values: Float64[np.ndarray, "X C"]) -> Integer[np.ndarray, " X"]:
    """Place of each row among the leaves."""
    if len(values) < 3:
        return np.arange(len(values))
    places = np.empty(len(values), dtype=np.int64)
    places[leaves_list(linkage(values, method="average", optimal_ordering=True))] = np.arange(len(values))
    return places
