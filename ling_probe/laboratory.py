"""One prompt under a model's own router and under a change: what it writes, how it routes, and what its old text then costs.

1. Complete the prompt greedily, as the model is and with the change in force.
2. Read the old text again under the change, and compare choices and losses token by token.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import pandas as pd

from ling_probe.benchmarks import Record
from ling_probe.capture.edits import Editor
from ling_probe.capture.generation import Decoding, complete
from ling_probe.capture.passes import record_sequences
from ling_probe.capture.sequences import encode
from ling_probe.errors import UsageError
from ling_probe.interventions import Intervention, check_all
from ling_probe.model.load import LoadedLing
from ling_probe.trace import SEGMENTS, RoutingTrace

MOST_PROMPT = 1024
"""Tokens of a prompt."""
_BUSY = threading.Lock()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a change did to one prompt."""

    before: str
    """What the model writes as it is."""
    after: str
    """What it writes under the change."""
    shared: int
    """Letters that both begin with."""
    loss_before: float
    """Mean over the tokens of the old text, in nats."""
    loss_after: float
    """The same under the change."""
    choices: pd.DataFrame
    """One row a layer and token of prompt and old text: layer, position, token, segment, `experts` before and `new_experts`
    under the change (tuples, in the router's order), `moved` (share of the choices that are others), loss_before and loss_after
    (of the next token, nats)."""

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer: tokens, the share of choices moved, and that of tokens with any choice moved."""
        some = self.choices.assign(touched=self.choices["moved"] > 0).groupby("layer", as_index=False)
        return some.agg(tokens=("position", "size"), moved=("moved", "mean"), touched=("touched", "mean"))


def try_change(
    loaded: LoadedLing,
    prompt: str,
    interventions: Sequence[Intervention],
    *,
    max_new_tokens: int = 128,
    seconds: float = 120.0,
) -> Outcome:
    """Write with and without a change, and read the old text under it.

    Args:
        loaded: The model; it is left as it was.
        prompt: What is completed.
        interventions: The change; it must act on every token.
        max_new_tokens: Longest completion.
        seconds: After so long nothing more is run.

    Raises:
        UsageError: An empty or too long prompt, out of time, or another text is being written in this process.
        InterventionError: The model, or generation, cannot carry the change out.
    """
    check_all(interventions, loaded.spec)
    record = Record(id="prompt", prompt=prompt)
    length = len(encode(loaded, record, prompt))
    if not 0 < length <= MOST_PROMPT:
        raise UsageError(f"a prompt of {length} tokens cannot be tried; give 1 to {MOST_PROMPT}")
    plain, edited = Editor(loaded, ()), Editor(loaded, interventions)
    decoding = Decoding(max_new_tokens=max_new_tokens)
    with _alone(), _at_most(loaded, seconds):
        old, new = (complete(loaded, [record], editor, decoding, 1, None)[0] for editor in (plain, edited))
        first, again = (next(record_sequences(loaded, [old], each, ("experts", "loss"), 1)) for each in (plain, edited))
    before, after = ("".join(each.texts[each.n_prompt :]) for each in (old, new))
    written = slice(old.n_prompt - 1, len(old.ids) - 1)
    return Outcome(
        before=before,
        after=after,
        shared=len(list(takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))),
        loss_before=float(first.loss[written].mean()),
        loss_after=float(again.loss[written].mean()),
        choices=_choices(first, again),
    )


def _choices(first: RoutingTrace, again: RoutingTrace) -> pd.DataFrame:
    tokens, rows = first.expert_ids.shape[:2]
    kept = (again.expert_ids[..., :, None] == first.expert_ids[..., None, :]).any(axis=-1).mean(axis=-1)
    each = lambda values: np.tile(np.asarray(values), rows)  # noqa: E731
    return pd.DataFrame(
        {
            "layer": np.repeat(first.spec.routed_layers, tokens),
            "position": each(np.arange(tokens)),
            "token": each(np.array(first.tokens, dtype=object)),
            "segment": each([SEGMENTS[code] for code in first.segment]),
            "experts": [tuple(map(int, ids)) for ids in first.expert_ids.transpose(1, 0, 2).reshape(-1, first.spec.top_k)],
            "new_experts": [tuple(map(int, ids)) for ids in again.expert_ids.transpose(1, 0, 2).reshape(-1, first.spec.top_k)],
            "moved": 1 - kept.T.ravel(),
            "loss_before": each(first.loss),
            "loss_after": each(again.loss),
        }
    )


@contextmanager
def _alone() -> Iterator[None]:
    if not _BUSY.acquire(blocking=False):
        raise UsageError("another text is being written; try again in a moment")
    try:
        yield
    finally:
        _BUSY.release()


@contextmanager
def _at_most(loaded: LoadedLing, seconds: float) -> Iterator[None]:
    """Stop between two forward passes once the time is up."""
    end = time.monotonic() + seconds

    def look(*_: object) -> None:
        if time.monotonic() > end:
            raise UsageError(f"this took longer than {seconds:g} seconds and was stopped; ask for fewer tokens")

    handle = loaded.native.model.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
