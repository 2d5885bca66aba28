"""A value for every expert, as a file that says what it was made of; times a strength, it is a list of interventions."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from ling_probe.errors import UsageError
from ling_probe.interventions import Intervention, bias
from ling_probe.run.folder import STEERING
from ling_probe.spec import ModelSpec

Measure = Literal["risk-difference", "information"]
"""What a value says of an expert: the difference of two shares, or the log2 of their ratio."""
LIKE = 8
"""Values are shuffled among so many experts of a layer whose loads are next to each other."""


@dataclass(frozen=True, kw_only=True)
class SteeringVector:
    """How much more often one class of text chooses each expert than another."""

    toward: str
    away: str
    about: str
    """What the classes are of: label, family, answer, or run."""
    model: str
    digest: str
    """Of the model's weights."""
    tokens: tuple[float, float]
    """Of either class, that were compared."""
    reliability: float
    """Correlation of the differences in two halves of the problems; NaN where a half has nothing to compare."""
    differences: Mapping[int, tuple[float, ...]]
    """By layer and expert: the share of the tokens of `toward` that choose it minus that of `away`; or, of measure information,
    its pointwise mutual information with `toward` minus that with `away`, in bits."""
    load: Mapping[int, tuple[int, ...]]
    """Choices of each expert by all those tokens."""
    measure: Measure = "risk-difference"

    @property
    def values(self) -> dict[int, np.ndarray]:
        """The differences by layer [E], divided by the largest of all layers."""
        largest = max((abs(each) for layer in self.differences.values() for each in layer), default=0.0)
        return {layer: np.array(each) / (largest or 1.0) for layer, each in self.differences.items()}

    def interventions(self, strength: float) -> tuple[Intervention, ...]:
        """The vector as biases: the largest value adds so much to its expert's choice score."""
        return tuple(
            bias(layer, [expert], strength * value)
            for layer, values in self.values.items()
            for expert, value in enumerate(values)
            if strength * value
        )

    def strongest(self, top: int) -> Self:
        """With the differences of all but the largest set to 0."""
        sizes = np.sort(np.abs(np.concatenate([np.array(each) for each in self.differences.values()])))[::-1]
        least = sizes[min(top, len(sizes)) - 1]
        kept = {layer: tuple(each if abs(each) >= least else 0.0 for each in row) for layer, row in self.differences.items()}
        return replace(self, differences=kept)

    def shuffled(self, rng: np.random.Generator) -> Self:
        """With the differences of each layer dealt anew among experts of like load."""
        dealt = {}
        for layer, row in self.differences.items():
            order, new = np.argsort(self.load[layer], kind="stable"), np.empty(len(row))
            for near in np.array_split(order, max(1, len(row) // LIKE)):
                new[near] = rng.permutation(np.array(row)[near])
            dealt[layer] = tuple(new.tolist())
        return replace(self, differences=dealt)

    def check(self, spec: ModelSpec) -> None:
        """Refuse a model of another geometry.

        Raises:
            UsageError: Layers or experts differ.
        """
        sizes = {len(row) for row in self.differences.values()}
        if tuple(self.differences) != tuple(spec.routed_layers) or sizes != {spec.n_experts}:
            raise UsageError(f"the vector steers {self.model}, whose layers and experts are others than those of {spec.name}")

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": 1} | asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `save` wrote.

        Raises:
            UsageError: The file is not there, or is no steering vector.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("schema") != 1:
                raise UsageError(f"{path} is a steering vector of another version of ling-probe; make it again")
            for name, kind in (("differences", float), ("load", int)):
                values[name] = {int(layer): tuple(map(kind, row)) for layer, row in values[name].items()}
            found = cls(**values | {"tokens": tuple(map(float, values["tokens"]))})
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}); make a vector with ling-probe steer") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{path} is no steering vector; make one with ling-probe steer") from error
        if not all(np.isfinite(row).all() for row in found.differences.values()):
            raise UsageError(f"{path} holds values that are no numbers; make it again with ling-probe steer")
        return found


def vector_folder(run: Path, vector: SteeringVector, top: int | None = None) -> Path:
    """Where a vector of a run and what it does are kept; a name that could act as a path is spelled out."""
    name = f"{vector.toward}-from-{vector.away}" + (f"-{top}" if top else "")
    name += "" if vector.measure == "risk-difference" else f"-{vector.measure}"
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:80]
    told = plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return run / STEERING / told
