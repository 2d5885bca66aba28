"""Which vectors of a forward pass to keep, as plain recordable values; taking them is `capture`'s.

    residual:3     the residual stream after decoder layer 3
    router:2       what the router of layer 2 reads: the residual stream in front of its experts, normed
    expert:4.17    what expert 17 of layer 4 adds where it is chosen: its weight times its output

Several at once are lists and ranges: ``residual:0-4``, ``router:1,3``, ``expert:4.0-7,4.17``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from jaxtyping import Bool

from ling_probe.errors import UsageError
from ling_probe.spec import ModelSpec
from ling_probe.trace import SEGMENTS, StepSpan

Kind = Literal["residual", "router", "expert"]
KINDS: tuple[Kind, ...] = get_args(Kind)
POSITIONS = ("all", "prompt", "reasoning", "answer", "last", "step-ends")
"""Which tokens: all, those of a segment, the last of the sequence, or the last of every step."""
EXAMPLES = "residual:3,5, router:1-4 or expert:4.17,4.20-23 (layer.expert)"


class Site(NamedTuple):
    """One place of a model that has a vector for a token; sites sort by kind, layer and expert."""

    kind: Kind
    layer: int
    expert: int = -1
    """Of kind "expert" only."""

    @property
    def name(self) -> str:
        """What it is called wherever it is named.

        >>> Site("residual", 3).name, Site("expert", 4, 17).name
        ('residual:3', 'expert:4.17')
        """
        return f"{self.kind}:{self.layer}" + (f".{self.expert}" if self.kind == "expert" else "")

    @property
    def number(self) -> int:
        """Its last number: the expert's, or else the layer's."""
        return self.expert if self.kind == "expert" else self.layer

    @property
    def after(self) -> "Site":
        """The one with the next number."""
        return self._replace(expert=self.expert + 1) if self.kind == "expert" else self._replace(layer=self.layer + 1)


@dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """Which vectors to keep: some sites, at some positions.

    Raises:
        UsageError: No sites, a name that is none, or no such positions.
    """

    names: tuple[str, ...]
    """Of sites, lists and ranges taken apart, in order and without repeats."""
    positions: str = "all"
    """One of `POSITIONS`."""

    def __post_init__(self) -> None:
        sites = sorted({site for name in self.names for site in parse_sites(name)})
        object.__setattr__(self, "names", tuple(site.name for site in sites))
        if not sites:
            raise UsageError(f"activations are kept for sites that are named; write {EXAMPLES}")
        if self.positions not in POSITIONS:
            raise UsageError(f'no positions "{self.positions}"; these there are: {", ".join(POSITIONS)}')

    def __str__(self) -> str:
        """What is kept, in ranges again.

        >>> str(ActivationSpec(names=("residual:0-3,7", "expert:2.5"), positions="last"))
        'expert:2.5, residual:0-3, residual:7 (positions: last)'
        """
        told: list[tuple[str, Site]] = []
        for site in self.sites:
            if told and told[-1][1].after == site:
                told[-1] = (f"{told[-1][0].split('-')[0]}-{site.number}", site)
            else:
                told.append((site.name, site))
        return f"{', '.join(text for text, _ in told)} (positions: {self.positions})"

    @property
    def sites(self) -> tuple[Site, ...]:
        """What `names` name."""
        return tuple(site for name in self.names for site in parse_sites(name))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {"names": list(self.names), "positions": self.positions}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The selection that `to_dict` wrote."""
        return cls(names=tuple(values["names"]), positions=values["positions"])

    def check(self, spec: ModelSpec) -> None:
        """Refuse what this model does not have.

        Raises:
            UsageError: A layer or expert does not exist, or the layer has no router.
        """
        for site in self.sites:
            if site.kind != "residual":
                spec.row(site.layer)
            elif site.layer >= spec.n_layers:
                raise UsageError(f"layer {site.layer} of {spec.name} does not exist; its layers are 0-{spec.n_layers - 1}")
            if site.expert >= spec.n_experts:
                raise UsageError(f"expert {site.expert} does not exist in {spec.name}; its experts are 0-{spec.n_experts - 1}")

    def covers(self, segment: np.ndarray, steps: Sequence[StepSpan]) -> Bool[np.ndarray, " T"]:
        """Which tokens of a sequence are selected, from their segment codes [T] and its steps."""
        if self.positions in SEGMENTS:
            return segment == SEGMENTS.index(self.positions)
        if self.positions == "all":
            return np.ones(len(segment), bool)
        ends = [span.stop - 1 for span in steps if span.stop > span.start]
        covered = np.zeros(len(segment), bool)
        covered[ends if self.positions == "step-ends" else [-1]] = True
        return covered


def parse_sites(text: str) -> list[Site]:
    """The sites that a text names.

    >>> [site.name for site in parse_sites("expert:4.17,5.0-1")]
    ['expert:4.17', 'expert:5.0', 'expert:5.1']

    Raises:
        UsageError: It names none, or a range runs backwards.
    """
    kind, _, items = text.partition(":")
    pattern = r"(?P<layer>\d{1,4})\.(?P<first>\d{1,4})" if kind == "expert" else r"(?P<first>\d{1,4})"
    found = [re.fullmatch(rf"{pattern}(-(?P<last>\d{{1,4}}))?", item) for item in items.split(",")]
    sites: list[Site] = []
    for item, match in zip(items.split(","), found, strict=True):
        if kind not in KINDS or match is None:
            raise UsageError(f'"{text}" names no activation; write {EXAMPLES}')
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if last < first:
            raise UsageError(f'"{item}" of "{text}" runs backwards; write the smaller number first')
        numbers = range(first, last + 1)
        sites += [Site(kind, int(match["layer"]), n) if kind == "expert" else Site(kind, n) for n in numbers]
    return sites
