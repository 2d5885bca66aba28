"""Cutting and labelling any text: what is a step, what stays whole, and that no character or token is lost."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ling_probe.benchmarks import Record
from ling_probe.steps import LABELS, SEGMENTERS, segment, token_spans

RECORD = Record(id="r", prompt="p", format="gsm8k")


def texts(text, steps="rules"):
    return [step.text for step in segment(RECORD, text, steps=steps)]


def label(text):
    (step,) = segment(RECORD, text, steps="lines")
    return step.label


SENTENCES = [
    ("He pays $2.50 for 3.5 kg. It is dear.", 2),
    ("Dr. Ivo Tam met Mrs. Lund. They ran.", 2),
    ("Take a prime, e.g. Seven, i.e. Not eight.", 1),
    ("See Fig. 3 and Eq. (4) and no. 5 there. He eats figs. I said No. Wait.", 4),
    ("Is it 7? Yes! Good... Next one", 4),
    ("Take 6! * 9! ways and n! Cups. No! Yes", 3),
    ("### Step 1: Add", 1),
    ("It took 5 ms. Dr. No ran.", 2),
    ('She said "Stop." He stopped.', 2),
    ("the value of f. is small", 1),
    ("It is 12. 15 is more. 3. Add them.", 3),
    ("Let $x = 3. Y$ hold. Then \\(a. B\\) too.", 2),
    ("They cost $5. He has $6 left.", 2),
    ("Thus \\[x = 2.\\]Hence $y = 3.$ Done", 3),
    ("甲有三个。乙有两个！丙？", 3),
    ("First this. Step 2: that", 2),
    ("", 0),
    (" \n\n ", 0),
]


@pytest.mark.parametrize(("text", "n"), SENTENCES)
def test_sentences_end_where_they_end(text, n):
    assert len(texts(text, "sentences")) == n, texts(text, "sentences")


def test_rules_take_the_marks_that_a_text_has():
    assert texts("Two boxes hold 6 each. That is 12. So 12.") == ["Two boxes hold 6 each.", "That is 12.", "So 12."]
    assert texts("Two boxes. Six each.\nThat is 12.") == ["Two boxes. Six each.", "That is 12."]
    assert texts("One. Two.\n\nThree.\nFour.") == ["One. Two.", "Three.", "Four."]


@pytest.mark.parametrize(
    "text",
    [
        "Step 1: Find the boxes.\n2*6=12\n|Step 2: Add.\n7+12=19\n|",
        "### Step 1\n\nFind the boxes.\n\n|That is done.\n\n|### Step 2\nAdd.",
        "We know:\n|1. a pen is blue\n|2. ink is wet\n   and cold\n\n|So it drips.",
        "1. Outer\n   - inner one\n   - inner two\n|2. Other",
        "(a) one\n|(b) two\n|- three\n|* four\n|• five",
        "**Case 1:** even\n|**Case 2:** odd",
    ],
)
def test_items_own_what_belongs_to_them(text):
    assert texts(text.replace("|", "")) == [part.strip() for part in text.split("|") if part.strip()]


@pytest.mark.parametrize(
    "whole",
    [
        "$$\na = 1\n\nb = 2\n$$",
        "\\[\na. B\n\\]",
        "\\begin{align*}\na &= 1 \\\\\n\nb &= 2\n\\end{align*}",
        "```python\nx = 1\n\n# Then. Next\ny = 2\n```",
        "[asy]\ndraw(1);\n\ndraw(2);\n[/asy]",
    ],
)
@pytest.mark.parametrize("steps", SEGMENTERS)
def test_displays_and_code_stay_whole(whole, steps):
    found = texts(f"One is here.\n\n{whole}\n\nThree is there.", steps)
    assert len([text for text in found if whole in text]) == 1
    assert found[0] == "One is here."
    assert found[-1] == "Three is there."


def test_a_display_belongs_to_its_sentence():
    text = "We have:\n\\[ x = 3 \\]\nwhere x is small.\nThen\n\\[ y = 4. \\]\nSo it ends."
    assert texts(text) == [text[: text.index("Then")].strip(), "Then\n\\[ y = 4. \\]", "So it ends."]


def test_an_open_display_or_fence_ends_nothing_too_early():
    assert texts("\\[ a\n\nOne.\n\nTwo.") == ["\\[ a", "One.", "Two."]
    assert texts("One.\n```\nx\n\ny") == ["One.", "```\nx\n\ny"]


def test_thoughts_end_before_what_is_said():
    text = "<think>\nWell. Hmm, no.\n</think>\n\nIt is 12.\nIt is even.\n#### 12"
    assert texts(text) == ["<think>\nWell.", "Hmm, no.\n</think>", "It is 12.", "It is even.", "#### 12"]
    assert texts("I see. So.</think>Right") == ["I see.", "So.</think>", "Right"]
    assert texts("<think>\n\n</think>\n\nRight") == ["<think>\n\n</think>", "Right"]


LABELLED = [
    ("3*4=12", "multiply"), ("So they have 7 + 5 = 12 figs.", "add"), ("\\(12 \\div 4 = 3\\)", "divide"),
    ("$\\frac{12}{4} = 3$", "divide"), ("**9 - 2 = 7**", "subtract"), ("\\[2 \\times 3 \\text{ figs} = 6\\]", "multiply"),
    ("2 + 3 = 5 and 5 * 2 = 10", "calculate"), ("10 / 3 ≈ 3.33", "divide"), ("n + 2 - 3 = 4", "calculate"),
    ("x^2 = 4", "calculate"), ("Since 5 < 7, take 5.", "compare"),
    ("The first is larger than the rest.", "compare"),
    ("Substituting x into it.", "substitute"), ("Expand the left side.", "simplify"), ("We count the red ones.", "count"),
    ("First, we need to find the total.", "plan"), ("Let's look at the boxes.", "plan"),
    ("Recall that a week has 7 days.", "recall"),
    ("The problem says that he ran.", "recall"), ("Therefore it is even.", "deduce"), ("It is odd because 3 is.", "deduce"),
    ("Let me verify: 3*4=12.", "check"), ("Wait, 3*4=12, not 13.", "backtrack"), ("That is wrong.", "backtrack"),
    ("Alternatively, use the sum.", "backtrack"), ("So the answer is 12.", "conclude"), ("**Answer:** 12", "answer"),
    ("#### 12", "answer"), ("How many are left?", "ask"), ("Thus it is $\\boxed{7}$.", "conclude"),
    ("Let $s = x + y$.", "plan"), ("Then, find it.", "plan"), ("There are 3! ways.", "count"),
    ("Since x is odd, y = 2.", "deduce"),
    ("Red ones (i.e. none) differ.", "other"), ("x ≈ 3.2", "calculate"), ("We can see a pattern.", "deduce"),
    ("We see that it holds.", "deduce"),
    ("Step 2: Let us check it", "check"), ("The pens are blue.", "other"),
    ("Factor 6 as 2 by 3.", "simplify"), ("It has two factors of 5.", "other"), ("Any rearrangement is odd.", "other"),
    ("Assume x = 1.", "plan"),
    ("```\n3*4=12\n```", "code"), ("no equation here: 2**3", "other"), ("Nowait, the bus came.", "other"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), LABELLED)
def test_a_step_is_named_by_what_it_does(text, expected):
    assert label(text) == expected


def test_every_label_is_given():
    assert {expected for _, expected in LABELLED} == set(LABELS)


PIECES = st.sampled_from(
    ["a", "So ", "b.", " C", "\n", "\n\n", "  ", "3*4=12", "Step 1: ", "1. ", "- ", "(a) ", "$", "$$", "\\[", "\\]", "\\(",
     "\\)", "\\begin{align}", "\\end{align}", "```", "<think>", "</think>", "#### 7", "answer: x", "?", "...", "。", "\t", "\r",
     "\x85", "é"]
)  # fmt: skip
ANY_TEXT = st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join))
BY_RULES = pytest.mark.parametrize("steps", SEGMENTERS)


@BY_RULES
@given(text=ANY_TEXT)
def test_steps_tile_any_text(steps, text):
    found = segment(RECORD, text, steps=steps)
    assert "".join(text[step.start : step.stop] for step in found) == (text if text.strip() else "")
    assert all(one.stop == two.start for one, two in pairwise(found))
    assert all(text[step.start : step.stop].strip() == step.text != "" for step in found)
    assert {step.label for step in found} <= set(LABELS)


@BY_RULES
@given(text=ANY_TEXT, sizes=st.lists(st.integers(0, 4), min_size=1))
def test_each_token_is_in_exactly_one_step(steps, text, sizes):
    cuts = [0]
    while cuts[-1] < len(text):
        cuts.append(min(len(text), cuts[-1] + sizes[len(cuts) % len(sizes)] + (sum(sizes) == 0)))
    spans = token_spans(segment(RECORD, text, steps=steps), list(pairwise(cuts)))
    held = [position for start, stop in spans for position in range(start, stop)]
    assert held == (list(range(len(cuts) - 1)) if text.strip() else [])


@BY_RULES
@given(words=st.lists(st.sampled_from(["It", "is", "red.", "No!", "4", "\n", "\n\n", "and"]), max_size=30))
def test_a_step_begins_with_the_token_of_its_first_word(steps, words):
    """Tokens as byte-level tokenizers cut them: a space begins one, a newline ends one."""
    text = " ".join(words)
    tokens = re.findall(r"\s*\n+| ?[^\s]+|\s+", text)
    ends = [sum(map(len, tokens[: place + 1])) for place in range(len(tokens))]
    found = segment(RECORD, text, steps=steps)
    spans = token_spans(found, [(end - len(token), end) for end, token in zip(ends, tokens, strict=True)])
    assert ["".join(tokens[start:stop]).strip() for start, stop in spans] == [step.text for step in found]


def test_more_steps_than_a_run_can_number_are_one_at_the_end():
    found = segment(RECORD, "a\n" * 40000, steps="lines")
    assert (len(found), found[-1].stop) == (2**15, 80000)


@pytest.mark.parametrize(
    "piece", ["\\[", "\\begin{a}", "$", "```\n", "<think>", "# ", "**", "- a\n", "...", "if ", "3 a b c d "]
)
def test_a_hostile_text_takes_no_longer(piece):
    for steps in SEGMENTERS:
        segment(RECORD, piece * (60000 // len(piece)), steps=steps)
