import dataclasses
import itertools
import json
import sys
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ling_probe.benchmarks import read_benchmark
from ling_probe.cost import cost
from ling_probe.errors import CheckpointError, UsageError
from ling_probe.evaluate import evaluate
from ling_probe.metrics import max_vio
from ling_probe.model.files import SHIPPED
from ling_probe.model.load import load_native
from ling_probe.model.modeling import gates
from ling_probe.recording import record
from ling_probe.rerouting import rerouted_losses
from ling_probe.stepbench import SHIPPED as SHIPPED_SPLITS
from ling_probe.stepbench import generate, shipped_records
from ling_probe.train import (
    PRESETS,
    Batch,
    BiasBalancer,
    collate,
    encode,
    new_config,
    new_model,
    train,
    training_batches,
    weighted_losses,
)
from ling_probe.train.batches import IGNORED, _problem
from ling_probe.train.training import _accumulate

SMALL = dataclasses.replace(
    PRESETS["ling-tiny"],
    steps=30,
    batch_tokens=400,
    warmup_steps=5,
    log_every=10,
    parts=2,
    curriculum_steps=20,
    architecture=PRESETS["ling-tiny"].architecture
    | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8, "moe_intermediate_size": 16},
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED / "ling-tiny")


def test_a_batch_aligns_every_label_with_the_token_before_it(tokenizer):
    record = shipped_records("test")[0]
    ids, prompt = encode(record, tokenizer)
    batch = collate([(ids, prompt), (ids[:5], 3)], tokenizer.pad_token_id, 0.1)
    assert batch.labels[0, :-1].tolist() == ids[1:]
    assert batch.labels[1, 4:].eq(IGNORED).all()
    assert batch.label_weights[0].tolist() == pytest.approx([0.1] * (prompt - 1) + [1.0] * (len(ids) - prompt) + [0.0])
    assert batch.real.sum() == len(ids) + 5
    assert tokenizer.decode(ids[prompt:-1]) == record.solution
    assert ids[-1] == tokenizer.eos_token_id


def test_the_loss_weighs_prompts_and_skips_padding():
    logits = torch.zeros(1, 4, 3)
    logits[0, 0, 1] = 5.0
    batch = Batch(torch.zeros(1, 4).long(), torch.tensor([[0, 1, 2, IGNORED]]), torch.tensor([[0.5, 1.0, 1.0, -1.0]]))
    wrong, even = -torch.log_softmax(torch.tensor([0.0, 5.0, 0.0]), 0)[0], np.log(3)
    loss, solution = weighted_losses(logits, batch)
    assert loss.item() == pytest.approx(0.5 * wrong.item() + 2 * even, rel=1e-5)
    assert solution.item() == pytest.approx(2 * even, rel=1e-5)


def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole(tokenizer):
    items = [encode(record, tokenizer) for record in shipped_records("test")[::150]]
    whole, halves = [items], [items[:2], items[2:]]
    ends = []
    for parts in (whole, halves):
        model = new_model(SMALL, tokenizer).train()
        balancer = BiasBalancer(model, rate=0.01)
        with ExitStack() as stack:
            balancer.attach(stack)
            losses = _accumulate(model, balancer, [collate(part, tokenizer.pad_token_id, 0.1) for part in parts])
        ends.append((losses, model.lm_head.weight.grad, balancer.counts[0]))
    (one, one_grad, one_load), (two, two_grad, two_load) = ends
    assert one == pytest.approx(two, rel=1e-5)
    torch.testing.assert_close(one_grad, two_grad, rtol=1e-3, atol=1e-6)
    assert (one_load - two_load).abs().sum() <= 2  # two scores that tie may fall either way
    assert one_load.sum() == sum(len(ids) for ids, _ in items) * 4


def test_the_stream_never_shows_a_shipped_prompt_and_repeats_itself(tokenizer):
    shipped = {record.prompt for split in SHIPPED_SPLITS for record in shipped_records(split)}
    first, again = (list(itertools.islice(training_batches(SMALL, tokenizer), 12)) for _ in range(2))
    for parts, same in zip(first, again, strict=True):
        assert 1 <= len(parts) <= SMALL.parts
        for batch, other in zip(parts, same, strict=True):
            assert torch.equal(batch.input_ids, other.input_ids)
            for ids, weights in zip(batch.input_ids, batch.label_weights, strict=True):
                prompt = int((weights.clamp(min=0) < 0.5).int().argmin()) + 1
                assert tokenizer.decode(ids[:prompt]) not in shipped
    real = [sum(int(batch.real.sum()) for batch in parts) for parts in first]
    assert all(SMALL.batch_tokens <= tokens < SMALL.batch_tokens + 300 for tokens in real)


def test_the_stream_leaves_out_what_is_shipped(monkeypatch):
    seen = [generate("causal", "train", index) for index in range(3)]
    monkeypatch.setattr("ling_probe.train.batches.shipped_prompts", lambda _: {seen[1].prompt})
    indices = itertools.count()
    drawn = [_problem("causal", indices, 0, hardest=6, bare=False).id for _ in range(2)]
    assert drawn == ["causal-train-0000", "causal-train-0002"]


def test_problems_grow_harder_with_the_curriculum(tokenizer):
    recipe = dataclasses.replace(SMALL, steps=200, curriculum_steps=90)
    sizes = [np.mean([len(ids) for part in parts for ids in part.input_ids]) for parts in training_batches(recipe, tokenizer)]
    assert np.mean(sizes[:20]) < 0.75 * np.mean(sizes[100:])
    easy = _problem("deduction", itertools.count(), 0, hardest=2, bare=True)
    assert easy.meta["difficulty"] == 2
    assert [recipe.bare_share_at(step) for step in (0, 30, 60, 90, 150)] == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])


def test_the_bias_moves_against_the_load_by_the_published_rule(tokenizer):
    model = new_model(SMALL, tokenizer)
    balancer = BiasBalancer(model, rate=0.01)
    counts = torch.tensor([10.0] * 8 + [0.0] * 24)
    balancer.counts[0] += counts
    balancer.step()
    sign = torch.sign(counts.mean() - counts)
    torch.testing.assert_close(gates(model)[1].expert_bias, 0.01 * (sign - sign.mean()))
    assert gates(model)[1].expert_bias.sum().abs() < 1e-6
    assert balancer.window[0].tolist() == counts.long().tolist()
    assert not balancer.counts[0].any()


def test_padding_is_not_load(tokenizer):
    model = new_model(SMALL, tokenizer)
    balancer = BiasBalancer(model, rate=0.01)
    with ExitStack() as stack:
        balancer.attach(stack)
        balancer.real = torch.tensor([[True] * 3 + [False] * 5])
        model(input_ids=torch.zeros(1, 8).long())
    assert [int(counts.sum()) for counts in balancer.counts] == [3 * 4, 3 * 4]
    assert not any(gate._forward_hooks for gate in gates(model).values())


@pytest.mark.slow
def test_balancing_works_and_costs_no_loss(tokenizer):
    """Three hundred small steps with and without the bias: the load evens out, the loss stays what it was."""
    ends = {}
    for rate in (0.0, 0.01):
        recipe = dataclasses.replace(SMALL, steps=300, log_every=50, bias_rate=rate)
        lines = [line for line in _losses(recipe, tokenizer) if "loss" in line]
        ends[rate] = lines[-1]
    assert max(ends[0.01]["max_vio"]) < 0.7 * max(ends[0.0]["max_vio"])
    assert ends[0.01]["loss"] == pytest.approx(ends[0.0]["loss"], rel=0.1)
    assert max(ends[0.0]["bias_range"]) == 0.0


def _losses(recipe, tokenizer):
    from ling_probe.train.training import _optimise

    return list(_optimise(new_model(recipe, tokenizer).train(), recipe, tokenizer, "cpu"))


def test_training_learns_saves_and_loads(tmp_path):
    lines = list(train(SMALL, tmp_path / "model", snapshots=(0.5,)))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert [line["step"] for line in lines] == [10, 20, 30]
    logged = [json.loads(line) for line in (tmp_path / "model" / "train.jsonl").read_text().splitlines()]
    assert logged == lines
    for folder in (tmp_path / "model", tmp_path / "model" / "step-15"):
        loaded = load_native(str(folder))
        assert loaded.spec.n_experts == 32
        assert max(gate.expert_bias.abs().max().item() for gate in loaded.gates().values()) > 0
    with pytest.raises(UsageError, match="exists already"):
        next(train(SMALL, tmp_path / "model"))


def test_two_workers_train_the_same_model(tmp_path, monkeypatch):
    script = tmp_path / "unguarded.py"  # a worker that imported what runs here would end, and its team with it
    script.write_text("raise SystemExit('imported by a worker')")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    alone, team = (list(train(SMALL, tmp_path / str(n), workers=n, stop_after=20)) for n in (1, 2))
    assert [line["tokens"] for line in team] == [line["tokens"] for line in alone]
    assert [line["loss"] for line in team] == pytest.approx([line["loss"] for line in alone], abs=2e-3)
    one, two = (load_native(str(tmp_path / name)).native.state_dict() for name in ("1", "2"))
    off = [float((one[name] - two[name]).abs().mean() / one[name].abs().mean().clamp(min=1e-3)) for name in one]
    assert np.median(off) < 0.02
    with pytest.raises(UsageError, match="3 workers on cpu"):
        next(train(SMALL, tmp_path / "3", workers=3))


def test_a_dense_model_trains_loads_and_is_evaluated(tmp_path):
    recipe = dataclasses.replace(SMALL, architecture=SMALL.architecture | {"first_k_dense_replace": 3})
    (*_, last) = train(recipe, tmp_path / "dense")
    assert last["max_vio"] == last["dead"] == last["bias_range"] == []
    loaded = load_native(str(tmp_path / "dense"))
    assert loaded.spec.n_rows == 0
    found = evaluate(loaded, shipped_records("test")[:3], max_new_tokens=5)
    assert found.accuracy["problems"].tolist() == [3]
    assert found.balance.empty
    assert rerouted_losses(loaded, shipped_records("test")[:3])["condition"].tolist() == ["true"]
    with pytest.raises(UsageError, match="dense in every layer"):
        record(loaded, read_benchmark("stepbench", limit=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_scaled_presets_differ_in_what_their_name_says():
    costs = {name: cost(new_config(PRESETS[name], 576)) for name in ("tiny-dense", "tiny-16", "tiny-32", "tiny-64")}
    active = {name: found.total.active for name, found in costs.items()}
    assert active["tiny-dense"] == pytest.approx(active["tiny-32"], rel=1e-3)
    layers, expert, row = 4, 3 * 128 * 48, 128 + 1
    for few, many, more in (("tiny-16", "tiny-32", 16), ("tiny-32", "tiny-64", 32)):
        assert active[many] - active[few] == layers * more * row
        assert costs[many].total.parameters - costs[few].total.parameters == layers * more * (expert + row)
    assert PRESETS["tiny-32"].architecture == PRESETS["ling-tiny"].architecture
    assert len({str(dataclasses.replace(PRESETS[name], architecture={})) for name in costs}) == 1


def test_stopping_early_gives_the_first_losses_of_the_whole(tmp_path):
    whole = list(train(SMALL, tmp_path / "whole"))
    part = list(train(SMALL, tmp_path / "part", stop_after=20))
    assert [line["loss"] for line in part] == [line["loss"] for line in whole[:2]]


def test_the_shipped_log_is_the_presets_and_its_first_losses_come_out_again(tmp_path):
    folder = SHIPPED / "ling-tiny"
    recipe = json.loads((folder / "recipe.json").read_text())
    first, finish = (dataclasses.asdict(PRESETS[name]) for name in ("ling-tiny", "ling-tiny-finish"))
    assert recipe == json.loads(json.dumps({"before": first} | finish))
    logged = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(20, first["steps"] + finish["steps"] + 1, 20))
    again = next(train(PRESETS["ling-tiny"], tmp_path / "again", stop_after=20))
    assert again["tokens"] == logged[0]["tokens"]
    assert again["loss"] == pytest.approx(logged[0]["loss"], abs=0.02)


@pytest.mark.parametrize("workers", [1, 2])
def test_training_goes_on_from_a_checkpoint(tmp_path, workers):
    (*_, last) = train(SMALL, tmp_path / "first")
    recipe = dataclasses.replace(SMALL, steps=10, curriculum_steps=0, seed=1, learning_rate=1e-9)
    (line,) = train(recipe, tmp_path / "second", workers=workers, start=tmp_path / "first", snapshots=(0.5,))
    assert line["step"] == 40
    assert line["tokens"] > last["tokens"]
    assert line["loss"] < 0.8 * next(train(recipe, tmp_path / "fresh"))["loss"]
    assert sorted(path.name for path in (tmp_path / "second").glob("step-*")) == ["step-35"]
    one, two = (load_native(str(tmp_path / name)).native.state_dict() for name in ("first", "second"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one if "expert_bias" not in name)
    assert any((one[name] - two[name]).abs().max() > 1e-3 for name in one if "expert_bias" in name)
    logs = [(tmp_path / name / "train.jsonl").read_text() for name in ("first", "second")]
    assert logs[1].startswith(logs[0])
    assert json.loads((tmp_path / "second" / "recipe.json").read_text())["before"]["steps"] == SMALL.steps


def test_a_start_that_is_none_is_refused_before_anything_is_written(tmp_path):
    list(train(SMALL, tmp_path / "small", stop_after=10))
    (tmp_path / "empty").mkdir()
    for start, said in (("empty", r"no train\.jsonl and recipe\.json"), ("small", "another architecture")):
        with pytest.raises(UsageError, match=said):
            next(train(PRESETS["ling-tiny-finish"], tmp_path / "out", start=tmp_path / start))
        assert not (tmp_path / "out").exists()
    (tmp_path / "empty" / "train.jsonl").write_text("{}\n")
    (tmp_path / "empty" / "recipe.json").write_text("[]")
    with pytest.raises(UsageError, match=r"no train\.jsonl and recipe\.json"):
        next(train(SMALL, tmp_path / "out", start=tmp_path / "empty"))
    weights = tmp_path / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        next(train(SMALL, tmp_path / "out", start=tmp_path / "small"))
    assert not (tmp_path / "out").exists()


def test_schedule_and_curriculum_end_where_they_should():
    recipe = PRESETS["ling-tiny"]
    rates = [recipe.learning_rate_at(step) for step in range(recipe.steps)]
    assert max(rates) == recipe.learning_rate
    assert rates[0] == pytest.approx(recipe.learning_rate / recipe.warmup_steps)
    assert rates[-1] < 0.01 * recipe.learning_rate
    assert [recipe.hardest_at(step) for step in (0, recipe.curriculum_steps // 2, recipe.curriculum_steps)] == [2, 4, 6]


def test_max_violation_of_a_known_load():
    assert max_vio(np.array([[6, 1, 1, 0]])).tolist() == [2.0]
