"""What recording costs over the same model's plain forward pass: same batch, same process, alternated.

Run with ``make perf``; docs/performance.md holds the table. Each row beyond ids and weights adds one thing to them. The plain
pass has no language-modelling head, which the rows "+loss" and the bridge run. Times are processor time of one thread: other
work on the machine disturbs it less than the clock. nnsight is measured where it can be imported; it is no dependency.
"""

import statistics
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from ling_probe.activations import ActivationSpec
from ling_probe.capture import _Recorder
from ling_probe.capture.layout import Layout
from ling_probe.capture.passes import next_token_loss
from ling_probe.capture.vectors import Spill, VectorRecorder
from ling_probe.capture.writes import WriteRecorder
from ling_probe.model import LingConfig, LingForCausalLM
from ling_probe.model.bridge import HookedLing
from ling_probe.model.load import LoadedLing, Verification

ROUNDS = 7
TOKENS = (8, 256)
ACTIVATIONS = ("residual:4", "residual:0-7", "router:4", "expert:4.0-7")
"""Each kept at all tokens, and put aside on the disk."""


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


def recording(loaded, inputs, keep=(), activations=None):
    """One batch recorded as `capture` does it: ids, weights, and what else is kept."""
    vectors, rows, width = None, *inputs.shape
    if activations:
        layouts = [Layout(np.ones(width, np.uint8), np.full(width, -1, np.int16), (), "")] * rows
        vectors = VectorRecorder(loaded, ActivationSpec(names=(activations,)), layouts, width, Spill())
    gates, writes = _Recorder(loaded, logits=False), WriteRecorder(loaded, keep, inputs, vectors)
    with gates.attached(), vectors.attached() if vectors else nullcontext(), writes.attached():
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
    for name in ACTIVATIONS:
        found[f"+activations {name}"] = lambda name=name: recording(loaded, inputs, activations=name)
    found["output_router_logits=True"] = lambda: with_router_logits(loaded, inputs)
    found["bridge run_with_cache"] = cached
    return found | ({"nnsight trace of the gates": nnsight_trace(loaded, inputs)} if find_spec("nnsight") else {})


def nnsight_trace(loaded, inputs):
    """Ids and weights of every gate, saved by a trace of nnsight (Fiotto-Kaufman et al. 2024)."""
    import nnsight

    model = nnsight.NNsight(loaded.native.model)

    def traced():
        with model.trace(input_ids=inputs, use_cache=False):
            kept = nnsight.save([])
            for layer in loaded.spec.routed_layers:
                kept.append(model.layers[layer].mlp.gate.output[1:])
        assert all(part.shape == (inputs.numel(), loaded.spec.top_k) for pair in kept for part in pair)

    return traced


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
        seconds, tokens = statistics.median(times[name]), inputs.numel()
        sys.stdout.write(f"\n{name:<26} {ratio:.3f} of plain, {tokens / seconds:,.0f} tokens/s ({seconds:.2f} s)")
    if not find_spec("nnsight"):
        record_property("nnsight trace of the gates", "absent: nnsight is not installed")
        sys.stdout.write("\nnnsight trace of the gates absent: nnsight is not installed")
    noise = abs(ratios["plain again"] - 1)
    assert ratios["ids+weights"] <= 1.03 + noise
