import doctest

import numpy as np
import pytest
from synthetic import synthetic_run, synthetic_spec, synthetic_traces

from ling_probe.analysis import sample as module
from ling_probe.analysis.sample import frequent, label_codes, sample_tokens, two_halves
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.trace import SEGMENTS


def tokens_one_by_one(run):
    """Every token with the id before it, in plain Python."""
    for batch in run.batches():
        for row in range(len(batch.sequence)):
            before = int(batch.token_id[row - 1]) if batch.position[row] else -1
            yield batch, row, before


def test_doctests_hold():
    assert doctest.testmod(module).failed == 0


def test_a_small_run_is_taken_whole_without_its_prompts(make_run):
    run = make_run(12, parts=3)
    sample = sample_tokens(run)
    expected = [
        (batch.sequence[row], batch.position[row], batch.token_id[row], before, batch.step[row], batch.expert_ids[row].tolist())
        for batch, row, before in tokens_one_by_one(run)
        if SEGMENTS[batch.segment[row]] in ("reasoning", "answer")
    ]
    columns = (sample.sequence, sample.position, sample.token_id, sample.previous_id, sample.step, sample.expert_ids.tolist())
    assert list(zip(*columns, strict=True)) == expected
    after = {(each[0], each[1] - 1): each[2] for each in expected}
    assert sample.next_id.tolist() == [after.get((each[0], each[1]), -1) for each in expected]
    assert sample.follows.tolist() == [(each[0], each[1] - 1) in {other[:2] for other in expected} for each in expected]


def test_a_longer_run_is_sampled_by_whole_sequences(make_run):
    run = make_run(40)
    whole, some = sample_tokens(run), sample_tokens(run, most=300, seed=1)
    assert 200 < some.n_tokens <= 300
    for sequence in np.unique(some.sequence):
        assert (some.sequence == sequence).sum() == (whole.sequence == sequence).sum()
    assert set(sample_tokens(run, most=300, seed=2).sequence) != set(some.sequence)
    assert sample_tokens(run, most=1).n_sequences == 2


def test_prompts_stand_in_for_completions_that_are_not_there(tmp_path):
    traces = synthetic_traces(synthetic_spec(), 3, rng=np.random.default_rng(0))
    for trace in traces:
        trace.segment[:] = SEGMENTS.index("prompt")
    run = Run.create(tmp_path / "run", spec=traces[0].spec, model={}, benchmark={}, options={})
    run.append(traces)
    sample = sample_tokens(run)
    assert sample.n_tokens == sum(trace.n_tokens for trace in traces)
    assert (sample.previous_id[sample.position == 0] == -1).all()
    assert (sample.previous_id[sample.position > 0] >= 0).all()


def test_one_sequence_cannot_be_split(make_run):
    with pytest.raises(UsageError, match="one sequence only in this run; holding some out needs two"):
        sample_tokens(make_run(1))
    with pytest.raises(UsageError, match="holds no sequences yet"):
        sample_tokens(make_run(0))


def test_counts_are_those_of_counting_one_by_one(make_run):
    sample = sample_tokens(make_run(6))
    group, rows = sample.position % 3 - 1, sample.position % 2 == 0
    expected = np.zeros((2, 16))
    for token in np.flatnonzero(rows & (group >= 0)):
        for expert in sample.expert_ids[token, 1]:
            expected[group[token], expert] += 1
    assert sample.counts(1, group, 2, rows).tolist() == expected.tolist()


def test_labels_are_those_of_the_steps(make_run):
    run = make_run(10)
    sample, steps = sample_tokens(run), run.steps
    labels = sorted(set(steps["label"]))
    named = {(row.sequence, row.step): row.label for row in steps.itertuples()}
    expected = [
        labels.index(named[sequence, step]) if step >= 0 else -1
        for sequence, step in zip(sample.sequence, sample.step, strict=True)
    ]
    assert label_codes(run, sample).tolist() == expected


def test_halves_split_whole_sequences_and_frequent_ids_stand_in_both():
    sequence = np.repeat(np.arange(9), 4)
    first = two_halves(sequence, seed=3)
    assert all(len(set(first[sequence == each])) == 1 for each in range(9))
    assert first.sum() in (16, 20)
    ids = np.where(first, 5, 7)
    ids[::2] = -1
    ids[1::4] = 9
    assert set(frequent(ids, first, 2)[ids == 9]) == {0}
    assert set(frequent(ids, first, 2)[ids != 9]) == {-1}


def test_the_sample_does_not_depend_on_parts(tmp_path):
    one, many = (sample_tokens(synthetic_run(tmp_path / str(parts), 20, parts=parts), most=200) for parts in (1, 5))
    assert one.token_id.tolist() == many.token_id.tolist()
