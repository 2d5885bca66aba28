import json

import numpy as np
import pytest
from typer.testing import CliRunner

from ling_probe import laboratory
from ling_probe.benchmarks import Record
from ling_probe.capture import capture
from ling_probe.charts import moved_heatmap
from ling_probe.cli import app
from ling_probe.errors import InterventionError, UsageError
from ling_probe.interventions import bias, exclude
from ling_probe.laboratory import try_change

PROMPT = "evaluate (8+12)*2\n"
CHANGE = [exclude(layer=2, experts=[1, 2, 3, 5])]


@pytest.fixture(scope="module")
def outcome(small_ling):
    return try_change(small_ling, PROMPT, CHANGE, max_new_tokens=20)


def captured(loaded, **options):
    (trace,) = capture(loaded, [Record(id="prompt", prompt=PROMPT)], max_new_tokens=20, **options)
    return trace


def test_both_texts_are_those_of_generation(small_ling, outcome):
    assert outcome.before == captured(small_ling).completion
    assert outcome.after == captured(small_ling, interventions=CHANGE).completion
    assert outcome.before != outcome.after
    assert outcome.before[: outcome.shared] == outcome.after[: outcome.shared]
    assert outcome.before[outcome.shared :][:1] != outcome.after[outcome.shared :][:1]
    assert not any(gate._forward_hooks or gate.choice._forward_hooks for gate in small_ling.gates().values())
    assert not small_ling.native.model._forward_pre_hooks


def test_choices_are_those_of_the_old_text_read_twice(small_ling, outcome):
    trace, table = captured(small_ling), outcome.choices
    for row, layer in enumerate(small_ling.spec.routed_layers):
        mine = table[table["layer"] == layer]
        assert mine["experts"].tolist() == [tuple(ids) for ids in trace.expert_ids[:, row].tolist()]
        assert mine["token"].tolist() == list(trace.tokens)
        moved = [len(set(new) - set(old)) / 3 for old, new in zip(mine["experts"], mine["new_experts"], strict=True)]
        assert mine["moved"].tolist() == pytest.approx(moved)
    assert (table[table["layer"] == 1]["moved"] == 0).all()
    assert not {1, 2, 3, 5} & {expert for new in table[table["layer"] == 2]["new_experts"] for expert in new}
    written = slice((trace.segment == 0).sum() - 1, -1)
    assert outcome.loss_before == pytest.approx(trace.loss[written].mean(), rel=1e-5)
    assert outcome.loss_after == pytest.approx(table[table["layer"] == 1]["loss_after"].to_numpy()[written].mean(), rel=1e-5)
    assert outcome.loss_after != pytest.approx(outcome.loss_before, rel=1e-3)
    layers = outcome.layers.set_index("layer")
    assert layers["moved"][2] == pytest.approx(table[table["layer"] == 2]["moved"].mean())
    assert layers["touched"].tolist() == [0, pytest.approx((table[table["layer"] == 2]["moved"] > 0).mean())]


def test_a_change_that_moves_nothing_changes_nothing(small_ling):
    same = try_change(small_ling, PROMPT, [bias(layer=1, experts=[3], value=1e-12)], max_new_tokens=6)
    assert (same.before, same.loss_before, same.shared) == (same.after, same.loss_after, len(same.before))
    assert not same.choices["moved"].any()


def test_the_figure_shows_the_table(outcome):
    (heat,) = moved_heatmap(outcome.choices).data
    np.testing.assert_allclose(np.array(heat.z).ravel(), outcome.choices["moved"], rtol=1e-6)
    first = outcome.choices.iloc[0]
    assert " ".join(map(str, first["experts"])) in heat.customdata[0][0]


def test_what_cannot_be_tried_is_said(small_ling):
    for prompt, found in (
        ("", "a prompt of 0 tokens"),
        ("1+" * 2000, "a prompt of 4000 tokens cannot be tried; give 1 to 1024"),
    ):
        with pytest.raises(UsageError, match=found):
            try_change(small_ling, prompt, CHANGE)
    with pytest.raises(InterventionError, match="layer 7 of random has no router"):
        try_change(small_ling, PROMPT, [exclude(layer=7, experts=[1])])
    with pytest.raises(InterventionError, match="while generating it must act on all"):
        try_change(small_ling, PROMPT, [exclude(layer=1, experts=[1], segments=["prompt"])])


def test_it_stops_in_time_and_one_at_a_time(small_ling):
    with pytest.raises(UsageError, match="took longer than 0 seconds and was stopped; ask for fewer tokens"):
        try_change(small_ling, PROMPT, CHANGE, seconds=0)
    assert not small_ling.native.model._forward_pre_hooks
    with laboratory._BUSY, pytest.raises(UsageError, match="another text is being written; try again in a moment"):
        try_change(small_ling, PROMPT, CHANGE)
    assert try_change(small_ling, PROMPT, CHANGE, max_new_tokens=1).before


@pytest.fixture
def asked(small_ling, monkeypatch):
    monkeypatch.setattr("ling_probe.cli.changing.loaded_model", lambda *_args, **_options: small_ling)

    def ask(*words):
        done = CliRunner().invoke(app, ["try", "random", PROMPT, "--max-new-tokens", "20", *words])
        return str(done.exception) if isinstance(done.exception, UsageError) else done.stdout

    return ask


def test_the_command_tries_a_change(asked, outcome):
    words = [word for expert in (1, 2, 3, 5) for word in ("--exclude", f"2.{expert}")]
    text, *layers = (json.loads(line) for line in asked(*words, "--json").splitlines())
    assert (text["before"], text["after"], text["same"]) == (outcome.before, outcome.after, False)
    assert [row["moved"] for row in layers] == pytest.approx(outcome.layers["moved"].tolist())
    shown = asked(*words)
    assert "another text" in shown
    assert f"loss on the text before: {outcome.loss_before:.3g} nats a token" in shown
    assert "the same text" in asked("--bias", "1.3=1e-12")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), "name a change: --exclude, --silence, --force or --bias LAYER.EXPERT"),
        (("--exclude", "3"), '--exclude "3" names no expert; write LAYER.EXPERT, as in 3.5'),
        (("--exclude", "1.2=3"), '--exclude "1.2=3" names no expert'),
        (("--bias", "1.2"), '--bias "1.2" names no expert; write LAYER.EXPERT=VALUE, as in 3.5=0.1'),
        (("--force", "1.x"), '--force "1.x" names no expert'),
    ],
)
def test_a_change_that_is_none_is_said(asked, words, found):
    assert found in asked(*words)
