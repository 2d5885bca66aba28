"""What a router computed, read back from a run: logits, scores and bias of one layer, beside the recorded choice.

The recorded choice is the truth. Logits are stored in 16 bits, so near ties the rule may give another set from them: such
tokens are told apart by `RouterBatch.agrees`, and an analysis leaves them out and says how many they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Integer

from ling_probe import routing
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch
from ling_probe.spec import ModelSpec

SLICE = 2048
"""Tokens worked on at a time."""


@dataclass(frozen=True)
class RouterBatch:
    """Some tokens of a batch in one layer."""

    tokens: TokenBatch
    bias: Float64[np.ndarray, " E"]
    spec: ModelSpec

    @property
    def ids(self) -> Integer[np.ndarray, "N K"]:
        """The recorded choice."""
        return self.tokens.expert_ids[:, 0]

    @cached_property
    def scores(self) -> Float64[np.ndarray, "N E"]:
        """Sigmoid of the logits."""
        return routing.scores(self.tokens.extra["logits"][:, 0].astype(np.float64))

    @cached_property
    def choice(self) -> Float64[np.ndarray, "N E"]:
        """Scores plus bias."""
        return routing.choice_scores(self.scores, self.bias)

    @cached_property
    def recorded(self) -> Bool[np.ndarray, "N E"]:
        """The recorded choice as a mask."""
        mask = np.zeros(self.choice.shape, dtype=bool)
        np.put_along_axis(mask, self.ids.astype(np.int64), values=True, axis=-1)
        return mask

    @cached_property
    def agrees(self) -> Bool[np.ndarray, " N"]:
        """Whether the rule gives the recorded set from the stored logits."""
        return (routing.chosen(self.choice, self.spec) == self.recorded).all(axis=-1)


def router_bias(run: Run) -> dict[int, Float64[np.ndarray, " E"]]:
    """The bias of each routed layer, of a run whose choices follow from it and its logits.

    Raises:
        UsageError: The run kept no logits, does not know the bias, or was captured with changed routing.
    """
    if run.manifest.parts and "logits" not in run.manifest.parts[0].extras:
        raise UsageError("no logits in this run; capture with --keep logits")
    bias = recorded_bias(run)
    if changed := [each.kind for each in run.manifest.interventions if each.kind != "silence"]:
        raise UsageError(f"routing was changed in this run ({changed[0]}), so its choices do not follow from logits and bias")
    return bias


def recorded_bias(run: Run) -> dict[int, Float64[np.ndarray, " E"]]:
    """The bias of each routed layer, as the manifest has it.

    Raises:
        UsageError: It does not know it.
    """
    bias = run.manifest.model.get("expert_bias") or {}
    if missing := [layer for layer in run.spec.routed_layers if len(bias.get(str(layer), ())) != run.spec.n_experts]:
        raise UsageError(f"run.json knows no expert_bias of layer {missing[0]}; capture again with this version")
    return {layer: np.array(bias[str(layer)]) for layer in run.spec.routed_layers}


def router_batches(run: Run, layer: int, bias: Float64[np.ndarray, " E"]) -> Iterator[RouterBatch]:
    """The tokens of a run in one layer, a slice of a part at a time."""
    for batch in run.batches(layers=[layer], weights=True, columns=["logits"]):
        for start in range(0, len(batch.sequence), SLICE):
            yield RouterBatch(some_tokens(batch, slice(start, start + SLICE)), bias, run.spec)


def some_tokens(batch: TokenBatch, rows: slice | Integer[np.ndarray, " n"]) -> TokenBatch:
    """Some rows of a batch."""
    fields = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
    return replace(batch, **fields, extra={name: value[rows] for name, value in batch.extra.items()})
