import json

import numpy as np
import pandas as pd
import pytest
from synthetic import synthetic_spec, synthetic_traces
from typer.testing import CliRunner

from ling_probe.cli import app
from ling_probe.errors import UsageError
from ling_probe.step_view import ANSWER, answer_attribution, attribution_by_layer, sequence_number, step_table

PREFERENCES = pd.DataFrame(
    {
        "layer": [1, 2, 3, 1, 1], "expert": [0, 5, 9, 3, 2], "label": "add", "log2_ratio": 1.0,
        "ci_low": [0.5, 0.9, 0.2, 0.7, -0.5], "ci_high": 1.5, "q": [0.01, 0.01, 0.01, 0.2, 0.01],
    }
)  # fmt: skip


@pytest.fixture
def run(make_run):
    return make_run(7, parts=3, keep=("lens", "logits"))


@pytest.fixture
def traces():
    return synthetic_traces(synthetic_spec(), 7, rng=np.random.default_rng(0), keep=("lens", "logits"))


@pytest.mark.parametrize("sequence", range(7))
def test_steps_are_those_of_the_trace(run, traces, sequence):
    trace, table = traces[sequence], step_table(run, sequence, PREFERENCES)
    assert table["label"].tolist() == [step.label for step in trace.steps]
    assert table["text"].tolist() == [step.text for step in trace.steps]
    assert table["correct"].tolist() == [step.correct for step in trace.steps]
    for row, step in zip(table.itertuples(), trace.steps, strict=True):
        assert row.tokens == step.stop - step.start
        assert row.loss == pytest.approx(trace.loss[step.start - 1 : step.stop - 1].mean(), rel=1e-5)


def test_named_experts_were_chosen_here_and_surely_prefer_the_label(run, traces):
    seen = 0
    for sequence, trace in enumerate(traces):
        for row, step in zip(step_table(run, sequence, PREFERENCES).itertuples(), trace.steps, strict=True):
            ids = trace.expert_ids[step.start : step.stop]
            times = {(1, 0): (ids[:, 0] == 0).sum(), (2, 5): (ids[:, 1] == 5).sum(), (3, 9): (ids[:, 2] == 9).sum()}
            expected = [(place, int(count)) for place, count in times.items() if count] if step.label == "add" else []
            expected.sort(key=lambda one: -{1: 0.5, 2: 0.9, 3: 0.2}[one[0][0]])
            assert [((each["layer"], each["expert"]), each["times"]) for each in row.experts] == expected
            seen += len(expected)
    assert seen > 3


def test_attribution_belongs_to_the_place_of_the_token_that_follows(run, traces):
    trace, table = traces[2], answer_attribution(run, 2)
    for layer in run.spec.routed_layers:
        lens = trace.extras["lens"][:, run.spec.row(layer)].astype(np.float16).astype(float)
        ids = trace.expert_ids[:, run.spec.row(layer)]
        rows = table[table["layer"] == layer].set_index("step")
        assert rows.index.tolist() == [*(step.step for step in trace.steps), ANSWER]
        for step in trace.steps:
            here = slice(step.start - 1, step.stop - 1)
            assert rows.loc[step.step, "logit"] == pytest.approx(lens[here].sum() / (step.stop - step.start))
        answer = np.flatnonzero(trace.segment == 2) - 1
        by_expert = np.bincount(ids[answer].ravel(), weights=lens[answer].ravel()) / len(answer)
        assert rows.loc[ANSWER, "expert"] == by_expert.argmax()
        assert rows.loc[ANSWER, "expert_logit"] == pytest.approx(by_expert.max())
    wide = attribution_by_layer(table)
    assert wide.columns.tolist() == ["layer", *(f"step {step.step}" for step in trace.steps), "answer"]


def test_a_sequence_is_named_by_its_id_or_its_number(run, traces):
    assert sequence_number(run, traces[4].sequence_id) == 4
    assert sequence_number(run, "4") == 4
    with pytest.raises(UsageError, match='has no sequence "99"; it holds 7, such as arithmetic-0000'):
        sequence_number(run, "99")


def test_a_run_without_attributions_says_how_to_get_them(make_run):
    with pytest.raises(UsageError, match="capture with --keep lens"):
        answer_attribution(make_run(3), 0)


def test_the_command_tells_steps_attribution_and_answer(make_run):
    run = make_run(9, keep=("lens",))
    done = CliRunner().invoke(app, ["trace", str(run.folder), "1", "--json"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["table"] for row in rows} == {"steps", "attribution"}
    steps = [row for row in rows if row["table"] == "steps"]
    assert [row["text"] for row in steps] == run.steps.query("sequence == 1")["text"].tolist()
    plain = make_run(9)
    told = CliRunner().invoke(app, ["trace", str(plain.folder), "1"])
    assert told.exit_code == 0
    assert "no attribution: this run did not keep" in told.output
    assert f"expected {plain.sequences['answer'][1]}" in told.output
