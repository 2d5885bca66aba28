"""What is kept beside ids and weights: contributions, residual norms, direct logit attribution."""

from contextlib import ExitStack

import duckdb
import numpy as np
import pandas as pd
import pytest
import torch

from ling_probe.benchmarks import read_benchmark
from ling_probe.capture import KEEP, capture
from ling_probe.capture.writes import along, final_scale, next_token_directions, spread_experts
from ling_probe.interventions import force, silence
from ling_probe.model.load import load_native
from ling_probe.recording import record
from ling_probe.run import Run

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@pytest.fixture(scope="module")
def loaded():
    return load_native("ling-tiny")


@pytest.fixture(scope="module")
def records():
    return read_benchmark("stepbench", limit=6).records


@pytest.fixture(scope="module")
def everything(loaded, records):
    return list(capture(loaded, records, keep=KEEP, batch_tokens=300))


@pytest.fixture(scope="module")
def halved():
    return load_native("ling-tiny", dtype="bfloat16")


def hooked_pass(loaded, ids):
    """One unpadded pass with plain hooks: logits [T V], and each module's output by name [T D]."""
    seen = {}
    with ExitStack() as stack, torch.no_grad():
        for name, module in loaded.native.named_modules():
            if name.endswith((".mlp", ".self_attn", "embed_tokens", "shared_experts")) or name.split(".")[-1].isdigit():
                hook = module.register_forward_hook(lambda _m, _a, out, name=name: seen.__setitem__(name, out))
                stack.callback(hook.remove)
        logits = loaded.native(torch.tensor([ids])).logits[0]
    return logits, {name: (out[0] if isinstance(out, tuple) else out)[0] for name, out in seen.items()}


def blocks(loaded):
    return {layer: loaded.native.model.layers[layer].mlp for layer in loaded.spec.routed_layers}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contributions_and_the_shared_expert_sum_to_the_output_of_a_plain_pass(
    loaded, halved, everything, implementation, dtype
):
    model = loaded if dtype == "float32" else halved
    before = model.native.config._experts_implementation
    model.native.set_experts_implementation(implementation)
    tokens = everything[0].token_ids.tolist()
    plain_logits, plain = hooked_pass(model, tokens)
    seen = {}
    with ExitStack() as stack:
        for layer, block in blocks(model).items():
            for remove in spread_experts(block.experts, lambda out, w, layer=layer: seen.__setitem__(layer, (out, w))):
                stack.callback(remove)
        logits, _ = hooked_pass(model, tokens)
    model.native.set_experts_implementation(before)
    assert set(seen) == set(model.spec.routed_layers)
    for layer, (outputs, weights) in seen.items():
        assert outputs.shape == (len(tokens), model.spec.top_k, model.spec.d_model)
        routed = (outputs * weights[..., None]).sum(1).to(outputs.dtype)
        total = routed + plain[f"model.layers.{layer}.mlp.shared_experts"]
        torch.testing.assert_close(total, plain[f"model.layers.{layer}.mlp"], rtol=0, atol=0 if dtype == "bfloat16" else 1e-6)
    torch.testing.assert_close(logits, plain_logits, rtol=0, atol=0 if dtype == "bfloat16" else 1e-5)


def test_keeping_more_changes_neither_choice_nor_loss(loaded, records, everything):
    plain = list(capture(loaded, records, batch_tokens=300))
    for before, after in zip(plain, everything, strict=True):
        np.testing.assert_array_equal(after.expert_ids, before.expert_ids)
        np.testing.assert_allclose(after.weights, before.weights, atol=1e-6)
        np.testing.assert_allclose(after.loss, before.loss, atol=1e-5)
        assert before.extras == {}


def test_keeping_nothing_more_is_the_plain_pass_bit_for_bit(loaded, records):
    trace = next(capture(loaded, records[:1]))
    logits, _ = hooked_pass(loaded, trace.token_ids.tolist())
    following = torch.from_numpy(trace.token_ids[1:]).long()
    losses = torch.nn.functional.cross_entropy(logits[:-1], following, reduction="none").numpy()
    np.testing.assert_array_equal(trace.loss[:-1], losses)


@torch.no_grad()
def test_a_contribution_is_the_norm_of_weight_times_the_experts_own_output(loaded, everything):
    """By the formula of one expert, on the recorded ids and weights."""
    trace = everything[1]
    inputs = {}
    with ExitStack() as stack:
        for layer, block in blocks(loaded).items():
            hook = block.register_forward_pre_hook(lambda _m, args, layer=layer: inputs.__setitem__(layer, args[0][0]))
            stack.callback(hook.remove)
        _, seen = hooked_pass(loaded, trace.token_ids.tolist())
    for layer, block in blocks(loaded).items():
        row = loaded.spec.row(layer)
        for position in (0, 7, trace.n_tokens - 1):
            for slot, expert in enumerate(trace.expert_ids[position, row]):
                gate, up = (block.experts.gate_up_proj[int(expert)] @ inputs[layer][position]).chunk(2)
                out = block.experts.down_proj[int(expert)] @ (torch.nn.functional.silu(gate) * up)
                expected = float(out.norm()) * trace.weights[position, row, slot]
                assert trace.extras["contribution"][position, row, slot] == pytest.approx(expected, rel=1e-4)
        shared = seen[f"model.layers.{layer}.mlp.shared_experts"].norm(dim=-1)
        np.testing.assert_allclose(trace.extras["shared"][:, row], shared.numpy(), rtol=1e-4)


def test_residual_norms_are_those_of_a_plain_hook(loaded, everything):
    for trace in everything:
        _, seen = hooked_pass(loaded, trace.token_ids.tolist())
        for layer in range(loaded.spec.n_layers):
            expected = seen[f"model.layers.{layer}"].norm(dim=-1)
            np.testing.assert_allclose(trace.extras["residual"][:, layer], expected.numpy(), rtol=1e-4)


@torch.no_grad()
def test_the_lens_over_all_that_is_written_is_the_models_logit(loaded, everything):
    """Embedding, attention, dense network, chosen and shared experts; nothing is left out and nothing left over."""
    dense = set(range(loaded.spec.n_layers)) - set(loaded.spec.routed_layers)
    for trace in everything:
        ids = trace.token_ids.tolist()
        logits, seen = hooked_pass(loaded, ids)
        direction = next_token_directions(loaded, torch.tensor([ids]))
        scale = final_scale(loaded, seen[f"model.layers.{loaded.spec.n_layers - 1}"][None])
        others = [seen["model.embed_tokens"], *(seen[f"model.layers.{i}.self_attn"] for i in range(loaded.spec.n_layers))]
        others += [seen[f"model.layers.{i}.mlp"] for i in dense]
        rest = (along(torch.stack(others, dim=1), direction) * scale[:, None]).sum(1).numpy()
        experts = trace.extras["lens"].sum(axis=(1, 2)) + trace.extras["lens_shared"].sum(axis=1)
        expected = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
        np.testing.assert_allclose((rest + experts)[:-1], expected, atol=2e-4)
        assert np.abs(experts[:-1]).max() > 1
        assert np.isnan(experts[-1])
        assert np.isfinite(experts[:-1]).all()


def test_a_silenced_expert_contributes_nothing_and_the_others_something(loaded, records):
    silenced = [1, 4, 9, 16, 25]
    traces = list(capture(loaded, records, keep=("contribution", "lens"), interventions=[silence(2, silenced)]))
    row, found = loaded.spec.row(2), 0
    for trace in traces:
        quiet = np.isin(trace.expert_ids[:, row], silenced)
        assert (trace.extras["contribution"][:, row][quiet] == 0).all()
        assert (trace.extras["contribution"][:, row][~quiet] > 0).all()
        assert (trace.extras["lens"][:-1, row][quiet[:-1]] == 0).all()
        found += int(quiet.sum())
    assert found > 10


def test_kept_numbers_do_not_depend_on_the_batch(loaded, records, everything):
    alone = [next(capture(loaded, [each], keep=KEEP)) for each in records]
    for one, other in zip(alone, everything, strict=True):
        for name, array in one.extras.items():
            np.testing.assert_allclose(array, other.extras[name], rtol=1e-3, atol=1e-4)


def test_interventions_and_keeping_go_together(loaded, records):
    changes = [force(3, [5, 6]), silence(4, range(0, 32, 2))]
    plain = capture(loaded, records, interventions=changes)
    kept = capture(loaded, records, interventions=changes, keep=("loss", "contribution", "residual", "lens"))
    for before, after in zip(plain, kept, strict=True):
        np.testing.assert_array_equal(after.expert_ids, before.expert_ids)
        np.testing.assert_allclose(after.loss, before.loss, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.native.modules())


def test_what_is_kept_is_stored_as_columns_that_anything_reads(loaded, tmp_path):
    problems = read_benchmark("stepbench", limit=6)
    run = record(loaded, problems, tmp_path / "run", keep=KEEP)
    Run.open(run.folder).verify()
    traces = list(capture(loaded, problems.records, keep=KEEP))
    names = ("contribution", "lens", "lens_shared", "logits", "residual", "shared")
    assert run.manifest.parts[0].extras == names
    (batch,) = run.batches(columns=names)
    for name in names:
        given = np.concatenate([trace.extras[name] for trace in traces])
        np.testing.assert_allclose(batch.extra[name], given, rtol=1e-3, atol=1e-4)
    file = run.folder / "parts" / "00000" / "tokens.parquet"
    plain = pd.read_parquet(file)
    routed, every = loaded.spec.routed_layers, range(loaded.spec.n_layers)
    expected = [f"{name}_{layer}" for name in names for layer in (every if name == "residual" else routed)]
    assert [name for name in plain.columns if name.rsplit("_", 1)[0] in names] == expected
    np.testing.assert_array_equal(np.stack(plain["contribution_2"]).astype(np.float32), batch.extra["contribution"][:, 1])
    largest = duckdb.sql(f"select max(list_max(contribution_2)), max(residual_0) from '{file}'").fetchall()[0]
    assert largest == pytest.approx((batch.extra["contribution"][:, 1].max(), batch.extra["residual"][:, 0].max()))
