"""The vectors of experts that a run keeps: what they are, that they survive what parts survive, and what lacks them."""

import shutil

import numpy as np
import pytest
import torch
from crashing import VECTORS, contents, record
from synthetic import synthetic_spec

from ling_probe import recording
from ling_probe.benchmarks import read_benchmark
from ling_probe.errors import RunError, UsageError
from ling_probe.model.load import load_native
from ling_probe.model.streaming import load_streamed
from ling_probe.model.vectors import expert_vectors, first_singular
from ling_probe.run import EXPERTS, Run, Shard, find_shards, merge


@pytest.fixture(autouse=True)
def _real_capture(monkeypatch):
    monkeypatch.setattr(recording, "capture", recording.capture)


def test_the_first_singular_vector_is_that_of_torch():
    torch.manual_seed(0)
    matrices = torch.randn(5, 40, 24) + 6 * torch.einsum("nd,nf->ndf", torch.randn(5, 40), torch.randn(5, 24)) / 6
    left, values, _ = torch.linalg.svd(matrices)
    found = first_singular(matrices)
    assert torch.allclose(found.norm(dim=-1), values[:, 0], rtol=1e-4)
    assert torch.allclose((found * left[..., 0]).sum(dim=-1).abs(), values[:, 0], rtol=1e-4)
    assert (found.gather(1, found.abs().argmax(dim=1, keepdim=True)) > 0).all()
    assert not first_singular(torch.zeros(2, 40, 24)).isnan().any()


def test_a_recorded_run_holds_the_vectors_of_its_model(tmp_path):
    loaded = load_native("ling-tiny")
    run = recording.record(loaded, read_benchmark("stepbench", limit=3), tmp_path / "run")
    found = run.expert_vectors()
    assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
        name: ((4, 32, 128), np.dtype(np.float16)) for name in ("gate", "output")
    }
    for row, layer in enumerate(loaded.spec.routed_layers):
        block = loaded.native.model.layers[layer].mlp
        assert found["gate"][row] == pytest.approx(block.gate.weight.detach().numpy(), abs=1e-2)
        left, values, _ = torch.linalg.svd(block.experts.down_proj.detach())
        exact = (left[..., 0] * values[:, :1]).numpy()
        assert np.abs((found["output"][row] * exact).sum(axis=-1)) == pytest.approx(values[:, 0].numpy() ** 2, rel=0.02)
    assert all((expert_vectors(loaded)[name] == each).all() for name, each in found.items()), "the same each time"


def test_a_streamed_model_has_none_and_its_run_says_so(tmp_path):
    streamed = load_streamed("ling-tiny")
    assert streamed.expert_vectors() == {}
    run = recording.record(streamed, read_benchmark("stepbench", limit=2), tmp_path / "run")
    assert not (run.folder / EXPERTS).exists()
    with pytest.raises(UsageError, match="holds no expert weights; capture it anew from a model loaded whole, not streamed"):
        run.expert_vectors()


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_damaged_vectors_are_named_and_kept_again(tmp_path, how):
    whole = contents(record(tmp_path / "run", 12, 4).folder)
    file = tmp_path / "run" / EXPERTS
    if how == "gone":
        file.unlink()
        with pytest.raises(RunError, match=rf"lacks {EXPERTS}, which run.json lists; .*--redo-damaged"):
            Run.open(tmp_path / "run")
    else:
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(RunError, match=rf"{EXPERTS} is missing or not what was written; .*--redo-damaged"):
            Run.open(tmp_path / "run").verify()
        with pytest.raises(RunError, match=r"cannot be read .* it is damaged"):
            Run.open(tmp_path / "run").expert_vectors()
    mended = record(tmp_path / "run", 12, 4, redo_damaged=True)
    assert mended.is_complete
    assert mended.verify() == []
    assert contents(tmp_path / "run") == whole


def test_merged_shards_keep_the_vectors(tmp_path):
    for index in (1, 2):
        shard = Shard(index, 2)
        record(tmp_path / shard.folder, 6, 2, shard=shard)
    merged = merge(tmp_path / "merged", find_shards(tmp_path))
    assert all((merged.expert_vectors()[name] == each).all() for name, each in VECTORS.items())
    for shard in find_shards(tmp_path):
        shutil.rmtree(shard)
    assert merged.verify() == []


def test_a_run_of_an_older_version_opens_without_them(make_run):
    run = make_run()
    assert '"files": {}' in (run.folder / "run.json").read_text()
    text = (run.folder / "run.json").read_text().replace(',\n  "files": {}\n}', "\n}")
    assert not text.endswith('"files": {}\n}\n')
    (run.folder / "run.json").write_text(text)
    old = Run.open(run.folder)
    assert old.verify() == []
    assert old.manifest.files == {}
    with pytest.raises(UsageError, match="holds no expert weights"):
        old.expert_vectors()


def test_a_complete_run_takes_no_vectors(make_run):
    spec = synthetic_spec()
    with pytest.raises(RunError, match="is complete and cannot be added to"):
        make_run().keep_experts({"gate": np.zeros((spec.n_rows, spec.n_experts, spec.d_model), np.float16)})
