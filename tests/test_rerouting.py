import json

import numpy as np
import pandas as pd
import pytest
import torch
from small_model import random_ling
from typer.testing import CliRunner

from ling_probe.benchmarks import Record
from ling_probe.cli import app
from ling_probe.errors import UsageError
from ling_probe.rerouting import draw_experts, rerouted_losses
from ling_probe.stats import wilson_interval

K, N_CONDITIONS = 3, 4 + 6


def sums(family, numbers):
    return [
        Record(
            id=f"{family}-{n}", family=family, prompt=f"{n}+{n}\n", solution=f"{n}+{n}={2 * n}\n" * (1 + n % 3) + "answer: 1\n"
        )
        for n in numbers
    ]


RECORDS = [*sums("small", range(8)), *sums("large", range(100, 106))]


@pytest.fixture
def loaded(tokenizer):
    return random_ling(tokenizer)


@pytest.fixture
def seen(loaded):
    """Every choice that every gate makes: [(layer, expert ids, weights), ...] in the order of the calls."""
    found = []
    handles = [
        gate.register_forward_hook(lambda _g, _a, out, layer=layer: found.append((layer, out[2], out[1])))
        for layer, gate in loaded.gates().items()
    ]
    yield found
    for handle in handles:
        handle.remove()


def row(table, condition, family="all"):
    (found,) = table[(table["condition"] == condition) & (table["family"] == family)].to_dict("records")
    return found


def by_hand(loaded, record):
    """Losses of a solution's tokens, its end included, and which of them are the likeliest, from one unpadded pass."""
    prompt, solution = (loaded.tokenizer(text)["input_ids"] for text in (record.prompt, record.solution))
    ids = torch.tensor([*prompt, *solution, loaded.tokenizer.eos_token_id])
    with torch.no_grad():
        logits = loaded.native(ids[None]).logits[0, len(prompt) - 1 : -1]
    targets = ids[len(prompt) :]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def state(loaded):
    """What a condition might leave behind."""
    hooks = [module for module in loaded.native.modules() if module._forward_hooks or module._forward_pre_hooks]
    router = {layer: (gate.top_k, id(gate.expert_bias), gate.expert_bias.tolist()) for layer, gate in loaded.gates().items()}
    return hooks, router, [name for name, _ in loaded.native.named_buffers()]


def test_one_row_a_condition_and_family(loaded):
    table = rerouted_losses(loaded, RECORDS)
    names = ["true", "random", "load", "no-bias", *(f"k={k}" for k in range(1, 7))]
    assert list(table[["condition", "family"]].itertuples(index=False, name=None)) == [
        (name, family) for name in names for family in ("large", "small", "all")
    ]
    assert list(table.columns) == [
        "condition", "family", "problems", "solution_tokens", "loss", "loss_low", "loss_high", "token_accuracy", "solved",
        "share", "ci_low", "ci_high", "loss_increase", "increase_low", "increase_high",
    ]  # fmt: skip
    assert row(table, "true")["problems"] == 14
    assert ((table["loss_low"] < table["loss"]) & (table["loss"] < table["loss_high"])).all()
    changed = table[~table["condition"].isin(["true", "k=3"])]
    assert ((changed["increase_low"] < changed["loss_increase"]) & (changed["loss_increase"] < changed["increase_high"])).all()
    assert list(rerouted_losses(loaded, RECORDS[:8])["family"].unique()) == ["small"]


def test_true_is_the_plain_loss_of_one_sequence_exactly(loaded):
    for record in RECORDS:
        losses, right = by_hand(loaded, record)
        found = row(rerouted_losses(loaded, [record]), "true", record.family)
        assert found["solution_tokens"] == len(losses)
        assert found["loss"] == losses.double().sum().item() / len(losses)
        assert found["token_accuracy"] == right.double().mean().item()


def test_true_of_many_is_their_mean_over_tokens(loaded):
    plain = [by_hand(loaded, record) for record in RECORDS]
    found = row(rerouted_losses(loaded, RECORDS, batch_tokens=90), "true")
    assert found["solution_tokens"] == sum(len(losses) for losses, _ in plain)
    assert found["loss"] == pytest.approx(torch.cat([losses for losses, _ in plain]).mean().item(), rel=1e-6)
    assert found["token_accuracy"] == pytest.approx(torch.cat([right for _, right in plain]).double().mean().item())


def test_solved_is_what_greedy_generation_reproduces(loaded):
    """Give half of the problems the model's own completion as their solution; it can say nothing but digits."""
    digits = loaded.tokenizer("0123456789")["input_ids"]
    speechless = torch.ones(loaded.native.lm_head.weight.shape[0], dtype=torch.bool)
    speechless[digits] = False
    loaded.native.lm_head.weight.data[speechless] = 0
    own = []
    for record in RECORDS[::2]:
        prompt = loaded.tokenizer(record.prompt, return_tensors="pt")["input_ids"]
        ids = loaded.native.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :]
        own.append(Record(id=f"own-{record.id}", prompt=record.prompt, solution=loaded.tokenizer.decode(ids)))
    assert all(len(each.solution) == 6 for each in own)
    # The model never ends a text, so without an end token its own completions are solved and others are not.
    loaded.tokenizer.eos_token = None
    try:
        table = rerouted_losses(loaded, [*own, *RECORDS])
    finally:
        loaded.tokenizer.eos_token = "<|endoftext|>"
    found = row(table, "true", "")
    assert found["solved"] == len(own)
    assert row(table, "true")["solved"] == len(own)
    assert found["share"] == 1
    assert (found["ci_low"], found["ci_high"]) == wilson_interval(len(own), len(own))
    assert row(table, "random", "")["solved"] < len(own)


def test_k_of_the_model_is_the_model(loaded):
    table = rerouted_losses(loaded, RECORDS)
    for family in ("small", "large", "all"):
        same, true = row(table, f"k={K}", family), row(table, "true", family)
        assert {**same, "condition": "true"} == true
        assert (true["loss_increase"], true["increase_low"], true["increase_high"]) == (0, 0, 0)


def test_every_condition_does_what_it_says_and_keeps_the_official_weights(loaded, seen):
    table = rerouted_losses(loaded, RECORDS)
    names = list(table["condition"].unique())
    assert len(seen) == 2 * N_CONDITIONS  # two routed layers, one batch
    for index, (_layer, ids, weights) in enumerate(seen):
        name = names[index // 2]
        assert ids.shape[1] == (int(name[2:]) if name.startswith("k=") else K)
        assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
        torch.testing.assert_close(weights.sum(1), torch.full((len(ids),), 2.5))
        groups = torch.nn.functional.one_hot(ids // 4, 4).any(1).sum(1)
        assert (groups.max() > 2) == (name in ("random", "load")), name
    first = {name: seen[2 * i][1] for i, name in enumerate(names)}
    assert torch.equal(first["k=6"][:, :3], first["true"])
    assert torch.equal(first["k=3"], first["true"])
    assert not torch.equal(first["no-bias"], first["true"])
    differ = {table.loc[table["condition"] == name, "loss"].iloc[-1] for name in names}
    assert len(differ) == N_CONDITIONS - 1  # k=3 is true


def test_the_bias_is_what_no_bias_takes_away(loaded):
    before = row(rerouted_losses(loaded, RECORDS), "no-bias")
    for gate in loaded.gates().values():
        gate.expert_bias.zero_()
    after = rerouted_losses(loaded, RECORDS)
    assert row(after, "true")["loss"] == row(after, "no-bias")["loss"] == before["loss"]


def test_the_model_is_left_as_it_was(loaded):
    before = state(loaded)
    rerouted_losses(loaded, RECORDS)
    assert state(loaded) == before
    assert before[0] == []


@pytest.mark.parametrize("failing", [1, 2, 4, 5])
def test_a_failure_leaves_the_model_as_it_was_too(loaded, monkeypatch, failing):
    before, calls, forward = state(loaded), [], loaded.native.model.forward

    def fail(*args, **options):
        calls.append(args)
        if len(calls) == failing:
            raise RuntimeError("out of memory")
        return forward(*args, **options)

    monkeypatch.setattr(loaded.native.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        rerouted_losses(loaded, RECORDS)
    assert state(loaded) == before


def test_draws_follow_the_seed_alone(loaded):
    table = rerouted_losses(loaded, RECORDS)
    pd.testing.assert_frame_equal(rerouted_losses(loaded, RECORDS), table)
    other = rerouted_losses(loaded, RECORDS, seed=1)
    for name in ("random", "load"):
        assert row(other, name)["loss"] != row(table, name)["loss"] != row(table, "true")["loss"]
    for name in ("true", "no-bias", "k=6"):
        assert row(other, name)["loss"] == row(table, name)["loss"]
    small_batches = rerouted_losses(loaded, RECORDS, batch_tokens=60)
    np.testing.assert_allclose(small_batches["loss"], table["loss"], rtol=1e-5)


def test_with_experts_all_the_same_only_which_experts_has_changed(loaded):
    for layer in loaded.native.model.layers[1:]:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data[:] = weight.data[:1].clone()
    table = rerouted_losses(loaded, RECORDS)
    np.testing.assert_allclose(table["loss"].iloc[2::3], row(table, "true")["loss"], rtol=1e-5)
    np.testing.assert_allclose(table["loss_increase"], 0, atol=1e-5)


def test_load_draws_follow_the_load_of_the_true_router_and_random_ones_do_not(loaded, seen):
    records = [Record(id=str(n), prompt="1+2\n", solution=f"{n}+{n}={2 * n}\n" * 40) for n in range(20)]
    rerouted_losses(loaded, records, batch_tokens=10**6)
    ids = loaded.tokenizer
    lengths = torch.tensor([len(ids(each.prompt)["input_ids"]) + len(ids(each.solution)["input_ids"]) + 1 for each in records])
    # One batch; rows are sorted by length.
    real = (torch.arange(int(lengths.max())) < lengths.sort().values[:, None]).flatten()
    counts = [(layer, torch.bincount(chosen[real].flatten(), minlength=16).numpy()) for layer, chosen, _ in seen[:6]]
    true, random, load = (dict(counts[i : i + 2]) for i in (0, 2, 4))
    for layer in loaded.gates():
        share = true[layer] / real.sum().item()
        error = np.sqrt(share * (1 - share) / real.sum().item())
        assert share.max() > 2 * share.mean()
        assert (np.abs(load[layer] / real.sum().item() - share) <= 4.5 * error + 1e-9).all()
        assert (
            np.abs(random[layer] / real.sum().item() - K / 16) < 4.5 * np.sqrt(K / 16 * (1 - K / 16) / real.sum().item())
        ).all()
        assert np.abs(random[layer] - true[layer]).max() > 10 * np.abs(load[layer] - true[layer]).max()


def test_draws_are_distinct_and_exactly_as_likely_as_counted():
    counts, tokens = np.array([500, 0, 100, 250, 400, 250]), 40_000  # an expert in every choice, and one in none
    noise = np.random.default_rng(0).random((tokens, 7))
    ids = draw_experts(counts, 3, noise).numpy()
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    found = np.bincount(ids.ravel(), minlength=6) / tokens
    np.testing.assert_allclose(found, counts / 500, atol=0.01)
    assert (found[0], found[1]) == (1, 0)


def test_with_equal_counts_every_set_is_equally_likely():
    ids = draw_experts(np.full(5, 2), 2, np.random.default_rng(0).random((50_000, 6))).sort(dim=1).values.numpy()
    _, found = np.unique(ids @ [10, 1], return_counts=True)
    assert len(found) == 10
    np.testing.assert_allclose(found / 50_000, 0.1, atol=0.006)


def test_problems_without_a_solution_are_left_out(loaded):
    bare = [Record(id=f"bare-{n}", family="bare", prompt="1+2\n") for n in range(3)]
    pd.testing.assert_frame_equal(rerouted_losses(loaded, [*RECORDS, *bare]), rerouted_losses(loaded, RECORDS))
    with pytest.raises(UsageError, match="no record has a solution"):
        rerouted_losses(loaded, bare)


@pytest.fixture
def evaluate(tmp_path, loaded, monkeypatch):
    """Call the command on two problems, with the random model; gives standard output and error."""
    monkeypatch.setattr("ling_probe.cli.measuring.loaded_model", lambda *_args, **_options: loaded)

    def call(*options, solution="1+2=3\nanswer: 3\n"):
        file = tmp_path / "sums.jsonl"
        lines = [{"prompt": f"1+{n}\n", "solution": solution, "answer": "3", "family": f"f{n}"} for n in (2, 3)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = CliRunner().invoke(app, ["evaluate", "random", str(file), "--max-new-tokens", "4", *options])
        assert done.exception is None, done.exception
        return done.stdout, done.stderr

    return call


def tables(out):
    return [json.loads(line)["table"] for line in out.splitlines()]


def test_evaluate_says_whether_routing_matters(evaluate):
    found = tables(evaluate("--json")[0])
    assert found.count("does routing matter") == N_CONDITIONS * 3
    assert list(dict.fromkeys(found)) == ["exact answers", "balance", "does routing matter"]
    shown = evaluate()[0]
    assert shown.index("random on sums : balance") < shown.index("random on sums : does routing matter")
    assert "no-bias" in shown


def test_evaluate_leaves_it_out_when_told_to_or_without_solutions(evaluate):
    out, errors = evaluate("--no-rerouting", "--json")
    assert set(tables(out)) == {"exact answers", "balance"}
    assert "other routers" not in errors
    out, errors = evaluate("--json", solution="")
    assert set(tables(out)) == {"exact answers", "balance"}
    assert errors.count("no problem has a solution to read, so other routers are not tried\n") == 1
