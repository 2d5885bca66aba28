"""The tokenizer of the small checkpoint that ships with the package.

Byte-level, so any text comes back exactly. Every word that stepbench writes is one token, every digit is one token, and every
invented name is two. Special tokens are named as in Ling 2.0 and none is ever added by itself.
"""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ling_probe import stepbench
from ling_probe.stepbench.names import FIRST, SECOND

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<role>", "</role>", "<|role_end|>", "<think>", "</think>")
_CHAT_WORDS = ("SYSTEM", "HUMAN", "ASSISTANT", "detailed", " thinking", " off", " on")
_SPACE = "Ġ"
_SAMPLED = 2000
_MULTIPLE = 64
CHAT_TEMPLATE = (
    "<role>SYSTEM</role>{% if messages and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "detailed thinking off<|role_end|>"
    "{% for message in messages %}{% if message.role == 'user' %}<role>HUMAN</role>{{ message.content }}<|role_end|>"
    "{% elif message.role == 'assistant' %}<role>ASSISTANT</role>{{ message.content }}<|role_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
"""As Ling 2.0 renders a chat: there is a system block even without a system message."""


def build_tokenizer(folder: str | Path) -> Path:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; the bytes are always the same.

    Returns:
        The folder, ready for ``AutoTokenizer.from_pretrained``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _tokenizer() -> Tokenizer:
    splitter = _splitter()
    pieces, merges = _name_merges()
    words = sorted(set(_words(splitter)) - set(pieces))
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces, *words]
    padding = -(len(tokens) + len(SPECIAL_TOKENS)) % _MULTIPLE
    specials = [*SPECIAL_TOKENS, *(f"<|reserved_{i}|>" for i in range(padding))]
    vocabulary = {token: i for i, token in enumerate([*tokens, *specials])}
    # ignore_merges takes a word of the vocabulary whole, so only names need merges and no other word can disturb theirs.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _name_merges() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges, in order, that cut a name with its space into its two pieces.

    Pieces are consonant, vowel, consonant; a merge never joins a vowel to a consonant before it is known which piece it is in.
    """
    merges = _left_to_right(_SPACE + piece for piece in FIRST) + _left_to_right(SECOND)
    return [left + right for left, right in merges], merges


def _left_to_right(pieces: Iterable[str]) -> list[tuple[str, str]]:
    merges = {(piece[:end], piece[end]) for piece in pieces for end in range(1, len(piece))}
    return sorted(merges, key=lambda merge: (len(merge[0]), merge))


def _words(splitter: pre_tokenizers.PreTokenizer) -> Iterable[str]:
    """Every word of the templates as the splitter leaves it, its space included."""
    records = (record for family in stepbench.FAMILIES for record in islice(stepbench.train_records(family), _SAMPLED))
    texts = [text for record in records for text in (record.prompt, record.solution)]
    names = {_SPACE + first + second for first in FIRST for second in SECOND}
    found = {word for text in {*texts, *_CHAT_WORDS} for word, _ in splitter.pre_tokenize_str(text)}
    return (word for word in found if len(word) > 1 and word not in names)
