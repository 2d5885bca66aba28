import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from records import RECORDS

from ling_probe.benchmarks import Record, read_benchmark
from ling_probe.capture import capture
from ling_probe.capture.sequences import end_tokens
from ling_probe.chat import Chat, chat_end, chat_prompt, special_ids
from ling_probe.errors import RunError, UsageError
from ling_probe.model.load import load_native
from ling_probe.recording import record as record_run
from ling_probe.run import Run
from ling_probe.trace import SEGMENTS

SUM = Record(
    id="a", prompt="evaluate 3+4\n", solution="3+4=7\nanswer: 7\n", answer="7", family="arithmetic", benchmark="stepbench"
)
RING = (
    "{% for message in messages %}<role>{{ message.role | upper }}</role>{{ message.content | trim }}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role><think>{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ messages[0].content }}"


@pytest.fixture(scope="module")
def loaded():
    return load_native("ling-tiny")


@pytest.fixture
def tokenizer(loaded, monkeypatch):
    """The shipped tokenizer; a test may set its template."""
    monkeypatch.setattr(loaded.tokenizer, "chat_template", loaded.tokenizer.chat_template)
    return loaded.tokenizer


def parts(tokenizer, prompt):
    """The template's text and the prompt's, each joined."""
    own = [token for token, template in zip(prompt.ids, prompt.template, strict=True) if not template]
    added = [token for token, template in zip(prompt.ids, prompt.template, strict=True) if template]
    return tokenizer.decode(added), tokenizer.decode(own)


def test_the_template_is_told_from_the_prompt(tokenizer):
    prompt = chat_prompt(tokenizer, SUM, Chat())
    block = "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role><|role_end|><role>ASSISTANT</role>"
    assert parts(tokenizer, prompt) == (block, "evaluate 3+4")


def test_a_system_message_is_asked_text_and_replaces_the_conversations_own(tokenizer):
    record = replace(SUM, messages=(("system", "detailed"), ("user", "3+4"), ("assistant", "8"), ("user", "no")))
    assert parts(tokenizer, chat_prompt(tokenizer, record, Chat()))[1] == "detailed3+48no"
    added, own = parts(tokenizer, chat_prompt(tokenizer, record, Chat(system="off")))
    assert own == "off3+48no"
    assert added.count("<role>") == 5


def test_a_template_may_trim_and_open_a_thought(tokenizer):
    tokenizer.chat_template = RING
    added, own = parts(tokenizer, chat_prompt(tokenizer, replace(SUM, prompt="  evaluate 3+4 \n\n"), Chat()))
    assert own == "evaluate 3+4"
    assert added.endswith("<role>ASSISTANT</role><think>")


def test_where_a_template_rewrites_a_text_only_special_tokens_are_its_own(tokenizer):
    tokenizer.chat_template = "<role>HUMAN</role>{{ messages[0].content | upper }}<|role_end|>"
    assert parts(tokenizer, chat_prompt(tokenizer, SUM, Chat())) == ("<role></role><|role_end|>", "HUMANEVALUATE 3+4")


def test_what_a_template_refuses_and_that_there_is_none_is_one_line(tokenizer):
    tokenizer.chat_template = STRICT
    with pytest.raises(
        UsageError, match=r"record a: the chat template refuses a conversation of system, user \(no system here\)"
    ):
        chat_prompt(tokenizer, SUM, Chat(system="x"))
    tokenizer.chat_template = None
    for ask in (lambda: chat_prompt(tokenizer, SUM, Chat()), lambda: chat_end(tokenizer), lambda: Chat().describe(tokenizer)):
        with pytest.raises(UsageError, match="has no chat template; leave out --chat"):
            ask()


def test_a_read_chat_has_its_segments_and_ends_as_the_template_ends_it(loaded):
    (trace,) = capture(loaded, [SUM], chat=Chat())
    names = np.array(SEGMENTS)[trace.segment]
    tokens = np.array(trace.tokens)
    assert "".join(tokens[names == "prompt"]) == "evaluate 3+4"
    assert "".join(tokens[names == "reasoning"]) == "3+4=7\n"
    assert "".join(tokens[names == "answer"]) == "answer: 7\n"
    assert "".join(tokens[names == "template"]).startswith(
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>"
    )
    assert (tokens[-1], names[-1]) == ("<|role_end|>", "special")
    assert trace.completion == SUM.solution
    (bare,) = capture(loaded, [SUM])
    assert "template" not in np.array(SEGMENTS)[bare.segment]
    assert bare.tokens[-1] == "<|endoftext|>"


def test_a_generated_chat_is_made_from_the_template_and_stops_at_either_end(loaded, tokenizer, monkeypatch):
    prompt, ends = chat_prompt(tokenizer, SUM, Chat()).ids, end_tokens(loaded, Chat())
    assert ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|role_end|>")]
    (trace,) = capture(loaded, [SUM], chat=Chat(), max_new_tokens=3)
    assert trace.token_ids[: len(prompt)].tolist() == prompt
    for end in ends:
        monkeypatch.setattr(
            "ling_probe.capture.generation.choose_tokens", lambda _logits, writers, end=end: [end] * len(writers)
        )
        (trace,) = capture(loaded, [SUM], chat=Chat(), max_new_tokens=3)
        assert trace.token_ids.tolist() == [*prompt, end]


def test_special_tokens_are_known_without_a_role(tokenizer):
    assert tokenizer.convert_tokens_to_ids("<role>") in special_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("detailed") not in special_ids(tokenizer)


def test_a_judged_solution_passes_its_verdict_on(loaded):
    (trace,) = capture(loaded, [replace(SUM, predicted="8", correct=False)])
    assert (trace.predicted, trace.correct) == ("8", False)
    (trace,) = capture(loaded, [SUM])
    assert (trace.predicted, trace.correct) == ("", None)


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join([json.dumps(RECORDS["gsm8k"]), "{broken", json.dumps(RECORDS["gsm8k"])]))
    return path


def ling(*args):
    command = [str(Path(sys.executable).parent / "ling-probe"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_says_what_it_read_and_writes_it_down(problems, tmp_path):
    done = ling("capture", "ling-tiny", problems, "--chat", "--system", "off", "--on-error", "skip", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first == "read 2 records of sums as gsm8k, 1 skipped"
    assert second.startswith("  skipped ")
    assert "sums.jsonl line 2: not JSON" in second
    manifest = Run.open(tmp_path / "run").manifest
    assert (manifest.benchmark["format"], manifest.benchmark["skipped"], len(manifest.benchmark["problems"])) == ("gsm8k", 1, 1)
    assert manifest.options["chat"]["system"] == "off"


def test_the_command_refuses_before_it_loads(problems, tmp_path):
    for options, message in (
        ((), "line 2: not JSON"),
        (("--system", "x"), "a system message needs --chat"),
        (("--format", "gsm9k"), 'no format "gsm9k"'),
    ):
        done = ling("capture", "ling-tiny", problems, "--out", tmp_path / "run", *options)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_chat_run_reads_back_with_its_segments(loaded, problems, tmp_path):
    sums = read_benchmark(problems, on_error="skip")
    run = Run.open(record_run(loaded, sums, tmp_path / "run", chat=Chat()).folder)
    segments = np.concatenate([batch.segment for batch in run.batches(layers=[1])])
    assert {SEGMENTS[code] for code in np.unique(segments)} == {"template", "prompt", "reasoning", "answer", "special"}
    with pytest.raises(RunError, match="captured with another options"):
        record_run(loaded, sums, tmp_path / "run", chat=Chat(system="off"), resume=True)
