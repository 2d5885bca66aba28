import json
import shutil
from math import ceil

import pytest
import torch
from official import FIXTURES
from safetensors.torch import load_file, save_file

from ling_probe.errors import CheckpointError, ConfigError
from ling_probe.model.files import SHIPPED, find_checkpoint
from ling_probe.model.fp8 import dequantise
from ling_probe.model.load import load_native
from ling_probe.model.streaming import load_streamed

QUANTISED = ("_proj.weight", "query_key_value.weight", "attention.dense.weight")
SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"


def quantised(weight, block):
    """Entries and scales [rows / block, columns / block], block by block."""
    entries = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(*(ceil(size / each) for size, each in zip(weight.shape, block, strict=True)))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].float().abs().max() / 448
            entries[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return entries, scales


def reference(entries, scales, block):
    """The numbers, one by one."""
    out = torch.empty(entries.shape)
    for i, row in enumerate(entries.float()):
        for j, entry in enumerate(row):
            out[i, j] = entry * scales[i // block[0], j // block[1]]
    return out


def write(folder, name, block):
    """A quantised copy of a fixture with a tokenizer, and a plain one that holds the numbers of the first in float32."""
    stored = load_file(FIXTURES / name / "model.safetensors")
    tensors, numbers = {}, dict(stored)
    for key, tensor in stored.items():
        if not key.endswith(QUANTISED):
            tensors[key] = tensor
            continue
        tensors[key], tensors[f"{key}_scale_inv"] = quantised(tensor, block)
        spread = tensors[f"{key}_scale_inv"].repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        numbers[key] = tensors[key].float() * spread[: tensor.shape[0], : tensor.shape[1]]
    for kind, values in (("fp8", tensors), ("plain", numbers)):
        shutil.copytree(FIXTURES / name, folder / kind)
        for file in (SHIPPED / "ling-tiny").glob("tokenizer*"):
            shutil.copy(file, folder / kind)
        save_file(values, folder / kind / "model.safetensors", metadata={"format": "pt"})
    configure(folder / "fp8", SETTINGS | {"weight_block_size": list(block)})
    return folder / "fp8", folder / "plain"


def configure(folder, settings):
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write(tmp_path_factory.mktemp("original"), "tiny-base", (128, 128))[0]


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "fp8")


def change(folder, **tensors):
    """Replace tensors by dotted names, or remove them."""
    file = folder / "model.safetensors"
    stored = load_file(file) | {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(
        {name: each for name, each in stored.items() if tensors.get(name, each) is not None}, file, metadata={"format": "pt"}
    )


@pytest.mark.parametrize("block", [(128, 128), (48, 40), (5, 64)])
def test_entries_times_the_scale_of_their_block(block):
    torch.manual_seed(0)
    entries, scales = quantised(torch.randn(96, 200), block)
    assert torch.equal(dequantise(entries, scales, block), reference(entries, scales, block))


@pytest.mark.parametrize(
    ("name", "block", "dtype"), [("tiny-base", (128, 128), "bfloat16"), ("tiny-tied", (48, 40), "float32")]
)
def test_a_quantised_checkpoint_loads_as_the_numbers_it_stands_for(tmp_path, name, block, dtype):
    fp8, plain = write(tmp_path, name, block)
    found, expected = load_native(str(fp8), dtype=dtype), load_native(str(plain), dtype=dtype)
    ours, theirs = found.native.state_dict(), expected.native.state_dict()
    assert ours.keys() == theirs.keys()
    assert {key: tensor.dtype for key, tensor in ours.items()} == {key: tensor.dtype for key, tensor in theirs.items()}
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    inputs = torch.arange(60).view(3, 20)
    assert torch.equal(found.native(inputs).logits, expected.native(inputs).logits)
    assert found.verification == expected.verification
    assert found.digest != expected.digest


def test_a_checkpoint_without_blocks_in_its_configuration_has_those_of_128(checkpoint):
    configure(checkpoint, SETTINGS)
    assert find_checkpoint(checkpoint).block == (128, 128)


def test_what_was_dequantised_is_saved_as_a_plain_checkpoint(checkpoint, tmp_path):
    loaded = load_native(str(checkpoint), dtype="bfloat16")
    loaded.native.save_pretrained(tmp_path / "saved")
    again = find_checkpoint(tmp_path / "saved")
    assert again.block is None
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    entries, scales = (load_file(checkpoint / "model.safetensors")[EXPERT + end] for end in ("", "_scale_inv"))
    assert torch.equal(stored[EXPERT], (entries.float() * scales).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: change(f, **{f"{EXPERT}_scale_inv": None}), CheckpointError, rf"{EXPERT} is fp8 and its scales .* missing"),
        (
            lambda f: change(f, **{f"{EXPERT}_scale_inv": torch.ones(2, 1)}),
            CheckpointError,
            rf"{EXPERT}_scale_inv is F32 \[2, 1\]; \[32, 128\] in blocks of 128 x 128 needs F32 \[1, 1\]",
        ),
        (
            lambda f: change(f, **{f"{EXPERT}_scale_inv": torch.ones(1, 1, dtype=torch.bfloat16)}),
            CheckpointError,
            r"_scale_inv is BF16 \[1, 1\]",
        ),
        (
            lambda f: change(f, **{EXPERT: torch.ones(32, 128, dtype=torch.int8)}),
            CheckpointError,
            f"{EXPERT} is stored as I8; F64, F32, F16, BF16 and fp8 matrices are read",
        ),
        (lambda f: configure(f, None), CheckpointError, "is fp8 and config.json has no quantization_config"),
        (lambda f: configure(f, SETTINGS | {"quant_method": "awq"}), ConfigError, "weights quantised by 'awq'"),
        (lambda f: configure(f, SETTINGS | {"weight_block_size": None}), ConfigError, "weight_block_size is None"),
        (lambda f: configure(f, SETTINGS | {"weight_block_size": [64, 64]}), CheckpointError, "in blocks of 64 x 64 needs"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(checkpoint, damage, error, message):
    damage(checkpoint)
    with pytest.raises(error, match=message) as caught:
        find_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_native, load_streamed])
def test_both_loaders_refuse_it(checkpoint, load):
    change(checkpoint, **{f"{EXPERT}_scale_inv": None})
    with pytest.raises(CheckpointError, match=r"scales .* are missing"):
        load(str(checkpoint))
