"""A native model put together from a checkpoint's stored tensors, a decoder layer at a time.

What transformers' loading does through `conversion`, for the checkpoints it cannot hold or read: those larger than memory, and
those in FP8. Both give the same tensors (tested).
"""

from collections.abc import Mapping

import torch

from ling_probe.model.config import LingConfig
from ling_probe.model.files import Checkpoint, layer_shapes
from ling_probe.model.mapped import MappedTensors
from ling_probe.model.modeling import LingForCausalLM, LingMoE, LingRotaryEmbedding

_NATIVE = (
    ("attention.dense.", "self_attn.o_proj."),
    ("attention.query_layernorm.", "self_attn.q_norm."),
    ("attention.key_layernorm.", "self_attn.k_norm."),
)
_FUSED = "attention.query_key_value."
EMBEDDING = "model.word_embeddings.weight"
State = dict[str, torch.Tensor]


def shell(config: LingConfig, dtype: torch.dtype) -> LingForCausalLM:
    """The native model without any weights (they are on the meta device), set up to run as `load_native` runs it."""
    with torch.device("meta"):
        native = LingForCausalLM._from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    native.model.rotary_emb = LingRotaryEmbedding(native.config)
    return native.eval()


def assemble(checkpoint: Checkpoint, dtype: torch.dtype) -> LingForCausalLM:
    """The whole native model in memory; beside it, one expert at a time."""
    native, tensors = shell(checkpoint.config, dtype), MappedTensors(checkpoint)
    for index, layer in enumerate(native.model.layers):
        state = {name: tensor.clone() for name, tensor in layer_state(tensors, checkpoint.config, index, dtype).items()}
        if isinstance(layer.mlp, LingMoE):
            state |= stacked_experts(tensors, checkpoint.config, index, dtype)
        fill(layer, state)
    fill(native.model.norm, {"weight": tensors.get("model.norm.weight", dtype).clone()})
    fill(native.model.embed_tokens, {"weight": tensors.get(EMBEDDING, dtype).clone()})
    if checkpoint.config.tie_word_embeddings:
        native.tie_weights()
    else:
        fill(native.lm_head, {"weight": tensors.get("lm_head.weight", dtype).clone()})
    return native


def fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a module its tensors, all of them, as they are."""
    module.load_state_dict(state, assign=True, strict=True)


def head_name(config: LingConfig) -> str:
    """Original name of the matrix that turns hidden states into logits."""
    return EMBEDDING if config.tie_word_embeddings else "lm_head.weight"


def layer_state(tensors: MappedTensors, config: LingConfig, index: int, dtype: torch.dtype) -> State:
    """A decoder layer's tensors by native name, without its routed experts; the router's bias float32 in any case."""
    prefix = f"model.layers.{index}."
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    state: State = {}
    for name in _layer_names(config, index, prefix):
        tensor = tensors.get(prefix + name, torch.float32 if name.endswith("expert_bias") else dtype)
        if name.startswith(_FUSED):
            parts = tensor.split([queries, keys, keys])
            state |= {
                f"self_attn.{each}_proj.{name.removeprefix(_FUSED)}": part for each, part in zip("qkv", parts, strict=True)
            }
        else:
            state[_native_name(name)] = tensor
    return state


def expert_names(index: int, expert: int) -> tuple[str, str, str]:
    """Original names of a routed expert's gate, up and down projections."""
    prefix = f"model.layers.{index}.mlp.experts.{expert}."
    return f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight", f"{prefix}down_proj.weight"


def stacked_experts(tensors: MappedTensors, config: LingConfig, index: int, dtype: torch.dtype) -> State:
    """A routed layer's experts, fused: gate and up [E, 2F, D], down [E, D, F]."""
    count, width, d = config.num_experts, config.moe_intermediate_size, config.hidden_size
    gate_up, down = torch.empty(count, 2 * width, d, dtype=dtype), torch.empty(count, d, width, dtype=dtype)
    for expert in range(count):
        names = expert_names(index, expert)
        for place, name in zip((gate_up[expert, :width], gate_up[expert, width:], down[expert]), names, strict=True):
            place.copy_(tensors.numbers(name))
    return {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}


def _layer_names(config: LingConfig, index: int, prefix: str) -> list[str]:
    """Original names of a layer's tensors, without the prefix and the routed experts."""
    names = (name.removeprefix(prefix) for name in layer_shapes(config, index))
    return [name for name in names if not name.startswith("mlp.experts.")]


def _native_name(name: str) -> str:
    for original, native in _NATIVE:
        if name.startswith(original):
            return native + name.removeprefix(original)
    return name
