"""One problem in the states of its run, and states in right and wrong solutions, against plain re-computations."""

import numpy as np
import pytest
from synthetic import synthetic_run

from ling_probe import charts, routing
from ling_probe.analysis.boundary_prediction import DISTANCE, routing_distance
from ling_probe.state_view import ENTROPY, LOSS, MARGIN, problem_states, state_summary, state_tables
from ling_probe.token_view import visible_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("view") / "run", 60, parts=3, keep=("logits",))


@pytest.fixture(scope="module")
def tables(run):
    return state_tables(run, states=4)


def tokens_of(run, sequence):
    """Batch rows of one completion."""
    for batch in run.batches(columns=["loss", "logits", "token"]):
        here = batch.sequence == sequence
        if here.any():
            return batch, here, here & np.isin(batch.segment, [1, 2])
    raise AssertionError


def test_a_problem_is_read_alone_as_it_is_in_the_run(run, tables):
    for sequence in (0, 33, 59):
        shown, (batch, here, told) = problem_states(run, sequence, tables), tokens_of(run, sequence)
        np.testing.assert_array_equal(shown.tokens["position"], batch.position[told])
        texts = [visible_text(text) for text in batch.extra["token"][told]]
        assert shown.tokens["text"].tolist() == texts
        np.testing.assert_array_equal(shown.tokens["state"], tables.fitted.states.decode(batch.expert_ids[told]))
        own = np.concatenate([[np.nan], batch.extra["loss"][here][:-1]])[told[here]]
        np.testing.assert_allclose(shown.tokens[LOSS], own)
        scores = routing.scores(batch.extra["logits"][told].astype(float))
        share = scores / scores.sum(axis=-1, keepdims=True)
        entropy = -(share * np.log(share)).sum(axis=-1).mean(axis=1) / np.log(16)
        np.testing.assert_allclose(shown.tokens[ENTROPY], entropy, rtol=1e-5)
        assert shown.tokens[MARGIN].between(0, 1).all()
        steps = run.steps.query("sequence == @sequence")
        np.testing.assert_array_equal(shown.steps[["start", "stop"]], steps[["start", "stop"]])


def test_boundaries_of_a_problem_are_its_own_and_the_peaks(run, tables):
    sequence = 5
    shown, (batch, _, told) = problem_states(run, sequence, tables), tokens_of(run, sequence)
    starts = run.steps.query("sequence == @sequence")["start"].to_numpy()[1:]
    by = {name: rows["position"].to_numpy() for name, rows in shown.boundaries.groupby("found")}
    np.testing.assert_array_equal(by["annotated"], starts)
    inside = told & (batch.step >= 0)
    distance = routing_distance(tables.fitted.states.space.place(batch.expert_ids[inside]), [int(inside.sum())])
    peaks = batch.position[inside][distance >= tables.thresholds[DISTANCE]]
    np.testing.assert_array_equal(by.get("by routing", np.zeros(0)), peaks)


def test_shares_in_right_and_wrong_solutions_are_weighted_by_family(run, tables):
    sample, path = tables.fitted.halves.sample, tables.fitted.path
    shares = {row: np.bincount(path[sample.sequence == row], minlength=4) / (sample.sequence == row).sum()
              for row in np.unique(sample.sequence[~tables.fitted.halves.first])}  # fmt: skip
    about = run.sequences.iloc[list(shares)].assign(row=list(shares))
    both = [family for family, rows in about.groupby("family") if rows["correct"].nunique() == 2]
    about = about[about["family"].isin(both)]
    wrong = about[~about["correct"].astype(bool)]
    expected = np.mean([shares[row] for row in wrong["row"]], axis=0)
    table = tables.answers.set_index(["answer", "state"])["share"]
    np.testing.assert_allclose(table["wrong"], expected)
    right = np.zeros(4)
    for family, rows in wrong.groupby("family"):
        mine = about[about["correct"].astype(bool) & (about["family"] == family)]["row"]
        right += len(rows) / len(wrong) * np.mean([shares[row] for row in mine], axis=0)
    np.testing.assert_allclose(table["right"], right)
    assert (tables.answers["ci_low"] <= tables.answers["share"]).all()


def test_the_summary_names_what_states_have_more_of(tables):
    summary = state_summary(tables.profiles)
    assert summary["share"].sum() == pytest.approx(1)
    for row in summary.itertuples():
        mine = tables.profiles[(tables.profiles["state"] == row.state) & (tables.profiles["log2_ratio"] > 0)]
        assert set(row.labels) <= set(mine.loc[mine["kind"] == "label", "name"])


def test_figures_of_a_problem_hold_its_numbers(run, tables):
    shown = problem_states(run, 5, tables)
    figure = charts.timeline(shown.tokens, shown.steps, shown.boundaries, shown.lines)
    lines = [trace for trace in figure.data if trace.type == "scatter" and trace.mode == "lines"]
    for name, line in zip(shown.lines, lines, strict=True):
        np.testing.assert_allclose(line.y, shown.tokens[name], rtol=1e-6)
    assert len(charts.share_bars(tables.answers).data) == 2


def test_a_run_without_logits_has_the_loss_alone(make_run):
    run = make_run(14, finish=False)
    shown = problem_states(run, 3, state_tables(run, states=2))
    assert shown.lines == (LOSS,)


def test_a_run_without_steps_has_states_and_no_boundaries(make_run):
    run = make_run(14, n_steps=(0, 0))
    tables = state_tables(run, states=2)
    shown = problem_states(run, 3, tables)
    assert tables.thresholds == {}
    assert shown.steps.empty
    assert shown.boundaries.empty
    assert charts.timeline(shown.tokens, shown.steps, shown.boundaries, shown.lines).data
