"""What recording costs over the same model's plain forward pass: same batch, same process, alternated.

Run with ``make perf``; docs/performance.md holds the table.
"""

import statistics
import sys
import time

import pytest
import torch

from ling_probe.capture import _Recorder
from ling_probe.model import LingConfig, LingForCausalLM
from ling_probe.model.load import LoadedLing, Verification

ROUNDS = 15


@pytest.fixture(scope="module")
def loaded():
    """A random Ling: hidden 512, 8 layers, 64 experts, top-8."""
    torch.set_num_threads(1)
    config = LingConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=256, n_group=8,
        topk_group=4, partial_rotary_factor=0.5, routed_scaling_factor=2.5, pad_token_id=0, eos_token_id=0,
        attn_implementation="sdpa", experts_implementation="grouped_mm",
    )  # fmt: skip
    native = LingForCausalLM(config).eval()
    return LoadedLing(native, None, config.spec("random"), "", Verification(0, 0, 0, 0.0))


@torch.no_grad()
def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.perf
def test_recording_ids_and_weights_is_nearly_free(loaded, record_property):
    inputs = torch.randint(4096, (8, 256))
    recorder = _Recorder(loaded, logits=False)

    def plain():
        loaded.native.model(input_ids=inputs, use_cache=False)

    def recorded():
        with recorder.attached():
            plain()
        recorder.arrays(8, 256)

    ways = {"plain": plain, "plain again": plain, "recorded": recorded}
    times = {name: [] for name in ways}
    for call in ways.values():
        timed(call)
    for _ in range(ROUNDS):
        for name, call in ways.items():
            times[name].append(timed(call))
    base = statistics.median(times["plain"])
    ratios = {name: statistics.median(values) / base for name, values in times.items()}
    for name, ratio in ratios.items():
        record_property(name, ratio)
        sys.stdout.write(f"\n{name:<12} {ratio:.3f} of plain ({statistics.median(times[name]):.2f} s for 2,048 tokens)")
    noise = abs(ratios["plain again"] - 1)
    assert ratios["recorded"] <= 1.03 + noise
