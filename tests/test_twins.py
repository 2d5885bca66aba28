"""Minimal pairs: the same words in the same places of two problems that differ in one operation."""

from dataclasses import replace

import numpy as np
import pytest
from pairs import plain_traces, write_run
from synthetic import synthetic_spec

from ling_probe.analysis import Verdict, finding, minimal_pairs, twins
from ling_probe.analysis.twins import AFTER, BEFORE, EARLIER, HERE, PROMPT, SIGN
from ling_probe.errors import UsageError

LABELS = {"sums": ("add", "subtract")}
CHANGED = 1
"""Position in the prompt of the word that differs."""


def pair_traces(n=40, *, seed=0, spec=None, follows=0.0, noise=0.0):
    """Pairs whose second step differs: its last token does, and the word in the prompt.

    Args:
        n: Pairs.
        seed: Of everything.
        spec: Geometry.
        follows: Share of the second step's choices that follow its operation.
        noise: Share of all choices after the changed word that are drawn anew.
    """
    rng, found = np.random.default_rng(seed), []
    spec = spec or synthetic_spec()
    for number, trace in enumerate(plain_traces(n, seed=seed, spec=spec, labels=LABELS, n_steps=(3, 4))):
        step = trace.steps[1]
        for side, label in enumerate(rng.permutation(LABELS["sums"])):
            ids, tokens = trace.expert_ids.copy(), trace.token_ids.copy()
            tokens[[CHANGED, step.stop - 1]] = (1, 1) if side else (2, 2)
            moved = np.flatnonzero((np.arange(len(ids)) > CHANGED) & (rng.random(len(ids)) < noise))
            here = np.arange(step.start, step.stop)
            for token in moved:
                ids[token] = [rng.permutation(spec.n_experts)[: spec.top_k] for _ in range(spec.n_rows)]
            ids[here[rng.random(len(here)) < follows]] = np.arange(4) + (4 if label == "add" else 8)
            spans = tuple(replace(span, label=str(label)) if span.step == 1 else span for span in trace.steps)
            meta = {"pair": f"pair-{number}", "pair_kind": "operation", "pair_step": 1}
            found.append(
                replace(
                    trace, sequence_id=f"{number}-{side}", expert_ids=ids, token_ids=tokens, steps=spans, meta=meta,
                    group_limited=False,
                )
            )  # fmt: skip
    return found


def apart(one, other, at):
    """Share of experts not shared at a token, by layer, the slow way."""
    return [1 - len(set(a) & set(b)) / 4 for a, b in zip(one.expert_ids[at], other.expert_ids[at], strict=True)]


def whole(table):
    rows = table[table["layer"].isna() & (table["by"] == "place") & (table["family"] == "all")]
    return rows.set_index("name")


@pytest.fixture(scope="module")
def traces():
    return pair_traces(follows=0.7, noise=0.1)


@pytest.fixture(scope="module")
def table(traces, tmp_path_factory):
    return minimal_pairs(write_run(tmp_path_factory.mktemp("twins") / "run", traces, parts=3), draws=200)


def test_the_step_that_needs_the_operation_changes_and_tells_it(table):
    rows = whole(table)
    assert rows.loc[BEFORE, "changed"] == 0
    assert rows.loc[BEFORE, "accuracy"] == 0.5
    assert rows.loc[HERE, "beyond_low"] > 0.2
    assert rows.loc[HERE, "q"] < 0.001
    assert rows.loc[HERE, "accuracy_low"] > 0.9
    assert rows.loc[[PROMPT, EARLIER, AFTER], "accuracy_low"].max() < 0.55
    found = finding("minimal_pairs", table)
    assert (found.verdict, found.rung) == (Verdict.SUPPORTED, 3)


def test_a_change_that_is_the_same_everywhere_is_not_the_operations(tmp_path):
    tables = [
        minimal_pairs(write_run(tmp_path / str(seed), pair_traces(30, seed=seed, noise=0.3)), draws=20) for seed in range(6)
    ]
    p = np.array([whole(table).loc[HERE, "p"] for table in tables])
    assert (p < 0.05).sum() <= 1
    accuracy = np.array([whole(table).loc[HERE, "accuracy"] for table in tables])
    assert accuracy.mean() == pytest.approx(0.5, abs=0.1)
    assert sum(finding("minimal_pairs", table).verdict is Verdict.SUPPORTED for table in tables) <= 1


def test_changes_by_place_and_distance_the_slow_way(traces, table):
    by_place, by_distance = {}, {}
    for one, other in zip(traces[::2], traces[1::2], strict=True):
        last, step = -1, one.steps[1]
        for at in range(one.n_tokens):
            if one.token_ids[at] != other.token_ids[at]:
                last = at
                continue
            changed = apart(one, other, at)
            place = BEFORE if last < 0 else PROMPT if at < one.steps[0].start else AFTER
            place = EARLIER if at >= one.steps[0].start and one.step[at] == 0 else HERE if one.step[at] == 1 else place
            assert last < step.start or at >= step.stop
            by_place.setdefault(place, []).append(np.mean(changed))
            if last >= 0:
                name = "1" if at - last == 1 else "2 to 3" if at - last < 4 else "4 to 7" if at - last < 8 else "8 to 15"
                by_distance.setdefault(name if at - last < 16 else "16 to 31", []).append(np.mean(changed))
    rows = whole(table)
    for name, values in by_place.items():
        assert rows.loc[name, "changed"] == pytest.approx(np.mean(values)), name
        assert rows.loc[name, "tokens"] == len(values)
    far = table[table["layer"].isna() & (table["by"] == "distance")].set_index("name")
    for name in ("1", "2 to 3", "4 to 7", "8 to 15"):
        assert far.loc[name, "changed"] == pytest.approx(np.mean(by_distance[name])), name
    assert SIGN not in rows.index, "only the last token of the step differs"


def test_beyond_is_within_pairs_at_the_same_place_in_the_step(traces, tmp_path):
    found = twins._twins(write_run(tmp_path / "run", traces), 0)
    beyond = twins._beyond(found)
    one, other, steps = traces[0], traces[1], traces[0].steps
    differences = []
    for place in range(steps[1].stop - steps[1].start - 1):
        if place < steps[0].stop - steps[0].start:
            here, before = (apart(one, other, step.start + place) for step in (steps[1], steps[0]))
            differences.append(np.subtract(here, before))
    assert beyond[0] == pytest.approx(np.mean(differences, axis=0))


def test_runs_without_pairs_are_refused(make_run, tmp_path):
    with pytest.raises(UsageError, match="0 pairs of problems that differ in one operation in this run, 10 are needed"):
        minimal_pairs(make_run(12))
    odd = [each for each in pair_traces(12) if not each.sequence_id.endswith("7-1")]
    assert len(twins._pairs(write_run(tmp_path / "run", odd), 0)) == 11


def test_several_thousand_pairs_are_sampled_and_many_experts_reduced(tmp_path, monkeypatch):
    monkeypatch.setattr(twins, "_MOST", 30)
    monkeypatch.setattr(twins, "_COMPONENTS", 16)
    table = minimal_pairs(write_run(tmp_path / "run", pair_traces(36, follows=0.9)), draws=20)
    assert whole(table)["pairs"].max() == 30
    assert whole(table).loc[HERE, "accuracy"] > 0.9
