"""What is fixed about a model's routing, and the letters its axes go by.

    T  tokens (positions of one sequence, or of many laid end to end)
    M  routed layers, in order; ``ModelSpec.routed_layers[row]`` is the decoder layer of a row
    E  routed experts of a layer
    K  experts chosen per token
    G  groups of consecutive experts
    D  width of the residual stream
    V  vocabulary

A *layer* counts all decoder layers, dense ones included; a *row* is the index on M. Only `ModelSpec` converts between them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from ling_probe.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The routing geometry of one model; the same for every sequence it runs."""

    name: str
    """What messages call the model."""
    n_layers: int
    """Decoder layers, dense ones included."""
    routed_layers: tuple[int, ...]
    """Decoder layers that have a router, ascending."""
    n_experts: int
    """Routed experts per layer; the shared expert is never counted."""
    top_k: int
    """Experts chosen per token."""
    n_groups: int = 1
    """Blocks of consecutive experts; 1 means no group limit."""
    topk_groups: int = 1
    """Groups that may be chosen from."""
    scale: float = 1.0
    """What the chosen weights sum to."""
    n_shared: int = 0
    """Shared experts, always on."""
    d_model: int
    """Width of the residual stream."""
    vocab_size: int

    def __post_init__(self) -> None:
        _check_geometry(self)

    @property
    def n_rows(self) -> int:
        """Length of the M axis."""
        return len(self.routed_layers)

    @property
    def group_size(self) -> int:
        """Experts per group."""
        return self.n_experts // self.n_groups

    @property
    def id_dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Smallest unsigned type that holds an expert id."""
        return np.uint8 if self.n_experts <= 256 else np.uint16

    def row(self, layer: int) -> int:
        """Index on the M axis of a decoder layer.

        Raises:
            UsageError: The layer has no router.
        """
        if layer not in self.routed_layers:
            raise UsageError(f"layer {layer} of {self.name} has no router; these do: {_ranges(self.routed_layers)}")
        return self.routed_layers.index(layer)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest; `from_dict` reads them back."""
        return asdict(self) | {"routed_layers": list(self.routed_layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The spec that `to_dict` wrote."""
        return cls(**(dict(values) | {"routed_layers": tuple(values["routed_layers"])}))


def _check_geometry(spec: ModelSpec) -> None:
    if spec.n_groups < 1 or spec.n_experts % spec.n_groups:
        raise ConfigError(
            f"{spec.name}: n_group {spec.n_groups} does not divide {spec.n_experts} experts; groups are equal blocks of experts"
        )
    if not 1 <= spec.topk_groups <= spec.n_groups:
        raise ConfigError(f"{spec.name}: topk_group {spec.topk_groups} is not between 1 and n_group {spec.n_groups}")
    if not 1 <= spec.top_k <= spec.topk_groups * spec.group_size:
        room = spec.topk_groups * spec.group_size
        raise ConfigError(f"{spec.name}: top-k {spec.top_k} does not fit the {room} experts of {spec.topk_groups} groups")
    if spec.n_groups > 1 and spec.group_size < 2:
        raise ConfigError(f"{spec.name}: groups of {spec.group_size} expert; a group's score is the sum of its two best")
    if any(not 0 <= layer < spec.n_layers for layer in spec.routed_layers):
        raise ConfigError(f"{spec.name}: routed layers {_ranges(spec.routed_layers)} lie outside 0-{spec.n_layers - 1}")


def _ranges(layers: tuple[int, ...]) -> str:
    if not layers:
        return "none"
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))
