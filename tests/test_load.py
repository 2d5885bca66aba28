import json
import shutil

import pytest
import torch
from official import FIXTURES, reference, run
from safetensors.torch import load_file, save_file
from test_modeling import with_next_token_layer

from ling_probe.errors import CheckpointError, ConfigError, RoutingMismatch, UsageError
from ling_probe.model.files import SHIPPED, expected_shapes, find_checkpoint, weight_digest
from ling_probe.model.load import load_model, load_native, verify_routing
from ling_probe.model.modeling import gates


@pytest.fixture
def checkpoint(tmp_path):
    """A writable copy of tiny-base with a tokenizer."""
    shutil.copytree(FIXTURES / "tiny-base", tmp_path / "copy")
    for file in (SHIPPED / "ling-tiny").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_the_shipped_checkpoint_loads_by_name_and_proves_its_routing():
    loaded = load_native("ling-tiny")
    assert loaded.spec.name == "ling-tiny"
    assert loaded.verification.choices == 4 * 64 * loaded.spec.n_rows
    assert loaded.verification.differ == 0
    assert loaded.verification.max_weight_error < 1e-5
    assert str(loaded.verification).startswith("0 of 1,024 differ")
    assert loaded.native.dtype == torch.float32
    assert max(gate.expert_bias.abs().max() for gate in gates(loaded.native).values()) > 0
    assert json.loads(json.dumps(loaded.describe()))["verification"]["differ"] == 0


def test_load_model_is_a_bridge_over_the_verified_model():
    bridge = load_model("ling-tiny")
    tokens = bridge.to_tokens("7+5=12\n", prepend_bos=False)
    assert bridge.loaded.tokenizer.decode(tokens[0]) == "7+5=12\n"
    _, cache = bridge.run_with_cache(tokens)
    assert cache["blocks.1.mlp.gate.expert_ids.hook_out"].shape == (tokens.shape[1], bridge.spec.top_k)


def test_expected_tensors_are_the_stored_ones():
    for name in ("tiny-base", "tiny-tied"):
        found = {key: tuple(value.shape) for key, value in load_file(FIXTURES / name / "model.safetensors").items()}
        assert expected_shapes(find_checkpoint(FIXTURES / name).config) == found


def test_the_digest_follows_the_weights(checkpoint):
    files = find_checkpoint(checkpoint).files
    before = weight_digest(files)
    tensors = load_file(files[0])
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, files[0], metadata={"format": "pt"})
    assert weight_digest(files) != before


@pytest.mark.parametrize("inside", [False, True])
def test_next_token_layers_are_never_decoder_layers(tmp_path, inside):
    with_next_token_layer(tmp_path / "with", inside=inside)
    for file in (SHIPPED / "ling-tiny").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "with")
    loaded = load_native(str(tmp_path / "with"))
    assert loaded.spec.routed_layers == (1, 2, 3)
    recorded = reference("tiny-base")
    logits, _ = run(loaded.native, recorded["unpadded.input_ids"])
    assert (logits - recorded["fp32.eager.unpadded.logits"]).abs().max() < 1e-3


def test_a_layer_that_breaks_the_rule_is_refused_and_named(checkpoint):
    loaded = load_native(str(checkpoint))
    gates(loaded.native)[2].n_groups = 1
    with pytest.raises(RoutingMismatch, match=r"layer 2 of .* \d+ of 256 choices differ"):
        verify_routing(loaded.native, loaded.spec)


def test_wrong_weights_alone_are_refused(checkpoint):
    loaded = load_native(str(checkpoint))
    gates(loaded.native)[3].scale = 2.4
    with pytest.raises(RoutingMismatch, match=r"layer 3 .* largest weight error"):
        verify_routing(loaded.native, loaded.spec)


def damage_truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def damage_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 400)


def damage_drop(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.7.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:64].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_extra_layer(folder):
    rewrite(folder, num_hidden_layers=3)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_truncate, CheckpointError, r"is truncated: [\d,]+ bytes found, its header promises"),
        (damage_header, CheckpointError, "truncated or no safetensors"),
        (damage_drop, CheckpointError, r"lacks 1 of 333 tensors, first model\.layers\.2\.mlp\.experts\.7\.up_proj"),
        (damage_shape, CheckpointError, r"model\.norm\.weight is \[64\]; config\.json asks for \[128\]"),
        (damage_extra_layer, CheckpointError, "holds layer 3; config.json counts 3 layers"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "lacks model.safetensors"),
        (lambda f: (f / "config.json").unlink(), CheckpointError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "expected a JSON object"),
        (lambda f: (f / "tokenizer.json").unlink(), CheckpointError, "no tokenizer.json"),
        (lambda f: rewrite(f, architectures=["BailingMoeForCausalLM"]), ConfigError, "not Ling 2.0"),
        (lambda f: rewrite(f, architectures=None), ConfigError, 'names no "architectures"'),
        (lambda f: rewrite(f, n_group=5), ConfigError, "n_group 5 does not divide 32 experts"),
        (lambda f: rewrite(f, quantization_config={"quant_method": "gptq"}), ConfigError, "quantised by 'gptq'"),
        (lambda f: rewrite(f, hidden_size="wide"), ConfigError, "hidden_size"),
    ],
)
def test_damage_is_refused_in_one_line(checkpoint, damage, error, message):
    damage(checkpoint)
    with pytest.raises(error, match=message) as caught:
        load_native(str(checkpoint))
    assert "\n" not in str(caught.value)


def test_a_name_that_is_nothing_lists_what_ships():
    with pytest.raises(CheckpointError, match=r"no checkpoint at nowhere; .*ling-tiny"):
        load_native("nowhere")


@pytest.mark.parametrize("device", ["gpu7", "cuda"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(UsageError, match=device):
        load_native("ling-tiny", device=device)
