import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ling_probe.errors import UsageError
from ling_probe.metrics import max_vio
from ling_probe.model.files import SHIPPED
from ling_probe.model.load import load_native
from ling_probe.model.modeling import gates
from ling_probe.stepbench import shipped_records
from ling_probe.train import (
    IGNORED,
    PRESETS,
    Batch,
    BiasBalancer,
    collate,
    encode,
    new_model,
    train,
    training_batches,
    weighted_loss,
)

SMALL = dataclasses.replace(
    PRESETS["ling-tiny"],
    steps=30,
    batch_tokens=400,
    warmup_steps=5,
    log_every=10,
    pool_batches=4,
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
    loss, solution = weighted_loss(logits, batch)
    assert loss.item() == pytest.approx((0.5 * wrong.item() + 2 * even) / 2.5, rel=1e-5)
    assert solution.item() == pytest.approx(even, rel=1e-5)


def test_the_stream_never_shows_a_shipped_prompt_and_repeats_itself(tokenizer):
    shipped = {record.prompt for split in ("test", "longer", "novel-names") for record in shipped_records(split)}
    first, again = (list(itertools.islice(training_batches(SMALL, tokenizer), 12)) for _ in range(2))
    for batch, same in zip(first, again, strict=True):
        assert torch.equal(batch.input_ids, same.input_ids)
        for ids, weights in zip(batch.input_ids, batch.label_weights, strict=True):
            prompt = int((weights.clamp(min=0) < 0.5).int().argmin()) + 1
            assert tokenizer.decode(ids[:prompt]) not in shipped
    assert np.mean([batch.input_ids.numel() for batch in first]) == pytest.approx(SMALL.batch_tokens, rel=0.3)


def test_the_bias_moves_against_the_load_by_the_published_rule(tokenizer):
    model = new_model(SMALL, tokenizer)
    balancer = BiasBalancer(model, rate=0.01)
    counts = torch.tensor([10.0] * 8 + [0.0] * 24)
    balancer._counts[0] += counts
    balancer.step()
    sign = torch.sign(counts.mean() - counts)
    torch.testing.assert_close(gates(model)[1].expert_bias, 0.01 * (sign - sign.mean()))
    assert gates(model)[1].expert_bias.sum().abs() < 1e-6
    assert balancer.window[0].tolist() == counts.long().tolist()
    assert not balancer._counts[0].any()


def test_padding_is_not_load(tokenizer):
    from contextlib import ExitStack

    model = new_model(SMALL, tokenizer)
    balancer = BiasBalancer(model, rate=0.01)
    with ExitStack() as stack:
        balancer.attach(stack)
        balancer.real = torch.tensor([[True] * 3 + [False] * 5])
        model(input_ids=torch.zeros(1, 8).long())
    assert [int(counts.sum()) for counts in balancer._counts] == [3 * 4, 3 * 4]
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
    from ling_probe.train import _optimise

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


def test_stopping_early_gives_the_first_losses_of_the_whole(tmp_path):
    whole = list(train(SMALL, tmp_path / "whole"))
    part = list(train(SMALL, tmp_path / "part", stop_after=20))
    assert [line["loss"] for line in part] == [line["loss"] for line in whole[:2]]


def test_the_shipped_log_is_the_presets_and_its_first_losses_come_out_again(tmp_path):
    folder = SHIPPED / "ling-tiny"
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe == json.loads(json.dumps(dataclasses.asdict(PRESETS["ling-tiny"])))
    logged = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert logged[-1]["step"] == PRESETS["ling-tiny"].steps
    again = next(train(PRESETS["ling-tiny"], tmp_path / "again", stop_after=20))
    assert again["tokens"] == logged[0]["tokens"]
    assert again["loss"] == pytest.approx(logged[0]["loss"], abs=0.02)


def test_schedule_and_curriculum_end_where_they_should():
    recipe = PRESETS["ling-tiny"]
    rates = [recipe.learning_rate_at(step) for step in range(recipe.steps)]
    assert max(rates) == recipe.learning_rate
    assert rates[0] == pytest.approx(recipe.learning_rate / recipe.warmup_steps)
    assert rates[-1] < 0.01 * recipe.learning_rate
    assert [recipe.hardest_at(step) for step in (0, recipe.curriculum_steps // 2, recipe.curriculum_steps)] == [2, 4, 6]


def test_max_violation_of_a_known_load():
    assert max_vio(np.array([[6, 1, 1, 0]])).tolist() == [2.0]
