import json
from dataclasses import replace
from functools import partial
from unittest.mock import ANY

import numpy as np
import pandas as pd
import pytest
from synthetic import LABELS, Planted, synthetic_run, synthetic_spec
from typer.testing import CliRunner

from ling_probe.analysis import ANALYSES, Verdict, causal_effects
from ling_probe.analysis.causal_effects import deciding
from ling_probe.benchmarks import read_benchmark
from ling_probe.capture import capture
from ling_probe.causal import (
    CONDITIONS,
    EFFECTS,
    Solutions,
    Study,
    Target,
    doses,
    intervene,
    matched_experts,
    preferred_experts,
    study,
)
from ling_probe.causal.effects import Parts, Rises, effect_rows
from ling_probe.causal.measure import ANSWER
from ling_probe.causal.transplant import UNTOUCHED, Choices, draw_donors
from ling_probe.causal.written import spread, write, written_rows
from ling_probe.charts import FIGURES
from ling_probe.cli import app
from ling_probe.errors import InterventionError, RunError, UsageError
from ling_probe.interventions import silence
from ling_probe.run import Run
from ling_probe.stats import paired_interval, rank_p

LOAD = {1: np.arange(16) ** 2, 2: np.arange(16) ** 2}
TARGET = Target(label="add", kind="silence", experts=((1, 3), (2, 5)))


@pytest.fixture(scope="module")
def loaded(small_ling):
    return small_ling


@pytest.fixture(scope="module")
def records():
    return [each for each in read_benchmark("stepbench", split="test").records if each.family == "arithmetic"][:12]


@pytest.fixture(scope="module")
def solutions(loaded, records):
    return Solutions(loaded, records, batch_tokens=500)


def test_losses_of_steps_and_answers_are_those_that_capture_records(loaded, records, solutions):
    traces = list(capture(loaded, records))
    assert [record.id for record in solutions.records] == [trace.sequence_id for trace in traces]
    for place, trace in enumerate(traces):
        mine = solutions.problem == place
        own = np.concatenate([[np.nan], trace.loss[:-1]])
        steps = [own[trace.step == step.step].sum() for step in trace.steps]
        assert solutions.labels[mine].tolist() == [*(step.label for step in trace.steps), ANSWER]
        assert solutions.unchanged.loss[mine] == pytest.approx([*steps, own[trace.segment == 2].sum()], rel=1e-4)
    assert (solutions.unchanged.right <= solutions.tokens).all()


def test_interventions_are_those_of_capture(loaded, records, solutions):
    change = [silence(1, [3]), silence(2, [5])]
    lost = sum(np.nansum(trace.loss[trace.step >= 0]) for trace in capture(loaded, records, interventions=change))
    before = sum(np.nansum(trace.loss[trace.step >= 0]) for trace in capture(loaded, records))
    found = solutions.under(TARGET.interventions())
    assert found.loss.sum() != pytest.approx(solutions.unchanged.loss.sum(), rel=1e-5)
    # Units begin one token earlier than positions inside steps; both see the same change within a few tokens.
    assert np.sign(found.loss.sum() - solutions.unchanged.loss.sum()) == np.sign(lost - before)
    assert not any(gate.expert_ids._forward_hooks or gate._forward_hooks for gate in loaded.gates().values())


def test_rises_are_sums_over_the_problems_with_such_steps(solutions):
    parts, found = Parts(solutions, solutions.labels == "multiply"), solutions.under(TARGET.interventions())
    rise = found.loss - solutions.unchanged.loss
    here = [place for place in range(len(solutions.records)) if "multiply" in solutions.labels[solutions.problem == place]]
    assert 0 < len(here) == parts.n_problems < len(solutions.records)
    rises = parts.rises(found)
    for row, place in enumerate(here):
        mine, own = solutions.problem == place, solutions.labels == "multiply"
        answer = solutions.labels == ANSWER
        assert rises.loss["own"][row] == pytest.approx(rise[mine & own].sum())
        assert rises.loss["other"][row] == pytest.approx(rise[mine & ~own & ~answer].sum())
        assert rises.loss["answer"][row] == pytest.approx(rise[mine & answer].sum())


def fake_parts(n):
    parts = object.__new__(Parts)
    parts.problems, parts.members = np.arange(n), dict.fromkeys(("own", "other", "answer"))
    parts.tokens = {"own": np.full(n, 10.0), "other": np.full(n, 20.0), "answer": np.full(n, 5.0)}
    parts.units = {name: np.full(n, 2.0) for name in parts.tokens}
    return parts


def fake_rises(own, rng, n=40):
    loss = {"own": own + rng.normal(0, 1, n), "other": rng.normal(0, 1, n), "answer": rng.normal(0, 1, n)}
    return Rises(loss, {name: np.zeros(n) for name in loss})


def rows_by_measure(target, controls):
    return {row["measure"]: row for row in effect_rows(fake_parts(40), target, controls, draws=500, seed=1)}


def test_an_effect_beyond_matched_experts_is_found_and_its_absence_too():
    rng = np.random.default_rng(0)
    controls = [fake_rises(5, rng) for _ in range(99)]
    found, none = (rows_by_measure(fake_rises(own, rng), controls) for own in (15, 5))
    assert found["own"]["excess"] == pytest.approx(1.0, abs=0.1)
    assert found["own"]["excess_low"] < 1.0 < found["own"]["excess_high"]
    assert found["own"]["p"] == 0.01
    assert found["selectivity"]["p"] == 0.01
    assert none["own"]["p"] > 0.05
    assert none["own"]["excess_low"] < 0 < none["own"]["excess_high"]
    assert none["own"]["ci_low"] > 0


def test_p_is_uniform_where_the_changed_experts_are_like_any_other():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(200):
        everyone = [fake_rises(rng.normal(5, 2), rng, n=10) for _ in range(20)]
        rows = effect_rows(fake_parts(10), everyone[0], everyone[1:], draws=2, seed=0)
        found.append(next(row["p"] for row in rows if row["measure"] == "own"))
    assert 3 <= sum(p <= 0.05 for p in found) <= 19
    assert np.mean(found) == pytest.approx(0.525, abs=0.07)


def test_matched_experts_are_others_of_the_layer_with_like_load():
    rng = np.random.default_rng(0)
    drawn = [matched_experts(((1, 15), (2, 0)), LOAD, rng=rng, spared=[(1, 14)]) for _ in range(200)]
    first, second = ({cells[place] for cells in drawn} for place in range(2))
    assert first == {(1, expert) for expert in range(6, 14)}
    assert second == {(2, expert) for expert in range(1, 9)}
    with pytest.raises(UsageError, match="layer 1 has no expert left"):
        matched_experts(((1, 0), (1, 1)), {1: np.ones(2)}, rng=rng)


def test_preferred_experts_are_the_surest_first():
    table = pd.DataFrame(
        {
            "layer": [1, 1, 2, 2], "expert": [0, 1, 2, 3], "label": "add", "ci_low": [0.2, 0.9, 0.5, -0.3],
            "q": [0.01, 0.01, 0.2, 0.01],
        }
    )  # fmt: skip
    assert preferred_experts(table, "add", 5) == ((1, 1), (1, 0))
    assert preferred_experts(table, "add", 1) == ((1, 1),)
    with pytest.raises(UsageError, match='no label "dance" in this run; these there are: add'):
        preferred_experts(table, "dance", 1)
    with pytest.raises(UsageError, match="no expert of this run surely prefers"):
        preferred_experts(table.assign(q=1.0), "add", 1)


def test_doses():
    found = list(doses("add", ((1, 1), (1, 0), (2, 4)), ["exclude", "bias"], [1, 2, 9], [0.1, -0.1]))
    asked = [("exclude", 1), ("exclude", 2), ("exclude", 3), ("bias", 0.1), ("bias", -0.1)]
    assert [(target.kind, target.dose) for target in found] == asked
    assert [(each.layer, each.experts) for each in found[2].interventions()] == [(1, (0, 1)), (2, (4,))]


@pytest.fixture(scope="module")
def choices(solutions):
    return Choices(solutions)


def test_a_token_given_its_own_experts_changes_nothing(solutions, choices):
    again = choices.with_donors(np.arange(len(choices.token)))
    assert (again.loss == solutions.unchanged.loss).all()
    moved = choices.with_donors(np.roll(np.arange(len(choices.token)), 7))
    assert moved.loss.sum() != pytest.approx(solutions.unchanged.loss.sum(), rel=1e-4)


def test_donors_are_the_same_tokens_of_other_problems(solutions, choices):
    same, other = draw_donors(choices, solutions, "add", rng=np.random.default_rng(0))
    touched = np.flatnonzero(same >= 0)
    assert len(touched) > 20
    assert (np.flatnonzero(other >= 0) == touched).all()
    for donors, own in ((same, True), (other, False)):
        rows = donors[touched]
        assert (choices.token[rows] == choices.token[touched]).all()
        assert (solutions.problem[choices.unit[rows]] != solutions.problem[choices.unit[touched]]).all()
        assert ((solutions.labels[choices.unit[rows]] == "add") == own).all()
        assert (solutions.labels[choices.unit[rows]] != ANSWER).all()
    assert (solutions.labels[choices.unit[touched]] == "add").all()
    assert (same == draw_donors(choices, solutions, "add", rng=np.random.default_rng(0))[0]).all()
    assert UNTOUCHED in same


def test_a_study_is_gone_on_with_and_gives_the_same_table(loaded, records, tmp_path, monkeypatch):
    plan = Study(targets=(TARGET,), transplants=("add",), draws=3, seed=5)
    whole = intervene(loaded, records, plan, LOAD, tmp_path / "whole")
    assert set(whole["measure"]) == {"own", "other", "selectivity", "answer"}
    assert set(whole["kind"]) == {"silence", "route_as"}
    lines = (tmp_path / "whole" / CONDITIONS).read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4 + 10
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / CONDITIONS).write_text("".join(lines[:7]) + lines[7][:30])
    passes = []
    scores = study.Solutions.scores
    monkeypatch.setattr(study.Solutions, "scores", lambda self, change: passes.append(1) or scores(self, change))
    again = intervene(loaded, records, plan, LOAD, tmp_path / "cut")
    pd.testing.assert_frame_equal(again, whole)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "cut" / EFFECTS), whole)
    # Nine of fourteen conditions, once the unchanged router, and the choices to move.
    assert len(passes) == 8 + 1 + 1
    assert json.loads(lines[0])["seed"] == 5


def test_another_study_in_the_folder_is_refused(loaded, records, tmp_path):
    plan = Study(targets=(TARGET,), draws=2)
    intervene(loaded, records, plan, LOAD, tmp_path)
    with pytest.raises(RunError, match="holds a study with another records"):
        intervene(loaded, records[:6], plan, LOAD, tmp_path)
    with pytest.raises(UsageError, match="nothing to change"):
        intervene(loaded, records, Study(targets=()), LOAD, tmp_path / "other")
    with pytest.raises(UsageError, match='no problem has a "dance" step; these labels there are: add, compare'):
        intervene(loaded, records, Study(targets=(), transplants=("dance",)), LOAD, tmp_path)
    with pytest.raises(InterventionError, match="layer 0 of random has no router"):
        Solutions(loaded, records).under([silence(0, [1])])


def test_records_without_steps_are_refused(loaded):
    with pytest.raises(UsageError, match="no record has a solution with reasoning steps"):
        Solutions(loaded, [])


def written(solved, judged=None, right=None, own=None):
    n = len(solved)
    judged = np.full(n, 2.0) if judged is None else np.array(judged, float)
    right = judged if right is None else np.array(right, float)
    own = np.ones(n) if own is None else own
    return {"problems": np.ones(n), "solved": np.array(solved, float), "judged": judged, "right": right,
            "steps": judged, "own": own}  # fmt: skip


def test_shares_of_what_the_model_writes_itself():
    before, target = written([1, 1, 1, 1, 0, 0]), written([0, 0, 0, 1, 1, 0], judged=[4] * 6, right=[3] * 6)
    controls = [before, written([1, 1, 0, 1, 0, 0])]
    rows = written_rows(before, target, controls, partial(rank_p, side=-1), draws=400, seed=2)
    solved, steps = rows
    assert (solved["measure"], steps["measure"]) == ("solved", "steps_right")
    assert solved["effect"] == pytest.approx(-2 / 6)
    assert solved["control"] == pytest.approx(-1 / 12)
    assert (solved["ci_low"], solved["ci_high"]) == paired_interval(3, 1, 6)
    assert solved["excess_high"] - solved["excess_low"] >= solved["ci_high"] - solved["ci_low"]
    assert solved["p_unchanged"] == pytest.approx(2 * (1 + 4) / 2**4)
    assert solved["p"] == pytest.approx(1 / 3)
    assert (steps["effect"], steps["control"]) == (pytest.approx(-0.25), 0)
    assert np.isnan(steps["p_unchanged"])


def test_intervals_of_paired_outcomes_hold_the_truth():
    rng = np.random.default_rng(0)
    for n, odds in ((20, (0.02, 0.02)), (60, (0.1, 0.05)), (60, (0.0, 0.2))):
        counts = rng.multinomial(n, [*odds, 1 - sum(odds)], size=600)
        bounds = np.array([paired_interval(int(lost), int(gained), n) for lost, gained, _ in counts])
        truth = odds[1] - odds[0]
        assert ((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).mean() > 0.92


def test_ranks_of_exchangeable_values_are_uniform():
    rng = np.random.default_rng(0)
    for side in (-1, 0, 1):
        found = [rank_p(values[0], values[1:], side=side) for values in rng.normal(size=(2000, 20))]
        assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.015)
        assert np.mean(found) == pytest.approx(0.525, abs=0.02)


def test_answers_are_those_that_generation_under_the_change_gives(loaded, records):
    change = TARGET.interventions()
    asked = {"max_new_tokens": 12, "keep": ("experts",)}
    traces = list(capture(loaded, records[:4], interventions=change, **asked))
    found = write(loaded, records[:4], change, label="add", max_new_tokens=12)["written"]
    assert found["steps"].tolist() == [len(trace.steps) for trace in traces]
    assert found["solved"].tolist() == [float(bool(trace.correct)) for trace in traces]
    assert [trace.completion for trace in traces] != [trace.completion for trace in capture(loaded, records[:4], **asked)]


def test_problems_to_write_come_from_all_of_the_list(records):
    bare = replace(records[0], answer="")
    assert [each.id for each in spread([bare, *records], 3)] == [records[place].id for place in (0, 6, 11)]
    assert len(spread(records, 99)) == len(records)
    assert spread([bare], 3) == []


def test_a_study_that_also_writes_keeps_and_goes_on(loaded, records, tmp_path):
    plan = Study(targets=(TARGET,), draws=3, written=2, written_draws=2, max_new_tokens=6)
    told = []
    whole = intervene(loaded, records, plan, LOAD, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (4 + 4, 4 + 4)
    assert whole["measure"].tolist() == ["own", "other", "selectivity", "answer", "solved", "steps_right"]
    assert whole["draws"].tolist() == [3, 3, 3, 3, 2, 2]
    assert whole["problems"].tolist()[-1] == 2
    pd.testing.assert_frame_equal(intervene(loaded, records, plan, LOAD, tmp_path), whole)
    assert len((tmp_path / CONDITIONS).read_text().splitlines()) == 1 + 8


RUNNER = CliRunner()


def asked(*words):
    done = RUNNER.invoke(app, list(map(str, words)), catch_exceptions=True)
    if done.exception and not isinstance(done.exception, SystemExit):
        return type(done.exception), str(done.exception)
    return done.exit_code, done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the labels that the records have, in which some experts surely prefer multiplications."""
    folder = tmp_path_factory.mktemp("causal") / "run"
    spec = synthetic_spec(n_layers=5, routed_layers=(1, 2, 3, 4), n_experts=32)
    planted = (Planted(2, 5, "multiply"), Planted(3, 9, "multiply"))
    return synthetic_run(folder, 60, spec=spec, planted=planted, labels={"arithmetic": LABELS["arithmetic"]})


def test_the_command_picks_experts_in_a_run_and_the_run_then_answers(run):
    with pytest.raises(UsageError, match="no causal study in this run"):
        causal_effects(run)
    words = ("intervene", "ling-tiny", "stepbench", "--run", run.folder, "--limit", 9, "--label", "multiply",
             "--dose", 1, "--dose", 2, "--draws", 3, "--generate", 2, "--generate-draws", 1, "--max-new-tokens", 40,
             "--json")  # fmt: skip
    code, text = asked(*words)
    assert code == 0, text
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["label"] for row in rows} == {"multiply"}
    assert {row["draws"] for row in rows} == {3, 1, 5}
    assert {row["experts"] for row in rows if row["kind"] == "exclude"} <= {"2.5", "3.9", "2.5 3.9", "3.9 2.5"}
    assert [row["problems"] for row in rows if row["measure"] in ("solved", "steps_right")] == [2] * 4
    table = causal_effects(Run.open(run.folder))
    assert table["effect"].tolist() == pytest.approx([row["effect"] for row in rows], rel=1e-3, abs=1e-9)
    found = ANALYSES["causal_effects"].finding(table)
    assert found.verdict in (Verdict.CANNOT_TELL, Verdict.NOT_SUPPORTED)
    assert "By dose, 1: " in found.sentence or "giving multiply steps" in found.sentence
    assert deciding(table)["measure"].tolist() == ["selectivity", "selectivity", "own"]
    losses, answers, curves = FIGURES["causal_effects"](table, run.spec)
    assert losses.data[0].x.tolist() == table[table["measure"] == "own"]["effect"].tolist()
    assert answers.data[0].x.tolist() == table[table["measure"] == "solved"]["effect"].tolist()
    matched, preferred = (trace for trace in curves.data if trace.mode == "lines+markers")
    selective = table[(table["measure"] == "selectivity") & (table["kind"] == "exclude")]
    assert (preferred.y.tolist(), matched.y.tolist()) == (selective["effect"].tolist(), selective["control"].tolist())
    assert list(preferred.x) == ["1", "2"]
    assert asked(*words, "--seed", 4) == (RunError, ANY)
    assert asked(*words, "--kind", "bias") == (UsageError, "bias needs a value and only bias has one: --kind bias --value 0.1")


def test_the_finding_tells_a_sure_effect_from_none():
    table = pd.DataFrame(
        {
            "label": "add", "kind": ["exclude", "exclude", "route_as"], "dose": 1.0, "measure": ["own", "selectivity", "own"],
            "excess": [0.5, 0.2, 0.0], "excess_low": [0.4, 0.1, -0.01], "excess_high": [0.6, 0.3, 0.01], "q": [0.01, 0.02, 0.6],
        }
    )  # fmt: skip
    found = ANALYSES["causal_effects"].finding(table)
    assert (found.verdict, found.rung, found.effect) == (Verdict.SUPPORTED, 5, 0.2)
    assert found.sentence.startswith("1 of 2 changes harm their own steps")
    written = {"measure": "solved", "effect": -0.1, "ci_low": -0.2, "ci_high": 0.0, "control": 0.01, "p_unchanged": 0.03,
               "problems": 50, "draws": 9}  # fmt: skip
    more = pd.concat([table, table[1:2].assign(**written), table[1:2].assign(dose=2.0, excess=0.3, excess_low=0.0)])
    sentence = ANALYSES["causal_effects"].finding(more).sentence
    assert "By dose, 1: 0.200, 2: 0.300." in sentence
    assert (
        "(50 problems), the share of right answers changes by -10.0 points (95 % interval -20.0 to 0.0; exact p 0.03)"
        in sentence
    )
    assert "under 9 matched changes by 1.0." in sentence
    none = ANALYSES["causal_effects"].finding(table.assign(q=0.6, excess_low=-0.01, excess_high=0.02))
    assert (none.verdict, none.rung) == (Verdict.NOT_SUPPORTED, 1)
