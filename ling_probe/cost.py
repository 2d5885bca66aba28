"""What a Ling 2.0 costs: parameters, FLOPs per token and cache bytes, in closed form from its configuration alone.

The letters, beside those of `ling_probe.spec`: L decoder layers, of which M routed; H query heads and J key-value heads of h
dimensions; F width of an expert; S shared experts; I width of a dense layer. The parts and what they hold are those of the
official code (inclusionAI/Ling-V2, ``modeling_bailing_moe_v2.py``).

What is counted, and what is not:

- Parameters are those of the decoder, with the router's bias, which the official code stores as a buffer.
- FLOPs are of a forward pass, two per multiplication and addition of a matrix product. Norms, activations, softmax, rotary
  embedding, the choice of experts and the addition of biases are left out.
- Next-token-prediction layers, which come after the decoder and are never loaded here, are stated apart and in no sum.

Nothing is measured here, and no weights are read; time and memory traffic are other questions.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ling_probe.errors import CheckpointError, ConfigError, UsageError

if TYPE_CHECKING:
    from ling_probe.model.config import LingConfig

PRESETS = Path(__file__).parent / "presets"
"""Configurations of the published sizes (arXiv 2510.22115 and the official code), in the original spelling."""
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
"""Bytes of one number by its type's name."""
_COUNTS = ("num_shared_experts", "num_nextn_predict_layers")


@dataclass(frozen=True)
class Part:
    """One kind of layer's share, summed over all layers."""

    name: str
    parameters: int
    """Stored."""
    active: int
    """Of these, those that one token passes through: K of E routed experts, all of everything else."""
    flops: int
    """FLOPs per token, forward."""


@dataclass(frozen=True)
class Cost:
    """What one configuration costs per token."""

    parts: tuple[Part, ...]
    """Embedding, attention projections, attention scores, router, routed experts, shared experts, dense feed-forward, norms,
    head."""
    context: int
    """Tokens that the attention scores and the cache are counted for."""
    prefill_score_flops: int
    """FLOPs of attention scores per token, averaged over a causal prefill of ``context`` tokens: 2·L·H·h·(context + 1)."""
    cache_bytes_per_token: int
    """Keys and values of one token in all layers: 2·L·J·h times the bytes of a number."""
    weight_bytes: int
    """All parameters as the original checkpoints store them: bfloat16, the router's bias float32."""
    routing_choices: int
    """Experts chosen per token over all layers, M·K."""
    next_token_layers: int
    """Next-token-prediction layers that the configuration names; in no other number."""
    next_token_layer_parameters: int
    """What one such layer stores, or would store: a routed layer, three norms, and a projection of 2·D to D."""

    @property
    def total(self) -> Part:
        """All parts; its active parameters include the embedding table and the head."""
        return _sum("total", self.parts)

    @property
    def non_embedding(self) -> Part:
        """All parts but embedding and head."""
        return _sum("without embedding and head", [part for part in self.parts if part.name not in ("embedding", "head")])

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one sequence of ``context`` tokens."""
        return self.context * self.cache_bytes_per_token


def cost(config: "LingConfig", *, context: int = 4096, number_bytes: int = 2) -> Cost:
    """Count one configuration's parameters, FLOPs and cache bytes, exactly.

    Args:
        config: Its ``num_hidden_layers`` counts decoder layers only.
        context: Tokens that a new token attends to, itself included: what decoding costs at that length.
        number_bytes: Bytes of one cached number; 2 is bfloat16.

    Raises:
        UsageError: A context below one token, or a number below one byte.
    """
    if context < 1 or number_bytes < 1:
        raise UsageError(f"a context of {context} tokens and numbers of {number_bytes} bytes; expected at least 1 of each")
    layers, routed = config.num_hidden_layers, _routed_layers(config)
    parts = _parts(config, context)
    return Cost(
        parts=parts,
        context=context,
        prefill_score_flops=2 * layers * config.num_attention_heads * config.head_dim * (context + 1),
        cache_bytes_per_token=2 * layers * config.num_key_value_heads * config.head_dim * number_bytes,
        weight_bytes=2 * _sum("total", parts).parameters + 2 * routed * config.num_experts,
        routing_choices=routed * config.num_experts_per_tok,
        next_token_layers=config.num_nextn_predict_layers,
        next_token_layer_parameters=_next_token_layer(config),
    )


def read_config(name: str) -> "LingConfig":
    """The configuration that a preset, a file, a checkpoint folder or a shipped checkpoint names, looked for in that order.

    Where a folder holds weights, their headers are checked against the configuration, and next-token-prediction layers that it
    counts among the decoder's are taken out; a file alone cannot show them. Nothing is downloaded.

    Raises:
        CheckpointError: Nothing there, or a folder whose files are not whole.
        ConfigError: Not JSON, or not a Ling 2.0.
    """
    from ling_probe.model.files import SHIPPED, find_checkpoint

    presets = {file.stem: file for file in sorted(PRESETS.glob("*.json"))}
    shipped = sorted(file.parent.name for file in SHIPPED.glob("*/config.json"))
    path = Path(name)
    if name in presets:
        return _read(presets[name])
    if name in shipped:
        return find_checkpoint(name).config
    if path.is_file():
        return _read(path)
    if (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        return _read(path / "config.json")
    if path.is_dir():
        return find_checkpoint(path).config
    raise CheckpointError(
        f"no configuration at {name}; give a preset ({', '.join(presets)}), a config.json, a checkpoint folder, "
        f"or a shipped checkpoint ({', '.join(shipped)})"
    )


def _read(file: Path) -> "LingConfig":
    from huggingface_hub.errors import StrictDataclassError

    from ling_probe.model.config import LingConfig

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds a {type(values).__name__}; expected a JSON object")
    if not values.get("architectures"):
        raise ConfigError(f'{file} names no "architectures"; Ling 2.0 says ["BailingMoeV2ForCausalLM"]')
    if negative := [name for name in _COUNTS if isinstance(values.get(name), int) and values[name] < 0]:
        raise ConfigError(f"{file}: {negative[0]} is {values[negative[0]]}; expected at least 0")
    try:
        return LingConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError, StrictDataclassError) as error:
        # Values of a wrong type fail in whichever way the code that meets them first does.
        raise ConfigError(f"{file} has a value that no Ling 2.0 can have: {' '.join(str(error).split())[:300]}") from None


def _parts(config: "LingConfig", context: int) -> tuple[Part, ...]:
    """Every part, in the order a token meets them; the norms, which are everywhere, before the head."""
    layers, routed, width = config.num_hidden_layers, _routed_layers(config), config.hidden_size
    experts, chosen, shared = config.num_experts, config.num_experts_per_tok, config.num_shared_experts
    vocabulary, expert = config.vocab_size * width, _swiglu(config, config.moe_intermediate_size)
    head = 0 if config.tie_word_embeddings else vocabulary
    scores = 4 * layers * config.num_attention_heads * config.head_dim * context
    norms = layers * _layer_norms(config) + width
    return (
        Part("embedding", vocabulary, vocabulary, 0),
        _always("attention projections", layers * _projections(config), added=layers * _biases(config)),
        Part("attention scores", 0, 0, scores),
        _always("router", routed * experts * width, added=routed * experts),
        Part("routed experts", routed * experts * expert, routed * chosen * expert, 2 * routed * chosen * expert),
        _always("shared experts", routed * shared * expert),
        _always("dense feed-forward", (layers - routed) * _swiglu(config, config.intermediate_size)),
        Part("norms", norms, norms, 0),
        Part("head", head, head, 2 * vocabulary),
    )


def _always(name: str, multiplied: int, *, added: int = 0) -> Part:
    """A part that every token passes whole: matrices of so many numbers, and numbers that are only added."""
    return Part(name, multiplied + added, multiplied + added, 2 * multiplied)


def _sum(name: str, parts: Iterable[Part]) -> Part:
    parts = tuple(parts)
    return Part(name, sum(p.parameters for p in parts), sum(p.active for p in parts), sum(p.flops for p in parts))


def _routed_layers(config: "LingConfig") -> int:
    return config.num_hidden_layers - config.first_k_dense_replace


def _projections(config: "LingConfig") -> int:
    """One layer's queries, keys, values and output: D·(H + 2J)·h + H·h·D."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.hidden_size * (queries + 2 * keys) + queries * config.hidden_size


def _biases(config: "LingConfig") -> int:
    """One layer's biases of those projections; published models have none."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return config.use_qkv_bias * heads * config.head_dim + config.use_bias * config.hidden_size


def _swiglu(config: "LingConfig", inner: int) -> int:
    """Gate, up and down projection: 3·D·inner."""
    return 3 * config.hidden_size * inner


def _layer_norms(config: "LingConfig") -> int:
    """One layer's two norms of the residual stream, and one each for all query and all key heads: 2·D + 2·h."""
    return 2 * config.hidden_size + config.use_qk_norm * 2 * config.head_dim


def _next_token_layer(config: "LingConfig") -> int:
    """A routed layer, the norms of its two inputs and its output, and ``eh_proj``; embedding and head are the decoder's own."""
    width = config.hidden_size
    experts = (config.num_experts + config.num_shared_experts) * _swiglu(config, config.moe_intermediate_size)
    layer = _projections(config) + _biases(config) + _layer_norms(config) + experts + config.num_experts * (width + 1)
    return layer + 3 * width + 2 * width * width
