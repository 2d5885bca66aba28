import numpy as np
import pytest
import torch

from ling_probe.benchmarks import Record, read_benchmark
from ling_probe.capture import capture
from ling_probe.errors import InterventionError, UsageError
from ling_probe.interventions import bias, exclude, force, route_with, silence
from ling_probe.model.load import load_native
from ling_probe.trace import SEGMENTS


@pytest.fixture(scope="module")
def loaded():
    return load_native("ling-tiny")


@pytest.fixture(scope="module")
def records():
    return read_benchmark("stepbench", limit=12).records


def by_hand(loaded, ids):
    """Unpadded forward of one sequence: logits, and each gate's own output."""
    seen = {}
    handles = [
        gate.register_forward_hook(lambda _g, _a, out, layer=layer: seen.__setitem__(layer, out))
        for layer, gate in loaded.gates().items()
    ]
    with torch.no_grad():
        logits = loaded.native(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits, seen


def test_a_trace_is_what_the_gates_of_one_unpadded_pass_return(loaded, records):
    traces = list(capture(loaded, records, keep=("experts", "loss", "logits"), batch_tokens=700))
    assert [trace.sequence_id for trace in traces] == [record.id for record in records]
    for trace in traces:
        logits, seen = by_hand(loaded, trace.token_ids.tolist())
        for layer, (router, weights, ids) in seen.items():
            row = loaded.spec.row(layer)
            np.testing.assert_array_equal(trace.expert_ids[:, row], ids.numpy())
            np.testing.assert_allclose(trace.weights[:, row], weights.numpy(), atol=1e-5)
            np.testing.assert_allclose(trace.extras["logits"][:, row], router.numpy(), atol=1e-4)
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(trace.token_ids[1:]).long(), reduction="none")
        np.testing.assert_allclose(trace.loss[:-1], losses.numpy(), atol=1e-4)
        assert np.isnan(trace.loss[-1])


def test_texts_segments_and_steps_are_the_records(loaded, records):
    for record, trace in zip(records, capture(loaded, records), strict=True):
        assert trace.completion == record.solution
        special = trace.segment == SEGMENTS.index("special")
        text = "".join(token for token, skip in zip(trace.tokens, special, strict=True) if not skip)
        assert text == record.prompt + record.solution
        assert special.tolist() == [False] * (trace.n_tokens - 1) + [True]
        prompt = "".join(np.array(trace.tokens)[trace.segment == 0])
        assert prompt == record.prompt
        assert "".join(np.array(trace.tokens)[trace.segment == SEGMENTS.index("answer")]) == f"answer: {record.answer}\n"
        assert [span.label for span in trace.steps] == [step.label for step in record.steps]
        for index, step in enumerate(record.steps):
            assert "".join(np.array(trace.tokens)[trace.step == index]) == record.solution[step.start : step.stop]


def test_generation_is_greedy_and_recorded_as_a_plain_pass_would(loaded, records):
    traces = list(capture(loaded, records[:6], max_new_tokens=30, batch_tokens=500))
    for record, trace in zip(records[:6], traces, strict=True):
        prompt = loaded.tokenizer(record.prompt)["input_ids"]
        found = trace.token_ids.tolist()
        assert found[: len(prompt)] == prompt
        assert len(found) - len(prompt) == 30 or found[-1] == loaded.tokenizer.eos_token_id
        logits, seen = by_hand(loaded, found)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == found[len(prompt) :]
        for layer, (_, _, ids) in seen.items():
            np.testing.assert_array_equal(trace.expert_ids[:, loaded.spec.row(layer)], ids.numpy())
        assert trace.correct == (trace.predicted == record.answer)


def test_nothing_stays_attached_and_nothing_changes(loaded, records):
    ids = torch.tensor([loaded.tokenizer(records[0].prompt)["input_ids"]])
    before = loaded.native(ids).logits
    list(capture(loaded, records[:3]))
    list(capture(loaded, records[:3], interventions=[exclude(2, [1]), silence(1, [0]), force(3, [4])]))
    assert not any(module._forward_hooks for module in loaded.native.modules())
    assert torch.equal(loaded.native(ids).logits, before)


@pytest.mark.parametrize(
    "change", [exclude(2, range(0, 32, 3)), force(2, [1, 30]), bias(2, range(0, 32, 2), 0.5), bias(2, range(9), -0.5)]
)
@pytest.mark.parametrize(
    "scope", [{}, {"segments": ("reasoning",)}, {"labels": ("add", "modus-ponens")}, {"positions": (3, 8)}]
)
def test_an_intervention_is_carried_out_as_the_rule_says(loaded, records, change, scope):
    made = {"exclude": exclude, "force": force}.get(change.kind)
    value = () if made else (change.value,)
    change = (made or bias)(2, change.experts, *value, **scope)
    plain = list(capture(loaded, records, keep=("experts", "logits")))
    edited = list(capture(loaded, records, keep=("experts", "logits"), interventions=[change]))
    row, bias_values = loaded.spec.row(2), loaded.gates()[2].expert_bias.numpy()
    touched = 0
    for before, after in zip(plain, edited, strict=True):
        names = [""] + [step.label for step in after.steps]
        ruled = route_with(
            [change], after.extras["logits"][:, row], bias_values, loaded.spec, layer=2,
            segments=[SEGMENTS[code] for code in after.segment], labels=[names[step + 1] for step in after.step],
        )  # fmt: skip
        np.testing.assert_array_equal(np.sort(after.expert_ids[:, row]), np.sort(ruled.ids))
        np.testing.assert_array_equal(after.expert_ids[:, :row], before.expert_ids[:, :row])
        touched += int((np.sort(after.expert_ids[:, row]) != np.sort(before.expert_ids[:, row])).sum())
    assert touched > 0


def test_silencing_keeps_the_choice_and_takes_away_the_output(loaded, records):
    everyone = silence(4, range(loaded.spec.n_experts))
    plain = list(capture(loaded, records))
    edited = list(capture(loaded, records, interventions=[everyone]))
    for before, after in zip(plain, edited, strict=True):
        np.testing.assert_array_equal(after.expert_ids, before.expert_ids)
        np.testing.assert_array_equal(after.weights, before.weights)
    losses = [np.nanmean(np.concatenate([trace.loss for trace in traces])) for traces in (plain, edited)]
    assert losses[1] > losses[0] + 0.01


def test_interventions_hold_while_generating(loaded, records):
    excluded = set(range(0, 32, 4))
    for trace in capture(loaded, records[:3], max_new_tokens=12, interventions=[exclude(1, excluded)]):
        assert not excluded & set(trace.expert_ids[:, 0].ravel().tolist())
    with pytest.raises(InterventionError, match="while generating it must act on all"):
        list(capture(loaded, records[:1], max_new_tokens=3, interventions=[exclude(1, [0], segments=("prompt",))]))


def test_what_cannot_be_captured_is_said(loaded, records):
    with pytest.raises(
        UsageError, match='cannot keep "everything"; these can be kept: experts, loss, logits, contribution, residual, lens'
    ):
        list(capture(loaded, records, keep=("everything",)))
    with pytest.raises(UsageError, match="record r has a prompt without tokens"):
        list(capture(loaded, [Record(id="r", prompt="")]))
    with pytest.raises(InterventionError, match="layer 0 of ling-tiny has no router"):
        list(capture(loaded, records, interventions=[exclude(0, [1])]))


def test_text_in_any_script_comes_back_whole(loaded):
    record = Record(id="r", prompt="日本 🙂 <b>é</b>\n", solution="naïve\u202e x\n")
    trace = next(capture(loaded, [record]))
    assert "".join(trace.tokens) == record.prompt + record.solution + "<|endoftext|>"
