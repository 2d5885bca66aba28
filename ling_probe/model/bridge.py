"""Ling 2.0 as a TransformerLens bridge, through an adapter registered from outside TransformerLens.

Hook points of a routed block, beside TransformerLens's usual ones (residual stream, ``ln1``, ``attn``, ``ln2``):

    blocks.L.mlp.gate.hook_in             router input                [T, D]
    blocks.L.mlp.gate.logits.hook_out     router logits               [T, E]
    blocks.L.mlp.gate.scores.hook_out     their sigmoid               [T, E]
    blocks.L.mlp.gate.choice.hook_out     scores + bias               [T, E]
    blocks.L.mlp.gate.expert_ids.hook_out the chosen                  [T, K]
    blocks.L.mlp.gate.weights.hook_out    their weights               [T, K]
    blocks.L.mlp.experts.hook_out         routed output               [T, D]
    blocks.L.mlp.shared_experts.hook_out  shared expert's output      [B, S, D]

A hook that returns a new value changes everything after it: new logits, scores or choice scores choose again, new ids bring
their own weights, new weights are used as they are (renormalise them yourself if you want them to sum to the scale).
"""

import copy
from typing import Any

import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MoEBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module

from ling_probe.model.config import ARCHITECTURE
from ling_probe.model.load import LoadedLing
from ling_probe.model.modeling import LingForCausalLM
from ling_probe.spec import ModelSpec

GATE_TENSORS = ("logits", "scores", "choice", "expert_ids", "weights")


class GateBridge(GeneralizedComponent):
    """The native gate, called as it is; its tensors are hooked by the children that pass them through."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, weights and ids of the (hooked) input."""
        return self.original_component(self.hook_in(hidden_states))


class LingAdapter(ArchitectureAdapter):
    """Where TransformerLens finds the parts of a native Ling 2.0."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._set_rms_rotary_defaults()
        self.cfg.attn_implementation = "eager"
        self.cfg.default_prepend_bos = False
        self.weight_processing_conversions = {**self._qkvo_weight_conversions()}
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "rotary_emb": RotaryEmbeddingBridge(name="model.rotary_emb", config=self.cfg),
            "blocks": BlockBridge(
                name="model.layers",
                submodules={
                    "ln1": RMSNormalizationBridge(name="input_layernorm", config=self.cfg),
                    "ln2": RMSNormalizationBridge(name="post_attention_layernorm", config=self.cfg),
                    "attn": self._attention(),
                    "mlp": self._feed_forward(),
                },
            ),
            "ln_final": RMSNormalizationBridge(name="model.norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }

    def _attention(self) -> PositionEmbeddingsAttentionBridge:
        linear = {tl: LinearBridge(name=f"{tl}_proj") for tl in ("q", "k", "v", "o")}
        norms = {name: RMSNormalizationBridge(name=name, config=self.cfg, optional=True) for name in ("q_norm", "k_norm")}
        return PositionEmbeddingsAttentionBridge(
            name="self_attn",
            config=self.cfg,
            submodules=linear | norms,
            requires_attention_mask=True,
            requires_position_embeddings=True,
        )

    def _feed_forward(self) -> MoEBridge:
        tensors = {name: GeneralizedComponent(name=name) for name in GATE_TENSORS}
        dense = {"dense_gate": "gate_proj", "dense_in": "up_proj", "dense_out": "down_proj"}
        return MoEBridge(
            name="mlp",
            config=self.cfg,
            sparse_required=("gate", "experts"),
            submodules={
                "gate": GateBridge(name="gate", optional=True, submodules=tensors),
                "experts": GeneralizedComponent(name="experts", optional=True),
                "shared_experts": self._gated_mlp(name="shared_experts", optional=True),
            }
            | {tl: LinearBridge(name=name, optional=True) for tl, name in dense.items()},
        )


class HookedLing(TransformerBridge):
    """A loaded Ling 2.0 that one can observe and edit: `run_with_cache`, `run_with_hooks`, `to_tokens` work as ever.

    The bridge works on a copy of the module tree that shares every weight with ``loaded.native``, the plain model that bulk
    capture runs; hooks on one do not slow down the other.
    """

    loaded: LoadedLing
    """The native model, its tokenizer, spec and verification."""

    @classmethod
    def wrap(cls, loaded: LoadedLing) -> "HookedLing":
        """The bridge over a loaded model."""
        ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, LingAdapter)
        bridge = build_bridge_from_module(
            _twin(loaded.native),
            ARCHITECTURE,
            hf_config=loaded.native.config,
            tokenizer=copy.deepcopy(loaded.tokenizer),
            model_name=loaded.spec.name,
        )
        # The public builder makes a TransformerBridge; the class adds one attribute, kept out of torch's registries.
        bridge.__class__ = cls
        bridge.__dict__["loaded"] = loaded
        return bridge

    @property
    def spec(self) -> ModelSpec:
        """The routing geometry."""
        return self.loaded.spec


def _twin(native: LingForCausalLM) -> LingForCausalLM:
    """The same model with modules of its own and the same tensors."""
    shared = {id(tensor): tensor for tensor in [*native.parameters(), *native.buffers()]}
    return copy.deepcopy(native, shared)
