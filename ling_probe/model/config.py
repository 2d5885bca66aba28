"""The configuration of a Ling 2.0 model, read and written in the original checkpoints' own spelling."""

from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ling_probe.errors import ConfigError
from ling_probe.spec import ModelSpec

ARCHITECTURE = "BailingMoeV2ForCausalLM"
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
)  # fmt: skip


@strict
class LingConfig(PreTrainedConfig):
    """A Ling 2.0 (``BailingMoeV2ForCausalLM``) configuration.

    Ling 1.x shares ``model_type`` with Ling 2.0, so a configuration is accepted or refused by its ``architectures``.
    Field names are those of the original ``config.json``; defaults are Ling-mini-2.0's.

    Raises:
        ConfigError: Another architecture, or a routing geometry that cannot be.
    """

    model_type = "bailing_moe"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float | int = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float | int = 0.02
    use_cache: bool = True
    use_qk_norm: bool = True
    use_bias: bool = False
    use_qkv_bias: bool = False
    tie_word_embeddings: bool = False
    attention_dropout: float | int = 0.0
    rope_theta: float | int = 600_000.0
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | int | None = None
    rotary_dim: int | None = None
    """The 1T model's spelling of the rotated part of a head, in dimensions."""
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 512
    first_k_dense_replace: int = 1
    n_group: int = 8
    """0 is how the authors' converter writes "ungrouped"; it reads as 1."""
    topk_group: int = 4
    routed_scaling_factor: float | int = 1.0
    norm_topk_prob: bool = True
    score_function: str = "sigmoid"
    num_nextn_predict_layers: int = 0
    """Next-token-prediction layers in the checkpoint; they are never loaded, and dropped on save."""
    output_router_logits: bool = False
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892
    bos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Normalise the spellings, then refuse what Ling 2.0 cannot be."""
        self._check_architecture(kwargs.get("architectures", getattr(self, "architectures", None)))
        if self.n_group < 1:
            self.n_group = self.topk_group = 1
        if self.partial_rotary_factor is None and self.rotary_dim is not None:
            self.partial_rotary_factor = self.rotary_dim / self.head_dim
        scaling = kwargs.pop("rope_scaling", None)
        if scaling and self.rope_parameters is None:
            self.rope_parameters = {"rope_type": scaling.get("rope_type", scaling.get("type", "default"))} | {
                key: value for key, value in scaling.items() if key not in ("type", "rope_type")
            }
        super().__post_init__(**kwargs)
        self._check_values()
        self.spec()

    def spec(self, name: str | None = None) -> ModelSpec:
        """The routing geometry, named for messages."""
        return ModelSpec(
            name=name or self._name_or_path or "this model",
            n_layers=self.num_hidden_layers,
            routed_layers=tuple(range(self.first_k_dense_replace, self.num_hidden_layers)),
            n_experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            n_groups=self.n_group,
            topk_groups=self.topk_group,
            scale=self.routed_scaling_factor,
            n_shared=self.num_shared_experts,
            d_model=self.hidden_size,
            vocab_size=self.vocab_size,
        )

    @staticmethod
    def _check_architecture(architectures: list[str] | None) -> None:
        if architectures and ARCHITECTURE not in architectures:
            raise ConfigError(
                f"this is a {architectures[0]} configuration, not Ling 2.0 ({ARCHITECTURE}); Ling 1.x and 2.5 route otherwise"
            )

    def _check_values(self) -> None:
        if self.score_function != "sigmoid":
            raise ConfigError(f'score_function is "{self.score_function}"; the Ling 2.0 router scores by "sigmoid"')
        if not self.norm_topk_prob:
            raise ConfigError("norm_topk_prob is false; the Ling 2.0 router normalises the chosen scores")
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ConfigError(
                f"first_k_dense_replace {self.first_k_dense_replace} is not between 0 and {self.num_hidden_layers} layers"
            )

    def to_dict(self) -> dict[str, Any]:
        """The original spelling: rope keys at the top level, never ``rope_parameters``; the original architecture's name."""
        values = super().to_dict()
        values["architectures"] = [ARCHITECTURE]
        rope = dict(values.pop("rope_parameters", None) or {})
        values["rope_theta"] = rope.pop("rope_theta", self.rope_theta)
        rope.pop("partial_rotary_factor", None)
        values["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        values["num_nextn_predict_layers"] = 0
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """The configuration of a ``config.json``'s values; refuses other architectures before reading anything else."""
        cls._check_architecture(config_dict.get("architectures"))
        return super().from_dict(config_dict, **kwargs)
