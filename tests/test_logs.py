import json
import struct
import tracemalloc
import zipfile

import pytest
from records import RECORDS

from ling_probe.benchmarks import archive, read_benchmark
from ling_probe.errors import BenchmarkError

SAMPLE = RECORDS["inspect"]
HEADER = {"version": 2, "eval": {"task": "sums", "model": "m"}}


@pytest.fixture
def log(tmp_path):
    """Write an Inspect log: members by name, objects as JSON."""

    def write(members, *, method=zipfile.ZIP_DEFLATED, header=HEADER):
        path = tmp_path / "a.eval"
        with zipfile.ZipFile(path, "w", method) as file:
            for name, value in ({"header.json": header} | members).items():
                file.writestr(name, value if isinstance(value, bytes) else json.dumps(value))
        return path

    return write


def fails(path, **options):
    with pytest.raises(BenchmarkError) as raised:
        read_benchmark(path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_an_inspect_log_gives_what_was_asked_said_and_judged(log):
    second = SAMPLE | {"epoch": 2, "scores": {"match": {"value": "I", "answer": "8"}}}
    found = read_benchmark(log({"samples/7_epoch_1.json": SAMPLE, "samples/7_epoch_2.json": second, "summaries.json": []}))
    first, again = found.records
    assert (found.name, found.format, first.id, again.id) == ("sums", "inspect", "7", "7-epoch-2")
    assert first.messages == (("system", "Be brief."), ("user", "What is 3+4?"))
    assert first.prompt == "system: Be brief.\n\nuser: What is 3+4?\n\n"
    assert first.solution == "3+4=7\nANSWER: 7"
    assert [(each.answer, each.predicted, each.correct) for each in (first, again)] == [("7", "7", True), ("7", "8", False)]
    assert first.meta["scores"] == SAMPLE["scores"]


def test_the_same_log_as_json_gives_the_same_records(log, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(HEADER | {"samples": [SAMPLE]}))
    assert read_benchmark(path).records == read_benchmark(log({"samples/7_epoch_1.json": SAMPLE})).records


@pytest.mark.parametrize(
    ("value", "correct"),
    [("C", True), ("I", False), ("P", None), ("N", False), (1, True), (0.0, False), (0.5, None), (True, True), ([1], None)],
)
def test_a_verdict_is_right_wrong_or_nothing(log, value, correct):
    path = log({"samples/1.json": SAMPLE | {"scores": {"s": {"value": value}}}})
    assert read_benchmark(path).records[0].correct is correct


def test_reasoning_and_texts_stored_apart_are_part_of_the_completion(log):
    content = [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "attachment://abc"}]
    output = {"choices": [{"message": {"role": "assistant", "content": content}}]}
    sample = {"id": "a", "input": "q", "target": ["4", "four"], "output": output, "attachments": {"abc": "it is 4"}}
    (record,) = read_benchmark(log({"samples/1.json": sample})).records
    assert (record.prompt, record.solution) == ("q\n", "<think>\nhm\n</think>\n\nit is 4")
    assert (record.answer, record.correct, record.meta["target"]) == ("4", None, ["4", "four"])
    assert "stored apart" in fails(log({"samples/1.json": sample | {"attachments": {}}}))


def test_a_sample_that_failed_is_named_or_skipped(log):
    broken = SAMPLE | {"id": 8, "output": {}, "error": {"message": "timed out"}}
    path = log({"samples/7.json": SAMPLE, "samples/8.json": broken, "samples/9.json": b"{"})
    assert 'member "samples/8.json": the sample has no completion (timed out)' in fails(path)
    found = read_benchmark(path, on_error="skip")
    assert (len(found.records), found.skipped) == (1, 2)


def test_members_outside_the_samples_are_never_looked_at(log, tmp_path):
    path = log({"samples/7.json": SAMPLE, "../evil.json": b"x", "/etc/samples/x.json": b"x", "samples/notes.txt": b"x"})
    assert len(read_benchmark(path).records) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.eval"]
    inside = read_benchmark(log({"samples/../../evil.json": SAMPLE}))
    assert len(inside.records) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.eval"]


def test_a_member_that_unpacks_to_too_much_is_refused(log, monkeypatch):
    path = log({"samples/7.json": SAMPLE | {"padding": "0" * 100_000}})
    monkeypatch.setattr(archive, "MEMBER_BYTES", 50_000)
    assert "at most 50,000 are read" in fails(path)
    monkeypatch.setattr(archive, "TOTAL_BYTES", 90_000)
    assert "unpacks to 100," in fails(path)


def test_a_member_that_lies_about_its_size_is_never_unpacked_whole(log):
    path = log({"samples/7.json": SAMPLE | {"padding": "0" * 12_000_000}})
    payload = bytearray(path.read_bytes())
    entry = payload.rindex(b"PK\x01\x02")
    payload[entry + 24 : entry + 28] = struct.pack("<I", 10)
    path.write_bytes(payload)
    tracemalloc.start()
    try:
        assert "is damaged" in fails(path)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_packing_that_python_cannot_unpack_is_said_in_one_line(log):
    path = log({"samples/7.json": SAMPLE})
    payload = bytearray(path.read_bytes())
    entry = payload.rindex(b"PK\x01\x02")
    payload[entry + 10 : entry + 12] = struct.pack("<H", 99)
    path.write_bytes(payload)
    assert "packed with method 99, which this Python cannot unpack" in fails(path)


def test_zstd_is_unpacked_where_this_python_can_and_else_called_by_its_name(log):
    if zstd := getattr(zipfile, "ZIP_ZSTANDARD", None):
        assert len(read_benchmark(log({"samples/7.json": SAMPLE}, method=zstd)).records) == 1
        return
    path = log({})
    payload = bytearray(path.read_bytes())
    entry = payload.rindex(b"PK\x01\x02")
    payload[entry + 10 : entry + 12] = struct.pack("<H", 93)
    path.write_bytes(payload)
    assert "packed with zstd" in fails(path)


def test_damaged_logs_give_one_clear_line(log, tmp_path):
    path = log({"samples/7.json": SAMPLE})
    payload = path.read_bytes()
    said = []
    for place in range(0, len(payload), 11):
        path.write_bytes(payload[:place] + bytes([payload[place] ^ 0x55]) + payload[place + 1 :])
        try:
            assert read_benchmark(path).records
        except BenchmarkError as error:
            said.append(str(error))
    assert len(said) > 20
    assert not any("\n" in each for each in said)
    path.write_bytes(b"not a zip")
    assert "a zip of JSON is expected" in fails(path)
    assert "holds no records" in fails(log({}))


LM = RECORDS["lm-eval"]


@pytest.fixture
def samples(tmp_path):
    def write(*values):
        path = tmp_path / "samples_sums.jsonl"
        path.write_text("\n".join(map(json.dumps, values)))
        return path

    return write


def test_a_harness_sample_gives_what_was_asked_said_and_judged(samples):
    (record,) = read_benchmark(samples(LM)).records
    assert (record.id, record.prompt, record.solution) == ("4", "Q: 3+4\nA:", " 3+4=8. The answer is 8")
    assert (record.answer, record.predicted, record.correct) == ("7", "8", False)
    assert record.meta["doc"] == {"q": "3+4"}
    older = LM | {"arguments": [["Q: 3+4\nA:", {"until": []}]]}
    assert read_benchmark(samples(older)).records == (record,)


def test_answers_judged_through_another_filter_are_read_once(samples):
    other = LM | {"filter": "flexible", "exact_match": 1.0}
    found = read_benchmark(samples(LM, other, LM | {"doc_id": 5}, other | {"doc_id": 5}))
    assert [(record.id, record.correct) for record in found.records] == [("4", False), ("5", False)]
    assert found.skipped == 0


def test_of_a_multiple_choice_the_likeliest_continuation_is_what_the_model_said(samples):
    values = {
        "doc_id": 0, "doc": {}, "target": 0, "acc": 0.0, "filter": "none",
        "arguments": {f"gen_args_{i}": {"arg_0": "Ice is", "arg_1": f" {word}"} for i, word in enumerate(["cold", "hot"])},
        "resps": [[["-3.5", "False"]], [["-0.5", "True"]]], "filtered_resps": [["-3.5", "False"], ["-0.5", "True"]],
    }  # fmt: skip
    (record,) = read_benchmark(samples(values)).records
    assert (record.prompt, record.solution) == ("Ice is", " hot")
    assert (record.answer, record.predicted, record.correct) == ("cold", "hot", False)


def test_a_context_that_is_a_conversation_is_read_as_one(samples):
    chat = json.dumps([{"role": "user", "content": "3+4?"}])
    (record,) = read_benchmark(samples(LM | {"arguments": {"gen_args_0": {"arg_0": [chat], "arg_1": {}}}})).records
    assert (record.prompt, record.messages) == ("3+4?\n", (("user", "3+4?"),))


def test_answers_that_no_text_can_be_made_of_are_refused(samples):
    assert "neither a text nor log-likelihoods" in fails(samples(LM | {"resps": [[-3.2]]}))
    assert "one answer for each request" in fails(samples(LM | {"resps": []}))
