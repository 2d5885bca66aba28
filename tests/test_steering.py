import json

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import LABELS, Effects, Planted, synthetic_run, synthetic_spec, synthetic_traces
from typer.testing import CliRunner

from ling_probe.analysis import ANALYSES, Verdict, steering_effects
from ling_probe.analysis.classified import PLACES
from ling_probe.benchmarks import read_benchmark
from ling_probe.capture import capture
from ling_probe.causal import CONDITIONS, Solutions
from ling_probe.causal.written import written_rows
from ling_probe.charts import FIGURES
from ling_probe.cli import app
from ling_probe.errors import RunError, UsageError
from ling_probe.run import Run
from ling_probe.stats import benjamini_hochberg, rank_p
from ling_probe.steering import SteeringVector, Trial, held_out, run_vector, steer, steering_vector, vector_folder
from ling_probe.steering.contrast import _differences
from ling_probe.steering.trial import STRENGTHS

TINY = synthetic_spec(n_layers=5, routed_layers=(1, 2, 3, 4), n_experts=32)
PLANTED = (Planted(2, 5, "multiply"), Planted(1, 3, "causal"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("steering") / "run", 60, planted=PLANTED)


@pytest.fixture(scope="module")
def records():
    return [each for each in read_benchmark("stepbench", split="test").records if each.family == "arithmetic"][:8]


def slow_differences(traces, toward, away, row):
    """Of steps: sums over token ids inside a family and third of the solution, one token after the other."""
    counts = {}
    for trace in traces:
        for step in trace.steps:
            if step.label not in (toward, away):
                continue
            stratum = (trace.family, PLACES * step.step // len(trace.steps))
            for position in np.flatnonzero((trace.step == step.step) & (trace.segment == 1)):
                cell = counts.setdefault((stratum, int(trace.token_ids[position])), np.zeros((2, 17)))
                cell[int(step.label == away), -1] += 1
                cell[int(step.label == away), trace.expert_ids[position, row]] += 1
    total, sums = 0.0, np.zeros(16)
    for cell in counts.values():
        n, m = cell[:, -1]
        if n and m:
            total += n * m / (n + m)
            sums += n * m / (n + m) * (cell[0, :16] / n - cell[1, :16] / m)
    return sums / total


def test_the_vector_compares_the_same_tokens(run):
    vector = steering_vector(run, "multiply", away="add")
    traces = synthetic_traces(run.spec, 60, rng=np.random.default_rng(0), planted=PLANTED)
    for row, layer in enumerate(run.spec.routed_layers):
        expected = slow_differences(traces, "multiply", "add", row)
        np.testing.assert_allclose(vector.differences[layer], expected, atol=1e-12)
    assert (vector.toward, vector.away, vector.about) == ("multiply", "add", "label")


def test_information_is_the_ratio_of_the_same_shares(run):
    risk, bits = (steering_vector(run, "multiply", measure=name) for name in ("risk-difference", "information"))
    assert (risk.measure, bits.measure) == ("risk-difference", "information")
    for layer in run.spec.routed_layers:
        ours, theirs = np.array(bits.differences[layer]), np.array(risk.differences[layer])
        assert (np.sign(ours) == np.sign(theirs)).all()
        assert len(np.unique(np.round(ours / theirs, 3))) > 1, "not one times the other"
    back = steering_vector(run, "multiply", away="add", measure="information").differences[2]
    forth = steering_vector(run, "add", away="multiply", measure="information").differences[2]
    np.testing.assert_allclose(back, np.negative(forth), atol=1e-12)
    assert vector_folder(run.folder, bits).name == "multiply-from-others-information"


def test_a_rare_expert_is_worth_no_bits():
    sums = np.zeros((1, 2, 1, 3))
    sums[0, :, 0] = [[2.0, 30.0, 60.0], [0.0, 30.0, 30.0]]
    (bits,) = _differences(sums, np.full((1, 1, 1, 1), 100.0), "information", even=1 / 3)
    np.testing.assert_allclose(bits[0], np.log2([(2 + 20 / 3) / (20 / 3), 1, (60 + 20 / 3) / (30 + 20 / 3)]))


@pytest.mark.parametrize("measure", ["risk-difference", "information"])
@pytest.mark.parametrize(("toward", "layer", "expert"), [("multiply", 2, 5), ("causal", 1, 3)])
def test_a_planted_expert_has_the_largest_value(run, toward, layer, expert, measure):
    values = steering_vector(run, toward, measure=measure).values
    assert values[layer][expert] == 1
    assert max(np.abs(row).max() for row in values.values()) == 1
    assert all(np.abs(values[other]).max() < 0.6 for other in values if other != layer)


def test_two_halves_agree_on_what_is_there_and_not_on_noise(make_run):
    planted = tuple(Planted(layer, expert, "multiply", boost=4.0) for layer in (1, 2, 3) for expert in (1, 6, 11))
    assert steering_vector(make_run(90, planted=planted), "multiply").reliability > 0.8
    found = [steering_vector(make_run(30, seed=seed), "multiply").reliability for seed in range(8)]
    assert abs(np.mean(found)) < 0.2


def test_right_answers_and_two_runs(run, make_run):
    assert steering_vector(run, "right").about == "answer"
    assert steering_vector(run, "right").differences[1] == pytest.approx(
        [-each for each in steering_vector(run, "wrong").differences[1]]
    )
    one, other = make_run(40, planted=Planted(3, 7, "causal", boost=4.0)), make_run(40)
    vector = run_vector(one, other)
    assert vector.values[3][7] == 1
    assert (vector.toward, vector.away, vector.about) == (one.folder.name, other.folder.name, "run")


def test_what_cannot_be_contrasted_is_said(run, make_run):
    with pytest.raises(UsageError, match='has no "dance" to steer to; it has labels abduce, add'):
        steering_vector(run, "dance")
    with pytest.raises(UsageError, match='no label "causal" in this run; these there are: abduce'):
        steering_vector(run, "add", away="causal")
    with pytest.raises(UsageError, match='"add" cannot be steered away from itself'):
        steering_vector(run, "add", away="add")
    alone = make_run(12, effects=Effects(confounded=True), labels={"a": ("add",), "b": ("take",)})
    with pytest.raises(UsageError, match="add and take share no tokens in this run"):
        steering_vector(alone, "add", away="take")
    manifest = dict(alone.manifest.model) | {"digest": "other"}
    other = Run.create(alone.folder.parent / "other", spec=alone.spec, model=manifest, benchmark={}, options={})
    with pytest.raises(UsageError, match="are of two models"):
        run_vector(alone, other)


def made(rows, load=None):
    values = {layer: tuple(map(float, row)) for layer, row in rows.items()}
    load = load or {layer: tuple(range(len(row))) for layer, row in rows.items()}
    return SteeringVector(
        toward="add", away="others", about="label", model="random", digest="digest", tokens=(10.0, 20.0), reliability=0.5,
        differences=values, load=load,
    )  # fmt: skip


def random_vector(seed=0, **changes):
    rng = np.random.default_rng(seed)
    return made({layer: rng.normal(0, 0.05, 16).tolist() for layer in (1, 2)}, **changes)


def test_a_strength_is_what_the_largest_value_adds():
    vector = made({1: [0.0, 0.02, -0.04], 2: [0.01, 0.0, 0.0]})
    found = {(each.layer, *each.experts): each.value for each in vector.interventions(0.1)}
    assert found == {(1, 1): pytest.approx(0.05), (1, 2): -0.1, (2, 0): pytest.approx(0.025)}
    assert {each.kind for each in vector.interventions(0.1)} == {"bias"}
    assert vector.strongest(1).differences == {1: (0.0, 0.0, -0.04), 2: (0.0, 0.0, 0.0)}
    assert vector.strongest(99) == vector
    assert made({1: [0.0, 0.0]}).interventions(0.1) == ()


def test_values_are_shuffled_among_experts_of_like_load():
    load = {layer: tuple(np.random.default_rng(layer).permutation(16).tolist()) for layer in (1, 2)}
    vector, rng = random_vector(load=load), np.random.default_rng(0)
    for layer in (1, 2):
        lighter = np.array(load[layer]) < 8
        homes = np.zeros((16, 16))
        for _ in range(300):
            new = np.array(vector.shuffled(rng).differences[layer])
            homes += new[:, None] == np.array(vector.differences[layer])
        assert (homes[np.ix_(lighter, ~lighter)] == 0).all()
        assert (homes[np.ix_(lighter, lighter)] > 10).all()
        assert (homes.sum(axis=0) == 300).all()


def test_a_vector_is_read_as_written(tmp_path):
    vector = random_vector()
    vector.save(tmp_path / "v" / "vector.json")
    assert SteeringVector.read(tmp_path / "v" / "vector.json") == vector
    told = json.loads((tmp_path / "v" / "vector.json").read_text())
    for broken, found in (
        ("{", "is no steering vector"),
        ("[1]", "is no steering vector"),
        (json.dumps(told | {"schema": 2}), "of another version"),
        (json.dumps({"schema": 1}), "is no steering vector"),
        (json.dumps(told | {"differences": {"1": [float("nan")]}}), "are no numbers"),
        (json.dumps(told | {"model_": 1}), "is no steering vector"),
    ):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(UsageError, match=found):
            SteeringVector.read(tmp_path / "broken.json")
    with pytest.raises(UsageError, match="cannot be read"):
        SteeringVector.read(tmp_path / "none.json")


def test_names_never_act_as_paths(tmp_path):
    vector = made({1: [0.0]})
    assert vector_folder(tmp_path, vector) == tmp_path / "steering" / "add-from-others"
    object.__setattr__(vector, "toward", "../../etc")
    found = vector_folder(tmp_path, vector, 4)
    assert found.parent == tmp_path / "steering"
    assert found.name.startswith("_etc-from-others-4-")


def test_the_bias_is_that_of_the_router_and_weights_stay_unbiased(small_ling, records):
    """The same losses as with the values added to the gates' own bias, which counts for choosing only."""
    vector, solutions = random_vector(), Solutions(small_ling, records)
    steered = solutions.under(vector.interventions(0.2)).loss
    gates = small_ling.gates()
    before = {layer: gate.expert_bias.clone() for layer, gate in gates.items()}
    for layer, gate in gates.items():
        gate.expert_bias += 0.2 * torch.from_numpy(vector.values[layer]).float()
    try:
        expected = solutions.under(()).loss
    finally:
        for layer, gate in gates.items():
            gate.expert_bias.copy_(before[layer])
    np.testing.assert_allclose(steered, expected, rtol=1e-5)
    assert not np.allclose(steered, solutions.unchanged.loss, rtol=1e-4)


@pytest.fixture(scope="module")
def trial():
    return Trial(strengths=(0.3, -0.1), draws=4, written=2, written_draws=2, max_new_tokens=8, seed=3)


def test_a_trial_measures_what_it_says_and_is_gone_on_with(small_ling, records, trial, tmp_path):
    vector, told = random_vector(), []
    table = steer(small_ling, records, vector, trial, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (2 * 5 + 2 * 3 + 1,) * 2
    measures = ["moved", "own", "other", "selectivity", "answer", "solved", "steps_right", "steps_own"]
    assert table["measure"].tolist() == measures * 2
    assert table["strength"].tolist() == [-0.1] * 8 + [0.3] * 8
    assert (table["draws"] == [4] * 5 + [2] * 3 + [4] * 5 + [2] * 3).all()
    row = table[(table["strength"] == 0.3) & (table["measure"] == "moved")].iloc[0]
    plain, steered = (list(capture(small_ling, records, interventions=each)) for each in ((), vector.interventions(0.3)))
    moved, slots = 0, 0
    for one, other in zip(plain, steered, strict=True):
        if not any(step.label == "add" for step in one.steps):
            continue
        counted = (one.step >= 0) | (one.segment == 2)
        shared = (other.expert_ids[counted][..., None] == one.expert_ids[counted][..., None, :]).any(axis=-1)
        moved, slots = moved + (~shared).sum(), slots + shared.size
    assert row["effect"] == pytest.approx(moved / slots)
    assert 0 < row["effect"] < 1
    lines = (tmp_path / CONDITIONS).read_text().splitlines(keepends=True)
    (tmp_path / CONDITIONS).write_text("".join(lines[:9]))
    pd.testing.assert_frame_equal(steer(small_ling, records, vector, trial, tmp_path), table)
    with pytest.raises(RunError, match="holds a study with another vector"):
        steer(small_ling, records, random_vector(1), trial, tmp_path)


def test_families_and_answers_are_measured_on_their_own_steps(small_ling, records, tmp_path):
    plan = Trial(strengths=(0.3,), draws=1, written=0)
    others = [each for each in read_benchmark("stepbench", split="test").records if each.family == "causal"][:3]
    vector = random_vector()
    for about, toward in (("family", "causal"), ("answer", "right")):
        object.__setattr__(vector, "about", about)
        object.__setattr__(vector, "toward", toward)
        table = steer(small_ling, [*records, *others], vector, plan, tmp_path / about).set_index("measure")
        solutions = Solutions(small_ling, [*records, *others])
        rise = solutions.under(vector.interventions(0.3)).loss - solutions.unchanged.loss
        own = (solutions.labels != "answer") & ((solutions.problem >= len(records)) | (about == "answer"))
        assert table["effect"]["own"] == pytest.approx(rise[own].sum() / solutions.tokens[own].sum(), rel=1e-6)
        assert ("other" in table.index) == (about == "family")
        assert "solved" not in table.index
    object.__setattr__(vector, "about", "family")
    object.__setattr__(vector, "toward", "poetry")
    with pytest.raises(UsageError, match='no problem has "poetry" in it'):
        steer(small_ling, records, vector, plan, tmp_path / "none")


def test_refusals(small_ling, records, tmp_path):
    with pytest.raises(UsageError, match="a strength of 0 changes nothing"):
        steer(small_ling, records, random_vector(), Trial(strengths=(0.0,)), tmp_path)
    with pytest.raises(UsageError, match="the vector steers random, whose layers and experts are others than those of random"):
        steer(small_ling, records, made({1: [0.1] * 16}), Trial(), tmp_path)
    assert held_out(records, [records[0].prompt]) == records[1:]
    with pytest.raises(UsageError, match="all 8 problems stand in the run that the vector is made of"):
        held_out(records, [each.prompt for each in records])
    assert 0 not in STRENGTHS


def rows(**columns):
    base = {"toward": "add", "away": "others", "about": "label", "strength": [0.1, 0.2], "measure": "solved", "problems": 100,
            "effect": 0.1, "ci_low": 0.05, "ci_high": 0.2, "control": 0.0, "excess": 0.1, "excess_low": [0.05, 0.04],
            "excess_high": 0.15, "p": 0.02, "q": 0.02, "p_unchanged": 0.001, "q_unchanged": 0.002}  # fmt: skip
    return pd.DataFrame(base | columns)


def test_the_finding_tells_a_gain_from_none():
    ask = ANALYSES["steering_effects"].finding
    found = ask(rows())
    assert (found.verdict, found.rung, found.effect) == (Verdict.SUPPORTED, 5, 0.1)
    assert "2 of 2 vectors and strengths" in found.sentence
    assert (
        "brings 10.00 points of right answers more than those do (95 % interval 5.00 to 15.00, 100 problems)" in found.sentence
    )
    none = rows(excess=0.0, excess_low=-0.01, excess_high=0.02, q_unchanged=1.0)
    assert (ask(none).verdict, ask(none).rung) == (Verdict.NOT_SUPPORTED, 1)
    assert ask(none.assign(excess_high=0.3)).verdict is Verdict.CANNOT_TELL
    assert ask(rows(excess=-0.2, excess_low=-0.3, excess_high=-0.1)).verdict is Verdict.NOT_SUPPORTED
    # What random vectors bring as well is nobody's gain, and a sure excess over harmful ones is none over the model as it is.
    assert ask(rows(excess_low=-0.01, excess_high=0.2)).verdict is Verdict.CANNOT_TELL
    assert ask(rows(q_unchanged=0.5)).verdict is not Verdict.SUPPORTED
    read = rows(measure="own", excess=-0.1, excess_low=-0.15, excess_high=-0.08, effect=-0.1)
    assert (ask(read).verdict, ask(read).effect, ask(read).ci_low) == (Verdict.SUPPORTED, 0.1, 0.08)
    assert ask(read.assign(excess=0.1, excess_low=0.08, excess_high=0.15)).verdict is Verdict.NOT_SUPPORTED


def simulated(rng, gain, n=60):
    """The table of a trial in which every vector changes every twentieth answer by chance, and the one tried some more."""
    base, rows = (rng.random(n) < 0.5).astype(float), []

    def written(share):
        solved = np.where(rng.random(n) < 0.05, 1 - base, base)
        solved = np.maximum(solved, rng.random(n) < share)
        return dict.fromkeys(("problems", "judged", "right", "steps", "own"), np.ones(n)) | {"solved": solved}

    for strength in STRENGTHS:
        before, others = written(0) | {"solved": base}, [written(0) for _ in range(9)]
        found = written_rows(before, written(gain), others, rank_p, measures=["solved"], draws=200, seed=0)
        rows += [{"toward": "add", "away": "others", "strength": strength} | row for row in found]
    table = pd.DataFrame(rows)
    return table.assign(q=1.0, q_unchanged=benjamini_hochberg(table["p_unchanged"].to_numpy()))


def test_no_gain_is_rarely_taken_for_one_and_a_gain_is_found():
    rng, ask = np.random.default_rng(0), ANALYSES["steering_effects"].finding
    null = [ask(simulated(rng, 0.0)).verdict for _ in range(50)]
    assert null.count(Verdict.SUPPORTED) <= 4
    assert [ask(simulated(rng, 0.5)).verdict for _ in range(5)] == [Verdict.SUPPORTED] * 5


def asked(*words):
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception and not isinstance(done.exception, SystemExit):
        return type(done.exception), str(done.exception)
    return done.exit_code, done.stdout


def test_the_commands_make_try_and_apply_a_vector(make_run, tmp_path):
    run = make_run(40, spec=TINY, labels={"arithmetic": LABELS["arithmetic"]}, planted=Planted(2, 5, "multiply"))
    with pytest.raises(UsageError, match="no steering vector of this run was tried"):
        steering_effects(run)
    words = ("steer", "ling-tiny", "stepbench", "--run", run.folder, "--limit", 6, "--draws", 2, "--generate", 1,
             "--generate-draws", 1, "--max-new-tokens", 30, "--json")  # fmt: skip
    code, text = asked(*words, "--toward", "multiply", "--strength", 0.1, "--strength", -0.1)
    assert code == 0, text
    table = steering_effects(Run.open(run.folder))
    assert [json.loads(line)["measure"] for line in text.splitlines()] == table["measure"].tolist()
    assert ANALYSES["steering_effects"].finding(table).verdict in (Verdict.CANNOT_TELL, Verdict.NOT_SUPPORTED)
    (figure,) = FIGURES["steering_effects"](table, run.spec)
    moved = next(trace for trace in figure.data if trace.name == "the vector" and trace.mode == "lines+markers")
    assert moved.y.tolist() == table[table["measure"] == "moved"]["effect"].tolist()
    vector = run.folder / "steering" / "multiply-from-others" / "vector.json"
    assert SteeringVector.read(vector).values[2][5] == 1
    out = tmp_path / "steered"
    code, text = asked(
        "capture", "ling-tiny", "stepbench", "--limit", 2, "--out", out, "--steer", vector, "--strength", 0.05
    )  # fmt: skip
    assert code == 0, text
    assert Run.open(out).manifest.interventions == SteeringVector.read(vector).interventions(0.05)
    assert asked(*words) == (UsageError, "name what to steer to: --toward CLASS (and perhaps --away CLASS), or --against RUN")
    assert asked("capture", "ling-tiny", "stepbench", "--out", tmp_path / "x", "--strength", 1)[0] is UsageError
