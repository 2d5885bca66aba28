import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ling_probe import stepbench
from ling_probe.benchmarks import files, read_benchmark
from ling_probe.errors import BenchmarkError, UsageError

DATASETS = Path(__file__).parents[1] / "datasets"


@pytest.fixture
def write(tmp_path):
    """Write JSON lines, or raw lines as they are, to a file."""

    def write(*lines, name="prompts.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        path.write_bytes(text)
        return path

    return write


def fails(path, **options):
    with pytest.raises(BenchmarkError) as raised:
        read_benchmark(path, **options)
    return str(raised.value)


@pytest.mark.parametrize("split", stepbench.SHIPPED)
def test_stepbench_reads_as_it_was_generated(split):
    benchmark = read_benchmark("stepbench", split=split)
    assert list(benchmark.records) == stepbench.shipped_records(split)
    assert (benchmark.name, benchmark.split) == ("stepbench", split)
    assert benchmark.digest == hashlib.sha256((DATASETS / "stepbench" / f"{split}.jsonl").read_bytes()).hexdigest()


def test_a_path_reads_the_same_as_the_name():
    by_name = read_benchmark("stepbench", split="longer")
    assert read_benchmark(DATASETS / "stepbench" / "longer.jsonl") == by_name
    assert read_benchmark(DATASETS / "stepbench", split="longer") == by_name


def test_an_installed_package_finds_its_benchmarks(write, monkeypatch):
    path = write({"prompt": "p"}, name="tinybench/test.jsonl")
    monkeypatch.setattr(files, "_HOMES", (path / "absent", path.parents[1]))
    record = read_benchmark("tinybench").records[0]
    assert (record.id, record.benchmark, record.split) == ("test-0001", "tinybench", "test")


def test_foreign_fields_are_read_by_the_names_given(write):
    path = write({"problem": "1+1?", "gold": 2, "why": "because", "level": 3, "steps": ["a", "b"]}, b"", {"problem": "2?"})
    first, second = read_benchmark(path, prompt_field="problem", answer_field="gold", solution_field="why").records
    assert (first.prompt, first.answer, first.solution, first.family) == ("1+1?", "2", "because", "")
    assert first.meta == {"level": 3, "steps": ["a", "b"]}
    assert (first.id, second.id, second.answer, second.benchmark) == ("prompts-0001", "prompts-0003", "", "prompts")


def test_steps_are_read_from_their_spans(write):
    step = {"label": "sum", "start": 2, "stop": 4, "text": "ignored"}
    (record,) = read_benchmark(write({"prompt": "p", "solution": "a\nb\nc", "steps": [step]})).records
    assert [(s.label, s.text, s.inputs, s.correct) for s in record.steps] == [("sum", "b", (), True)]


def test_answers_that_are_no_strings_are_written_as_json(write):
    path = write({"prompt": "p", "answer": True}, {"prompt": "p", "answer": 2.5}, {"prompt": "p", "answer": None})
    assert [record.answer for record in read_benchmark(path).records] == ["true", "2.5", ""]


def test_a_byte_order_mark_and_windows_line_ends_are_read(write):
    path = write(b'\xef\xbb\xbf{"prompt": "one"}\r', b'{"prompt": "two"}\r')
    assert [record.prompt for record in read_benchmark(path).records] == ["one", "two"]


def test_a_limit_takes_from_each_family_in_turn(write):
    path = write(*({"prompt": "p", "id": f"{family}{i}", "family": family} for family in "ab" for i in range(4)))
    assert [record.id for record in read_benchmark(path, limit=3).records] == ["a0", "a1", "b0"]
    assert len(read_benchmark(path, limit=99).records) == 8
    with pytest.raises(UsageError, match="limit of 0"):
        read_benchmark(path, limit=0)


GOOD = {"prompt": "p"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', "line 2: not JSON"),
        (b"\xff\xfe" * 5000, "line 2: not UTF-8 text at byte 0"),
        (b"x" * 100000, "line 2: not JSON"),
        (b"[" * 100000, "line 2: not JSON"),
        (b"[1, 2]", "line 2: a JSON list where an object was expected"),
        ({"problem": "q", "answer": "a"}, '(found: "problem", "answer"); name it with --prompt-field'),
        ({"k" * 500: "q"}, 'found: "' + "k" * 60 + '..."'),
        ({str(i): i for i in range(99)}, '"7", ...); name it'),
        ({}, "(found: nothing)"),
        ({"prompt": ["p"]}, 'field "prompt" is a JSON list; text is expected'),
        ({"prompt": ""}, 'field "prompt" is empty'),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": "p", "id": "prompts-0001"}, 'id "prompts-0001" was used on line 1'),
        ({"prompt": "p", "solution": "a", "steps": [{"label": "x", "start": 0, "stop": 9}]}, "within the 1 characters"),
        ({"prompt": "p", "solution": "a", "steps": [{"start": 0, "stop": 1}]}, "does not have a label"),
        ({"prompt": "p", "solution": "a", "steps": [{"label": "x", "start": 0, "stop": 1, "inputs": 3}]}, "list of inputs"),
    ],
)
def test_a_bad_line_is_named_and_never_echoed_whole(write, line, message):
    said = fails(write(GOOD, line))
    assert message in said
    assert "line 2" in said
    assert "\n" not in said
    assert len(said) < 600


def test_what_is_missing_is_said_with_what_there_is(write, tmp_path):
    assert "longer, novel-names, pairs, test" in fails("stepbench", split="dev")
    assert "stepbench" in fails("gsm9k")
    assert "a .jsonl file" in fails(tmp_path / "absent.jsonl")
    assert "holds no records" in fails(write(b"", b"  "))
    assert "cannot be read: File name too long" in fails("x" * 5000)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary() | st.from_regex(rb'\{"prompt": "[a-z]*", "steps": \[\{"start": [0-9]\}\]\}'), max_size=4))
def test_any_bytes_give_records_or_one_clear_line(tmp_path, lines):
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    said = ""
    try:
        assert read_benchmark(path).records
    except BenchmarkError as error:
        said = str(error)
    assert "\n" not in said


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(min_size=1), st.text(), st.text()), min_size=1))
def test_texts_come_back_exactly(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "solution": s, "answer": a}) for p, s, a in rows))
    assert [(r.prompt, r.solution, r.answer) for r in read_benchmark(path).records] == rows
