from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ling_probe.benchmarks import Record, Step
from ling_probe.errors import UsageError
from ling_probe.stepbench import FAMILIES, generate
from ling_probe.steps import check_steps, judge, segment, token_spans

ARITHMETIC = Record(id="a", prompt="compute (7+5)*3\n", family="arithmetic", benchmark="stepbench")


def steps_of(*spans):
    return [Step(label="x", text="", start=start, stop=stop) for start, stop in spans]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gold_solution_read_line_by_line_gives_its_gold_steps(family):
    for index in range(60):
        record = generate(family, "test", index)
        assert segment(record, record.solution) == record.steps
        assert segment(replace(record, steps=()), record.solution) == record.steps


def test_wrong_and_foreign_lines_are_steps_too():
    steps = segment(ARITHMETIC, "7+5=13\n\n13*3=39\nhmm\nanswer: 39\n")
    assert [(step.label, step.correct) for step in steps] == [("add", False), ("multiply", True), ("other", None)]
    assert [(step.start, step.stop) for step in steps] == [(0, 7), (8, 16), (16, 20)]
    assert (steps[0].inputs, steps[0].result) == (("7", "5"), "13")


def test_a_text_cut_short_keeps_its_last_line():
    (step,) = segment(ARITHMETIC, "7+5=1")
    assert (step.text, step.start, step.stop, step.correct) == ("7+5=1", 0, 5, False)


FOREIGN = replace(ARITHMETIC, benchmark="elsewhere")


def test_a_text_that_nobody_annotated_is_cut_and_labelled_by_rules():
    (step,) = segment(FOREIGN, "7+5=13")
    assert (step.label, step.correct, step.inputs, step.result) == ("add", None, ("7", "5"), "13")
    assert [each.label for each in segment(FOREIGN, "7+5=13\nanswer: 13\n")] == ["add", "answer"]


def test_steps_are_found_as_asked():
    text = "He has 7 figs. He buys 5.\nSo he has 7+5=12."
    annotated = (Step(label="x", text="He has 7 figs. He buys 5.", start=0, stop=26, correct=True),)
    record = replace(FOREIGN, solution=text, steps=annotated)
    assert segment(record, text) == segment(record, text, steps="annotated") == annotated
    assert [step.text for step in segment(record, text, steps="lines")] == text.split("\n")
    assert [step.text for step in segment(record, text, steps="sentences")] == [
        "He has 7 figs.",
        "He buys 5.",
        "So he has 7+5=12.",
    ]
    assert segment(record, "7+5=12") == segment(record, "7+5=12", steps="rules")


def test_what_cannot_be_asked_is_said():
    with pytest.raises(UsageError, match='"verses"; these there are: auto, annotated, rules, sentences, lines'):
        segment(FOREIGN, "7", steps="verses")
    with pytest.raises(UsageError, match="this text of record a; find them by auto"):
        segment(FOREIGN, "7", steps="annotated")
    gold = generate("causal", "test", 0)
    check_steps("annotated", [gold], generated=True)
    with pytest.raises(UsageError, match="the solution of record a"):
        check_steps("annotated", [gold, FOREIGN])
    with pytest.raises(UsageError, match="a text that a model writes"):
        check_steps("annotated", [gold, replace(gold, benchmark="elsewhere")], generated=True)
    check_steps("auto", [FOREIGN])


def test_a_found_step_is_correct_as_far_as_annotated_ones_say():
    parts = ["A is 2. B is 3.\n", "So C is 6. Then D is 1.\n", "E is 9.\n"]
    starts = [sum(map(len, parts[:place])) for place in range(3)]
    steps = [
        Step(label="x", text=part.strip(), start=start, stop=start + len(part), correct=correct)
        for part, start, correct in zip(parts, starts, (True, False, None), strict=True)
    ]
    record = replace(FOREIGN, solution="".join(parts), steps=tuple(steps))
    assert [step.correct for step in segment(record, record.solution, steps="lines")] == [True, False, None]
    assert [step.correct for step in segment(record, record.solution, steps="sentences")] == [True, True, None, None, None]
    assert {step.correct for step in segment(record, record.solution + "F", steps="lines")} == {None}


@given(st.text(alphabet="7+5=12\n:answer ", max_size=60))
def test_steps_are_lines_in_order(completion):
    steps = segment(ARITHMETIC, completion)
    assert [completion[step.start : step.stop].removesuffix("\n") for step in steps] == [step.text for step in steps]
    assert all(one.stop <= two.start for one, two in pairwise(steps))
    left = [line for line in completion.split("\n") if line.strip() and not line.startswith("answer:")]
    assert [step.text for step in steps] == left


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7+5=12\nanswer: 12\n", "12"),
        ("answer: 1\n3+4=7\nanswer: not red", "not red"),
        ("answer:", ""),
        ("the answer: 3\n", None),
        ("", None),
    ],
)
def test_the_answer_is_what_follows_the_last_answer_line(text, answer):
    record = Record(id="r", prompt="p", answer=answer or "?")
    assert judge(record, text, generated=True) == (answer or "", bool(answer))


def test_a_token_belongs_to_the_step_its_first_character_is_in():
    offsets = [(0, 3), (3, 7), (7, 8), (8, 12)]
    assert token_spans(steps_of((0, 5), (5, 8), (8, 12)), offsets) == [(0, 2), (2, 3), (3, 4)]
    assert token_spans(steps_of((4, 5), (5, 8)), offsets, base=10) == [(12, 12), (12, 13)]
    assert token_spans(steps_of((0, 4)), []) == [(0, 0)]


@given(st.lists(st.integers(1, 5), max_size=20), st.lists(st.integers(1, 9), max_size=8), st.integers(0, 50))
def test_steps_that_tile_a_text_share_out_its_tokens(token_sizes, step_sizes, base):
    tokens = [sum(token_sizes[:i]) for i in range(len(token_sizes) + 1)]
    cuts = [sum(step_sizes[:i]) for i in range(len(step_sizes) + 1)]
    spans = token_spans(steps_of(*pairwise(cuts)), list(pairwise(tokens)), base=base)
    held = [position for start, stop in spans for position in range(start, stop)]
    assert held == [base + i for i, start in enumerate(tokens[:-1]) if start < cuts[-1]]
