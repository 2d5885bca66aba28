import json

import pytest
from records import RECORDS

from ling_probe.benchmarks import FORMATS, answer_of, read_benchmark
from ling_probe.benchmarks.operations import read_operations
from ling_probe.errors import BenchmarkError, UsageError
from ling_probe.steps import judge, segment


@pytest.fixture
def read(tmp_path):
    """Read objects as one JSON lines file."""

    def read(*values, name="made.jsonl", **options):
        path = tmp_path / name
        path.write_text("\n".join(value if isinstance(value, str) else json.dumps(value) for value in values))
        return read_benchmark(path, **options)

    return read


def fails(read, *values, **options):
    with pytest.raises(BenchmarkError) as raised:
        read(*values, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_there_is_a_record_of_every_format():
    assert set(RECORDS) == set(FORMATS)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_recognised_by_its_fields_and_by_no_other_format(name, read):
    fitting = [each.name for each in FORMATS.values() if not each.lacks(RECORDS[name]) and each.fits(RECORDS[name])]
    assert fitting == [name]
    found = read(RECORDS[name])
    assert (found.format, found.records[0].format) == (name, name)
    assert found == read(RECORDS[name], format=name)


@pytest.mark.parametrize("name", RECORDS)
def test_steps_are_exact_spans_and_the_answer_is_found_in_the_solution(name, read):
    (record,) = read(RECORDS[name]).records
    reached = 0
    for step in record.steps:
        assert reached == step.start < step.stop
        assert record.solution[step.start : step.stop].rstrip("\n") == step.text
        reached = step.stop
    assert not record.steps or segment(record, record.solution) == record.steps
    if record.answer and record.correct is None:
        assert judge(record, record.solution, generated=True)[1] is True
        assert judge(record, record.solution.replace(record.answer, "nothing"), generated=True)[1] is False


def shape(record):
    return [(step.label, step.text) for step in record.steps]


def test_gsm8k_is_read_without_calculator_marks_and_labelled_by_them(read):
    (record,) = read(RECORDS["gsm8k"]).records
    assert record.prompt == "Mira has 7 pens and buys 2 boxes of 6. How many has she?\n"
    assert record.solution == "She buys 2*6=12 pens.\nSo she has $19 in all.\nThat is it.\n#### 19"
    assert [(step.label, step.inputs, step.result) for step in record.steps] == [
        ("multiply", ("2", "6"), "12"),
        ("add", ("7", "12"), "19"),
        ("other", (), ""),
    ]
    assert record.answer == "19"
    assert record.meta == {}


def test_several_operations_calculate_and_one_repeated_keeps_its_name(read):
    lines = [
        "a <<8-3-1=4>>4",
        "b <<8-3*2=2>>2",
        "c <<9/3=3>>3 and <<3+1=4>>4",
        "d 5 pens + 6 pens = 11 pens",
        "e <<-5+2=-3>>-3",
    ]
    (record,) = read({"question": "q", "answer": "\n".join(lines) + "\n#### 1,200"}).records
    assert [step.label for step in record.steps] == ["subtract", "calculate", "calculate", "add", "add"]
    assert record.answer == "1,200"
    assert judge(record, "so the total is 1200.00\n", generated=True) == ("1200.00", True)


def test_a_sub_question_is_a_step_of_its_own(read):
    (record,) = read(RECORDS["gsm8k-socratic"]).records
    assert shape(record) == [
        ("ask", "How many does she buy?"),
        ("multiply", "She buys 12."),
        ("ask", "How many in all?"),
        ("add", "7 + 12 = 19"),
    ]
    assert " ** " not in record.solution
    assert "<<" not in record.solution


def test_another_text_about_gsm8k_is_labelled_by_rules_and_judged_by_nobody(read):
    (record,) = read(RECORDS["gsm8k"]).records
    steps = segment(record, "Boxes: 2 x 6 = 12\nfine\n\n7 + 12 = 20\n#### 20")
    assert [step.label for step in steps] == ["multiply", "other", "add", "answer"]
    assert {step.correct for step in steps} == {None}


def test_svamp_is_one_labelled_equation(read):
    (record,) = read(RECORDS["svamp"]).records
    assert (record.id, record.prompt) == ("made-1", "Tom had 9 figs. He ate 4, How many are left?\n")
    assert shape(record) == [("subtract", "( 9.0 - 4.0 ) = 5")]
    assert (record.answer, record.meta) == ("5", {"Type": "Subtraction"})


def test_math_takes_the_field_for_the_answer_or_else_the_box(read):
    given = RECORDS["math"]
    assert read(given).records[0].answer == "\\frac{1}{3}"
    (record,) = read(given | {"answer": "\\dfrac13"}).records
    assert (record.answer, record.family, record.meta) == ("\\dfrac13", "Prealgebra", {"level": "Level 1"})
    assert judge(record, record.solution, generated=True) == ("\\frac{1}{3}", True)


def test_processbench_knows_the_first_wrong_step_and_nothing_after_it(read):
    (record,) = read(RECORDS["processbench"]).records
    assert [step.correct for step in record.steps] == [True, False, None]
    assert (record.correct, record.predicted, record.answer, record.family) == (False, "8", "", "omnimath")
    assert record.solution == "\n\n".join(RECORDS["processbench"]["steps"])
    assert judge(record, record.solution, generated=False) == ("8", False)
    right = RECORDS["processbench"] | {"label": -1, "final_answer_correct": True}
    assert [step.correct for step in read(right).records[0].steps] == [True] * 3
    assert "the first wrong of 3 steps" in fails(read, RECORDS["processbench"] | {"label": 3})


def test_arc_reads_as_published_and_as_on_the_hub(read):
    here = RECORDS["arc"]
    hub = {
        "id": "made_1",
        "question": "What melts ice?",
        "choices": {"text": ["cold", "heat"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    assert read(here).records == read(hub).records
    assert read(here).records[0].prompt == "What melts ice?\nA. cold\nB. heat\n"
    assert "texts with their labels" in fails(read, here | {"question": {"stem": "s", "choices": [{"text": "cold"}]}})


def test_a_prontoqa_proof_tells_premises_from_inferences(read):
    (record,) = read(RECORDS["prontoqa"]).records
    assert [step.label for step in record.steps] == ["premise", "premise", "modus-ponens", "premise", "negation"]
    assert (record.answer, record.solution.splitlines()[-1]) == ("False", "answer: False")
    assert "one of the options A, B" in fails(read, RECORDS["prontoqa"] | {"answer": "C"})


def test_an_entailment_ends_in_its_hypothesis_which_is_not_in_the_prompt(read):
    (record,) = read(RECORDS["entailmentbank"]).records
    assert record.prompt.splitlines()[:2] == ["sent1: ice is water", "sent2: water can flow"]
    assert "ice can move" not in record.prompt
    assert [(step.label, step.inputs, step.result) for step in record.steps] == [
        ("entail", ("sent1", "sent2"), "int1"),
        ("conclude", ("int1", "sent3"), "hypothesis"),
    ]
    assert record.steps[1].text.endswith("-> hypothesis: ice can move")
    assert 'an inference "sent1' in fails(read, RECORDS["entailmentbank"] | {"proof": "sent1; "})


def test_folio_and_bbh_ask_and_have_no_steps(read):
    (folio,) = read(RECORDS["folio"]).records
    asked = "Is the following statement true, false or uncertain? Tom purrs."
    assert (folio.prompt, folio.steps) == (f"All cats purr.\nTom is a cat.\n{asked}\n", ())
    assert read(RECORDS["folio"] | {"premises": "All cats purr.\nTom is a cat. "}).records[0].prompt == folio.prompt
    assert judge(folio, "It is unknown.", generated=True) == ("unknown", False)
    (bbh,) = read(RECORDS["bbh"]).records
    assert (bbh.family, bbh.solution) == ("navigate", "answer: Yes\n")


def test_bbh_is_read_from_the_file_it_is_published_in(tmp_path, read):
    path = tmp_path / "navigate.json"
    path.write_text(json.dumps({"canary": "x", "examples": [{"input": "a", "target": "(A)"}, {"input": "b", "target": "(B)"}]}))
    found = read_benchmark(path)
    assert [(record.id, record.answer) for record in found.records] == [("navigate-0001", "(A)"), ("navigate-0002", "(B)")]
    assert judge(found.records[1], "So the answer is B.", generated=True) == ("B.", True)
    path.write_text('{"rows": 1}')
    assert "a list of records" in fails(lambda: read_benchmark(path))


def test_cladder_steps_have_their_kind_and_may_have_several_lines(read):
    (record,) = read(RECORDS["cladder"]).records
    assert record.prompt == "X causes Y. P is 40%. Does X raise Y?\n"
    assert [step.label for step in record.steps] == ["variables", "graph", "query", "data", "conclude"]
    assert record.steps[3].text == "P(Y)=0.4\nP(X)=0.1"
    assert (record.family, record.answer, record.meta["meta"]["rung"]) == ("ate", "no", 2)
    assert read(RECORDS["cladder"] | {"reasoning": None}).records[0].solution == "answer: no\n"


@pytest.mark.parametrize(
    ("text", "prompt", "rest"),
    [("A title\nA body.\n", "A title\n", "A body.\n"), ("\n\n one\ntwo", "\n\n one\n", "two"), ("one line", "one line", ""),
     ("\ufeffa\r\nb", "a\r\n", "b")],
)  # fmt: skip
def test_a_document_is_read_whole(tmp_path, text, prompt, rest):
    path = tmp_path / "story.txt"
    path.write_bytes(text.encode())
    (record,) = read_benchmark(path).records
    assert (record.prompt, record.solution, record.answer) == (prompt, rest, "")


def test_a_document_of_nothing_or_of_no_text_is_refused(tmp_path):
    path = tmp_path / "story.txt"
    for payload, message in ((b" \n\n", "the prompt is empty"), (b"ab\xff", "not UTF-8 text at byte 2")):
        path.write_bytes(payload)
        with pytest.raises(BenchmarkError, match=message):
            read_benchmark(path)


def test_what_fits_nothing_is_named_with_what_there_is(read):
    said = fails(read, {"problem": "p", "solution": "no box"})
    assert 'line 1: no field "prompt", and no known format (found: "problem", "solution")' in said
    assert "--prompt-field" in said
    assert "--format (gsm8k," in said
    assert 'field "question" is not as gsm8k has it (found: "problem")' in fails(read, {"problem": "p"}, format="gsm8k")
    assert "line 2: field" in fails(read, RECORDS["gsm8k"], {"question": "q"})
    assert "ends its solutions with ####" in fails(read, {"question": "q", "answer": "12"}, format="gsm8k")
    with pytest.raises(UsageError, match='no format "gsm9k"; these there are: plain, gsm8k'):
        read(RECORDS["gsm8k"], format="gsm9k")
    with pytest.raises(UsageError, match="format gsm8k knows its fields"):
        read(RECORDS["gsm8k"], format="gsm8k", prompt_field="question")


def test_a_record_that_could_be_two_kinds_asks_which(read):
    both = RECORDS["folio"] | RECORDS["bbh"]
    assert "could be bbh or folio; say which with --format" in fails(read, both)
    assert read(both, format="folio").records[0].answer == "True"


def test_a_prompt_makes_a_record_plain_whatever_else_it_has(read):
    assert read(RECORDS["gsm8k"] | {"prompt": "p"}).format == "plain"
    found = read(RECORDS["gsm8k"], prompt_field="question", solution_field="answer", answer_field="none")
    assert (found.format, found.records[0].solution) == ("plain", RECORDS["gsm8k"]["answer"])


def test_skipping_counts_what_cannot_be_read_and_keeps_the_first_messages(read):
    lines = ["{not json", {"odd": 1}, RECORDS["gsm8k"], *[{"question": "q"}] * 6, RECORDS["gsm8k"]]
    assert "line 1: not JSON" in fails(read, *lines)
    found = read(*lines, on_error="skip")
    assert [record.id for record in found.records] == ["made-0003", "made-0010"]
    assert (found.skipped, len(found.problems)) == (8, 5)
    assert "made.jsonl line 1: not JSON" in found.problems[0]
    assert found.describe() == {
        "name": "made", "split": "", "digest": found.digest, "records": 2, "format": "gsm8k", "skipped": 8,
        "problems": list(found.problems),
    }  # fmt: skip
    assert "holds no records that can be read; the first: " in fails(read, "{", on_error="skip")
    with pytest.raises(UsageError, match='"stop" or "skip"'):
        read(*lines, on_error="maybe")


def test_a_plain_benchmark_is_described_as_before(read):
    found = read({"prompt": "p"})
    assert found.describe() == {"name": "made", "split": "", "digest": found.digest, "records": 1}


HOSTILE = [
    None,
    True,
    3,
    1e300,
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    "",
    "\ud800",
    "#### x",
    "x" * 99,
    ["\ud800"],
    {"text": [1], "label": []},
]


@pytest.mark.parametrize("name", RECORDS)
def test_a_field_of_another_kind_gives_a_record_or_one_clear_line(name, read):
    outcomes = set()
    for field in RECORDS[name]:
        for value in HOSTILE:
            try:
                said = read(RECORDS[name] | {field: value}, format=name).name
            except BenchmarkError as error:
                said = str(error)
            outcomes.add("line 1: " in said)
            assert "\n" not in said
            assert len(said) < 600
    assert True in outcomes


ANSWERS = [
    ("gsm8k", "I get 3, no:\n#### 1,018\nthanks", "1,018"),
    ("gsm8k", "#### Step 1\nso **Answer:** $12.50", "$12.50"),
    ("gsm8k", "so we have 4 apples and 7.", "7"),
    ("gsm8k", "nothing", None),
    ("math", "first \\boxed{1} then \\boxed{ {a}_{b} }", "{a}_{b}"),
    ("math", "open \\boxed{1 and", None),
    ("math", "the answer is $x^2$", "$x^2$"),
    ("arc", "A dog is a pet. The answer is (C).", "C"),
    ("arc", "thinking\n**B**\n", "B"),
    ("arc", "the answer is a dog", None),
    ("prontoqa", "true at first, but it is False.", "False"),
    ("prontoqa", "Answer: True. It is not false.", "True"),
    ("cladder", "no wonder. answer: yes", "yes"),
    ("bbh", "So the answer is (B).", "(B)."),
    ("reasoning-gym", "<answer>1</answer> or <answer> 2\n</answer>", "2"),
    ("plain", "Answer: 3\nanswer: 4\n", "4"),
]


@pytest.mark.parametrize(("name", "text", "answer"), ANSWERS)
def test_an_answer_is_found_in_the_form_of_its_format(name, text, answer):
    found = answer_of(name).find(text)
    assert (found.text if found else None) == answer


SAME = [
    ("gsm8k", "$1,200", "1200", True), ("gsm8k", "1200.5", "1200", False), ("gsm8k", "twelve", "12", False),
    ("math", "\\left( 3, \\dfrac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})", True), ("math", "10,000", "10000", True),
    ("math", "90^\\circ", "90", True), ("math", "(1,2)", "(12)", False), ("math", "\\text{no}", "no", True),
    ("bbh", "(b).", "(B)", True), ("bbh", "b", "(B)", True), ("bbh", "c", "(B)", False),
    ("folio", "unknown", "Uncertain", True),
    ("folio", "true", "False", False), ("plain", "a ", "a", True), ("plain", "A", "a", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "found", "expected", "same"), SAME)
def test_answers_are_the_same_but_for_how_they_are_written(name, found, expected, same):
    assert answer_of(name).same(found, expected) is same


def test_looking_for_answers_takes_no_longer_in_a_hostile_text():
    for text in (
        "\\boxed{" * 20000,
        "answer is " * 20000,
        "1" * 100000,
        "####" * 30000,
        "<answer>" * 20000,
        "2 x " * 30000 + "=",
    ):
        for answer in {answer_of(name) for name in FORMATS}:
            answer.find(text)
        read_operations(text)
