"""Ling 2.0 in PyTorch, on transformers' building blocks.

Axes: B sequences, S positions, T = B*S tokens, D width, E experts, K chosen, G groups, F expert width, H heads.

The forward pass of a routed layer, in the official order (inclusionAI/Ling-V2, ``modeling_bailing_moe_v2.py``):

1. ``logits`` = float32(x) @ float32(W).T
2. ``scores`` = sigmoid(logits)
3. ``choice`` = scores + expert_bias, for choosing only
4. keep the ``topk_group`` groups whose two best choice scores sum highest; the other groups are -inf
5. ``expert_ids`` = the K best of what is left, best first
6. ``weights`` = scores of the chosen / (their sum + 1e-20) * routed_scaling_factor
7. output = sum of weights * expert(x), accumulated in float32, plus the shared expert, ungated

Every named tensor passes through a child module of the gate that does nothing, so a forward hook there can read it or
replace it, and everything after it follows the replacement.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ling_probe.errors import CheckpointError
from ling_probe.model.config import LingConfig

Tensor = torch.Tensor


class LingRMSNorm(nn.Module):
    """Root-mean-square norm in float32, scaled in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Norm over the last axis."""
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class LingRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotated part of each head; YaRN and other scalings through transformers' table."""

    inv_freq: Tensor

    def __init__(self, config: LingConfig) -> None:
        super().__init__()
        self.config = config
        inv_freq, self.attention_scaling = self.frequencies(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)

    @staticmethod
    def frequencies(config: LingConfig) -> tuple[Tensor, float]:
        """Inverse frequencies [rotary_dim / 2] and the factor on cosines and sines."""
        rope: dict[str, Any] = config.rope_parameters or {}
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None)
        dim = int(config.head_dim * (rope.get("partial_rotary_factor") or 1.0))
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, S, rotary_dim] in x's dtype, computed in float32."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            freqs = position_ids[..., None].float() * self.inv_freq.float()
            angles = torch.cat((freqs, freqs), dim=-1)
            cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """Swap the two halves of the last axis and negate the first."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first ``rotary_dim`` dimensions of each head; the rest passes."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    dim = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        turned = x[..., :dim]
        return torch.cat((turned * cos + rotate_half(turned) * sin, x[..., dim:]), dim=-1)

    return rotate(q), rotate(k)


def eager_attention_forward(
    module: "LingAttention", query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention by plain matrix products, softmax in float32: the official eager path."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    pattern = nn.functional.dropout(pattern, p=dropout, training=module.training)
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


class LingAttention(nn.Module):
    """Grouped-query attention with a norm on every query and key head, before the rotation."""

    def __init__(self, config: LingConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.use_qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.use_qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.use_qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.use_bias)
        if config.use_qk_norm:
            self.q_norm = LingRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = LingRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed values [B, S, D], and the pattern where the kernel gives one."""
        shape = hidden_states.shape[:-1]
        q, k, v = (f(hidden_states).view(*shape, -1, self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        mixed, pattern = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(*shape, -1).contiguous()), pattern


class LingMLP(nn.Module):
    """SwiGLU: a dense layer's feed-forward network, or a shared expert."""

    def __init__(self, config: LingConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LingGate(nn.Module):
    """The router of one layer; `forward` is the official rule, steps 1 to 6 above.

    Its children ``logits``, ``scores``, ``choice``, ``expert_ids`` and ``weights`` each pass one tensor through unchanged.
    """

    expert_bias: Tensor

    def __init__(self, config: LingConfig) -> None:
        super().__init__()
        self.top_k, self.n_experts = config.num_experts_per_tok, config.num_experts
        self.n_groups, self.topk_groups = config.n_group, config.topk_group
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))
        self.logits, self.scores, self.choice = nn.Identity(), nn.Identity(), nn.Identity()
        self.expert_ids, self.weights = nn.Identity(), nn.Identity()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E] float32, weights [T, K] float32 and expert ids [T, K] of hidden states [T, D]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        with torch.autocast(device_type=x.device.type, enabled=False):
            logits = self.logits(nn.functional.linear(x.float(), self.weight.float()))
            scores = self.scores(logits.sigmoid())
            choice = self.choice(scores + self.expert_bias)
            ids = self.expert_ids(self._limit_groups(choice).topk(self.top_k, dim=-1).indices)
            chosen = scores.gather(-1, ids)
            weights = self.weights(chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * self.scale)
        return logits, weights, ids

    def _limit_groups(self, choice: Tensor) -> Tensor:
        if self.n_groups == 1:
            return choice
        grouped = choice.view(-1, self.n_groups, self.n_experts // self.n_groups)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_groups, dim=-1).indices
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, value=True)
        return grouped.masked_fill(~kept[..., None], float("-inf")).view_as(choice)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LingGate":
        """Follow every move, but keep the bias float32: in 16 bits it changes which experts are chosen."""
        exact = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != torch.float32 and not exact.is_meta:
            self.expert_bias = exact.to(self.expert_bias.device, torch.float32)
        return self


@use_experts_implementation
class LingExperts(nn.Module):
    """All routed experts of a layer, fused: ``gate_up_proj`` [E, 2F, D], ``down_proj`` [E, D, F]."""

    def __init__(self, config: LingConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.moe_intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum [T, D] of the chosen experts' outputs, one expert at a time, summed over slots in float32."""
        outputs = hidden_states.new_empty(*top_k_index.shape, hidden_states.shape[-1])
        for expert in top_k_index.unique():
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs[token, slot] = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
        return (outputs * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


class LingMoE(nn.Module):
    """A routed layer's feed-forward network: chosen experts plus the shared expert."""

    def __init__(self, config: LingConfig) -> None:
        super().__init__()
        self.gate = LingGate(config)
        self.experts = LingExperts(config)
        if config.num_shared_experts:
            self.shared_experts = LingMLP(config, config.moe_intermediate_size * config.num_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(flat)
        routed = self.experts(flat, ids, weights).view_as(hidden_states)
        return routed + self.shared_experts(hidden_states) if hasattr(self, "shared_experts") else routed


class LingDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a dense or a routed feed-forward network, each behind a norm and added to the residual stream."""

    def __init__(self, config: LingConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LingAttention(config, layer_idx)
        routed = layer_idx >= config.first_k_dense_replace
        self.mlp = LingMoE(config) if routed else LingMLP(config, config.intermediate_size)
        self.input_layernorm = LingRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LingRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The residual stream [B, S, D] after this layer."""
        mixed, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LingPreTrainedModel(PreTrainedModel):
    """What the bare model and the one with a head share."""

    config: LingConfig
    config_class = LingConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LingDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["expert_bias"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "router_logits": OutputRecorder(LingGate, index=0),
        "hidden_states": LingDecoderLayer,
        "attentions": LingAttention,
    }

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; refuses a checkpoint that counts next-token-prediction layers as decoder layers.

        Raises:
            CheckpointError: It does. `ling_probe.model.load` corrects the count and loads it.
        """
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if inside := [key for key in info["unexpected_keys"] if key.endswith(".eh_proj.weight")]:
            raise CheckpointError(
                f"{inside[0].removesuffix('.eh_proj.weight')} is a next-token-prediction layer, counted in num_hidden_layers "
                f"{model.config.num_hidden_layers}; load it with ling_probe, or lower that number"
            )
        return (model, info) if wanted else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LingExperts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, LingGate):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.expert_bias)
        elif isinstance(module, LingRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LingRotaryEmbedding):
            module.inv_freq.copy_(module.frequencies(self.config)[0])


class LingModel(LingPreTrainedModel):
    """Ling 2.0 without its head."""

    def __init__(self, config: LingConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LingDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LingRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LingRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Last hidden state [B, S, D], normed."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        inputs = self.layer_inputs(x, attention_mask, position_ids, past_key_values)
        for layer in self.layers:
            x = layer(x, **inputs, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def layer_inputs(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None, past_key_values: Cache | None = None
    ) -> dict[str, Any]:
        """What every decoder layer is given beside the residual stream [B, S, D], of which only shape and type matter here."""
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values,
            position_ids=position_ids,
        )  # fmt: skip
        embeddings = self.rotary_emb(x, position_ids=position_ids)
        return {
            "attention_mask": mask, "position_ids": position_ids, "past_key_values": past_key_values,
            "position_embeddings": embeddings,
        }  # fmt: skip


class LingForCausalLM(LingPreTrainedModel, GenerationMixin):
    """Ling 2.0 with its language-modelling head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LingConfig) -> None:
        super().__init__(config)
        self.model = LingModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        first, count = config.num_hidden_layers, config.num_nextn_predict_layers
        # Next-token-prediction layers come after the decoder's; they are left in the checkpoint.
        self._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{i}\." for i in range(first, first + count)]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Next-token logits [B, S, V]; ``output_router_logits=True`` adds one [T, E] per routed layer."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, router_logits=outputs.router_logits,
        )  # fmt: skip


def gates(model: nn.Module) -> dict[int, LingGate]:
    """Every router of a model, by decoder layer."""
    found = next(module for module in model.modules() if isinstance(module, LingModel))
    return {i: layer.mlp.gate for i, layer in enumerate(found.layers) if isinstance(layer.mlp, LingMoE)}
