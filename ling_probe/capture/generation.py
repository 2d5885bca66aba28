"""Completions by the model itself: key-value cache, batches of left-padded prompts, greedy or sampled.

Each sequence has a random generator of its own, seeded by the seed and the record's id, and takes one number from it a token:
what is drawn depends neither on the batch a sequence shares nor on the records before it. (The probabilities it is drawn from
are the model's, and in 16 bits those differ a little with the shape of the batch.)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from transformers.cache_utils import DynamicCache

from ling_probe.benchmarks import Record
from ling_probe.capture.batching import length_batches
from ling_probe.capture.edits import Editor
from ling_probe.capture.sequences import TokenSequence, end_tokens, read_prompt, token_sequence
from ling_probe.chat import Chat
from ling_probe.errors import UsageError
from ling_probe.model.load import LoadedLing


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How prompts are completed.

    Raises:
        UsageError: A value out of its range.
    """

    max_new_tokens: int = 0
    """Longest completion; 0 generates nothing."""
    temperature: float = 0.0
    """What logits are divided by before the softmax; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw among the likeliest tokens whose probabilities first reach this sum."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, with the token that completes one; the end token always does."""
    seed: int = 0
    """Of every draw."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UsageError(f"at most {self.max_new_tokens} new tokens makes no sense; give 0 or more")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature {self.temperature:g} makes no sense; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p:g} is no share of probability; give more than 0 and at most 1")
        if "" in self.stop:
            raise UsageError("an empty stop text would end every completion at once; leave it out")
        if not self.max_new_tokens and (self.temperature or self.top_p != 1 or self.stop):
            raise UsageError("temperature, top-p and stop texts are for generating; give a number of new tokens too")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest; what changes nothing, as the seed of a greedy completion, is left out."""
        values: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature:
            values |= {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return values | ({"stop": list(self.stop)} if self.stop else {})


@torch.no_grad()
def complete(
    loaded: LoadedLing, records: Sequence[Record], editor: Editor, decoding: Decoding, batch_tokens: int, chat: Chat | None
) -> list[TokenSequence]:
    """Completed prompts, in the order of the records; interventions act on every step."""
    given = [read_prompt(loaded, record, chat) for record in records]
    prompts, ends = [prompt.ids for prompt in given], end_tokens(loaded, chat)
    if empty := [record.id for record, prompt in zip(records, prompts, strict=True) if not prompt]:
        raise UsageError(f"record {empty[0]} has a prompt without tokens; there is nothing to run")
    writers = [_Writer(loaded, record.id, decoding, ends) for record in records]
    lengths = [len(prompt) + decoding.max_new_tokens for prompt in prompts]
    for batch in length_batches(lengths, batch_tokens):
        with editor.everywhere():
            _complete_batch(loaded, [prompts[i] for i in batch], [writers[i] for i in batch])
    return [
        token_sequence(loaded, record, prompt, writer.ids, generated=True)
        for record, prompt, writer in zip(records, given, writers, strict=True)
    ]


def _complete_batch(loaded: LoadedLing, prompts: list[list[int]], writers: list["_Writer"]) -> None:
    """Prefill, then one token a step; sequences that have ended leave the batch."""
    device, cache = loaded.native.device, DynamicCache(config=loaded.native.config)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    while writers:
        logits = loaded.native(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        for writer, token in zip(writers, choose_tokens(logits, writers), strict=True):
            writer.add(token)
        going = [row for row, writer in enumerate(writers) if not writer.finished]
        if len(going) < len(writers):
            writers, rows = [writers[row] for row in going], torch.tensor(going, dtype=torch.long, device=device)
            cache.batch_select_indices(rows)
            mask, positions = mask[rows], positions[rows]
        ids = torch.tensor([[writer.ids[-1]] for writer in writers], device=device)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        positions = positions[:, -1:] + 1


def choose_tokens(logits: torch.Tensor, writers: Sequence["_Writer"]) -> list[int]:
    """The next token of each row of logits [B V]: the likeliest, or drawn with each writer's own number."""
    decoding = writers[0].decoding
    if not decoding.temperature:
        return logits.argmax(dim=-1).tolist()
    numbers = torch.tensor([writer.random.random() for writer in writers], dtype=torch.float64, device=logits.device)
    return sample(logits, numbers, temperature=decoding.temperature, top_p=decoding.top_p).tolist()


def sample(logits: torch.Tensor, numbers: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """Tokens [B] of logits [B V] by inverting the distribution at numbers [B] from [0, 1), likeliest token first.

    Among the likeliest tokens whose probabilities first reach ``top_p`` (Holtzman et al. 2020); float64 throughout.
    """
    ordered, tokens = (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(dim=-1)
    kept = torch.where(reached - ordered < top_p, ordered, 0.0)
    reached = kept.cumsum(dim=-1)
    place = (reached <= numbers[:, None] * reached[:, -1:]).sum(dim=-1)
    last = (kept > 0).sum(dim=-1) - 1
    return tokens.gather(-1, torch.minimum(place, last)[:, None])[:, 0]


class _Writer:
    """One growing completion: its ids, its random numbers, and whether it has ended."""

    def __init__(self, loaded: LoadedLing, record_id: str, decoding: Decoding, ends: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.decoding = decoding
        digest = hashlib.sha256(f"{decoding.seed}\n{record_id}".encode()).digest()
        self.random = np.random.default_rng(int.from_bytes(digest[:16], "big"))
        self._ends = frozenset(ends)
        self._backend = loaded.tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tail = ""
        """As much of the text's end as a stop text may begin in."""
        self._stopped = False

    def add(self, token: int) -> None:
        """Grow by one token."""
        self.ids.append(token)
        if self.decoding.stop:
            text = self._tail + (self._stream.step(self._backend, token) or "")
            self._stopped = any(stop in text for stop in self.decoding.stop)
            reach = max(map(len, self.decoding.stop)) - 1
            self._tail = text[-reach:] if reach else ""

    @property
    def finished(self) -> bool:
        """Whether the end token, a stop text or the longest length was reached."""
        return self._stopped or self.ids[-1] in self._ends or len(self.ids) >= self.decoding.max_new_tokens
