"""Run a checkpoint larger than memory: one decoder layer at a time, over many batches.

1. The native model is built without weights. What a gate's hook, the loss and the manifest look at is where it always is.
2. Batches are gathered until what is kept for them (the residual stream, and each layer's choice) reaches a budget.
3. Layer by layer: wait until the system has read the layer's bytes, begin to read the next layer's in another thread, give the
   layer its tensors, run it over all batches, and take its tensors away again.
4. Routed experts are never stacked: each one that some token of a batch chose is used from the memory map.
5. The first stream carries one more batch, the random tokens that `verify_routing` uses; a layer that does not route by the
   rule ends it before any result is given.
6. After the last layer, the norm; the head is in place while results are taken.

Every module that computes is the ordinary one except the experts', which do the arithmetic of "grouped_mm" in the same
products, rows and order: results are equal bit for bit on the CPU (tested).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.activations import ACT2FN

from ling_probe.errors import UsageError
from ling_probe.model.assemble import EMBEDDING, expert_names, fill, head_name, layer_state, shell
from ling_probe.model.config import LingConfig
from ling_probe.model.files import Checkpoint, expected_shapes, find_checkpoint, weight_digest
from ling_probe.model.load import Dtype, LoadedLing, Verification, compare_layer, probe_tokens, verified
from ling_probe.model.mapped import MappedTensors, Range, ReadAhead
from ling_probe.model.modeling import LingForCausalLM, LingGate, LingMoE, gates
from ling_probe.routing import RoutingDifference
from ling_probe.spec import ModelSpec

Tensor = torch.Tensor
BUDGET_BYTES = 1 << 30
"""What one stream keeps for its batches; more batches than fit into it read the checkpoint again."""
_CHOICE_BYTES = 12
"""Of one chosen expert: an id as torch gives it, and a weight."""
_SUM_TOKENS = 512


class StreamBatch(Protocol):
    """A batch as `StreamedLing.forward` needs it."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids [B, S]."""

    @property
    def mask(self) -> Tensor | None:
        """1 for a token, 0 for padding [B, S]; None if nothing is padding."""

    def attached(self) -> AbstractContextManager[None]:
        """Hooks for this batch, attached while the block runs; entered once a layer."""


Batch = TypeVar("Batch", bound=StreamBatch)
Matrices = tuple[Tensor, Tensor, Tensor]
"""Gate, up and down projection, in any number type."""


class StreamedExperts(nn.Module):
    """What `LingExperts` computes as "grouped_mm", from one stored expert at a time.

    Gate and up projections are joined before they are used, in a buffer for one expert: two narrower products may round
    otherwise than the one of the fused layout.
    """

    def __init__(
        self, config: LingConfig, dtype: torch.dtype, matrices: Callable[[int], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.width, self.n_experts = config.moe_intermediate_size, config.num_experts
        self.act_fn = ACT2FN[config.hidden_act]
        self.dtype = dtype
        self.matrices = matrices
        """Of an expert."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum [T, D] of the chosen experts' outputs, summed over slots in float32."""
        n_tokens, k = top_k_index.shape
        ids, order = torch.sort(top_k_index.reshape(-1))
        outputs = hidden_states.new_empty(n_tokens * k, hidden_states.shape[-1])
        joined = hidden_states.new_empty(2 * self.width, hidden_states.shape[-1])
        counts = torch.bincount(ids, minlength=self.n_experts).tolist()
        for expert, rows in enumerate(order.split(counts)):
            if len(rows):
                outputs[rows] = self._expert(expert, hidden_states[rows // k], joined)
        result = torch.empty_like(hidden_states)
        slots = outputs.view(n_tokens, k, -1)
        for each in torch.arange(n_tokens).split(_SUM_TOKENS):
            part = slice(int(each[0]), int(each[-1]) + 1)
            result[part] = (slots[part] * top_k_weights[part, :, None]).sum(dim=1).to(result.dtype)
        return result

    def _expert(self, expert: int, x: Tensor, joined: Tensor) -> Tensor:
        gate, up, down = self.matrices(expert)
        joined[: self.width].copy_(gate)
        joined[self.width :].copy_(up)
        gate_out, up_out = nn.functional.linear(x, joined).chunk(2, dim=-1)
        return nn.functional.linear(self.act_fn(gate_out) * up_out, down.to(self.dtype))


class _Embedding(nn.Module):
    """Rows of the stored embedding in the model's number type; only the pages of rows that are asked for are read."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.dtype = dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, S] to [B, S, D]."""
        return nn.functional.embedding(input_ids, self.weight).to(self.dtype)


@dataclass(frozen=True)
class _Layers:
    """The decoder layers of a native model without weights, and where their tensors come from."""

    native: LingForCausalLM
    tensors: MappedTensors
    dtype: torch.dtype

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> "_Layers":
        """With everything in place that stays: embedding, norm, biases, and experts that fetch their matrices when called."""
        config, tensors = checkpoint.config, MappedTensors(checkpoint)
        layers = cls(shell(config, dtype), tensors, dtype)
        model = layers.native.model
        model.set_submodule("embed_tokens", _Embedding(tensors.numbers(EMBEDDING), dtype))
        fill(model.norm, {"weight": tensors.get("model.norm.weight", dtype)})
        for index, layer in enumerate(model.layers):
            if isinstance(layer.mlp, LingMoE):
                layer.set_submodule("mlp.experts", StreamedExperts(config, dtype, partial(layers._matrices, index)))
                layer.mlp.gate.expert_bias = tensors.get(f"model.layers.{index}.mlp.gate.expert_bias", torch.float32).clone()
        return layers

    def bytes_of(self, index: int) -> list[Range]:
        """What to read for a layer; for the one after the last, the norm and the head."""
        config = self.native.config
        names = (f"model.layers.{index}.",) if index < config.num_hidden_layers else ("model.norm.", head_name(config))
        return self.tensors.ranges(names)

    @contextmanager
    def filled(self, index: int) -> Iterator[nn.Module]:
        """A layer that has its tensors while the block runs."""
        layer = self.native.model.layers[index]
        fill(layer, layer_state(self.tensors, self.native.config, index, self.dtype))
        try:
            yield layer
        finally:
            _empty(layer)

    @contextmanager
    def head(self) -> Iterator[None]:
        """The head is in place while the block runs."""
        fill(self.native.lm_head, {"weight": self.tensors.get(head_name(self.native.config), self.dtype)})
        try:
            yield
        finally:
            _empty(self.native.lm_head)

    def _matrices(self, index: int, expert: int) -> Matrices:
        gate, up, down = (self.tensors.numbers(name) for name in expert_names(index, expert))
        return gate, up, down


def _empty(module: nn.Module) -> None:
    """Take a module's parameters away; buffers stay: a router's bias, which a manifest lists."""
    for child in module.modules():
        for name, tensor in child.named_parameters(recurse=False):
            setattr(child, name, nn.Parameter(tensor.to("meta"), requires_grad=False))


@dataclass(frozen=True)
class _Probe:
    """The batch that routing is proved on, as one more batch of a stream."""

    native: LingForCausalLM
    spec: ModelSpec
    input_ids: Tensor
    mask: None = None
    found: list[RoutingDifference] = field(default_factory=list)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Compare what each gate chooses with the rule while the block runs."""
        with ExitStack() as stack:
            for layer, gate in gates(self.native).items():
                compare = partial(self._compare, layer)
                stack.callback(gate.register_forward_hook(compare).remove)
            yield

    def _compare(self, layer: int, gate: LingGate, args: tuple[Tensor], out: Any) -> None:
        self.found.append(compare_layer(gate, self.spec, layer, args[0], out))


@dataclass(frozen=True)
class StreamedLing(LoadedLing):
    """A Ling whose layers are in memory one at a time; made by `load_streamed`, captured as any `LoadedLing`.

    ``native`` holds embedding, norm and router biases: calling it as a whole cannot work. ``verification`` counts nothing until
    the first stream has passed.
    """

    layers: _Layers
    budget_bytes: int = BUDGET_BYTES

    @property
    def is_proved(self) -> bool:
        """Whether the routing has been verified, which the first stream does."""
        return self.verification.choices > 0

    def describe(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        shapes = expected_shapes(self.native.config)
        return super().describe() | {
            "dtype": str(self.layers.dtype).removeprefix("torch."),
            "parameters": sum(prod(shape) for name, shape in shapes.items() if not name.endswith("expert_bias")),
            "streamed": True,
        }

    def expert_vectors(self) -> dict[str, np.ndarray]:
        """Nothing: it would read every expert's weights, of which a stream reads the chosen ones alone."""
        return {}

    def forward(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with its last hidden states [B, S, D], normed, in order; the head works until the next one is asked for.

        Raises:
            RoutingMismatch: A layer does not route by the rule; raised before the first result.
        """
        for group in self._groups(batches):
            yield from self._stream(group)

    def _groups(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Batches together until they fill the budget; at least one."""
        spec, config = self.spec, self.native.config
        token_bytes = config.hidden_size * self.layers.dtype.itemsize + spec.n_rows * spec.top_k * _CHOICE_BYTES
        group: list[Batch] = []
        for batch in batches:
            tokens = sum(each.input_ids.numel() for each in (*group, batch))
            if group and tokens * token_bytes > self.budget_bytes:
                yield group
                group = []
            group.append(batch)
        if group:
            yield group

    @torch.no_grad()
    def _stream(self, group: list[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        model, layers = self.native.model, self.layers
        probe = _Probe(self.native, self.spec, probe_tokens(self.spec))
        members: list[Batch | _Probe] = [*group] if self.is_proved else [*group, probe]
        states = [model.embed_tokens(each.input_ids) for each in members]
        with ReadAhead.running() as ahead:
            reading = ahead.start(layers.bytes_of(0))
            for index in range(self.spec.n_layers):
                reading.result()
                reading = ahead.start(layers.bytes_of(index + 1))
                with layers.filled(index) as layer:
                    for place, each in enumerate(members):
                        with each.attached():
                            states[place] = layer(states[place], **model.layer_inputs(states[place], each.mask))
            reading.result()
        if not self.is_proved:
            # The one thing about a loaded model that is found out later; nothing else may change it.
            object.__setattr__(self, "verification", verified(probe.found))
        with layers.head():
            for batch in group:
                yield batch, model.norm(states.pop(0))


def load_streamed(
    name_or_path: str, *, revision: str | None = None, device: str = "auto", dtype: Dtype = "auto"
) -> StreamedLing:
    """Make a checkpoint ready to be run layer by layer, on the CPU. Its routing is verified by the first stream.

    Args:
        name_or_path: As for `load_native`.
        revision: As for `load_native`.
        device: "auto" and "cpu" are the CPU.
        dtype: "auto" is float32. The router's bias is float32 in any case.

    Raises:
        CheckpointError: Missing, truncated, or not fitting its configuration.
        ConfigError: Not a Ling 2.0 that we can run.
        UsageError: Another device, or two revisions.
    """
    if device not in ("auto", "cpu"):
        raise UsageError(f"layers are streamed on the CPU only, and device {device} was asked for; leave --stream-layers out")
    checkpoint = find_checkpoint(name_or_path, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.tokenizer_folder)
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return StreamedLing(
        native=(layers := _Layers.of(checkpoint, kind)).native,
        tokenizer=tokenizer,
        spec=checkpoint.config.spec(checkpoint.name),
        digest=weight_digest(checkpoint.files),
        verification=Verification(choices=0, differ=0, near_ties=0, max_weight_error=0.0),
        layers=layers,
    )
