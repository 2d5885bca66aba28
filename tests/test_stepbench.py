import hashlib
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ling_probe import stepbench
from ling_probe.benchmarks import Record
from ling_probe.errors import UsageError
from ling_probe.stepbench import FAMILIES, check, generate, label_line, read_line, splits
from ling_probe.stepbench.draw import Draw
from ling_probe.stepbench.names import FIRST, SECOND, all_names, draw_names
from ling_probe.stepbench.pairs import content_words
from ling_probe.steps import segment
from ling_probe.tokenizer import build_tokenizer

SHIPPED = Path(__file__).parents[1] / "datasets" / "stepbench"
HELD_OUT = frozenset(all_names(held_out=True))
USUAL = frozenset(all_names(held_out=False))

DEDUCTION = (
    "facts: in sabgar moxpus is found. by gazjin taldel holds. by baxtis gazjin holds. from moxpus torzan follows. with daxwex "
    "always happy comes. of nubsof baxtis is true. for jutdop daxwex holds. with torzan never happy comes. "
    "question: is sabgar happy?\n"
)
CAUSAL = (
    "given dupyed is 17\n"
    "noise is 33-17=16\n"
    "set dupyed to 9\n"
    "from dupyed wumnem adds noise: 9+16=25\n"
    "from wumnem daxzan multiplies 3: 25*3=75\n"
    "from daxzan rovdel subtracts 19: 75-19=56\n"
    "from rovdel gimraz subtracts 6: 56-6=50\n"
    "answer: 50\n"
)
BETWEEN = [7, 1, 4, 2, 1, 7, 4, 9]
SHUFFLED = ["b", "a", "d", "c", "f", "e"]


def records(count, *, families=stepbench.FAMILIES, chosen=stepbench.SPLITS, seed=3):
    return [generate(family, split, index, seed) for family in families for split in chosen for index in range(count)]


def written(family, prompt, lines, answer):
    """A record as a person would write it, its steps read from its solution."""
    solution = "".join(f"{line}\n" for line in [*lines, f"answer: {answer}"])
    record = Record(id="x", prompt=prompt, solution=solution, answer=answer, family=family, benchmark="stepbench")
    return replace(record, steps=segment(record, solution), meta={"n_steps": len(lines)})


BY_HAND = [
    ("arithmetic", "compute ((7+5)*3)-4\n", ["7+5=12", "12*3=36", "36-4=32"], "32"),
    ("arithmetic", "what is 4+(3*(7-5))?\n", ["7-5=2", "3*2=6", "4+6=10"], "10"),
    (
        "arithmetic",
        "is ((7+5)*3)-4 greater than 30?\n",
        ["7+5=12", "12*3=36", "36-4=32", "compare 32 with 30: larger"],
        "yes",
    ),
    ("arithmetic", "is 36/(2+2) less than 9?\n", ["2+2=4", "36/4=9", "compare 9 with 9: equal"], "no"),
    (
        "arithmetic",
        "story: mibpus has 7 figs. kelvek has 9 pears. it is day 3 of the month. mibpus finds 5. kelvek eats 2. "
        "mibpus splits them into 4 piles and keeps one. does mibpus have more than 3 figs?\n",
        [
            "given mibpus has 7 figs",
            "finds 5: 7+5=12",
            "splits them into 4 piles and keeps one: 12/4=3",
            "compare 3 with 3: equal",
        ],
        "no",
    ),
    (
        "deduction",
        "facts: with wumpus torvex comes. for daxlom wumpus holds. by torvex always red holds. question: is daxlom red?\n",
        ["for daxlom wumpus", "from wumpus torvex", "from torvex always red", "so daxlom is always red"],
        "true",
    ),
    (
        "deduction",
        "facts: from wumpus never red follows. of daxlom wumpus is true. by torvex always red holds. "
        "question: is daxlom red?\n",
        ["for daxlom wumpus", "from wumpus never red", "so daxlom is never red"],
        "false",
    ),
    (
        "deduction",
        "facts: with wumpus torvex comes. in daxlom wumpus is found. by zibnix always red holds. question: is daxlom red?\n",
        ["for daxlom wumpus", "from wumpus torvex", "from torvex nothing"],
        "unknown",
    ),
    (
        "causal",
        "model: with zibbor moxnem adds 4. zibbor equals 3. by moxnem talvek multiplies 2. question: what is talvek?\n",
        ["given zibbor is 3", "from zibbor moxnem adds 4: 3+4=7", "from moxnem talvek multiplies 2: 7*2=14"],
        "14",
    ),
    (
        "causal",
        "model: from zibbor moxnem adds 4. zibbor is 3. from moxnem talvek multiplies 2. "
        "question: if we set moxnem to 5, what is talvek?\n",
        ["set moxnem to 5", "from moxnem talvek multiplies 2: 5*2=10"],
        "10",
    ),
    (
        "causal",
        "model: zibbor is 3. by zibbor moxnem adds noise. with moxnem talvek multiplies 2. we saw moxnem is 9. "
        "question: what would talvek be if zibbor were 6?\n",
        [
            "given zibbor is 3",
            "noise is 9-3=6",
            "set zibbor to 6",
            "from zibbor moxnem adds noise: 6+6=12",
            "from moxnem talvek multiplies 2: 12*2=24",
        ],
        "24",
    ),
    ("arithmetic", "is 7+5 less than 20?\n", ["7+5=12", "compare 20 with 12: larger"], "yes"),
    ("arithmetic", "is 7+5 smaller than 9?\n", ["7+5=12", "compare 9 with 12: smaller"], "no"),
]


@pytest.mark.parametrize(("family", "prompt", "lines", "answer"), BY_HAND)
def test_the_check_agrees_with_problems_solved_by_hand(family, prompt, lines, answer):
    assert check(written(family, prompt, lines, answer)) == []


@pytest.mark.parametrize(("family", "prompt", "lines", "answer"), BY_HAND)
def test_the_check_refuses_a_wrong_answer_a_missing_step_and_a_wrong_number(family, prompt, lines, answer):
    assert check(written(family, prompt, lines, answer + "1"))
    assert check(written(family, prompt, lines[1:], answer))
    wrong = [re.sub(r"\d+$", lambda number: str(int(number[0]) + 1), line) for line in lines]
    assert wrong == lines or check(written(family, prompt, wrong, answer))


def test_the_check_refuses_moved_spans_and_foreign_labels():
    record = generate("causal", "test", 0)
    first, *rest = record.steps
    for bad in (replace(first, stop=first.stop - 1), replace(first, label="add"), replace(first, result="99")):
        assert check(replace(record, steps=(bad, *rest)))
    assert check(replace(record, meta={"n_steps": 1}))
    assert check(replace(record, answer="98"))
    second = replace(rest[0], start=rest[0].start + 1, text=rest[0].text[1:])
    assert any("is not at" in problem for problem in check(replace(record, steps=(first, second, *rest[1:]))))
    assert "cannot be solved" in check(replace(record, prompt="hello"))[0]


def test_every_generated_record_is_solved_again_from_its_prompt():
    assert [problem for record in records(500) for problem in check(record)] == []
    bare = [generate(family, "train", index, bare=True) for family in FAMILIES for index in range(300)]
    assert [problem for record in bare for problem in check(record)] == []


def test_a_bare_problem_is_as_hard_and_has_hardly_a_premise_to_spare():
    for index in range(300):
        bare, full = ([generate(family, "train", index, bare=bare) for family in FAMILIES] for bare in (True, False))
        assert [r.meta["difficulty"] for r in bare] == [r.meta["difficulty"] for r in full]
        arithmetic, deduction, causal = bare
        cited = [step for step in arithmetic.steps if step.label not in ("compare", "premise")]
        assert arithmetic.meta["form"].startswith("symbolic") or arithmetic.prompt.count(". ") == len(cited) + 1
        assert deduction.prompt.count(". ") == len(deduction.steps) - 1  # the last line is no premise
        upstream = {"observe": 0, "intervene": 3, "counterfactual": 0}[causal.meta["form"]]
        assert causal.prompt.count(". ") <= len(causal.steps) + upstream


def test_shipped_files_are_what_the_generator_writes(tmp_path):
    for path in stepbench.write_shipped(tmp_path):
        assert path.read_bytes() == (SHIPPED / path.name).read_bytes(), path.name
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in (SHIPPED / "card.md").read_text()


def test_generation_never_changes():
    assert generate("arithmetic", "train", 0).prompt == "compute (8*4)/4\n"
    assert generate("deduction", "train", 1, seed=5).prompt == DEDUCTION
    assert generate("causal", "longer", 2, seed=5).solution == CAUSAL
    draw = Draw("key", 1)
    assert [draw.between(0, 9) for _ in range(8)] == BETWEEN
    assert draw.shuffled("abcdef") == SHUFFLED


def test_training_never_shows_a_shipped_prompt(monkeypatch):
    seen = {record.prompt for family in stepbench.FAMILIES for record in islice(stepbench.train_records(family), 1500)}
    shipped = [record.prompt for split in stepbench.SHIPPED for record in stepbench.shipped_records(split)]
    assert len(set(shipped)) == len(shipped) == 3600
    assert not seen & set(shipped)

    second = generate("causal", "train", 1)
    monkeypatch.setattr(splits, "shipped_prompts", lambda _: {second.prompt})
    assert [record.id for record in islice(stepbench.train_records("causal"), 2)] == ["causal-train-0000", "causal-train-0002"]


@pytest.mark.parametrize("family", stepbench.FAMILIES)
def test_difficulties_and_forms_are_as_frequent_as_promised(family):
    sample = records(600, families=[family], chosen=["train"])
    forms = Counter(record.meta["form"] for record in sample)
    assert set(forms.values()) == {600 // len(forms)}
    assert {record.meta["difficulty"] for record in sample} == set(range(2, 7))
    assert {record.meta["difficulty"] for record in records(600, families=[family], chosen=["longer"])} == {7, 8, 9}


def test_labels_are_the_closed_list():
    found = {step.label for record in records(300) for step in record.steps}
    assert found == set(stepbench.LABELS)
    card = (SHIPPED / "card.md").read_text()
    assert all(f"`{label}`" in card for label in stepbench.LABELS)


def test_compare_is_balanced():
    answers = Counter(r.answer for r in records(4000, families=["arithmetic"], chosen=["train"]) if "compare" in r.meta["form"])
    assert set(answers) == {"yes", "no"}
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.04


def test_every_deduction_holds_the_property_its_negation_and_a_dead_end():
    for record in records(200, families=["deduction"]):
        facts, quality = record.prompt.split(" question: ")[0], record.prompt.split()[-1].rstrip("?")
        if record.split != "pairs":
            assert facts.count(f" always {quality} ") == facts.count(f" never {quality} ") == 1
        subjects = re.findall(r"(?:from|with|by) (\w+)", facts)
        categories = set(re.findall(r"(?:from|with|by|for|in|of) \w+ ((?!always)[a-z]{6}) ", facts))
        assert len(subjects) == len(set(subjects))
        assert len(categories - set(subjects)) == 1


def test_setting_a_variable_hides_everything_upstream():
    for record in records(300, families=["causal"], chosen=["test"]):
        if record.meta["form"] == "intervene":
            target = record.steps[0].text.split()[1]
            cause = re.search(rf" (\w+) {target} (?:adds|subtracts|multiplies)", record.prompt)[1]
            assert cause not in record.solution


def test_names_stand_after_one_space_and_only_the_novel_split_has_held_out_ones():
    for record in records(150):
        text = record.prompt + record.solution
        found = {word for word in re.findall(r"[a-z]{6}", text) if word in HELD_OUT | USUAL}
        assert found <= (HELD_OUT if record.split == "novel-names" else USUAL)
        assert all(text.count(name) == len(re.findall(rf"(?<=[a-z.,:] ){name}\b", text)) for name in found)
        assert found or record.meta["form"].startswith("symbolic")
        assert len({name[:3] for name in found}) == len({name[3:] for name in found}) == len(found)


def test_numbers_are_whole_small_and_plain():
    for record in records(300):
        numbers = re.findall(r"-?\d+(?:\.\d)?", re.sub(r"(?<=[\d)])-", " ", record.prompt + record.solution))
        assert all(number == str(int(number)) and 0 <= int(number) <= 99 for number in numbers)


def test_a_fifth_of_the_names_is_held_out_evenly():
    assert len(HELD_OUT) == 120
    assert len(HELD_OUT | USUAL) == 576
    assert set(Counter(name[:3] for name in HELD_OUT).values()) == set(Counter(name[3:] for name in HELD_OUT).values()) == {5}
    assert {name[:3] for name in HELD_OUT} == set(FIRST)
    assert {name[3:] for name in HELD_OUT} == set(SECOND)


@given(st.integers(0, 10**6), st.integers(1, 20), st.booleans())
def test_names_of_one_problem_share_no_piece(seed, count, held_out):
    names = draw_names(Draw(seed), count, held_out=held_out)
    assert len({name[:3] for name in names}) == len({name[3:] for name in names}) == count
    assert set(names) <= (HELD_OUT if held_out else USUAL)


@given(st.integers(), st.lists(st.integers()), st.lists(st.integers()))
def test_draws_keep_what_they_are_given(seed, one, two):
    draw = Draw(seed)
    assert sorted(draw.shuffled(one)) == sorted(one)
    merged = draw.merged([(0, item) for item in one], [(1, item) for item in two])
    assert [item for source, item in merged if source == 0] == one
    assert [item for source, item in merged if source == 1] == two


STORY_PROMPT = BY_HAND[4][1]
DEDUCTION_PROMPT = BY_HAND[6][1]
CAUSAL_PROMPT = BY_HAND[10][1]


@pytest.mark.parametrize(
    ("family", "line", "prompt", "label", "correct"),
    [
        ("arithmetic", "12*3=36", "", "multiply", True),
        ("arithmetic", "12*3=35", "", "multiply", False),
        ("arithmetic", "7/2=3", "", "divide", False),
        ("arithmetic", "7/0=0", "", "divide", False),
        ("arithmetic", "compare 3 with 3: smaller", "", "compare", False),
        ("arithmetic", "compare 3 with 3: equal", "", "compare", True),
        ("arithmetic", "compare 2 with 3: smaller", "", "compare", True),
        ("arithmetic", "compare 4 with 3: larger", "", "compare", True),
        ("arithmetic", "07+5=12", "", "other", None),
        ("arithmetic", "given zibbor is 3", "", "other", None),
        ("arithmetic", "given mibpus has 7 figs", "", "premise", None),
        ("arithmetic", "given mibpus has 7 figs", STORY_PROMPT, "premise", True),
        ("arithmetic", "given mibpus has 9 pears", STORY_PROMPT, "premise", False),
        ("arithmetic", "finds 5: 7+5=12", "", "add", True),
        ("arithmetic", "finds 5: 7+5=12", STORY_PROMPT, "add", True),
        ("arithmetic", "finds 5: 7+6=13", STORY_PROMPT, "add", False),
        ("arithmetic", "finds 5: 7+5=13", STORY_PROMPT, "add", False),
        ("arithmetic", "buys 5: 7+5=12", STORY_PROMPT, "add", False),
        ("deduction", "for daxlom wumpus", "", "premise", None),
        ("deduction", "for daxlom wumpus", DEDUCTION_PROMPT, "premise", True),
        ("deduction", "for daxlom torvex", DEDUCTION_PROMPT, "premise", False),
        ("deduction", "from torvex always red", DEDUCTION_PROMPT, "modus-ponens", True),
        ("deduction", "from wumpus always red", DEDUCTION_PROMPT, "modus-ponens", False),
        ("deduction", "from wumpus torvex", DEDUCTION_PROMPT, "modus-ponens", False),
        ("deduction", "from wumpus torvex", BY_HAND[7][1], "modus-ponens", True),
        ("deduction", "from wumpus never red", DEDUCTION_PROMPT, "negation", True),
        ("deduction", "so daxlom is never red", DEDUCTION_PROMPT, "conclude", True),
        ("deduction", "so daxlom is always red", DEDUCTION_PROMPT, "conclude", False),
        ("deduction", "from wumpus nothing", DEDUCTION_PROMPT, "no-rule", False),
        ("deduction", "from zibnix nothing", DEDUCTION_PROMPT, "no-rule", False),
        ("deduction", "from torvex nothing", BY_HAND[7][1], "no-rule", True),
        ("causal", "noise is 9-3=6", CAUSAL_PROMPT, "abduce", True),
        ("causal", "noise is 9-3=5", CAUSAL_PROMPT, "abduce", False),
        ("causal", "set zibbor to 6", CAUSAL_PROMPT, "intervene", True),
        ("causal", "set zibbor to 5", CAUSAL_PROMPT, "intervene", False),
        ("causal", "set moxnem to 5", BY_HAND[9][1], "intervene", True),
        ("causal", "given zibbor is 3", CAUSAL_PROMPT, "premise", True),
        ("causal", "given zibbor is 3", BY_HAND[8][1], "premise", True),
        ("causal", "from zibbor moxnem adds noise: 6+6=12", CAUSAL_PROMPT, "add", True),
        ("causal", "from zibbor moxnem adds noise: 6*6=36", CAUSAL_PROMPT, "multiply", False),
        ("causal", "from moxnem talvek multiplies 2: 12*2=24", CAUSAL_PROMPT, "multiply", True),
        ("causal", "from moxnem talvek multiplies 2: 12*3=36", CAUSAL_PROMPT, "multiply", False),
        ("causal", "from moxnem talvek multiplies 3: 12*3=36", CAUSAL_PROMPT, "multiply", False),
        ("causal", "from moxnem talvek multiplies 3: 12*3=36", "", "multiply", True),
        ("geometry", "7+5=12", "", "other", None),
    ],
)
def test_a_line_is_labelled_and_judged_by_itself(family, line, prompt, label, correct):
    reading = read_line(line, family, prompt)
    assert (reading.label, reading.correct) == (label, correct)
    assert label_line(line, family) == label


def test_rules_that_go_in_circles_end():
    prompt = "facts: from wumpus torvex follows. from torvex wumpus follows. for daxlom wumpus holds. question: is it red?\n"
    assert read_line("so daxlom is always red", "deduction", prompt).correct is False


@pytest.mark.parametrize(("family", "split", "listed"), [("logic", "test", "deduction"), ("causal", "dev", "novel-names")])
def test_unknown_families_and_splits_are_named_with_those_there_are(family, split, listed):
    with pytest.raises(UsageError, match=listed):
        generate(family, split, 0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("family", FAMILIES)
def test_operation_pairs_differ_in_one_token_and_in_the_operation_of_one_step(family, tokenizer):
    for first, second in pairs(family, "operation"):
        step = first.meta["pair_step"]
        assert check(first) == check(second) == []
        one, two = (tokenizer(record.prompt)["input_ids"] for record in (first, second))
        assert len(one) == len(two)
        assert sum(a != b for a, b in zip(one, two, strict=True)) == 1
        labels = [[each.label for each in record.steps] for record in (first, second)]
        assert [n for n, (a, b) in enumerate(zip(*labels, strict=True)) if a != b] == [step]
        assert first.meta["form"] == second.meta["form"] or {first.meta["form"], second.meta["form"]} == {"proved", "refuted"}


@pytest.mark.parametrize("family", FAMILIES)
def test_content_pairs_share_every_operation_and_no_content_word(family):
    for first, second in pairs(family, "content"):
        assert check(first) == check(second) == []
        assert [step.label for step in first.steps] == [step.label for step in second.steps]
        words = [content_words(record.prompt) for record in (first, second)]
        assert all(words)
        assert not words[0] & words[1]
        names = [{word for word in re.findall(r"[a-z]{6}", record.prompt) if word in USUAL} for record in (first, second)]
        assert not names[0] & names[1]
        assert first.meta["pair_step"] is None
        assert not first.meta["form"].startswith("symbolic")


def pairs(family, kind):
    """The shipped pairs of one kind."""
    chosen = [r for r in stepbench.shipped_records("pairs") if r.family == family and r.meta["pair_kind"] == kind]
    found = list(zip(chosen[::2], chosen[1::2], strict=True))
    assert len(found) == 75
    assert all(first.meta["pair"] == second.meta["pair"] for first, second in found)
    return found
