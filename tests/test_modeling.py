import json
import math
import shutil

import numpy as np
import pytest
import torch
from official import CASES, FIXTURES, NAMES, load, reference, run
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ling_probe.errors import CheckpointError, ConfigError
from ling_probe.model import LingConfig, LingForCausalLM, LingModel
from ling_probe.model.modeling import LingRotaryEmbedding, gates
from ling_probe.routing import compare_routing, route

TOLERANCE = 1e-5
"""Of router logits, as a share of their scale."""


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_the_official_code_in_every_layer(name, experts, record_property):
    recorded, model = reference(name), load(name, experts=experts)
    near_ties = 0
    for case in CASES:
        mask = recorded[f"{case}.attention_mask"]
        real = mask.bool().view(-1)
        logits, seen = run(model, recorded[f"{case}.input_ids"], mask)
        assert len(seen) == model.config.num_hidden_layers - model.config.first_k_dense_replace
        for layer, (router, weights, ids) in seen.items():
            official = {
                key: recorded[f"fp32.eager.{case}.{key}.{layer}"][real] for key in ("router_logits", "topk_idx", "topk_weight")
            }
            scale = official["router_logits"].abs().max()
            assert (router[real] - official["router_logits"]).abs().max() <= TOLERANCE * scale
            found = compare_routing(
                ids[real].numpy(),
                weights[real].numpy(),
                official["router_logits"].numpy(),
                gates(model)[layer].expert_bias.numpy(),
                model.config.spec(),
            )
            assert found.differ == 0
            assert found.max_weight_error < 1e-5
            near_ties += int((ids[real].sort(-1).values != official["topk_idx"].sort(-1).values).any(-1).sum())
        difference = (logits - recorded[f"fp32.eager.{case}.logits"])[mask.bool()].abs().max()
        assert difference < 1e-4
    record_property("near_ties", near_ties)
    assert near_ties == 0


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_the_official_code_bit_for_bit(name, experts):
    recorded, model = reference(name), load(name, "bf16", experts=experts)
    for case in CASES:
        mask = recorded[f"{case}.attention_mask"]
        real = mask.bool().view(-1)
        logits, seen = run(model, recorded[f"{case}.input_ids"], mask)
        for layer, (router, weights, ids) in seen.items():
            for key, value in (("router_logits", router), ("topk_idx", ids), ("topk_weight", weights)):
                assert torch.equal(value[real], recorded[f"bf16.eager-bias32.{case}.{key}.{layer}"][real]), (case, layer, key)
        assert torch.equal(logits.float()[mask.bool()], recorded[f"bf16.eager-bias32.{case}.logits"][mask.bool()])


@pytest.mark.parametrize("part", ["bias", "groups", "shared", "qk_norm", "rotary"])
def test_parity_notices_a_broken_path(part):
    recorded, model = reference("tiny-base"), load("tiny-base")
    layer = model.model.layers[1]
    if part == "bias":
        layer.mlp.gate.expert_bias.zero_()
    elif part == "groups":
        layer.mlp.gate.n_groups = 1
    elif part == "shared":
        nn.init.zeros_(layer.mlp.shared_experts.down_proj.weight)
    elif part == "qk_norm":
        layer.self_attn.q_norm = nn.Identity()
    else:
        model.model.rotary_emb.inv_freq.mul_(0.5)
    logits, _ = run(model, recorded["unpadded.input_ids"])
    assert (logits - recorded["fp32.eager.unpadded.logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_the_official_ones(name, dtype):
    recorded, model = reference(name), load(name, dtype)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 999}
    for use_cache, suffix in ((True, ""), (False, "_nocache")):
        found = model.generate(recorded["unpadded.input_ids"][:1, :12], max_new_tokens=16, use_cache=use_cache, **options)
        assert torch.equal(found, recorded[f"{dtype}.generate.unpadded{suffix}"])
        padded, mask = recorded["lpad.input_ids"], recorded["lpad.attention_mask"]
        found = model.generate(padded, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, **options)
        assert torch.equal(found, recorded[f"{dtype}.generate.lpad{suffix}"])


@pytest.mark.parametrize("name", NAMES)
def test_saving_gives_back_the_original_checkpoint_bit_for_bit(name, tmp_path):
    load(name, "bf16").save_pretrained(tmp_path)
    original, saved = load_file(FIXTURES / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys()
    for key, value in original.items():
        assert saved[key].dtype == value.dtype
        assert torch.equal(saved[key], value), key
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (FIXTURES / name, tmp_path))
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed <= {"torch_dtype", "transformers_version"}
    assert after["dtype"] == before["torch_dtype"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_stays_float32_through_loading_casting_and_training(dtype):
    exact = load_file(FIXTURES / "tiny-base" / "model.safetensors")["model.layers.1.mlp.gate.expert_bias"]
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny-base", dtype=dtype)
    for each in (model, model.to(dtype), model.half(), model.double().bfloat16()):
        gate = each.model.layers[1].mlp.gate
        assert gate.expert_bias.dtype == torch.float32
        assert torch.equal(gate.expert_bias, exact)
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16


def test_the_auto_classes_know_ling():
    assert isinstance(AutoConfig.from_pretrained(FIXTURES / "tiny-base"), LingConfig)
    assert type(AutoModel.from_pretrained(FIXTURES / "tiny-base")) is LingModel
    assert type(AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny-base")) is LingForCausalLM


def test_a_derivatives_model_type_is_read_too(tmp_path):
    shutil.copytree(FIXTURES / "tiny-base", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"model_type": "bailing_moe_v2"}))
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "copy"), LingConfig)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BailingMoeForCausalLM"]}, "BailingMoeForCausalLM"),
        ({"n_group": 5}, "n_group 5 does not divide 32 experts"),
        ({"topk_group": 9}, "topk_group 9"),
        ({"num_experts_per_tok": 17}, "top-k 17 does not fit the 16 experts of 2 groups"),
        ({"score_function": "softmax"}, "softmax"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change, message):
    values = json.loads((FIXTURES / "tiny-base" / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        LingConfig.from_dict(values | change)


def test_zero_groups_is_the_converters_word_for_none():
    config = tiny(n_group=0, topk_group=0)
    assert (config.n_group, config.topk_group) == (1, 1)


def tiny(**changes):
    values = json.loads((FIXTURES / "tiny-base" / "config.json").read_text())
    return LingConfig.from_dict(values | changes)


def test_both_spellings_of_partial_rotation_are_one():
    by_factor = LingRotaryEmbedding(tiny()).inv_freq
    by_dim = LingRotaryEmbedding(tiny(partial_rotary_factor=None, rotary_dim=16)).inv_freq
    whole = LingRotaryEmbedding(tiny(partial_rotary_factor=1.0)).inv_freq
    assert torch.equal(by_factor, by_dim)
    assert (len(by_factor), len(whole)) == (8, 16)


def test_yarn_follows_its_paper():
    """Frequencies and temperature from the formulas of arXiv 2309.00071, section 3, written out here."""
    factor, original, base, dim = 4.0, 128, 600_000.0, 16
    scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    rotary = LingRotaryEmbedding(tiny(rope_scaling=scaling))
    plain = base ** -(np.arange(0, dim, 2) / dim)

    def index(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(index(32)), 0), min(math.ceil(index(1)), dim - 1)
    kept = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(rotary.inv_freq.numpy(), plain / factor * (1 - kept) + plain * kept, rtol=1e-6)
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1)
    assert tiny(rope_scaling=scaling).to_dict()["rope_scaling"]["rope_type"] == "yarn"


def with_next_token_layer(folder, *, inside):
    """tiny-base with a next-token-prediction layer; ``inside`` counts it in num_hidden_layers as Ring does."""
    shutil.copytree(FIXTURES / "tiny-base", folder)
    tensors = load_file(folder / "model.safetensors")
    n = 4
    extra = {key.replace("layers.3.", f"layers.{n}."): value.clone() for key, value in tensors.items() if "layers.3." in key}
    d = 128
    extra |= {
        f"model.layers.{n}.{name}.weight": torch.ones(d, dtype=torch.bfloat16) for name in ("enorm", "hnorm", "final_layernorm")
    }
    extra[f"model.layers.{n}.eh_proj.weight"] = torch.zeros(d, 2 * d, dtype=torch.bfloat16)
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_nextn_predict_layers": 1, "num_hidden_layers": n + inside}
    (folder / "config.json").write_text(json.dumps(config))


def test_next_token_layers_are_left_out_and_said_so_on_save(tmp_path):
    with_next_token_layer(tmp_path / "with", inside=False)
    recorded, model = reference("tiny-base"), load("tiny-base", folder=tmp_path / "with")
    logits, seen = run(model, recorded["unpadded.input_ids"])
    assert sorted(seen) == [1, 2, 3]
    assert (logits - recorded["fp32.eager.unpadded.logits"]).abs().max() < 1e-4
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_next_token_layers_counted_as_decoder_layers_are_refused_by_the_auto_classes(tmp_path):
    with_next_token_layer(tmp_path / "with", inside=True)
    with pytest.raises(CheckpointError, match=r"model\.layers\.4 is a next-token-prediction layer"):
        load("tiny-base", folder=tmp_path / "with")


@pytest.mark.parametrize("edit", ["logits", "scores", "choice", "expert_ids", "weights"])
def test_a_hook_on_the_gate_re_routes(edit):
    """Every named tensor of the router can be replaced, and what follows obeys."""
    recorded, model = reference("tiny-base"), load("tiny-base")
    inputs = recorded["unpadded.input_ids"]
    plain, before = run(model, inputs)
    gate = model.model.layers[2].mlp.gate
    # Expert 9 is made the best choice of every token, or given all the weight.
    values = {"logits": 20.0, "scores": 5.0, "choice": 50.0}

    def change(_module, _args, tensor):
        tensor = tensor.clone()
        if edit in values:
            tensor[:, 9] = values[edit]
        elif edit == "expert_ids":
            tensor[(tensor != 9).all(-1), 0] = 9
        else:
            tensor[:, 1:] = 0.0
        return tensor

    handle = getattr(gate, edit).register_forward_hook(change)
    edited, after = run(model, inputs)
    handle.remove()
    logits, weights, ids = after[2]
    if edit == "weights":
        assert torch.equal(ids, before[2][2])
        assert (weights[:, 1:] == 0).all()
    elif edit == "logits":
        ruled = route(logits.numpy(), gate.expert_bias.numpy(), model.config.spec())
        np.testing.assert_array_equal(ids.numpy(), ruled.ids)
        assert not torch.equal(ids, before[2][2])
    else:
        assert (ids == 9).any(-1).all()
        torch.testing.assert_close(weights.sum(-1), torch.full((len(weights),), 2.5))
    assert torch.equal(after[1][2], before[1][2])
    assert not torch.equal(edited, plain)
    assert torch.equal(run(model, inputs)[0], plain)


def test_numpy_rule_gives_the_models_own_choice():
    recorded, model = reference("tiny-base"), load("tiny-base")
    _, seen = run(model, recorded["unpadded.input_ids"])
    for layer, (logits, weights, ids) in seen.items():
        ruled = route(logits.numpy(), gates(model)[layer].expert_bias.numpy(), model.config.spec())
        np.testing.assert_array_equal(ruled.ids, ids.numpy())
        np.testing.assert_allclose(ruled.weights, weights.numpy(), atol=1e-6)


def test_gradients_reach_router_and_experts_in_both_modes():
    model = load("tiny-base")
    ids = reference("tiny-base")["unpadded.input_ids"]
    for mode in (model.eval(), model.train()):
        mode.zero_grad()
        mode(input_ids=ids, labels=ids).loss.backward()
        layer = mode.model.layers[1].mlp
        assert layer.gate.weight.grad.abs().sum() > 0
        assert layer.experts.gate_up_proj.grad.abs().sum() > 0


def test_router_logits_on_request_are_one_per_routed_layer():
    recorded, model = reference("tiny-base"), load("tiny-base")
    out = model(input_ids=recorded["unpadded.input_ids"], output_router_logits=True)
    assert len(out.router_logits) == 3
    torch.testing.assert_close(out.router_logits[0], recorded["fp32.eager.unpadded.router_logits.1"], atol=1e-4, rtol=1e-4)
