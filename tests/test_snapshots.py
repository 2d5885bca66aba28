import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from official import FIXTURES
from safetensors.torch import load_file, save_file

from ling_probe.errors import CheckpointError, UsageError
from ling_probe.model import files
from ling_probe.model.load import load_model, load_native
from ling_probe.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder of tokenizer files alone."""
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def add_snapshot(folder, step):
    """A copy of the checkpoint whose last norm is the step, under ``step-N``."""
    snapshot = folder / f"step-{step}"
    snapshot.mkdir()
    shutil.copy(folder / "config.json", snapshot)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = float(step)
    save_file(tensors, snapshot / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A tiny checkpoint with snapshots after 5 and 40 steps; the first without a tokenizer of its own."""
    folder = tmp_path / "model"
    shutil.copytree(tokenizer, folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "tiny-base" / name, folder)
    for step in (40, 5):
        add_snapshot(folder, step)
    shutil.copytree(tokenizer, folder / "step-40", dirs_exist_ok=True)
    return folder


@pytest.fixture
def shipped(checkpoint, monkeypatch):
    """The same checkpoint as a shipped one called model."""
    monkeypatch.setattr(files, "SHIPPED", checkpoint.parent)
    return "model"


@pytest.mark.parametrize("load", [load_native, lambda name: load_model(name).loaded], ids=["native", "bridge"])
@pytest.mark.parametrize("step", [5, 40])
def test_a_snapshot_loads_by_name(checkpoint, shipped, load, step):
    for name in (f"{checkpoint}@step-{step}", f"{shipped}@step-{step}"):
        loaded = load(name)
        assert loaded.native.model.norm.weight.unique().tolist() == [step]
        assert loaded.tokenizer.decode(loaded.tokenizer("answer: 12")["input_ids"]) == "answer: 12"
        assert loaded.describe()["name"] == loaded.spec.name == name


def test_a_manifest_tells_snapshots_apart(checkpoint):
    told = [load_native(name).describe() for name in (f"{checkpoint}", f"{checkpoint}@step-5", f"{checkpoint}@step-40")]
    assert len({each["digest"] for each in told}) == len({each["name"] for each in told}) == 3
    assert len({each["tokenizer_digest"] for each in told}) == 1


def test_the_checkpoint_itself_is_still_what_the_bare_name_means(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")["model.norm.weight"]
    assert torch.equal(load_native(str(checkpoint)).native.model.norm.weight, weights.float())


def test_a_snapshot_given_as_a_folder_finds_the_tokenizer_too(checkpoint, monkeypatch):
    assert load_native(str(checkpoint / "step-5")).tokenizer.eos_token == "<|endoftext|>"
    monkeypatch.chdir(checkpoint / "step-5")
    assert load_native(".").tokenizer.eos_token == "<|endoftext|>"


def test_a_folder_whose_own_name_has_the_sign_is_that_folder(checkpoint):
    odd = checkpoint.parent / "model@step-5"
    shutil.copytree(checkpoint / "step-40", odd)
    assert load_native(str(odd)).native.model.norm.weight.unique().tolist() == [40]


@pytest.mark.parametrize("wrong", ["step-6", "step-", "", "40", "../model", "step-5/", "step-99"])
def test_an_unknown_snapshot_lists_those_there_are_in_order(checkpoint, wrong):
    (checkpoint / "step-99").mkdir()  # a snapshot that was never finished
    with pytest.raises(CheckpointError, match=r"these there are: step-5, step-40$") as caught:
        load_native(f"{checkpoint}@{wrong}")
    assert f'model has no snapshot "{wrong}"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_snapshots_says_so(checkpoint):
    with pytest.raises(CheckpointError, match=r'step-5 has no snapshot "step-1"; these there are: none'):
        load_native(f"{checkpoint / 'step-5'}@step-1")


def test_a_snapshot_of_nothing_lists_what_ships(shipped):
    with pytest.raises(CheckpointError, match=r"no checkpoint at nowhere@step-5; .*\(model\)"):
        load_native("nowhere@step-5")


def test_a_tokenizer_that_is_nowhere(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-5 and its parent have no tokenizer\.json"):
        load_native(f"{checkpoint}@step-5")
    with pytest.raises(CheckpointError, match=r"model has no tokenizer\.json"):
        load_native(str(checkpoint))


def test_on_the_hub_the_part_after_the_sign_is_the_revision(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append((name, how)) or str(checkpoint))
    assert load_native("owner/model@v1.5").spec.name == "owner/model@v1.5"
    load_native("owner/model", revision="main")
    assert [(name, how["revision"]) for name, how in asked] == [("owner/model", "v1.5"), ("owner/model", "main")]
    with pytest.raises(UsageError, match=r"names revision v1\.5 and --revision says main"):
        load_native("owner/model@v1.5", revision="main")


def test_the_command_line_takes_snapshots(checkpoint, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "1+2\n", "solution": "1+2=3\nanswer: 3\n", "answer": "3"}) + "\n")
    command = [str(Path(sys.executable).parent / "ling-probe"), "capture"]
    done = subprocess.run(
        [*command, f"{checkpoint}@step-5", problems, "--out", tmp_path / "run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"]["name"] == f"{checkpoint}@step-5"
    done = subprocess.run(
        [*command, f"{checkpoint}@step-6", problems, "--out", tmp_path / "other"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.strip()] == [
        f'ling-probe: {checkpoint} has no snapshot "step-6"; these there are: step-5, step-40'
    ]
