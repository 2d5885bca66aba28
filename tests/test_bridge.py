import pytest
import torch
from official import NAMES, load, reference
from transformer_lens.model_bridge import TransformerBridge

from ling_probe.model import LingForCausalLM
from ling_probe.model.bridge import GATE_TENSORS, HookedLing
from ling_probe.model.load import LoadedLing, verify_routing
from ling_probe.model.modeling import gates


def hooked(name="tiny-base", dtype="fp32"):
    native = load(name, dtype)
    spec = native.config.spec(name)
    return HookedLing.wrap(LoadedLing(native, None, spec, "", verify_routing(native, spec)))


@pytest.mark.parametrize("name", NAMES)
def test_parity_per_layer_through_the_bridge(name):
    recorded, bridge = reference(name), hooked(name)
    logits, cache = bridge.run_with_cache(recorded["unpadded.input_ids"], return_type="logits")
    assert (logits - recorded["fp32.eager.unpadded.logits"]).abs().max() < 1e-4
    for layer in bridge.spec.routed_layers:
        gate = f"blocks.{layer}.mlp.gate"
        official = {key: recorded[f"fp32.eager.unpadded.{key}.{layer}"] for key in ("router_logits", "topk_idx", "topk_weight")}
        assert (cache[f"{gate}.logits.hook_out"] - official["router_logits"]).abs().max() < 1e-5 * official[
            "router_logits"
        ].abs().max()
        assert torch.equal(cache[f"{gate}.expert_ids.hook_out"], official["topk_idx"])
        torch.testing.assert_close(cache[f"{gate}.weights.hook_out"], official["topk_weight"], atol=1e-5, rtol=0)


def test_bfloat16_through_the_bridge_is_exact():
    recorded, bridge = reference("tiny-base"), hooked(dtype="bf16")
    logits = bridge(recorded["unpadded.input_ids"], return_type="logits")
    assert torch.equal(logits.float(), recorded["bf16.eager-bias32.unpadded.logits"])


def test_every_promised_hook_point_is_there_and_adds_up():
    recorded, bridge = reference("tiny-base"), hooked()
    assert isinstance(bridge, TransformerBridge)
    _, cache = bridge.run_with_cache(recorded["unpadded.input_ids"])
    block = "blocks.2"
    routed = cache[f"{block}.mlp.experts.hook_out"].view(2, 24, 128)
    shared = cache[f"{block}.mlp.shared_experts.hook_out"]
    torch.testing.assert_close(routed + shared, cache[f"{block}.mlp.hook_out"])
    torch.testing.assert_close(cache[f"{block}.hook_resid_mid"] + routed + shared, cache[f"{block}.hook_resid_post"])
    scores = cache[f"{block}.mlp.gate.scores.hook_out"]
    torch.testing.assert_close(scores, cache[f"{block}.mlp.gate.logits.hook_out"].sigmoid())
    torch.testing.assert_close(cache[f"{block}.mlp.gate.weights.hook_out"].sum(-1), torch.full((48,), 2.5))
    for name in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z", "hook_attn_out"):
        assert cache[f"{block}.{name}"].isfinite().all()


@pytest.mark.parametrize("name", GATE_TENSORS)
def test_an_edit_re_routes_that_layer_and_leaves_nothing_behind(name):
    recorded, bridge = reference("tiny-base"), hooked()
    inputs = recorded["unpadded.input_ids"]
    plain = bridge(inputs, return_type="logits")
    seen = {}

    def edit(tensor, hook):
        tensor = tensor.clone()
        if name == "expert_ids":
            tensor[(tensor != 9).all(-1), -1] = 9
        elif name == "weights":
            tensor[:, 0] = 0.0
        else:
            tensor[:, 9] = tensor.max() + 5.0
        return tensor

    def keep(tensor, hook):
        seen[hook.name] = tensor.detach().clone()

    hooks = [(f"blocks.2.mlp.gate.{name}.hook_out", edit)]
    hooks += [(f"blocks.{layer}.mlp.gate.expert_ids.hook_out", keep) for layer in (1, 2)]
    edited = bridge.run_with_hooks(inputs, fwd_hooks=hooks, return_type="logits")
    assert (edited - plain).abs().max() > 1e-3
    assert torch.equal(seen["blocks.1.mlp.gate.expert_ids.hook_out"], recorded["fp32.eager.unpadded.topk_idx.1"])
    changed = not torch.equal(seen["blocks.2.mlp.gate.expert_ids.hook_out"], recorded["fp32.eager.unpadded.topk_idx.2"])
    assert changed == (name != "weights")
    assert torch.equal(bridge(inputs, return_type="logits"), plain)


def test_the_native_model_shares_weights_and_is_not_hooked():
    bridge = hooked()
    native = bridge.loaded.native
    assert type(native) is LingForCausalLM
    inputs = reference("tiny-base")["unpadded.input_ids"]
    before = native(inputs).logits
    with torch.no_grad():
        gates(native)[1].weight.add_(1.0)
    assert (native(inputs).logits - before).abs().max() > 1e-3
    torch.testing.assert_close(bridge(inputs, return_type="logits"), native(inputs).logits, atol=1e-4, rtol=1e-4)
    assert not any(module._forward_hooks for module in native.modules())
