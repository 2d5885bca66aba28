import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from official import FIXTURES
from safetensors.torch import load_file, save_file
from test_fp8 import write
from typer.testing import CliRunner

from ling_probe import capture as capture_module
from ling_probe.benchmarks import Record, read_benchmark
from ling_probe.capture import capture
from ling_probe.cli import app
from ling_probe.errors import RoutingMismatch, RunError, UsageError
from ling_probe.interventions import bias, exclude, force, silence
from ling_probe.model import LingConfig
from ling_probe.model.files import SHIPPED, find_checkpoint
from ling_probe.model.load import load_native
from ling_probe.model.mapped import MappedTensors, ReadAhead
from ling_probe.model.modeling import LingDecoderLayer, LingExperts, gates
from ling_probe.model.streaming import StreamedExperts, load_streamed
from ling_probe.recording import record
from ling_probe.run import Run

DTYPES = ("float32", "bfloat16")


def with_tokenizer(source, folder):
    """A copy of a fixture that can read text."""
    shutil.copytree(source, folder)
    for file in (SHIPPED / "ling-tiny").glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


def sharded(source, folder, shards=5):
    """A copy whose tensors are dealt out to files in turn, so that no layer lies in one piece."""
    with_tokenizer(source, folder)
    tensors = load_file(source / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return str(folder)


def checkpoint(name, folder):
    if name == "ling-tiny":
        return name
    if name == "sharded":
        return sharded(FIXTURES / "tiny-base", folder / "sharded")
    if name == "fp8":
        return str(write(folder, "tiny-base", (48, 40))[0])
    return with_tokenizer(FIXTURES / name, folder / name)


@pytest.fixture(scope="module")
def records():
    return read_benchmark("stepbench", limit=7).records


def assert_equal(found, expected):
    """Every array of two lists of traces, bit for bit."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.sequence_id == other.sequence_id
        assert one.expert_ids.size
        for name in ("token_ids", "expert_ids", "weights", "loss", "segment", "step"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert one.extras.keys() == other.extras.keys()
        for name, values in one.extras.items():
            np.testing.assert_array_equal(values, other.extras[name], err_msg=name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(["ling-tiny", "tiny-base"], DTYPES),
        ("tiny-tied", "bfloat16"),
        ("sharded", "float32"),
        ("fp8", "bfloat16"),
    ],
)
def test_traces_are_those_of_the_whole_model_bit_for_bit(name, dtype, records, tmp_path):
    path = checkpoint(name, tmp_path)
    whole, streamed = load_native(path, dtype=dtype), load_streamed(path, dtype=dtype)
    keep = ("experts", "loss", "logits")
    expected = list(capture(whole, records, keep=keep, batch_tokens=500))
    assert_equal(list(capture(streamed, records, keep=keep, batch_tokens=500)), expected)
    assert streamed.verification == whole.verification
    assert streamed.describe() == whole.describe() | {"streamed": True}


def test_interventions_do_in_a_stream_what_they_do_in_the_whole_model(records):
    whole, streamed = load_native("ling-tiny"), load_streamed("ling-tiny")
    changes = [
        exclude(1, range(0, 32, 4), segments=["reasoning"]), silence(2, [1, 2, 3]), bias(3, [5], 0.7),
        force(4, [9, 30], positions=range(3, 12)),
    ]  # fmt: skip
    plain = list(capture(whole, records, batch_tokens=500))
    edited = list(capture(whole, records, interventions=changes, batch_tokens=500))
    assert any((one.expert_ids != other.expert_ids).any() for one, other in zip(plain, edited, strict=True))
    assert_equal(list(capture(streamed, records, interventions=changes, batch_tokens=500)), edited)
    assert_equal(list(capture(streamed, records, batch_tokens=500)), plain)


def reads(monkeypatch):
    """The layers whose bytes are read ahead, from now on."""
    seen = []
    start = ReadAhead.start
    monkeypatch.setattr(ReadAhead, "start", lambda self, ranges: (seen.append(list(ranges)), start(self, seen[-1]))[1])
    return seen


def test_a_layer_is_read_once_for_all_batches_that_fit_the_budget(records, monkeypatch):
    streamed, seen = load_streamed("ling-tiny"), reads(monkeypatch)
    whole = list(capture(streamed, records, batch_tokens=150))
    once = streamed.spec.n_layers + 1
    assert len(seen) == once
    object.__setattr__(streamed, "budget_bytes", 1)
    assert_equal(list(capture(streamed, records, batch_tokens=150)), whole)
    lengths = [trace.n_tokens for trace in whole]
    batches = len(list(capture_module.length_batches(lengths, 150)))
    assert batches > 3
    assert len(seen) == once * (batches + 1)


def test_what_is_read_ahead_is_every_byte_that_is_used(monkeypatch):
    streamed, seen = load_streamed("ling-tiny"), reads(monkeypatch)
    list(capture(streamed, [Record(id="r", prompt="1+1=2\n")]))
    read = sorted((start, stop) for ranges in seen for _file, start, stop in ranges)
    found = find_checkpoint("ling-tiny")
    used = sorted((each.start, each.stop) for name, each in found.stored.items() if "embeddings" not in name)
    assert sum(stop - start for start, stop in read) == sum(stop - start for start, stop in used)
    assert all(any(start <= a and b <= stop for start, stop in read) for a, b in used)


def test_only_one_layer_is_in_memory_and_none_afterwards(records, monkeypatch):
    streamed, held = load_streamed("ling-tiny"), []

    def count(*_):
        there = [not layer.input_layernorm.weight.is_meta for layer in streamed.native.model.layers]
        held.append(sum(there))

    handles = [
        module.register_forward_hook(count) for module in streamed.native.modules() if isinstance(module, LingDecoderLayer)
    ]
    list(capture(streamed, records[:2]))
    for handle in handles:
        handle.remove()
    assert set(held) == {1}
    assert all(each.is_meta for layer in streamed.native.model.layers for each in layer.parameters())
    assert streamed.native.lm_head.weight.is_meta


def test_experts_nobody_chose_are_not_touched(monkeypatch):
    streamed, touched = load_streamed("ling-tiny"), set()
    view = MappedTensors.view
    monkeypatch.setattr(MappedTensors, "view", lambda self, name: (touched.add(name), view(self, name))[1])
    list(capture(streamed, read_benchmark("stepbench", limit=1).records))
    touched.clear()
    trace = next(capture(streamed, [Record(id="r", prompt="7\n")]))
    for row, layer in enumerate(streamed.spec.routed_layers):
        experts = {int(name.split(".")[5]) for name in touched if name.startswith(f"model.layers.{layer}.mlp.experts.")}
        assert experts == set(trace.expert_ids[:, row].ravel().tolist())


@pytest.mark.parametrize(("attribute", "value", "layer"), [("n_groups", 1, 2), ("scale", 2.4, 3)])
def test_a_layer_that_breaks_the_rule_stops_the_first_stream_before_anything_is_written(
    tmp_path, attribute, value, layer, records
):
    streamed = load_streamed(checkpoint("tiny-base", tmp_path))
    setattr(gates(streamed.native)[layer], attribute, value)
    assert not streamed.is_proved
    with pytest.raises(RoutingMismatch, match=f"layer {layer} .* does not route by the Ling 2.0 rule"):
        record(streamed, read_benchmark("stepbench", limit=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not streamed.is_proved
    assert all(each.is_meta for each in streamed.native.model.layers[layer].parameters())


def test_a_run_and_its_manifest_are_those_of_the_whole_model(tmp_path):
    benchmark = read_benchmark("stepbench", limit=8)
    streamed = record(load_streamed("ling-tiny"), benchmark, tmp_path / "streamed")
    whole = record(load_native("ling-tiny"), benchmark, tmp_path / "whole")
    assert [part.files for part in streamed.manifest.parts] == [part.files for part in whole.manifest.parts]
    assert streamed.manifest.model == dict(whole.manifest.model) | {"streamed": True}
    assert streamed.manifest.model["verification"]["choices"] == 4 * 64 * 4


def test_a_run_goes_on_in_a_stream(tmp_path):
    benchmark = read_benchmark("stepbench", limit=12)

    def stop(_done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(load_native("ling-tiny"), benchmark, tmp_path / "run", parts=4, progress=stop)
    assert 0 < len(Run.open(tmp_path / "run").done) < 12
    done = record(load_streamed("ling-tiny"), benchmark, tmp_path / "run", parts=4, resume=True)
    assert done.is_complete
    assert len(done.done) == 12


def test_what_else_can_be_kept_is_that_of_the_whole_model():
    keep, problems = ("experts", "loss", "logits", "contribution", "residual"), read_benchmark("stepbench", limit=3).records
    streamed, whole = (
        list(capture(model, problems, keep=keep)) for model in (load_streamed("ling-tiny"), load_native("ling-tiny"))
    )
    for ours, theirs in zip(streamed, whole, strict=True):
        assert set(ours.extras) == set(theirs.extras) == {"logits", "contribution", "shared", "residual"}
        for name, values in theirs.extras.items():
            np.testing.assert_allclose(ours.extras[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_a_stream_does_not_do_is_said(tmp_path):
    streamed = load_streamed("ling-tiny")
    with pytest.raises(UsageError, match="streamed layer by layer reads given solutions only"):
        record(streamed, read_benchmark("stepbench", limit=2), tmp_path / "run", max_new_tokens=3)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="lens needs the model's head"):
        record(streamed, read_benchmark("stepbench", limit=2), tmp_path / "run", keep=("experts", "lens"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="streamed on the CPU only, and device cuda"):
        load_streamed("ling-tiny", device="cuda")
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="exists already"):
        record(streamed, read_benchmark("stepbench", limit=2), tmp_path / "there")


def test_the_wide_products_of_real_experts_round_as_the_whole_models_do():
    torch.manual_seed(0)
    config = LingConfig(num_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, experts_implementation="grouped_mm")
    fused = LingExperts(config).to(torch.bfloat16)
    for weight in fused.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    width = config.moe_intermediate_size

    def matrices(expert):
        return fused.gate_up_proj[expert, :width], fused.gate_up_proj[expert, width:], fused.down_proj[expert]

    # 300 rows an expert: two products of half the width round otherwise there, where the processor has matrix tiles.
    x = torch.randn(600, config.hidden_size).to(torch.bfloat16)
    ids, weights = torch.arange(600)[:, None] % 2 + torch.tensor([2, 0]), torch.rand(600, 2)
    with torch.no_grad():
        assert torch.equal(StreamedExperts(config, torch.bfloat16, matrices)(x, ids, weights), fused(x, ids, weights))


@pytest.mark.parametrize("more", [["--generate", "5"], ["--ray", "2"]])
def test_the_command_line_streams_solutions_on_one_machine_only(tmp_path, more):
    command = ["capture", "ling-tiny", "stepbench", "--out", str(tmp_path / "run"), "--stream-layers", *more]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, UsageError)
    assert "leave --generate and --ray out" in str(refused.exception)
    assert not (tmp_path / "run").exists()
