"""Sequences to traces by one teacher-forced forward pass over each right-padded batch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from ling_probe.activations import ActivationSpec
from ling_probe.capture.batching import length_batches
from ling_probe.capture.edits import Editor
from ling_probe.capture.gates import _Recorder
from ling_probe.capture.layout import Layout, find_layout
from ling_probe.capture.sequences import TokenSequence
from ling_probe.capture.vectors import Spill, VectorRecorder
from ling_probe.capture.writes import WriteRecorder
from ling_probe.model.load import LoadedLing
from ling_probe.model.streaming import StreamedLing
from ling_probe.steps import judge
from ling_probe.trace import Activation, RoutingTrace

_LOSS_SLICE = 1024


@torch.no_grad()
def record_sequences(
    loaded: LoadedLing, sequences: list[TokenSequence], editor: Editor, keep: tuple[str, ...], batch_tokens: int,
    activations: ActivationSpec | None = None, spill: Path | None = None,
) -> Iterator[RoutingTrace]:  # fmt: skip
    """One trace for each sequence, in their order."""
    aside = Spill(spill) if activations else None
    lengths = [len(sequence.ids) for sequence in sequences]
    traces: dict[int, RoutingTrace] = {}
    places = length_batches(lengths, batch_tokens)
    batches = (_Batch(loaded, batch, [sequences[i] for i in batch], editor, keep, activations, aside) for batch in places)
    for batch, hidden in _forward(loaded, batches):
        traces |= zip(batch.places, batch.traces(hidden), strict=True)
    for i in range(len(sequences)):
        yield traces.pop(i)


def _forward(loaded: LoadedLing, batches: Iterable["_Batch"]) -> Iterator[tuple["_Batch", torch.Tensor]]:
    """Each batch with its last hidden states [B S D]: one forward pass after the other, or all of them layer by layer."""
    if isinstance(loaded, StreamedLing):
        yield from loaded.forward(batches)
        return
    for batch in batches:
        with batch.attached():
            output = loaded.native.model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
        yield batch, output.last_hidden_state


class _Batch:
    """Right-padded sequences that are run together."""

    def __init__(
        self, loaded: LoadedLing, places: list[int], sequences: list[TokenSequence], editor: Editor, keep: tuple[str, ...],
        activations: ActivationSpec | None, spill: Spill | None,
    ) -> None:  # fmt: skip
        self.places = places
        """Of the sequences, in the window."""
        self.input_ids, self.mask = (part.to(loaded.native.device) for part in _padded(sequences))
        self._loaded, self._sequences, self._editor, self._keep = loaded, sequences, editor, keep
        self._layouts = [find_layout(sequence) for sequence in sequences]
        self._gates = _Recorder(loaded, logits="logits" in keep)
        self._vectors = None
        if activations and spill:
            self._vectors = VectorRecorder(loaded, activations, self._layouts, self.input_ids.shape[1], spill)
        self._writes = WriteRecorder(loaded, keep, self.input_ids, self._vectors)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record and edit while the block runs."""
        # The gates are read before the editor silences any expert: it stays chosen. Writes come after: it adds nothing.
        vectors = self._vectors.attached() if self._vectors else nullcontext()
        edits = self._editor.inside(self._layouts, self.input_ids.shape[1])
        with self._gates.attached(), edits, vectors, self._writes.attached():
            yield

    def traces(self, hidden: torch.Tensor) -> Iterator[RoutingTrace]:
        """One trace a sequence, from what was recorded and the last hidden states."""
        shape = (self.input_ids.shape[0], self.input_ids.shape[1])
        ids, weights, logits = self._gates.arrays(*shape)
        extras = self._writes.arrays() | ({"logits": logits} if logits is not None else {})
        with_loss = "loss" in self._keep
        loss = next_token_loss(self._loaded, hidden, self.input_ids) if with_loss else np.full(shape, np.nan, np.float32)
        for row, (sequence, layout) in enumerate(zip(self._sequences, self._layouts, strict=True)):
            n = len(sequence.ids)
            own = {name: array[row, :n].copy() for name, array in (extras | {"loss": loss}).items()}
            for name in own.keys() & {"loss", "lens", "lens_shared"}:
                own[name][-1] = np.nan
            kept = self._vectors.of(row) if self._vectors else {}
            ungrouped = self._editor.may_leave_groups
            yield _trace(self._loaded, sequence, layout, ids[row, :n], weights[row, :n], own, kept, ungrouped)


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
    own: dict[str, np.ndarray], kept: dict[str, Activation], ungrouped: bool,
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
        activations=kept,
        group_limited=not ungrouped,
    )
