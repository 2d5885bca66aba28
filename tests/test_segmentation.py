"""Agreement of two segmentations, against plain recomputation, and of the rules with annotated records."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ling_probe import segmentation as seg
from ling_probe.benchmarks import Record, Step
from ling_probe.errors import UsageError
from ling_probe.stepbench import generate
from ling_probe.steps.agreement import segmenter_agreement


def places(*boundaries):
    return np.array(boundaries, dtype=np.int64)


@st.composite
def segmentations(draw):
    n = draw(st.integers(2, 40))
    one, two = (draw(st.sets(st.integers(1, n - 1))) for _ in range(2))
    return n, places(*sorted(one)), places(*sorted(two))


def plain_errors(n, reference, found):
    """Pk and WindowDiff from the segment of every unit."""
    ours, theirs = ([sum(b <= unit for b in boundaries) for unit in range(n)] for boundaries in (reference, found))
    k = seg.window(n, len(reference))
    pairs = [(ours[i + k] - ours[i], theirs[i + k] - theirs[i]) for i in range(n - k)]
    return np.mean([(a == 0) != (b == 0) for a, b in pairs]), np.mean([a != b for a, b in pairs])


@given(segmentations())
def test_pk_and_window_diff_are_what_counting_gives(case):
    n, reference, found = case
    pk, diff = plain_errors(n, reference, found)
    assert seg.pk(reference, found, n) == pytest.approx(pk)
    assert seg.window_diff(reference, found, n) == pytest.approx(diff)
    assert 0 <= seg.pk(reference, found, n) <= seg.window_diff(reference, found, n) <= 1


@given(segmentations())
def test_a_segmentation_agrees_with_itself(case):
    n, reference, _ = case
    assert seg.pk(reference, reference, n) == seg.window_diff(reference, reference, n) == 0
    assert seg.matched(reference, reference) == len(reference)


def test_errors_worked_out_by_hand():
    # Ten units in two fives: k is 3, and of 7 windows those from unit 2, 3 and 4 hold the boundary at 5.
    assert seg.pk(places(5), places(), 10) == pytest.approx(3 / 7)
    # A boundary one unit late misses the window from unit 2 and fills the one from unit 5.
    assert seg.pk(places(5), places(6), 10) == pytest.approx(2 / 7)
    # One more beside a right one: Pk sees it where it is alone, WindowDiff everywhere.
    assert seg.pk(places(5), places(5, 6), 10) == pytest.approx(1 / 7)
    assert seg.window_diff(places(5), places(5, 6), 10) == pytest.approx(3 / 7)


def test_edges():
    every = places(1, 2, 3)
    assert seg.pk(every, every, 4) == 0
    assert seg.pk(every, places(), 4) == seg.window_diff(places(), every, 4) == 1
    assert seg.pk(places(), places(), 5) == 0
    assert math.isnan(seg.pk(places(), places(), 1))
    assert math.isnan(seg.window_diff(places(), places(), 0))
    assert np.isnan(seg.score(0, 0, 0)).all()
    assert seg.score(0, 2, 0)[1:] == (0, 0)
    assert math.isnan(seg.kappa([], []))
    assert math.isnan(seg.kappa(["a", "a"], ["a", "a"]))
    assert math.isnan(seg.kappa(["a", "a"], ["a", "b"]))
    assert seg.kappa(["a", "b"], ["b", "a"]) == -1


def largest_pairing(reference, found, tolerance):
    """By trying, for each boundary, every partner and none."""
    if not len(reference):
        return 0
    first, rest = reference[0], reference[1:]
    options = [place for place, each in enumerate(found) if abs(each - first) <= tolerance]
    without = largest_pairing(rest, found, tolerance)
    return max([without, *(1 + largest_pairing(rest, found[:place] + found[place + 1 :], tolerance) for place in options)])


@given(st.sets(st.integers(1, 12), max_size=5), st.sets(st.integers(1, 12), max_size=5), st.integers(0, 3))
def test_matches_are_the_largest_pairing(one, two, tolerance):
    one, two = sorted(one), sorted(two)
    assert seg.matched(places(*one), places(*two), tolerance=tolerance) == largest_pairing(one, two, tolerance)


@given(st.integers(0, 30), st.integers(0, 40), st.integers(0, 9))
def test_chance_boundaries_are_places(n, count, seed):
    for found in (seg.even_boundaries(n, count), seg.random_boundaries(n, count, np.random.default_rng(seed))):
        assert len(set(found.tolist())) == len(found) == max(0, min(count, n - 1))
        assert sorted(found) == list(found)
        assert all(0 < each < n for each in found)


def marked(*steps, end="", **fields):
    """A record whose solution is its steps, a text and a label each."""
    found, solution = [], ""
    for text, label in steps:
        found.append(Step(label=label, text=text.strip(), start=len(solution), stop=len(solution) + len(text)))
        solution += text
    return Record(id="m", prompt="p", solution=solution + end, steps=tuple(found), **fields)


def row(table, layout, segmenter):
    (found,) = table.query("layout == @layout and segmenter == @segmenter").to_dict("records")
    return found


def test_agreement_with_steps_a_line():
    record = marked(("He has 2*3=6 figs.\n", "multiply"), ("Ann had a fig. He got 6+1=7.\n", "subtract"), end="answer: 7\n")
    bare = Record(id="b", prompt="p", solution="x")
    table = segmenter_agreement([record, bare])
    assert set(table["records"]) == {1}
    lines, sentences, flat = (
        row(table, *which) for which in (("written", "lines"), ("written", "sentences"), ("removed", "sentences"))
    )
    assert (lines["steps"], lines["found"], lines["f1"], lines["pk"], lines["window_diff"]) == (2, 2, 1, 0, 0)
    assert (lines["both_named"], lines["named"]) == (2, 1)
    assert lines["kappa"] == pytest.approx(1 / 3)  # right once of two, where chance is a quarter
    assert (sentences["found"], sentences["recall"], sentences["precision"]) == (3, 1, pytest.approx(2 / 3))
    assert (flat["found"], flat["f1"]) == (2, 0.5)  # the answer begins in lower case, as no sentence does


def test_annotation_without_operations_has_no_kappa():
    table = segmenter_agreement([marked(("A is so.\n", "premise"), ("B is so.\n", "conclude"))])
    assert table["kappa"].isna().all()
    assert table["kappa_none"].isna().all()


def test_random_boundaries_hit_as_often_as_they_must():
    records = [generate("arithmetic", "test", index) for index in range(30)]
    found = row(segmenter_agreement(records, draws=200), "written", "lines")
    expected = total = 0
    for record in records:
        n, count = len(record.solution.split()), len(record.steps)
        expected += count * count / (n - 1)  # of a hypergeometric draw
        total += count
    assert found["f1"] == 1
    assert found["f1_random"] == pytest.approx(expected / total, rel=0.03)


def test_the_interval_is_over_records():
    good, bad = (
        marked(("One is.\n", "x"), ("Two is.\n", "x")),
        marked(("One is. Two is. Three is. Four", "x"), (" is. So.", "x")),
    )
    table = row(segmenter_agreement([good] * 5 + [bad] * 5), "written", "sentences")
    assert 0 < table["ci_low"] < table["f1"] < table["ci_high"] < 1
    assert table["f1"] == pytest.approx(2 * 5 / (10 + 5 + 20))


def test_records_without_steps_are_no_comparison():
    with pytest.raises(UsageError, match="no record has annotated steps"):
        segmenter_agreement([Record(id="b", prompt="p", solution="x")])
