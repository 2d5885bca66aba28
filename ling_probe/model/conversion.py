"""Original Ling checkpoints to the native layout and back, as transformers weight converters.

Names change, the fused ``query_key_value`` [all Q | all K | all V] becomes three projections, and a layer's experts are
stacked to 3-D. Every operation is its own inverse in reverse, so saving gives back the original tensors bit for bit.
"""

from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter, WeightRenaming

Tensors = dict[str, Any]


def _single(tensors: Tensors, name: str) -> torch.Tensor:
    value = tensors[name]
    return value[0] if isinstance(value, list) else value


class SplitQueryKeyValue(ConversionOps):
    """Rows of ``query_key_value`` to queries, keys and values; sizes from the configuration."""

    @torch.no_grad()
    def convert(
        self, input_dict: Tensors, source_patterns: list[str], target_patterns: list[str], config: Any, **_: Any
    ) -> Tensors:
        """Three tensors, under the target names."""
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        parts = torch.split(_single(input_dict, source_patterns[0]), [queries, keys, keys], dim=0)
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        """The join."""
        return JoinQueryKeyValue()


class JoinQueryKeyValue(ConversionOps):
    """Queries, keys and values stacked by rows into ``query_key_value``."""

    @torch.no_grad()
    def convert(self, input_dict: Tensors, source_patterns: list[str], target_patterns: list[str], **_: Any) -> Tensors:
        """One tensor, under the target name."""
        return {target_patterns[0]: torch.cat([_single(input_dict, name) for name in source_patterns], dim=0)}

    @property
    def reverse_op(self) -> ConversionOps:
        """The split."""
        return SplitQueryKeyValue()


def weight_conversions() -> list[WeightConverter | WeightRenaming]:
    """From the original layout to the native one, in the order they apply."""
    return [
        WeightRenaming(r"model\.word_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"\.attention\.dense\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
        WeightRenaming(r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
        WeightConverter(
            source_patterns="attention.query_key_value",
            target_patterns=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            operations=[SplitQueryKeyValue()],
        ),
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def register_conversions() -> None:
    """Tell transformers how to load and save the native classes."""
    for name in ("LingForCausalLM", "LingModel"):
        register_checkpoint_conversion_mapping(name, weight_conversions(), overwrite=True)
