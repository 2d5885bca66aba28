import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ling_probe.stepbench import FAMILIES, SPLITS, generate
from ling_probe.stepbench.names import all_names
from ling_probe.tokenizer import SPECIAL_TOKENS, build_tokenizer

NAMES = frozenset(all_names(held_out=True) + all_names(held_out=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_building_twice_gives_the_same_bytes(folder, tmp_path):
    for path in build_tokenizer(tmp_path).iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_the_vocabulary_fills_a_multiple_of_64(tokenizer):
    assert len(tokenizer) == 576
    assert sorted(tokenizer.get_vocab().values()) == list(range(576))


def test_special_tokens_are_single_and_never_added(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert tokenizer("".join(SPECIAL_TOKENS))["input_ids"] == ids
    assert tokenizer("")["input_ids"] == []
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == ids[1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_every_name_is_its_two_pieces(tokenizer):
    for name in NAMES:
        assert tokenizer.tokenize(f" {name}") == [f"Ġ{name[:3]}", name[3:]]


def test_every_other_word_is_one_token_and_every_digit_is(tokenizer):
    """On problems that the vocabulary was not collected from."""
    for family in FAMILIES:
        for split in SPLITS:
            for record in (generate(family, split, index, seed=9) for index in range(150)):
                text = record.prompt + record.solution
                tokens = tokenizer.tokenize(text)
                names = sum(word in NAMES for word in re.findall(r"[a-z]+", text))
                spaces = len(re.findall(r" (?=[\d(])", text))
                assert len(tokens) == len(re.findall(r"[a-z]+|\d|[^a-z\d ]", text)) + names + spaces


def test_numbers_are_digits_wherever_they_stand(tokenizer):
    assert tokenizer.tokenize("7+15=22\n") == ["7", "+", "1", "5", "=", "2", "2", "Ċ"]
    assert tokenizer.tokenize(" has 15 figs.") == ["Ġhas", "Ġ", "1", "5", "Ġfigs", "."]


def test_offsets_cut_the_text_where_tokens_begin(tokenizer):
    text = "given wumpus is 15\n"
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:stop] for start, stop in encoded["offset_mapping"]]
    assert pieces == ["given", " wum", "pus", " is", " ", "1", "5", "\n"]


@given(text=st.text())
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_chat_has_a_system_block_even_without_a_system_message(tokenizer):
    question = {"role": "user", "content": "hi"}
    system = "<role>SYSTEM</role>{}detailed thinking off<|role_end|><role>HUMAN</role>hi<|role_end|>"
    plain = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert plain == system.format("") + "<role>ASSISTANT</role>"
    chat = [{"role": "system", "content": "be brief"}, question, {"role": "assistant", "content": "yes"}]
    expected = system.format("be brief\n") + "<role>ASSISTANT</role>yes<|role_end|>"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected
