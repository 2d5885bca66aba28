"""In worlds without an effect every test rejects as often as it says, and no verdict says "supported" more often than that."""

import doctest

import cases
import numpy as np
import pandas as pd
import pytest
from cases import CASES, Counts, calibrate
from worlds import World

from ling_probe.analysis import label_specialisation
from ling_probe.run import Run


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not case.wrong], ids=str)
def test_false_positives_come_at_the_stated_rate(case):
    counts, faults = calibrate(case, case.quick_runs, quick=True)
    assert faults == [], f"{counts.rejected} of {len(counts)} drawn tests reject, {counts.rate()} of all"


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_a_test_that_rejects_at_another_rate_is_noticed(rate):
    """Too often and too seldom, each with p values that are uniform at that rate."""
    rng = np.random.default_rng(0)
    p = rng.random((400, 30)) * 0.05 / rate
    counts = Counts(p[:, 0], (p <= 0.05).mean(axis=1), np.zeros(400), np.zeros(400), np.full(400, np.nan))
    side = "too many" if rate > 0.05 else "too few"
    assert counts.faults(may_be_low=False) == [f"drawn tests, {side}", f"all tests, {side}"]
    assert counts.faults(may_be_low=True) == ([] if rate < 0.05 else counts.faults(may_be_low=False))


def test_a_verdict_given_too_freely_is_noticed():
    uniform = np.random.default_rng(1).random((200, 30))
    often = np.arange(200) < 30
    counts = Counts(uniform[:, 0], (uniform <= 0.05).mean(axis=1), np.zeros(200), often, np.full(200, np.nan))
    assert counts.faults(may_be_low=False) == ["verdicts"]


def test_a_run_in_memory_is_the_run_that_would_be_written(tmp_path):
    memory = World(words=0.7, n_sequences=9).run(0)
    written = Run.create(tmp_path / "run", spec=memory.spec, model=dict(memory.manifest.model), benchmark={}, options={})
    written.append(memory.traces())
    pd.testing.assert_frame_equal(memory.sequences, written.sequences)
    pd.testing.assert_frame_equal(memory.steps, written.steps)
    columns = ("token", "loss", "sequence_id", "logits")
    for layers in (None, [3, 1]):
        (mine,), (theirs,) = (list(run.batches(layers=layers, weights=True, columns=columns)) for run in (memory, written))
        for name in ("sequence", "position", "token_id", "segment", "step", "expert_ids", "weights"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), err_msg=name)
        for name in columns:
            np.testing.assert_array_equal(mine.extra[name], theirs.extra[name], err_msg=name)
    tables = [label_specialisation(run, permutations=19, draws=9) for run in (memory, written)]
    pd.testing.assert_frame_equal(*tables)


def test_routing_of_a_world_follows_what_it_should_and_nothing_else():
    """Neighbours, words and problems route alike; the same label in two problems does not."""
    run = World(words=0.7, n_sequences=200).run(0)
    (batch,) = run.batches(layers=[1])
    chosen = np.zeros((len(batch.position), 16))
    np.put_along_axis(chosen, batch.expert_ids[:, 0].astype(int), 1, axis=1)
    load = chosen.mean(axis=0)
    assert load.max() > 2 * load.min()

    def alike(one, other):
        return (chosen[one] * chosen[other]).sum(axis=1).mean()

    rng = np.random.default_rng(0)
    everyone = rng.permutation(len(chosen))
    chance = alike(np.arange(len(chosen)), everyone)
    neighbours = np.flatnonzero(batch.sequence[1:] == batch.sequence[:-1])
    assert alike(neighbours, neighbours + 1) > chance + 0.3
    by_word = np.lexsort((rng.random(len(chosen)), batch.token_id))
    same_word = np.flatnonzero(batch.token_id[by_word][1:] == batch.token_id[by_word][:-1])
    assert alike(by_word[same_word], by_word[same_word + 1]) > chance + 0.3


def test_doctests_hold():
    assert doctest.testmod(cases).failed == 0
