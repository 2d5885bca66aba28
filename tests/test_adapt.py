import json
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from small_model import random_ling
from typer.testing import CliRunner

from ling_probe.adapt import DELTA, Adaptation, adapt, add_delta, task_problems, tuned_parameters
from ling_probe.benchmarks import read_benchmark
from ling_probe.cli import app
from ling_probe.errors import CheckpointError, UsageError
from ling_probe.model.load import load_native
from ling_probe.stepbench import shipped_prompts

QUICK = {"steps": 4, "batch_tokens": 600, "warmup_steps": 1, "learning_rate": 3e-3}


@pytest.fixture
def loaded(tokenizer):
    return random_ling(tokenizer)


def numbers(loaded):
    return {name: tensor.clone() for name, tensor in loaded.native.state_dict().items()}


def problems():
    return task_problems("arithmetic", "test")


def changed(before, loaded):
    return {name for name, tensor in loaded.native.state_dict().items() if not torch.equal(tensor, before[name])}


def test_only_the_routers_move_and_the_loss_falls(loaded, tmp_path):
    before = numbers(loaded)
    quick = QUICK | {"steps": 12, "learning_rate": 3e-2}
    lines = list(adapt(loaded, (next(problems()) for _ in range(10_000)), Adaptation(**quick), tmp_path / "out"))
    assert {name.rsplit(".", 1)[1] for name in changed(before, loaded)} == {"weight", "expert_bias"}
    assert all(".gate." in name for name in changed(before, loaded))
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not loaded.native.training
    assert not any(gate._forward_hooks for gate in loaded.gates().values())


@pytest.mark.parametrize(("tuned", "kinds"), [("bias", {"expert_bias"}), ("experts", {"gate_up_proj", "down_proj"})])
def test_references_move_what_they_say(loaded, tmp_path, tuned, kinds):
    before = numbers(loaded)
    list(adapt(loaded, problems(), Adaptation(tuned=tuned, **QUICK), tmp_path / "out"))
    moved = changed(before, loaded)
    assert {name.rsplit(".", 1)[1] for name in moved} >= kinds
    routers = sum(gate.weight.numel() for gate in loaded.gates().values())
    assert not any(name.endswith("gate.weight") for name in moved)
    if tuned == "experts":
        cells = sum(int((loaded.native.state_dict()[name] != before[name]).sum()) for name in moved if "proj" in name)
        one = before["model.layers.1.mlp.experts.gate_up_proj"][0].numel() * 3 // 2
        assert 0.8 * routers < cells <= routers + one


def test_everything_may_move(loaded, tmp_path):
    before = numbers(loaded)
    list(adapt(loaded, problems(), Adaptation(tuned="all", bias_rate=0.0, **QUICK), tmp_path / "out"))
    assert {name for name in before if "expert_bias" not in name} >= changed(before, loaded) > {"model.embed_tokens.weight"}


def test_saved_checkpoint_and_delta_say_the_same(loaded, tokenizer, tmp_path):
    before = numbers(loaded)
    list(adapt(loaded, problems(), Adaptation(**QUICK), tmp_path / "out"))
    after = numbers(loaded)
    saved = load_native(str(tmp_path / "out"), dtype="float32")
    for layer, gate in saved.gates().items():
        assert torch.equal(gate.expert_bias, loaded.gates()[layer].expert_bias)
        assert torch.equal(gate.weight, loaded.gates()[layer].weight.bfloat16().float())
    assert set(load_file(tmp_path / "out" / DELTA)) == changed(before, loaded)
    loaded.native.load_state_dict(before)
    add_delta(loaded, tmp_path / "out" / DELTA)
    for name, tensor in after.items():
        assert torch.allclose(loaded.native.state_dict()[name], tensor, atol=1e-7)
    told = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert (told["tuned"], told["steps"], told["from"]) == ("router", 4, "random")


def test_a_delta_of_another_model_is_refused(loaded, tmp_path):
    save_file({"model.layers.1.mlp.gate.weight": np.zeros((2, 2), np.float32)}, tmp_path / "delta.safetensors")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.gate.weight does not fit random \(shape \(2, 2\)\)"):
        add_delta(loaded, tmp_path / "delta.safetensors")


def test_refusals(loaded, tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        next(adapt(loaded, problems(), Adaptation(**QUICK), tmp_path))
    few = list(islice(problems(), 6))
    with pytest.raises(UsageError, match=r"the problems ran out after \d of 4 steps"):
        list(adapt(loaded, few, Adaptation(**QUICK), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    loaded.native.bfloat16()
    with pytest.raises(UsageError, match="tuning needs float32"):
        next(adapt(loaded, problems(), Adaptation(**QUICK), tmp_path / "out"))


def test_task_problems_are_never_shipped_ones():
    drawn = list(islice(task_problems("arithmetic", "longer"), 50))
    assert {record.meta["difficulty"] for record in drawn} == {7, 8, 9}
    assert not {record.prompt for record in drawn} & shipped_prompts("arithmetic")
    shipped = {record.prompt for record in read_benchmark("stepbench", split="longer").records}
    assert not {record.prompt for record in drawn} & shipped


def test_drawn_experts_depend_on_the_seed(loaded):
    masks = [tuned_parameters(loaded.native, Adaptation(tuned="experts", seed=seed))[0][1] for seed in (0, 0, 5)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_the_command_adapts_and_judges_before_and_after(tmp_path):
    words = ["adapt", "ling-tiny", "--family", "arithmetic", "--split", "longer", "--steps", "1", "--batch-tokens", "300",
             "--judge", "stepbench:test", "--limit", "2", "--out", str(tmp_path / "out"), "--json"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["when"], row["task"], row["problems"]) for row in rows] == [
        ("before", "stepbench:longer:arithmetic", 2),
        ("before", "stepbench:test", 2),
        ("after", "stepbench:longer:arithmetic", 2),
        ("after", "stepbench:test", 2),
    ]
    assert all(row["agreement"] == 1 for row in rows[:2])
    assert all(0.5 < row["agreement"] < 1 for row in rows[2:])
    assert (tmp_path / "out" / DELTA).is_file()
    assert json.loads((tmp_path / "out" / "judged.json").read_text(encoding="utf-8")) == rows
