"""What recording costs over the same model's plain forward pass: same batch, same process, alternated.

Run with ``make perf``; docs/performance.md holds the table. Each row beyond ids and weights adds one thing to them. The plain
pass has no language-modelling head, which the rows "+loss" and the bridge run. Times are processor time of one thread: other
work on the machine disturbs it less than the clock.
"""

import statistics
import sys
import time

import pytest
import torch

from ling_probe.capture import _Recorder
from ling_probe.capture.passes import next_token_loss
from ling_probe.capture.writes import WriteRecorder
from ling_probe.model import LingConfig, LingForCausalLM
from ling_probe.model.bridge import HookedLing
from ling_probe.model.load import LoadedLing, Verification

ROUNDS = 7
TOKENS = (8, 256)


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
    start = time.process_time()
    call()
    return time.process_time() - start


def recording(loaded, inputs, keep=()):
    """One batch recorded as `capture` does it: ids, weights, and what else is kept."""
    gates, writes = _Recorder(loaded, logits=False), WriteRecorder(loaded, keep, inputs)
    with gates.attached(), writes.attached():
        hidden = loaded.native.model(input_ids=inputs, use_cache=False).last_hidden_state
    gates.arrays(*inputs.shape)
    writes.arrays()
    if "loss" in keep:
        next_token_loss(loaded, hidden, inputs)


def with_router_logits(loaded, inputs):
    found = loaded.native.model(input_ids=inputs, use_cache=False, output_router_logits=True).router_logits
    assert len(found) == loaded.spec.n_rows


def ways(loaded, inputs):
    bridge = HookedLing.wrap(loaded)
    points = [f"gate.{name}.hook_out" for name in ("expert_ids", "weights")]
    router = [f"blocks.{layer}.mlp.{point}" for layer in loaded.spec.routed_layers for point in points]

    def cached():
        _, cache = bridge.run_with_cache(inputs, names_filter=router)
        assert set(router) <= set(cache)

    def plain():
        loaded.native.model(input_ids=inputs, use_cache=False)

    found = {"plain": plain, "plain again": plain, "ids+weights": lambda: recording(loaded, inputs)}
    for name in ("loss", "contribution", "residual", "lens"):
        found[f"+{name}"] = lambda name=name: recording(loaded, inputs, (name,))
    found["output_router_logits=True"] = lambda: with_router_logits(loaded, inputs)
    found["bridge run_with_cache"] = cached
    return found


@pytest.mark.perf
def test_recording_ids_and_weights_is_nearly_free(loaded, record_property):
    inputs = torch.randint(loaded.spec.vocab_size, TOKENS)
    calls = ways(loaded, inputs)
    times = {name: [] for name in calls}
    for call in calls.values():
        timed(call)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(timed(call))
    base = statistics.median(times["plain"])
    ratios = {name: statistics.median(values) / base for name, values in times.items()}
    for name, ratio in ratios.items():
        record_property(name, ratio)
        sys.stdout.write(f"\n{name:<26} {ratio:.3f} of plain ({statistics.median(times[name]):.2f} s for 2,048 tokens)")
    noise = abs(ratios["plain again"] - 1)
    assert ratios["ids+weights"] <= 1.03 + noise
