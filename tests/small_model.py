"""One small Ling 2.0 of random weights, for tests that run or change a model; it routes by the whole rule, bias included."""

import torch

from ling_probe.model import LingConfig, LingForCausalLM
from ling_probe.model.load import LoadedLing, verify_routing
from ling_probe.model.modeling import gates

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "initializer_range": 0.2,
}  # fmt: skip


def random_ling(tokenizer) -> LoadedLing:
    """A model of its own, always the same, whose bias matters."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = LingConfig(
        vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=end, attn_implementation="sdpa",
        experts_implementation="grouped_mm", **SIZES,
    )  # fmt: skip
    native = LingForCausalLM(config).eval()
    for gate in gates(native).values():
        gate.expert_bias.normal_(0, 0.3)
    spec = config.spec("random")
    return LoadedLing(native, tokenizer, spec, "digest", verify_routing(native, spec))
