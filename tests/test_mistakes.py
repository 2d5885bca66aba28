"""The first wrong step: beside right steps of the same number, and located in held-out solutions."""

from dataclasses import replace

import numpy as np
import pytest
from pairs import write_run
from synthetic import Effects, synthetic_spec, synthetic_traces

from ling_probe.analysis import Verdict, finding, first_wrong_step, mistakes, wrong_step_localisation
from ling_probe.analysis.classified import classified_steps
from ling_probe.analysis.localisation import ALL, ROUTING, first_chances
from ling_probe.analysis.step_measures import DEPARTURE, ENTROPY, LOSS, SURPRISE, TOP, step_measures
from ling_probe.errors import UsageError


def run_of(folder, n=90, *, seed=0, astray=0.0, keep=(), n_steps=(3, 6)):
    """Steps go wrong at random; a share of the wrong steps' choices is drawn anew, whatever the token."""
    rng, spec = np.random.default_rng(seed), synthetic_spec()
    traces = synthetic_traces(
        spec, n, rng=rng, effects=Effects(token=2.0), labels={"sums": ("add", "subtract")}, n_steps=n_steps, keep=keep
    )
    found = []
    for trace in traces:
        ids, failed, spans = trace.expert_ids.copy(), False, []
        for span in trace.steps:
            right = bool(rng.random() < 0.8)
            if not right and not failed:
                here = np.arange(span.start, span.stop)
                moved = here[rng.random(len(here)) < astray]
                ids[moved] = rng.permuted(np.tile(np.arange(16), (len(moved), spec.n_rows, 1)), axis=-1)[..., :4]
            failed |= not right
            spans.append(replace(span, correct=right if not failed or not right else None))
        found.append(replace(trace, expert_ids=ids, steps=tuple(spans), group_limited=False))
    return write_run(folder, found)


@pytest.fixture(scope="module")
def astray(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("mistakes") / "run", 150, astray=0.8, keep=("logits",))


def test_wrong_steps_that_leave_their_words_routing_are_found(astray):
    table = first_wrong_step(astray, draws=200)
    rows = table[table["measure"] == SURPRISE]
    assert (rows["effect"] > 1).all()
    assert (rows["ci_low"] > 0.5).all()
    assert (rows["q"] < 0.001).all()
    assert (table.loc[table["measure"].isin([LOSS, ENTROPY]), "q"] > 0.01).all()
    found = finding("first_wrong_step", table)
    assert (found.verdict, found.rung) == (Verdict.SUPPORTED, 3)
    assert "surprise" in found.sentence


def test_wrong_steps_like_right_ones_are_not_found(tmp_path):
    tables = [first_wrong_step(run_of(tmp_path / str(seed), 60, seed=seed), draws=20) for seed in range(8)]
    p = np.concatenate([table["p"].to_numpy() for table in tables])
    assert (p <= 0.05).mean() < 0.12
    assert sum(finding("first_wrong_step", table).verdict is Verdict.SUPPORTED for table in tables) <= 2


def test_steps_count_up_to_the_first_wrong_one(astray):
    judged, steps = mistakes.judged_steps(astray), astray.steps
    for _, rows in steps.groupby("sequence"):
        right = rows["correct"].fillna(value=False).to_numpy(dtype=bool)
        first = int(np.argmin(right)) if not right.all() else len(right)
        assert judged.right[rows.index].tolist() == [place < first for place in range(len(right))]
        known = first < len(right) and rows["correct"].iloc[first] is not None
        assert judged.wrong[rows.index].tolist() == [known and place == first for place in range(len(right))]


def test_an_effect_by_hand(astray):
    judged = mistakes.judged_steps(astray)
    values = np.random.default_rng(0).normal(size=len(judged.step))
    change = mistakes._change(values, judged)
    row = int(np.flatnonzero(judged.wrong & (judged.step == 2))[0])
    assert change[row] == pytest.approx(values[row] - (values[row - 1] + values[row - 2]) / 2)
    weights = np.ones((2, len(astray.sequences)))
    found = mistakes._compared(change, judged, judged.step, weights)
    numbers, weight, rest = [], [], []
    for step in range(1, 6):
        bad, good = (change[kind & (judged.step == step)] for kind in (judged.wrong, judged.right))
        if len(bad) and len(good):
            weight.append(len(bad) * len(good) / (len(bad) + len(good)))
            numbers.append(weight[-1] * (bad.mean() - good.mean()))
            rest.append(good - good.mean())
    spread = np.sqrt(sum((each**2).sum() for each in rest) / (sum(map(len, rest)) - len(rest)))
    assert found["effect"] == pytest.approx(sum(numbers) / sum(weight) / spread)


def test_measures_of_a_step_by_hand(astray):
    steps = classified_steps(astray)
    measures, row = step_measures(astray, steps), 1
    names = list(measures.names)
    (batch,) = (each for each in astray.batches(weights=True, columns=["loss"]))
    span = astray.steps.iloc[row]
    here = np.flatnonzero((batch.sequence == span["sequence"]) & (batch.step == 1))
    before = np.flatnonzero((batch.sequence == span["sequence"]) & (batch.step == 0))
    weights = batch.weights[here, 1]
    assert measures.raw[row, names.index((TOP, 2))] == pytest.approx(
        (weights.max(axis=1) / weights.sum(axis=1)).mean(), abs=1e-6
    )
    assert measures.raw[row, names.index((LOSS, None))] == pytest.approx(batch.extra["loss"][here].mean(), abs=1e-6)
    share = np.bincount(batch.expert_ids[before, 1].ravel(), minlength=16) / len(before)
    assert measures.raw[row, names.index((DEPARTURE, 2))] == pytest.approx(1 - share[batch.expert_ids[here, 1]].mean())
    assert np.isnan(measures.raw[0, names.index((DEPARTURE, 2))])
    # Words are taken out: over all steps of a stratum nothing is left.
    assert (measures.beyond[:, 0] * steps.n_tokens).sum() == pytest.approx(0, abs=1e-6)


def test_routing_astray_locates_the_step(astray):
    table = wrong_step_localisation(astray, draws=200)
    rows = table.set_index("features")
    assert rows.loc[ROUTING, "ci_low"] > rows["chance"].iloc[0] + 0.2
    assert rows.loc[ALL, "gain_low"] > 0.1
    judged = mistakes.judged_steps(astray)
    located = judged.wrong & (judged.n_steps > 1)
    assert table["solutions"].iloc[0] == located.sum()
    assert table["chance"].iloc[0] == pytest.approx((1 / judged.n_steps[located]).mean())
    found = finding("wrong_step_localisation", table)
    assert (found.verdict, found.rung) == (Verdict.SUPPORTED, 4)


def test_routing_that_knows_nothing_locates_nothing(tmp_path):
    table = wrong_step_localisation(run_of(tmp_path / "run", 120, seed=5), draws=100)
    assert finding("wrong_step_localisation", table).verdict is not Verdict.SUPPORTED


def test_the_first_of_equal_chances_is_the_likeliest():
    chance, problem = np.full(6, 0.3), np.array([0, 0, 0, 1, 1, 1])
    assert np.exp(first_chances(chance, problem)) == pytest.approx([0.3, 0.21, 0.147] * 2)


def test_runs_without_judged_steps_are_refused(tmp_path):
    run = run_of(tmp_path / "run", 12)
    with pytest.raises(UsageError, match="problems of this run have right steps before a first wrong one, 10 are needed"):
        first_wrong_step(run)
    with pytest.raises(UsageError, match="have two steps or more and a known first wrong one, 20 are needed"):
        wrong_step_localisation(run)
