"""What decides the trained weights, and the recipes that ship."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the trained weights, apart from the library versions."""

    steps: int
    batch_tokens: int = 3072
    """Tokens per step."""
    parts: int = 2
    """Parts of neighbours in length that a step's batch is computed in, so that little is padding."""
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    decay_fraction: float = 0.3
    """Last part of the steps, over which the learning rate falls linearly to zero."""
    momentum: float = 0.95
    """Of Muon, which moves the matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW, which moves embeddings, head, routers and norms."""
    weight_decay: float = 0.1
    """On what Muon moves."""
    clip_norm: float = 1.0
    bias_rate: float = 1e-3
    """Step of the router bias."""
    prompt_weight: float = 0.1
    curriculum_steps: int = 600
    """Steps over which problems grow from 2 operations to 6, and from bare ones to full ones."""
    seed: int = 0
    log_every: int = 20
    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of `LingConfig`; vocabulary and special tokens come from the tokenizer."""

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a 0-based step: linear warm-up, plateau, linear decay to zero."""
        decay_steps = max(1, round(self.steps * self.decay_fraction))
        up = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * min(up, (self.steps - step) / decay_steps)

    def hardest_at(self, step: int) -> int:
        """Most operations a training problem may have at a step, 2 to 6."""
        return 6 if step >= self.curriculum_steps else 2 + 4 * step // self.curriculum_steps

    def bare_share_at(self, step: int) -> float:
        """Share of bare problems: all in the first third of the curriculum, none after it."""
        return min(1.0, max(0.0, 1.5 * (1 - step / self.curriculum_steps))) if self.curriculum_steps else 0.0


# With a rotation base of 10,000 three of the eight frequencies turn less than one radian in 250 tokens; with 100 none does.
_TINY: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "first_k_dense_replace": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "partial_rotary_factor": 0.5,
    "num_experts": 32, "num_experts_per_tok": 4, "num_shared_experts": 1, "moe_intermediate_size": 48,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "max_position_embeddings": 512, "rope_theta": 100.0,
    "initializer_range": 0.02,
}  # fmt: skip
_SCALED: dict[str, dict[str, Any]] = {
    # Five dense layers of this width have the active parameters of ling-tiny, up to 0.1 %.
    "tiny-dense": {"first_k_dense_replace": 5, "intermediate_size": 277},
    "tiny-16": {"num_experts": 16},
    "tiny-32": {},
    "tiny-64": {"num_experts": 64},
}
"""What differs from ling-tiny in the four small runs that ask what more experts bring at the same compute per token."""
PRESETS: dict[str, Recipe] = {
    "ling-tiny": Recipe(steps=7600, architecture=_TINY),
    # Goes on from ling-tiny's weights: the same problems once more at a third of the learning rate, down to zero.
    "ling-tiny-finish": Recipe(
        steps=1200, learning_rate=1e-3, warmup_steps=100, decay_fraction=0.75, curriculum_steps=0, seed=1, architecture=_TINY
    ),
    **{
        name: Recipe(steps=800, warmup_steps=100, curriculum_steps=200, architecture=_TINY | changed)
        for name, changed in _SCALED.items()
    },
}
