"""Sequences to traces by one teacher-forced forward pass over each right-padded batch."""

from collections.abc import Iterator

import numpy as np
import torch

from ling_probe.capture.batching import length_batches
from ling_probe.capture.edits import Editor
from ling_probe.capture.gates import _Recorder
from ling_probe.capture.layout import Layout, find_layout
from ling_probe.capture.sequences import TokenSequence
from ling_probe.capture.writes import WriteRecorder
from ling_probe.model.load import LoadedLing
from ling_probe.steps import judge
from ling_probe.trace import RoutingTrace

_LOSS_SLICE = 1024


@torch.no_grad()
def record_sequences(
    loaded: LoadedLing, sequences: list[TokenSequence], editor: Editor, keep: tuple[str, ...], batch_tokens: int
) -> Iterator[RoutingTrace]:
    """One trace for each sequence, in their order."""
    lengths = [len(sequence.ids) for sequence in sequences]
    traces: dict[int, RoutingTrace] = {}
    for batch in length_batches(lengths, batch_tokens):
        traces |= zip(batch, _run_batch(loaded, [sequences[i] for i in batch], editor, keep), strict=True)
    for i in range(len(sequences)):
        yield traces.pop(i)


def _run_batch(
    loaded: LoadedLing, sequences: list[TokenSequence], editor: Editor, keep: tuple[str, ...]
) -> Iterator[RoutingTrace]:
    input_ids, mask = (part.to(loaded.native.device) for part in _padded(sequences))
    rows, width = input_ids.shape
    layouts = [find_layout(sequence) for sequence in sequences]
    gates, writes = _Recorder(loaded, logits="logits" in keep), WriteRecorder(loaded, keep, input_ids)
    # The gates are read before the editor silences any expert: it stays chosen. Writes come after: it adds nothing.
    with gates.attached(), editor.inside(layouts, width), writes.attached():
        hidden = loaded.native.model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    ids, weights, logits = gates.arrays(rows, width)
    extras = writes.arrays() | ({"logits": logits} if logits is not None else {})
    loss = next_token_loss(loaded, hidden, input_ids) if "loss" in keep else np.full((rows, width), np.nan, np.float32)
    for row, (sequence, layout) in enumerate(zip(sequences, layouts, strict=True)):
        n = len(sequence.ids)
        own = {name: array[row, :n].copy() for name, array in (extras | {"loss": loss}).items()}
        for name in own.keys() & {"loss", "lens", "lens_shared"}:
            own[name][-1] = np.nan
        yield _trace(loaded, sequence, layout, ids[row, :n], weights[row, :n], own, editor.may_leave_groups)


def _padded(sequences: list[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B S], padded on the right."""
    width = max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        mask[row, : len(sequence.ids)] = 1
    return input_ids, mask


def next_token_loss(loaded: LoadedLing, hidden: torch.Tensor, input_ids: torch.Tensor) -> np.ndarray:
    """Next-token loss [B, S] in nats from last hidden states [B, S, D]; the last column means nothing."""
    flat = hidden.flatten(0, 1)
    targets = input_ids.roll(-1, dims=1).flatten()
    losses = [
        torch.nn.functional.cross_entropy(loaded.native.lm_head(part).float(), target, reduction="none")
        for part, target in zip(flat.split(_LOSS_SLICE), targets.split(_LOSS_SLICE), strict=True)
    ]
    return torch.cat(losses).view(input_ids.shape).cpu().numpy()


def _trace(
    loaded: LoadedLing, sequence: TokenSequence, layout: Layout, ids: np.ndarray, weights: np.ndarray,
    own: dict[str, np.ndarray], ungrouped: bool,
) -> RoutingTrace:  # fmt: skip
    record = sequence.record
    predicted, correct = judge(record, layout.completion, generated=sequence.generated)
    return RoutingTrace(
        spec=loaded.spec,
        sequence_id=record.id,
        token_ids=np.array(sequence.ids, np.int32),
        tokens=tuple(
            loaded.tokenizer.convert_ids_to_tokens(token) if special else text
            for token, text, special in zip(sequence.ids, sequence.texts, sequence.special, strict=True)
        ),
        expert_ids=ids,
        weights=weights,
        segment=layout.segment,
        step=layout.step,
        loss=own.pop("loss").astype(np.float32),
        steps=layout.steps,
        benchmark=record.benchmark,
        family=record.family,
        split=record.split,
        prompt=record.prompt,
        completion=layout.completion,
        answer=record.answer,
        predicted=predicted,
        correct=correct,
        meta=record.meta,
        extras=own,
        group_limited=not ungrouped,
    )
