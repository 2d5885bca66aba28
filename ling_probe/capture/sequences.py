"""A record as the tokens that will be run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers.decoders import DecodeStream

from ling_probe.benchmarks import Record
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


def read_sequence(loaded: LoadedLing, record: Record) -> TokenSequence:
    """Prompt and own solution, ended as in training if there is a solution."""
    prompt, solution = encode(loaded, record, record.prompt), encode(loaded, record, record.solution)
    end = [loaded.tokenizer.eos_token_id] if solution and loaded.tokenizer.eos_token_id is not None else []
    return token_sequence(loaded, record, prompt, [*solution, *end], generated=False)


def encode(loaded: LoadedLing, record: Record, text: str) -> list[int]:
    """Token ids of a text, without special tokens around it.

    Raises:
        UsageError: The tokenizer gives a token that the model does not know.
    """
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if text and max(ids, default=0) >= loaded.spec.vocab_size:
        raise UsageError(
            f"record {record.id}: the tokenizer gives token {max(ids)}; {loaded.spec.name} knows {loaded.spec.vocab_size}"
        )
    return ids


def token_sequence(loaded: LoadedLing, record: Record, prompt: list[int], rest: list[int], *, generated: bool) -> TokenSequence:
    """A record with the tokens of its prompt and of what follows.

    Raises:
        UsageError: The prompt has no tokens.
    """
    if not prompt:
        raise UsageError(f"record {record.id} has a prompt without tokens; there is nothing to run")
    ids = [*prompt, *rest]
    texts = (*_texts(loaded, prompt), *_texts(loaded, rest))
    special = np.isin(ids, loaded.tokenizer.all_special_ids)
    return TokenSequence(record, ids, len(prompt), texts, special, generated)


def _texts(loaded: LoadedLing, ids: Sequence[int]) -> list[str]:
    """The exact text each token adds; a token that only begins a character adds nothing, special tokens too."""
    stream, backend = DecodeStream(skip_special_tokens=True), loaded.tokenizer.backend_tokenizer
    return [stream.step(backend, token) or "" for token in ids]
