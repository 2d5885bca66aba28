"""Loss and rightness of every reasoning step and answer, teacher-forced, under any change to routing."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float64, Int64

from ling_probe.benchmarks import Record
from ling_probe.capture import length_batches, read_sequence
from ling_probe.capture.edits import Editor
from ling_probe.capture.layout import Layout, find_layout
from ling_probe.errors import UsageError
from ling_probe.interventions import Intervention, check_all
from ling_probe.model.load import LoadedLing
from ling_probe.trace import SEGMENTS

ANSWER = "answer"
"""What the units of answers are called, beside the labels of steps."""
_LOSS_SLICE = 1024


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded solutions [B, S] that are run together."""

    layouts: list[Layout]
    input_ids: torch.Tensor
    unit: np.ndarray
    """Unit of the token that follows each position, -1 for none [B, S]."""


Change = Callable[[Batch], AbstractContextManager[None]]
"""Makes the change that lasts for the forward pass of one batch."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What one condition makes of every unit."""

    loss: Float64[np.ndarray, " U"]
    """Sum over the unit's tokens, in nats."""
    right: Int64[np.ndarray, " U"]
    """Tokens that are the likeliest ones, given the solution so far."""


class Solutions:
    """Given solutions, cut into units: U reasoning steps and answers of P problems.

    A unit's loss is that of predicting its own tokens.
    """

    def __init__(self, loaded: LoadedLing, records: Sequence[Record], *, batch_tokens: int = 8192) -> None:
        """Tokenize and cut.

        Raises:
            UsageError: No record has a solution with steps.
        """
        self.loaded, self.batch_tokens = loaded, batch_tokens
        usable = [record for record in records if record.solution]
        sequences = [read_sequence(loaded, record) for record in usable]
        layouts = [find_layout(sequence) for sequence in sequences]
        if not any(layout.steps for layout in layouts):
            raise UsageError("no record has a solution with reasoning steps; what routing does to steps needs some")
        self.records = usable
        labels: list[str] = []
        problem: list[int] = []
        units = []
        for place, layout in enumerate(layouts):
            unit = np.where(layout.step >= 0, layout.step + len(labels), -1)
            unit[layout.segment == SEGMENTS.index("answer")] = len(labels) + len(layout.steps)
            units.append(unit)
            labels += [*(step.label for step in layout.steps), ANSWER]
            problem += [place] * (len(layout.steps) + 1)
        self.labels = np.array(labels)
        """Of each unit."""
        self.problem = np.array(problem)
        """Place of its problem in `records`."""
        self.tokens = np.bincount(np.concatenate([unit[unit >= 0] for unit in units]), minlength=len(labels))
        """Tokens of each unit."""
        places = length_batches([len(sequence.ids) for sequence in sequences], batch_tokens)
        self.batches = [
            self._batch([layouts[i] for i in some], [sequences[i].ids for i in some], [units[i] for i in some])
            for some in places
        ]

    def _batch(self, layouts: list[Layout], ids: list[list[int]], units: list[np.ndarray]) -> Batch:
        width = max(map(len, ids))
        input_ids = torch.zeros(len(ids), width, dtype=torch.long)
        unit = np.full((len(ids), width), -1)
        for row, (each, own) in enumerate(zip(ids, units, strict=True)):
            input_ids[row, : len(each)] = torch.tensor(each)
            unit[row, : len(each) - 1] = own[1:]
        return Batch(layouts, input_ids.to(self.loaded.native.device), unit)

    @cached_property
    def unchanged(self) -> Scores:
        """Under the model's own router."""
        return self.scores(lambda _batch: nullcontext())

    def under(self, interventions: Sequence[Intervention]) -> Scores:
        """With these interventions in force.

        Raises:
            InterventionError: The model cannot carry one out.
        """
        check_all(interventions, self.loaded.spec)
        editor = Editor(self.loaded, interventions)
        return self.scores(lambda batch: editor.inside(batch.layouts, batch.input_ids.shape[1]))

    @torch.no_grad()
    def scores(self, change: Change) -> Scores:
        """Under any change; one forward pass over all solutions."""
        loss, right = np.zeros(len(self.labels)), np.zeros(len(self.labels), np.int64)
        native = self.loaded.native
        for batch in self.batches:
            with change(batch):
                hidden = native.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            scored = torch.from_numpy(batch.unit >= 0).to(hidden.device)
            hidden, targets = hidden[scored], batch.input_ids.roll(-1, dims=1)[scored]
            unit = batch.unit[batch.unit >= 0]
            for start in range(0, len(unit), _LOSS_SLICE):
                part = slice(start, start + _LOSS_SLICE)
                logits = native.lm_head(hidden[part]).float()
                losses = torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")
                np.add.at(loss, unit[part], losses.cpu().numpy())
                np.add.at(right, unit[part], (logits.argmax(-1) == targets[part]).cpu().numpy())
        return Scores(loss, right)
