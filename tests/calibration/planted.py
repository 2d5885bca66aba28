"""Runs with effects of known size: how often they are found, or something else is, and how often intervals hold the truth."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from cases import WORDS
from worlds import Plant, World

from ling_probe.analysis import label_specialisation
from ling_probe.analysis.question import DISCOVERY

CELL = ["layer", "expert", "label"]
LARGE = 3000
"""Sequences of a run whose effects are taken for the truth."""
REAL = 0.1
"""Log2 ratio from which a true effect counts as one: the groups carry a planted effect on to other experts."""


CONFOUNDED = World(words=1.5, token=2.0)
"""Labels have words of their own and routing follows words strongly; nothing routes by label."""


def planted_world(boost: float, n_sequences: int) -> World:
    """One expert of each layer prefers one label, by a logit more."""
    plants = (Plant(1, 5, "add", boost), Plant(2, 9, "premise", boost), Plant(3, 2, "negation", boost))
    return replace(WORDS, plants=plants, n_sequences=n_sequences)


def true_effects(world: World, *, seed: int = 1_000_000) -> pd.Series:
    """Log2 ratio of every cell in a run so large that its error does not matter, by `CELL`."""
    large = replace(world, n_sequences=LARGE).run(seed)
    return label_specialisation(large, permutations=100_000, draws=1).set_index(CELL)["log2_ratio"]


@dataclass(frozen=True)
class Power:
    """What was found in some runs of one world, at q below 0.05."""

    recall: float
    """Share of the planted effects found as preferences."""
    found: float
    """Cells found in a run, preferences and aversions."""
    wrong: float
    """Share of the found, over all runs, whose true effect is nothing (`REAL`) or of the other sign."""
    bias: float
    """Mean error of the planted effects, log2."""
    covered: float
    """Share of the planted effects inside their 95 % interval."""
    n: int
    """Planted effects, over all runs."""


def power(world: World, truth: pd.Series, seeds: Iterable[int]) -> Power:
    """Ask many runs of a world for its planted effects."""
    planted = [(plant.layer, plant.expert, plant.label) for plant in world.plants]
    tables = [label_specialisation(world.run(seed)).set_index(CELL).assign(truth=truth) for seed in seeds]
    mine = pd.concat([table.loc[planted] for table in tables])
    found = pd.concat([table[table["q"] < DISCOVERY] for table in tables])
    wrong = (found["truth"].abs() < REAL) | (np.sign(found["truth"]) != np.sign(found["log2_ratio"]))
    return Power(
        recall=float(((mine["q"] < DISCOVERY) & (mine["log2_ratio"] > 0)).mean()),
        found=len(found) / len(tables),
        wrong=float(wrong.mean()) if len(found) else np.nan,
        bias=float((mine["log2_ratio"] - mine["truth"]).mean()),
        covered=float(((mine["ci_low"] <= mine["truth"]) & (mine["truth"] <= mine["ci_high"])).mean()),
        n=len(mine),
    )
