"""A record as the tokens that will be run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers.decoders import DecodeStream

from ling_probe.benchmarks import Record
from ling_probe.chat import Chat, ChatPrompt, chat_end, chat_prompt, special_ids
from ling_probe.errors import UsageError
from ling_probe.model.load import LoadedLing


@dataclass(frozen=True)
class TokenSequence:
    """A record with the tokens that will be run."""

    record: Record
    ids: list[int]
    n_prompt: int
    texts: tuple[str, ...]
    """What each token adds to the text; nothing for a special token."""
    special: np.ndarray
    """Which tokens are special [T]."""
    generated: bool
    template: tuple[bool, ...] = ()
    """Which tokens of the prompt a chat template added; empty without one."""
    steps: str = "auto"
    """How its reasoning steps are found: a name in `ling_probe.steps.CHOICES`."""


def read_sequence(loaded: LoadedLing, record: Record, chat: Chat | None = None) -> TokenSequence:
    """Prompt and own solution, ended as in training, or as the chat template ends it, if there is a solution."""
    prompt, solution = read_prompt(loaded, record, chat), encode(loaded, record, record.solution)
    end = end_tokens(loaded, chat)[-1:] if solution else []
    return token_sequence(loaded, record, prompt, [*solution, *end], generated=False)


def encode(loaded: LoadedLing, record: Record, text: str) -> list[int]:
    """Token ids of a text, without special tokens around it.

    Raises:
        UsageError: The tokenizer gives a token that the model does not know.
    """
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    _check_known(loaded, record, ids)
    return ids


def _check_known(loaded: LoadedLing, record: Record, ids: list[int]) -> None:
    if max(ids, default=0) >= loaded.spec.vocab_size:
        raise UsageError(
            f"record {record.id}: the tokenizer gives token {max(ids)}; {loaded.spec.name} knows {loaded.spec.vocab_size}"
        )


def read_prompt(loaded: LoadedLing, record: Record, chat: Chat | None) -> ChatPrompt:
    """The tokens of a prompt, as it is or as a conversation."""
    if chat is None:
        return ChatPrompt(encode(loaded, record, record.prompt), ())
    prompt = chat_prompt(loaded.tokenizer, record, chat)
    _check_known(loaded, record, prompt.ids)
    return prompt


def end_tokens(loaded: LoadedLing, chat: Chat | None) -> list[int]:
    """Tokens that end a completion: the tokenizer's, and last the chat template's if that is another."""
    ends = [loaded.tokenizer.eos_token_id, chat_end(loaded.tokenizer) if chat else None]
    return [end for end in ends if end is not None]


def token_sequence(
    loaded: LoadedLing, record: Record, prompt: ChatPrompt, rest: list[int], *, generated: bool
) -> TokenSequence:
    """A record with the tokens of its prompt and of what follows.

    Raises:
        UsageError: The prompt has no tokens.
    """
    if not prompt.ids:
        raise UsageError(f"record {record.id} has a prompt without tokens; there is nothing to run")
    ids = [*prompt.ids, *rest]
    texts = (*_texts(loaded, prompt.ids), *_texts(loaded, rest))
    special = np.isin(ids, list(special_ids(loaded.tokenizer)))
    return TokenSequence(record, ids, len(prompt.ids), texts, special, generated, prompt.template)


def _texts(loaded: LoadedLing, ids: Sequence[int]) -> list[str]:
    """The exact text each token adds; a token that only begins a character adds nothing, special tokens too."""
    stream, backend = DecodeStream(skip_special_tokens=True), loaded.tokenizer.backend_tokenizer
    return [stream.step(backend, token) or "" for token in ids]
