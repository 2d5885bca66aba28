"""Whole vectors: the right ones, joined with their tokens, and stored so that nothing is lost."""

import doctest
import errno
import io
import json
import os
import tempfile
import tracemalloc
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from official import FIXTURES, load, reference
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from synthetic import synthetic_spec, synthetic_traces
from test_cli import ling, refused

from ling_probe import activations, trace
from ling_probe.activations import POSITIONS, ActivationSpec
from ling_probe.benchmarks import read_benchmark
from ling_probe.capture import capture
from ling_probe.capture.layout import Layout
from ling_probe.capture.vectors import Spill, VectorRecorder
from ling_probe.errors import RunError, UsageError
from ling_probe.interventions import silence
from ling_probe.model.load import LoadedLing, Verification, load_native
from ling_probe.model.streaming import load_streamed
from ling_probe.recording import record
from ling_probe.run import Run, Shard, find_shards, merge, vectors
from ling_probe.trace import Activation

EVERYTHING = ActivationSpec(names=("residual:0-4", "router:1-4", "expert:1.0-31,2.0-31,3.0-31,4.0-31"))


@pytest.fixture(scope="module")
def loaded():
    return load_native("ling-tiny")


@pytest.fixture(scope="module")
def problems():
    return read_benchmark("stepbench", limit=6)


@pytest.fixture(scope="module")
def everything(loaded, problems):
    """Every record in a batch of its own, so that a plain pass over its tokens is the same pass."""
    return list(capture(loaded, problems.records, activations=EVERYTHING, batch_tokens=1))


def hooked(loaded, tokens):
    """What a plain pass gives every decoder layer and takes from it, every gate, and every layer's experts."""
    seen = {}
    with ExitStack() as stack, torch.no_grad():
        for index, layer in enumerate(loaded.native.model.layers):
            stack.callback(
                layer.register_forward_hook(lambda _m, _a, out, n=f"residual:{index}": seen.update({n: out[0]})).remove
            )
        for index, gate in loaded.gates().items():
            see = lambda _m, args, n=f"router:{index}": seen.update({n: args[0]})  # noqa: E731
            stack.callback(gate.register_forward_pre_hook(see).remove)
            experts = loaded.native.model.layers[index].mlp.experts
            stack.callback(experts.register_forward_hook(lambda _m, _a, out, n=index: seen.update({n: out})).remove)
        loaded.native(torch.tensor([tokens.tolist()]))
    return seen


def test_residuals_and_router_inputs_are_those_of_plain_hooks_bit_for_bit(loaded, everything):
    for each in everything:
        seen = hooked(loaded, each.token_ids)
        for name in (name for name in EVERYTHING.names if not name.startswith("expert")):
            assert each.activations[name].positions.tolist() == list(range(each.n_tokens))
            np.testing.assert_array_equal(each.activations[name].vectors, seen[name].numpy(), err_msg=name)


def test_what_the_experts_of_a_token_add_sums_to_the_routed_output(loaded, everything):
    for each in everything:
        seen = hooked(loaded, each.token_ids)
        for row, layer in enumerate(loaded.spec.routed_layers):
            total = np.zeros((each.n_tokens, loaded.spec.d_model), np.float32)
            for expert in range(loaded.spec.n_experts):
                found = each.activations[f"expert:{layer}.{expert}"]
                chosen = (each.expert_ids[:, row] == expert).any(axis=1)
                assert found.positions.tolist() == np.flatnonzero(chosen).tolist()
                total[found.positions] += found.vectors
            np.testing.assert_allclose(total, seen[layer].numpy(), atol=1e-5)


@torch.no_grad()
def test_router_inputs_give_the_official_codes_router_logits():
    """With the weights as they lie in a checkpoint of the official layout; the last residual gives its logits."""
    native, recorded = load("tiny-base"), reference("tiny-base")
    stored = load_torch(FIXTURES / "tiny-base" / "model.safetensors")
    mask, ids = recorded["rpad.attention_mask"], recorded["rpad.input_ids"]
    loaded = LoadedLing(native, None, native.config.spec("tiny-base"), "", Verification(0, 0, 0, 0.0))
    layouts = [Layout(np.ones(int(n), np.uint8), np.full(int(n), -1, np.int16), (), "") for n in mask.sum(1)]
    wanted = ActivationSpec(names=("router:1-3", "residual:3"))
    recorder = VectorRecorder(loaded, wanted, layouts, ids.shape[1], Spill())
    with recorder.attached():
        native.model(input_ids=ids, attention_mask=mask)
    real = mask.bool()
    for layer in (1, 2, 3):
        official = recorded[f"fp32.eager.rpad.router_logits.{layer}"].view(*mask.shape, -1)
        gate = stored[f"model.layers.{layer}.mlp.gate.weight"].float()
        for row in range(len(layouts)):
            found = torch.from_numpy(recorder.of(row)[f"router:{layer}"].vectors) @ gate.T
            torch.testing.assert_close(found, official[row][real[row]], rtol=1e-4, atol=1e-4 * float(official.abs().max()))
    for row in range(len(layouts)):
        hidden = native.model.norm(torch.from_numpy(recorder.of(row)["residual:3"].vectors))
        official = recorded["fp32.eager.rpad.logits"][row][real[row]]
        torch.testing.assert_close(native.lm_head(hidden), official, rtol=0, atol=1e-4)


def test_keeping_vectors_changes_neither_choice_nor_loss_and_leaves_nothing_attached(loaded, problems, everything):
    for plain, kept in zip(capture(loaded, problems.records, batch_tokens=1), everything, strict=True):
        np.testing.assert_array_equal(kept.expert_ids, plain.expert_ids)
        np.testing.assert_allclose(kept.loss, plain.loss, atol=1e-5)
        assert plain.activations == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.native.modules())


def test_vectors_hardly_depend_on_the_batch_and_keep_company_with_norms(loaded, problems, everything):
    """In batches, beside everything that is attached to the same experts; norms are those of the vectors."""
    keep = ("contribution", "residual", "lens")
    found = capture(loaded, problems.records, keep=keep, activations=EVERYTHING, batch_tokens=400)
    for alone, each in zip(everything, found, strict=True):
        for name in EVERYTHING.names:
            np.testing.assert_array_equal(each.activations[name].positions, alone.activations[name].positions)
            np.testing.assert_allclose(each.activations[name].vectors, alone.activations[name].vectors, atol=2e-4)
        norms = np.linalg.norm(each.activations["residual:2"].vectors, axis=1)
        np.testing.assert_allclose(norms, each.extras["residual"][:, 2], rtol=1e-5)
        expert = each.expert_ids[0, 1, 0]
        first = np.linalg.norm(each.activations[f"expert:2.{expert}"].vectors[0])
        assert first == pytest.approx(each.extras["contribution"][0, 1, 0], rel=1e-4)


def test_a_silenced_expert_adds_zeros(loaded, problems):
    wanted = ActivationSpec(names=("expert:2.0-31",))
    for each in capture(loaded, problems.records, interventions=[silence(2, [1, 4, 9])], activations=wanted):
        assert not any(each.activations[f"expert:2.{expert}"].vectors.any() for expert in (1, 4, 9))
        assert any(each.activations[f"expert:2.{expert}"].vectors.any() for expert in range(32))


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_are_those_asked_for(loaded, problems, everything, positions):
    wanted = ActivationSpec(names=("residual:3", "expert:4.0-31"), positions=positions)
    for each, whole in zip(capture(loaded, problems.records, activations=wanted, batch_tokens=1), everything, strict=True):
        expected = {
            "all": list(range(each.n_tokens)),
            "last": [each.n_tokens - 1],
            "step-ends": [span.stop - 1 for span in each.steps],
        }.get(positions) or np.flatnonzero(each.segment == ("prompt", "reasoning", "answer").index(positions)).tolist()
        assert expected
        assert each.activations["residual:3"].positions.tolist() == expected
        np.testing.assert_array_equal(each.activations["residual:3"].vectors, whole.activations["residual:3"].vectors[expected])
        chosen = sum(len(each.activations[f"expert:4.{expert}"].positions) for expert in range(32))
        assert chosen == 4 * len(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_holds_the_models_own_numbers_and_every_library_reads_it(tmp_path, problems, dtype):
    loaded = load_native("ling-tiny", dtype=dtype)
    wanted = ActivationSpec(names=("residual:1", "router:2", "expert:3.5"), positions="reasoning")
    run = record(loaded, problems, tmp_path / "run", activations=wanted, batch_tokens=1, parts=2)
    assert run.verify() == []
    traces = list(capture(loaded, problems.records, activations=wanted, batch_tokens=1))
    cut = run.manifest.parts[0].sequences
    for part, mine in zip(run.manifest.parts, (traces[:cut], traces[cut:]), strict=True):
        path = run.folder / "parts" / part.name / "activations.safetensors"
        found = load_torch(path)
        for name in wanted.names:
            assert found[f"{name}.vectors"].dtype == getattr(torch, dtype)
            expected = np.concatenate([each.activations[name].vectors for each in mine])
            np.testing.assert_array_equal(found[f"{name}.vectors"].float().numpy(), expected)
            rows = [row for row, each in enumerate(mine) for _ in each.activations[name].positions]
            assert found[f"{name}.sequence"].tolist() == rows
        if dtype != "bfloat16":
            assert set(load_file(path)) == set(found)
    seen = hooked(loaded, traces[0].token_ids)["residual:1"].float().numpy()
    first = next(run.activations("residual:1"))
    np.testing.assert_array_equal(first.vectors[first.sequence == 0], seen[traces[0].activations["residual:1"].positions])


def test_vectors_join_with_the_tokens_of_a_run_whatever_its_parts(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "PIECE", 10_000)
    wanted = ActivationSpec(names=("router:2", "expert:2.5"))
    run = record(loaded, read_benchmark("stepbench", limit=20), tmp_path / "run", keep=("logits",), activations=wanted, parts=3)
    tokens = list(run.batches(layers=[2], columns=["logits"]))
    place = {
        (int(sequence), int(position)): (batch.extra["logits"][row, 0], batch.expert_ids[row, 0])
        for batch in tokens
        for row, (sequence, position) in enumerate(zip(batch.sequence, batch.position, strict=True))
    }
    gate = loaded.gates()[2].weight.detach().numpy()
    pieces = list(run.activations("router:2"))
    assert len(pieces) > len(run.manifest.parts)
    assert max(len(piece.vectors) for piece in pieces) == 10_000 // (4 * loaded.spec.d_model)
    keys = [(int(s), int(p)) for piece in pieces for s, p in zip(piece.sequence, piece.position, strict=True)]
    assert keys == list(place), "every token once, in the order of the run"
    logits = np.concatenate([piece.vectors for piece in pieces]) @ gate.T
    np.testing.assert_allclose(logits, np.stack([place[key][0] for key in keys]), atol=0.02)
    chosen = [
        (int(s), int(p)) for piece in run.activations("expert:2.5") for s, p in zip(piece.sequence, piece.position, strict=True)
    ]
    assert chosen == [key for key in keys if 5 in place[key][1]]
    with pytest.raises(UsageError, match=r"no activation residual:1; it has expert:2\.5, router:2 \(positions: all\): capture"):
        run.activations("residual:1")


def test_generated_texts_have_the_vectors_of_a_pass_over_them(loaded, problems, tmp_path):
    wanted = ActivationSpec(names=("residual:4",), positions="reasoning")
    run = record(loaded, problems, tmp_path / "run", activations=wanted, max_new_tokens=12, batch_tokens=1)
    (batch,), (found,) = run.batches(), run.activations("residual:4")
    for row in range(len(problems.records)):
        mine = batch.sequence == row
        seen = hooked(loaded, batch.token_id[mine])["residual:4"].numpy()
        assert found.position[found.sequence == row].tolist() == np.flatnonzero(batch.segment[mine] == 1).tolist()
        np.testing.assert_array_equal(found.vectors[found.sequence == row], seen[batch.segment[mine] == 1])


def test_a_stream_of_layers_keeps_what_the_whole_model_does(loaded, problems, tmp_path):
    whole = record(loaded, problems, tmp_path / "whole", activations=EVERYTHING, batch_tokens=400)
    streamed = record(load_streamed("ling-tiny"), problems, tmp_path / "streamed", activations=EVERYTHING, batch_tokens=400)
    for name in EVERYTHING.names:
        for ours, theirs in zip(streamed.activations(name), whole.activations(name), strict=True):
            np.testing.assert_array_equal(ours.sequence, theirs.sequence)
            np.testing.assert_array_equal(ours.position, theirs.position)
            np.testing.assert_allclose(ours.vectors, theirs.vectors, rtol=1e-5, atol=1e-6, err_msg=name)


def test_memory_holds_where_vectors_lie_and_writes_them_one_sequence_at_a_time(loaded, tmp_path):
    problems = read_benchmark("stepbench", limit=40)
    tracemalloc.start()
    try:
        traces = list(capture(loaded, problems.records, activations=EVERYTHING, spill=tmp_path))
        held, _ = tracemalloc.get_traced_memory()
        run = Run.create(
            tmp_path / "run", spec=loaded.spec, model={}, benchmark={}, options={"activations": EVERYTHING.to_dict()}
        )
        tracemalloc.reset_peak()
        run.append(traces)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = (run.folder / "parts" / "00000" / "activations.safetensors").stat().st_size
    assert size > 40 << 20
    assert held < size / 6
    assert peak - held < size / 6
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "what is put aside has no name"


def test_an_interrupted_capture_ends_in_the_same_bytes_as_do_shards_and_a_redone_part(loaded, tmp_path):
    problems, wanted = read_benchmark("stepbench", limit=12), ActivationSpec(names=("residual:2", "expert:3.0-7"))
    whole = record(loaded, problems, tmp_path / "whole", activations=wanted, parts=4)
    files = [part.files for part in whole.manifest.parts]
    assert all("activations.safetensors" in each for each in files)
    with pytest.raises(KeyboardInterrupt):
        record(loaded, problems, tmp_path / "cut", activations=wanted, parts=4, progress=lambda _done: _interrupt())
    with pytest.raises(RunError, match="another options"):
        record(loaded, problems, tmp_path / "cut", activations=ActivationSpec(names=("residual:2",)), parts=4, resume=True)
    cut = record(loaded, problems, tmp_path / "cut", activations=wanted, parts=4, resume=True)
    assert [part.files for part in cut.manifest.parts] == files
    for index in (1, 2):
        shard = Shard(index, 2)
        record(loaded, problems, tmp_path / "shards" / shard.folder, activations=wanted, parts=4, shard=shard)
    merged = merge(tmp_path / "merged", find_shards(tmp_path / "shards"))
    assert [part.files for part in merged.manifest.parts] == files
    assert np.concatenate([each.sequence for each in merged.activations("residual:2")]).max() == 11
    path = cut.folder / "parts" / "00001" / "activations.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(RunError, match=r"activations\.safetensors of part 00001 is not what was written"):
        cut.verify()
    mended = record(loaded, problems, tmp_path / "cut", activations=wanted, parts=4, redo_damaged=True)
    assert [part.files for part in mended.manifest.parts] == files
    path.unlink()
    with pytest.raises(RunError, match=r"part 00001 lacks activations\.safetensors"):
        Run.open(tmp_path / "cut")
    left = {each.name for each in (tmp_path / "cut").iterdir()}
    assert left == {"run.json", "parts", "experts.safetensors"}, "nothing was left aside"


def _interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["cut", "header", "length"])
def test_a_damaged_file_is_said_in_one_line(tmp_path, damage):
    run, path = synthetic(tmp_path), tmp_path / "run" / "parts" / "00000" / "activations.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-40], "header": data[:20] + b"\xff" + data[21:], "length": b"\xff" * 8 + data[8:]}[damage])
    with pytest.raises(RunError, match=r"activations\.safetensors cannot be read .* it is damaged"):
        list(run.activations("residual:0"))


def synthetic(folder, **kept):
    spec = synthetic_spec()
    wanted = ActivationSpec(names=("residual:0",))
    run = Run.create(folder / "run", spec=spec, model={}, benchmark={}, options={"activations": wanted.to_dict()})
    numbers = np.ones((2, spec.d_model), np.float32)
    given = {"residual:0": Activation(np.array([0, 3], np.int32), lambda: numbers)} | kept
    run.append([replace(each, activations=given) for each in synthetic_traces(spec, 3, rng=np.random.default_rng(0))])
    return run


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Activation(np.array([0, 3], np.int32), lambda: np.ones((2, 7), np.float32)), r"is float32 \[2, 7\]; expected"),
        (Activation(np.array([0, 3], np.int32), lambda: np.ones((1, 8), np.float32)), r"is float32 \[1, 8\]; expected"),
        (Activation(np.array([0, 3], np.int32), lambda: np.ones((2, 8))), "is float64"),
        (Activation(np.array([3, 0], np.int32), lambda: np.ones((2, 8), np.float32)), r"has positions \[3, 0\]; expected asc"),
        (Activation(np.array([0, 99], np.int32), lambda: np.ones((2, 8), np.float32)), "expected ascending ones below"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_and_the_run_stays_whole(tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        synthetic(tmp_path, **{"residual:0": given})
    assert Run.open(tmp_path / "run").verify() == []


def test_every_sequence_of_a_run_has_the_activations_it_was_made_for(tmp_path, make_run):
    with pytest.raises(UsageError, match=r"has activations residual:0, router:1; every one of .* has residual:0"):
        synthetic(tmp_path, **{"router:1": Activation(np.array([], np.int32), lambda: np.ones((0, 8), np.float32))})
    with pytest.raises(UsageError, match="has no activation residual:0; it has none: capture with --activations residual:0"):
        make_run().activations("residual:0")


def test_a_selection_is_a_plain_value():
    one = ActivationSpec(names=("expert:4.17-18", "residual:5,3", "residual:3"), positions="answer")
    other = ActivationSpec(names=("residual:3", "expert:4.17", "residual:5", "expert:4.18"), positions="answer")
    assert one == other == ActivationSpec.from_dict(json.loads(json.dumps(one.to_dict())))
    assert one.names == ("expert:4.17", "expert:4.18", "residual:3", "residual:5")
    assert one != ActivationSpec(names=one.names)
    assert doctest.testmod(activations).failed == doctest.testmod(trace).failed == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "names no activation; write residual:3,5") for name in ("", "residual", "residual:", "mlp:3", "residual:1,")),
        *((name, "names no activation") for name in ("expert:4", "residual:3.1", "router:-1", "residual:a", "expert:4.1.2")),
        ("residual:5-3", '"5-3" of "residual:5-3" runs backwards'),
        ("expert:4.5-3", "runs backwards"),
    ],
)
def test_what_names_nothing_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        ActivationSpec(names=(name,))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("residual:5", "layer 5 of ling-tiny does not exist; its layers are 0-4"),
        ("router:0", "layer 0 of ling-tiny has no router; these do: 1-4"),
        ("expert:0.1", "layer 0 of ling-tiny has no router"),
        ("router:9", "layer 9 of ling-tiny has no router"),
        ("expert:4.32", "expert 32 does not exist in ling-tiny; its experts are 0-31"),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_anything_is_written(loaded, problems, tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        record(loaded, problems, tmp_path / "run", activations=ActivationSpec(names=(name,)))
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_is_said_in_one_line(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    spill = Spill(tmp_path)
    with pytest.raises(RunError, match=r"could not be put aside \(No space .*make room, and go on with --resume"):
        spill.put(np.ones(9))


@pytest.mark.slow
def test_the_command_line_keeps_joins_and_refuses(tmp_path):
    command = ["capture", "ling-tiny", "stepbench", "--limit", "3", "--out", tmp_path / "run"]
    assert "which activations to keep is said by --activations" in refused(*command, "--keep", "activations")
    assert "positions last of which activations?" in refused(*command, "--activation-positions", "last")
    named = [*command, "--activations", "residual:3", "--activations", "expert:4.0-3"]
    assert 'no positions "middle"; these there are: all, prompt' in refused(*named, "--activation-positions", "middle")
    done = ling(*named, "--activation-positions", "step-ends")
    assert done.returncode == 0, done.stderr
    facts = json.loads(ling("inspect", tmp_path / "run", "--verify", "--json").stdout)
    assert facts["activations"] == "expert:4.0-3, residual:3 (positions: step-ends)"
    assert facts["vector_bytes"] == (tmp_path / "run/parts/00000/activations.safetensors").stat().st_size
    assert sum(len(each.position) for each in Run.open(tmp_path / "run").activations("residual:3")) == facts["steps"]
