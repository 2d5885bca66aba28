"""Evaluations that somebody already ran: what the model was given, what it wrote, and how that was judged.

Reading them as a benchmark traces the very texts of an evaluation. Inspect writes ``.eval`` (a zip of JSON) and ``.json``;
lm-evaluation-harness writes ``samples_*.jsonl`` with ``--log_samples``.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ling_probe.benchmarks.values import check_text, object_of, text_of
from ling_probe.errors import BenchmarkError

_METRICS = ("exact_match", "acc", "pass@1", "acc_norm", "em")
_GRADES = {"C": True, "I": False, "N": False}
_ATTACHED = "attachment://"


def read_inspect(values: Mapping[str, Any]) -> dict[str, Any]:
    """The conversation up to the model's last message, that message, and the first scorer's verdict.

    A partial score judges nothing. Every score is kept in ``meta``.
    """
    attached = object_of(values, "attachments")
    messages = _messages(values, attached)
    completion = _completion(values, attached)
    if not completion:
        error = object_of(values, "error").get("message", "")
        raise BenchmarkError(f"the sample has no completion{f' ({error})' if error else ''}; only finished samples can be read")
    scores = object_of(values, "scores")
    score: Any = next(iter(scores.values()), {})
    return {
        "id": _inspect_id(values),
        "prompt": _joined(messages),
        "messages": messages,
        "solution": completion,
        "answer": _gold(values.get("target")),
        "predicted": text_of(score, "answer") if isinstance(score, dict) and isinstance(score.get("answer"), str) else "",
        "correct": _verdict(score.get("value") if isinstance(score, dict) else score),
        "meta": {name: values[name] for name in ("epoch", "target", "scores", "metadata", "model") if values.get(name)},
    }


def _inspect_id(values: Mapping[str, Any]) -> str:
    name, epoch = text_of(values, "id"), values.get("epoch", 1)
    return name if epoch == 1 else f"{name}-epoch-{epoch}"


def _messages(values: Mapping[str, Any], attached: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What the model was given before its last message."""
    found = values.get("messages") or values["input"]
    if isinstance(found, str):
        return (("user", _attached(found, attached)),)
    if not isinstance(found, list) or not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in found):
        raise BenchmarkError('field "messages" is expected to be a list of messages with a role and a content')
    spoken = [place for place, each in enumerate(found) if each["role"] == "assistant"]
    return tuple((each["role"], _content(each, attached)) for each in found[: spoken[-1] if spoken else None])


def _completion(values: Mapping[str, Any], attached: Mapping[str, Any]) -> str:
    match values.get("output"):
        case {"choices": [{"message": dict(message)}, *_]}:
            return _content(message, attached)
        case {"completion": str(text)}:
            return _attached(text, attached)
    return ""


def _content(message: Mapping[str, Any], attached: Mapping[str, Any]) -> str:
    """The text of a message; reasoning that was kept apart comes before it, as Ring writes it."""
    content = message.get("content")
    if isinstance(content, str):
        return _attached(content, attached)
    parts = [part for part in content or [] if isinstance(part, dict)]
    thoughts = [part["reasoning"] for part in parts if isinstance(part.get("reasoning"), str) and part["reasoning"]]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    thought = "".join(f"<think>\n{_attached(text, attached)}\n</think>\n\n" for text in thoughts)
    return thought + "".join(_attached(text, attached) for text in texts)


def _attached(text: str, attached: Mapping[str, Any]) -> str:
    """Inspect stores a long text once and refers to it."""
    if text.startswith(_ATTACHED):
        found = attached.get(text.removeprefix(_ATTACHED))
        if not isinstance(found, str):
            raise BenchmarkError("a text was stored apart and is not in the sample's attachments; write the log again whole")
        text = found
    check_text(text, "a message")
    return text


def is_lm_eval(values: Mapping[str, Any]) -> bool:
    """Whether a record has what the harness logs beside its document."""
    return "filtered_resps" in values or "target" in values


def read_lm_eval(values: Mapping[str, Any]) -> dict[str, Any]:
    """The context and the first answer; of a multiple choice, the continuation that the model found likeliest."""
    requests = _requests(values["arguments"])
    answers: Any = values["resps"]
    if not requests or not isinstance(answers, list) or len(answers) != len(requests):
        raise BenchmarkError('fields "arguments" and "resps" are expected to hold one answer for each request')
    chosen = max(range(len(requests)), key=lambda place: _likelihood(answers[place])) if _is_choice(answers[0]) else 0
    context, continuation = requests[chosen]
    is_choice = _is_choice(answers[0])
    completion = continuation if is_choice else _first_text(answers[0])
    messages = _chat(context)
    return {
        "id": text_of(values, "doc_id"),
        "prompt": _joined(messages) if messages else context,
        "messages": messages,
        "solution": completion,
        "answer": _expected(values, [text for _, text in requests] if is_choice else []),
        "predicted": continuation.strip() if is_choice else _filtered(values.get("filtered_resps")),
        "correct": next((_verdict(values[name]) for name in _METRICS if name in values), None),
        "meta": {name: values[name] for name in ("doc", "target", "filter", *_METRICS) if name in values},
    }


def other_filter(values: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether a record is an answer that was read already, judged through another filter."""
    return values.get("filter") != first.get("filter")


def _requests(arguments: Any) -> list[tuple[str, str]]:
    """Context and continuation of every request, as newer and older harnesses log them."""
    found = []
    for each in arguments.values() if isinstance(arguments, dict) else arguments:
        row = list(each.values()) if isinstance(each, dict) else each
        if not isinstance(row, list) or not row or not isinstance(row[0], str | list):
            raise BenchmarkError('field "arguments" is expected to hold the context of each request')
        context = row[0] if isinstance(row[0], str) else "".join(map(str, row[0]))
        continuation = row[1] if len(row) > 1 and isinstance(row[1], str) else ""
        check_text(context + continuation, 'field "arguments"')
        found.append((context, continuation))
    return found


def _is_choice(answer: Any) -> bool:
    """Whether an answer is a log-likelihood with whether it was the greedy choice, and no text."""
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return isinstance(answer, list) and len(answer) == 2 and str(answer[1]) in ("True", "False")


def _likelihood(answer: Any) -> float:
    while isinstance(answer, list) and answer:
        answer = answer[0]
    try:
        return float(answer)
    except (TypeError, ValueError) as error:
        raise BenchmarkError('field "resps" holds an answer that is no log-likelihood') from error


def _first_text(answer: Any) -> str:
    while isinstance(answer, list) and answer:
        answer = answer[0]
    if not isinstance(answer, str):
        raise BenchmarkError('field "resps" holds neither a text nor log-likelihoods; only answers with a text can be traced')
    check_text(answer, 'field "resps"')
    return answer


def _filtered(answers: Any) -> str:
    while isinstance(answers, list) and answers:
        answers = answers[0]
    return answers if isinstance(answers, str) else ""


def _chat(context: str) -> tuple[tuple[str, str], ...]:
    """The messages of a context that was logged as the JSON of a conversation."""
    if not context.lstrip().startswith("[{"):
        return ()
    try:
        found = json.loads(context)
    except (ValueError, RecursionError):
        return ()
    is_chat = all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str) for each in found
    )
    return tuple((each["role"], each["content"]) for each in found) if is_chat else ()


def _expected(values: Mapping[str, Any], choices: Sequence[str]) -> str:
    """The target; of a multiple choice, the continuation that it numbers."""
    target = values.get("target")
    if str(target).isdecimal() and int(str(target)) < len(choices):
        return choices[int(str(target))].strip()
    return _gold(target)


def _gold(target: Any) -> str:
    """The answer of a target, which may be a list of equal ones or a worked solution that ends in ``#### 18``."""
    first = target[0] if isinstance(target, list) and target else target
    text = text_of({"target": first}, "target")
    return text.rpartition("####")[2].strip()


def _joined(messages: Sequence[tuple[str, str]]) -> str:
    """Without a chat template there is only text: a single message as it is, several with who speaks."""
    if len(messages) == 1:
        return messages[0][1] + "\n"
    return "".join(f"{role}: {text}\n\n" for role, text in messages)


def _verdict(value: Any) -> bool | None:
    """Right, wrong, or neither where a score is between."""
    if isinstance(value, str):
        return _GRADES.get(value)
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None
