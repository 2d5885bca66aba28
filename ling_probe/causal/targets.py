"""Which experts to change for a kind of step, and which like them to compare with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Real

from ling_probe.errors import UsageError
from ling_probe.interventions import Intervention

Kind = Literal["exclude", "silence", "force", "bias"]
Cells = tuple[tuple[int, int], ...]
"""Experts, each as (layer, expert)."""
NEAREST = 8
"""A matched expert is one of so many of the same layer whose load is nearest."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One change for one kind of step, everywhere in the text."""

    label: str
    kind: Kind
    experts: Cells
    value: float = 0.0
    """What `bias` adds to the choice score."""

    @property
    def dose(self) -> float:
        """The value of a bias; of any other kind the number of experts."""
        return self.value if self.kind == "bias" else float(len(self.experts))

    def interventions(self, experts: Cells | None = None) -> tuple[Intervention, ...]:
        """The change as interventions, one a layer; with `experts` the same change to these."""
        layers: dict[int, list[int]] = {}
        for layer, expert in experts or self.experts:
            layers.setdefault(layer, []).append(expert)
        return tuple(
            Intervention(kind=self.kind, layer=layer, experts=tuple(those), value=self.value) for layer, those in layers.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"label": self.label, "kind": self.kind, "value": self.value, "experts": [list(cell) for cell in self.experts]}


def preferred_experts(table: pd.DataFrame, label: str, top: int) -> Cells:
    """The experts that prefer a label most surely: corrected p below 0.05 and the interval's lower end the highest.

    Args:
        table: Of `label_specialisation`.
        label: A step label.
        top: At most so many.

    Raises:
        UsageError: None does, or the table has no such label.
    """
    rows = table[table["label"] == label]
    if rows.empty:
        raise UsageError(f'no label "{label}" in this run; these there are: {", ".join(sorted(table["label"].unique()))}')
    sure = rows[(rows["q"] < 0.05) & (rows["ci_low"] > 0)].nlargest(top, "ci_low")
    if sure.empty:
        raise UsageError(
            f'no expert of this run surely prefers "{label}" steps; choose another label, or capture more problems'
        )
    return tuple((int(layer), int(expert)) for layer, expert in zip(sure["layer"], sure["expert"], strict=True))


def matched_experts(
    experts: Cells,
    load: Mapping[int, Real[np.ndarray, " E"]],
    *,
    rng: np.random.Generator,
    spared: Sequence[tuple[int, int]] = (),
) -> Cells:
    """As many other experts of the same layers, each drawn from the `NEAREST` in load to one that it stands for.

    Args:
        experts: What they stand for.
        load: Choices of each expert, by layer.
        rng: Source of the draw.
        spared: Experts that are never drawn, beside `experts`.

    Raises:
        UsageError: A layer has too few others.
    """
    drawn: list[tuple[int, int]] = []
    taken = {*experts, *spared}
    for layer, expert in experts:
        near = np.argsort(np.abs(np.log1p(load[layer]) - np.log1p(load[layer][expert])), kind="stable")
        free = [(layer, int(other)) for other in near if (layer, int(other)) not in taken]
        if not free:
            raise UsageError(f"layer {layer} has no expert left to compare with; change fewer of its experts")
        chosen = free[int(rng.integers(min(NEAREST, len(free))))]
        taken.add(chosen)
        drawn.append(chosen)
    return tuple(drawn)


def doses(
    label: str, experts: Cells, kinds: Sequence[Kind], numbers: Sequence[int], values: Sequence[float]
) -> Iterator[Target]:
    """One target for each kind and dose: the first n experts, or for `bias` all of them with each value."""
    for kind in kinds:
        if kind == "bias":
            yield from (Target(label=label, kind=kind, experts=experts, value=value) for value in values)
        else:
            for number in sorted({min(number, len(experts)) for number in numbers}):
                yield Target(label=label, kind=kind, experts=experts[:number])
