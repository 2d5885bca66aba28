"""Prompts put to a model as a conversation, through the chat template that came with its tokenizer.

1. Render the messages with the checkpoint's own template, the generation prompt included.
2. Render them again with a placeholder for each text: what lies between the placeholders is the template's.
3. A token that begins in a message's text belongs to the prompt; every other token, special or not, is the template's.

Ling always writes a system block, and Ring opens ``<think>`` at the end; both are the template's business, and so is what it
does with a text (some trim it). Where it changes one in another way only special tokens count as the template's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ling_probe.benchmarks import Record
from ling_probe.errors import UsageError

_PLACEHOLDER = "\ue000{}\ue001"
"""Of private characters, which no template looks for."""


@dataclass(frozen=True)
class Chat:
    """That prompts are put as a conversation, and what the system message says."""

    system: str = ""
    """In place of a system message that a record's conversation has; nothing leaves it to the record and the template."""

    def describe(self, tokenizer: Any) -> dict[str, str]:
        """Plain values for a manifest."""
        template = _template(tokenizer)
        return {"system": self.system, "template_digest": hashlib.sha256(template.encode()).hexdigest()}


@dataclass(frozen=True)
class ChatPrompt:
    """The tokens of a rendered conversation."""

    ids: list[int]
    template: tuple[bool, ...]
    """Which of them are the template's."""


def chat_prompt(tokenizer: Any, record: Record, chat: Chat) -> ChatPrompt:
    """Render a record's prompt as the user's message, or its conversation as it was.

    The newline that ends a prompt, to part it from a solution, is no part of the message.

    Raises:
        UsageError: The tokenizer has no chat template, or its template refuses the conversation.
    """
    messages = _messages(record, chat)
    text = _render(tokenizer, record, messages)
    spans = _spans(tokenizer, record, messages, text)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = found["input_ids"]
    if spans is None:
        special = special_ids(tokenizer)
        return ChatPrompt(ids, tuple(token in special for token in ids))
    inside = (any(first <= start < last for first, last in spans) for start, _ in found["offset_mapping"])
    return ChatPrompt(ids, tuple(not own for own in inside))


def chat_end(tokenizer: Any) -> int | None:
    """The special token with which the template ends what the model says; None if it is the tokenizer's own end, or none.

    Raises:
        UsageError: The tokenizer has no chat template.
    """
    said = _PLACEHOLDER.format(0)
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False) if _template(tokenizer) else ""
    except TemplateError:
        return None
    after = tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"]
    special = special_ids(tokenizer)
    return next((token for token in after[:1] if token in special and token != tokenizer.eos_token_id), None)


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that stand for no text, whether or not the tokenizer has a role for them."""
    return {*tokenizer.all_special_ids, *(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)}


def _messages(record: Record, chat: Chat) -> list[tuple[str, str]]:
    messages = list(record.messages) or [("user", record.prompt.removesuffix("\n"))]
    if not chat.system:
        return messages
    return [("system", chat.system), *(each for each in messages if each[0] != "system")]


def _template(tokenizer: Any) -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise UsageError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; leave out --chat, or use a chat checkpoint"
        ) from error
    return template


def _render(tokenizer: Any, record: Record, messages: Sequence[tuple[str, str]]) -> str:
    conversation = [{"role": role, "content": text} for role, text in messages]
    _template(tokenizer)
    try:
        rendered: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(role for role, _ in messages)
        raise UsageError(f"record {record.id}: the chat template refuses a conversation of {roles} ({error})") from error
    return rendered


def _spans(tokenizer: Any, record: Record, messages: Sequence[tuple[str, str]], rendered: str) -> list[tuple[int, int]] | None:
    """Characters of each message's text, if the rendered text is the template with the texts, as they are or trimmed."""
    marks = [_PLACEHOLDER.format(place) for place in range(len(messages))]
    rest = _render(tokenizer, record, [(role, mark) for (role, _), mark in zip(messages, marks, strict=True)])
    built, spans, trims = "", list[tuple[int, int]](), _trims(tokenizer, record, messages)
    for mark, (_, text) in zip(marks, messages, strict=True):
        before, _, rest = rest.partition(mark)
        own = text.strip() if trims else text
        spans.append((len(built) + len(before), len(built) + len(before) + len(own)))
        built += before + own
    return spans if built + rest == rendered else None


def _trims(tokenizer: Any, record: Record, messages: Sequence[tuple[str, str]]) -> bool:
    """Whether the template trims what it is given."""
    spaced = _PLACEHOLDER.format(" ")
    return f" {spaced} " not in _render(tokenizer, record, [*messages[:-1], (messages[-1][0], f" {spaced} ")])
