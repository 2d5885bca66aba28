"""Prompts to traces: run a loaded Ling and keep what its routers chose.

1. Take a window of records; in generating mode, complete each prompt greedily first.
2. Sort the window by length and cut it into right-padded batches of at most ``batch_tokens`` tokens.
3. Run the native model once over each batch with a plain forward hook on every gate; the gate's own ids and weights are
   copied, never derived.
4. Compute the next-token loss from the last hidden states in slices, so that logits of the whole batch never exist.
5. Undo the sorting and yield one checked `RoutingTrace` a record, in the order of the records.

A generated text is recorded by the forward pass of step 3, not by the decoding steps; in float32 both choose the same experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream

from ling_probe.benchmarks import Record
from ling_probe.errors import InterventionError, UsageError
from ling_probe.interventions import Intervention, check_all
from ling_probe.model.load import LoadedLing
from ling_probe.model.modeling import LingGate
from ling_probe.model.streaming import StreamedLing
from ling_probe.steps import extract_answer, segment, token_spans
from ling_probe.trace import SEGMENTS, RoutingTrace, StepSpan

KEEP = ("experts", "loss", "logits")
"""What `capture` can record. Bytes per token and routed layer: experts 3K, logits 2E as stored; loss 4 bytes a token."""
WINDOW = 512
"""Records held at a time."""
_LOSS_SLICE = 1024
_PROMPT, _REASONING, _ANSWER, _SPECIAL = range(len(SEGMENTS))


@dataclass(frozen=True)
class _Sequence:
    """A record with the tokens that will be run."""

    record: Record
    ids: list[int]
    n_prompt: int
    texts: tuple[str, ...]
    """What each token adds to the text; nothing for a special token."""
    special: np.ndarray
    """Which tokens are special [T]."""
    generated: bool


def capture(
    model: Any,
    records: Iterable[Record],
    *,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 0,
    keep: Sequence[str] = ("experts", "loss"),
    batch_tokens: int = 8192,
) -> Iterator[RoutingTrace]:
    """Run records through a model and yield one trace each, in order.

    Args:
        model: What `load_model` or `load_native` returns.
        records: Problems; without generation their own solutions are read, teacher-forced.
        interventions: Changes to routing, in force for every forward pass, decoding steps included.
        max_new_tokens: If positive, complete each prompt greedily, at most so far, instead of reading the solution.
        keep: Names from `KEEP`; experts are always kept.
        batch_tokens: Padded tokens of one forward pass; a longer sequence is a batch of its own.

    Raises:
        UsageError: An unknown name in ``keep``, a prompt without tokens, or generation with a streamed model.
        InterventionError: An intervention that this model, or generation, cannot carry out.
    """
    loaded: LoadedLing = getattr(model, "loaded", model)
    if unknown := [name for name in keep if name not in KEEP]:
        raise UsageError(f'cannot keep "{unknown[0]}"; these can be kept: {", ".join(KEEP)}')
    check_all(interventions, loaded.spec)
    if max_new_tokens > 0 and isinstance(loaded, StreamedLing):
        raise UsageError("a model that is streamed layer by layer reads given solutions only; leave generation out")
    editor = _Editor(loaded, interventions)
    remaining = iter(records)
    while window := list(islice(remaining, WINDOW)):
        if max_new_tokens > 0:
            sequences = _generate(loaded, window, editor, max_new_tokens, batch_tokens)
        else:
            sequences = [read_sequence(loaded, record) for record in window]
        yield from _record(loaded, sequences, editor, tuple(keep), batch_tokens)


def read_sequence(loaded: LoadedLing, record: Record) -> _Sequence:
    """Prompt and own solution, ended as in training if there is a solution."""
    prompt, solution = _encode(loaded, record, record.prompt), _encode(loaded, record, record.solution)
    end = [loaded.tokenizer.eos_token_id] if solution and loaded.tokenizer.eos_token_id is not None else []
    return _sequence(loaded, record, prompt, [*solution, *end], generated=False)


def _encode(loaded: LoadedLing, record: Record, text: str) -> list[int]:
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if text and max(ids, default=0) >= loaded.spec.vocab_size:
        raise UsageError(
            f"record {record.id}: the tokenizer gives token {max(ids)}; {loaded.spec.name} knows {loaded.spec.vocab_size}"
        )
    return ids


def _sequence(loaded: LoadedLing, record: Record, prompt: list[int], rest: list[int], *, generated: bool) -> _Sequence:
    if not prompt:
        raise UsageError(f"record {record.id} has a prompt without tokens; there is nothing to run")
    ids = [*prompt, *rest]
    texts = (*_texts(loaded, prompt), *_texts(loaded, rest))
    special = np.isin(ids, loaded.tokenizer.all_special_ids)
    return _Sequence(record, ids, len(prompt), texts, special, generated)


def _texts(loaded: LoadedLing, ids: Sequence[int]) -> list[str]:
    """The exact text each token adds; a token that only begins a character adds nothing, special tokens too."""
    stream, backend = DecodeStream(skip_special_tokens=True), loaded.tokenizer.backend_tokenizer
    return [stream.step(backend, token) or "" for token in ids]


@torch.no_grad()
def _generate(
    loaded: LoadedLing, records: list[Record], editor: "_Editor", max_new_tokens: int, batch_tokens: int
) -> list[_Sequence]:
    """Greedy completions, in batches of left-padded prompts of similar length."""
    prompts = [_encode(loaded, record, record.prompt) for record in records]
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    done: dict[int, _Sequence] = {}
    for batch in length_batches(lengths, batch_tokens):
        width = max(len(prompts[i]) for i in batch)
        pad = loaded.tokenizer.pad_token_id or 0
        rows = [[pad] * (width - len(prompts[i])) + prompts[i] for i in batch]
        masks = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
        input_ids = torch.tensor(rows, device=loaded.native.device)
        with editor.everywhere():
            output = loaded.native.generate(
                input_ids, attention_mask=torch.tensor(masks, device=loaded.native.device), max_new_tokens=max_new_tokens,
                do_sample=False, pad_token_id=pad, eos_token_id=loaded.tokenizer.eos_token_id,
            )  # fmt: skip
        for i, row in zip(batch, output[:, width:].tolist(), strict=True):
            new = _until_end(row, loaded.tokenizer.eos_token_id)
            done[i] = _sequence(loaded, records[i], prompts[i], new, generated=True)
    return [done[i] for i in range(len(records))]


def _until_end(ids: list[int], end: int | None) -> list[int]:
    """Generated ids up to and including the first end token."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length whose padded size is at most ``batch_tokens``."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[i] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def _record(
    loaded: LoadedLing, sequences: list[_Sequence], editor: "_Editor", keep: tuple[str, ...], batch_tokens: int
) -> Iterator[RoutingTrace]:
    lengths = [len(sequence.ids) for sequence in sequences]
    traces: dict[int, RoutingTrace] = {}
    places = length_batches(lengths, batch_tokens)
    batches = (_Batch(loaded, batch, [sequences[i] for i in batch], editor, keep) for batch in places)
    for batch, hidden in _forward(loaded, batches):
        traces |= zip(batch.places, batch.traces(hidden), strict=True)
    for i in range(len(sequences)):
        yield traces.pop(i)


def _forward(loaded: LoadedLing, batches: Iterable["_Batch"]) -> Iterator[tuple["_Batch", torch.Tensor]]:
    """Each batch with its last hidden states [B, S, D]: one forward pass after the other, or all of them layer by layer."""
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
        self, loaded: LoadedLing, places: list[int], sequences: list[_Sequence], editor: "_Editor", keep: tuple[str, ...]
    ) -> None:
        self.places = places
        """Of the sequences, in the window."""
        width, device = max(len(sequence.ids) for sequence in sequences), loaded.native.device
        input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros(len(sequences), width, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            input_ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
            mask[row, : len(sequence.ids)] = 1
        self.input_ids, self.mask = input_ids.to(device), mask.to(device)
        self._loaded, self._sequences, self._editor, self._keep = loaded, sequences, editor, keep
        self._layouts = [_layout(sequence) for sequence in sequences]
        self._recorder = _Recorder(loaded, logits="logits" in keep)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record and edit while the block runs."""
        # The recorder sees a gate's output before the editor silences any of it: a silenced expert stays chosen.
        with self._recorder.attached(), self._editor.inside(self._layouts, self.input_ids.shape[1]):
            yield

    def traces(self, hidden: torch.Tensor) -> Iterator[RoutingTrace]:
        """One trace a sequence, from what was recorded and the last hidden states."""
        ids, weights, logits = self._recorder.arrays(*self.input_ids.shape)
        with_loss = "loss" in self._keep
        loss = _loss(self._loaded, hidden, self.input_ids) if with_loss else np.full(self.input_ids.shape, np.nan, np.float32)
        for row, (sequence, layout) in enumerate(zip(self._sequences, self._layouts, strict=True)):
            n = len(sequence.ids)
            own_loss = loss[row, :n].copy()
            own_loss[-1] = np.nan
            extras = {"logits": logits[row, :n]} if logits is not None else {}
            yield _trace(
                self._loaded, sequence, layout, ids[row, :n], weights[row, :n], own_loss, extras, self._editor.may_leave_groups
            )


def _loss(loaded: LoadedLing, hidden: torch.Tensor, input_ids: torch.Tensor) -> np.ndarray:
    """Next-token loss [B, S] in nats from last hidden states [B, S, D]; the last column means nothing."""
    flat = hidden.flatten(0, 1)
    targets = input_ids.roll(-1, dims=1).flatten()
    losses = [
        torch.nn.functional.cross_entropy(loaded.native.lm_head(part).float(), target, reduction="none")
        for part, target in zip(flat.split(_LOSS_SLICE), targets.split(_LOSS_SLICE), strict=True)
    ]
    return torch.cat(losses).view(input_ids.shape).cpu().numpy()


class _Recorder:
    """Copies what every gate returns in one forward pass."""

    def __init__(self, loaded: LoadedLing, *, logits: bool) -> None:
        self._gates = loaded.gates()
        self._spec = loaded.spec
        self._with_logits = logits
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record while the block runs; nothing stays attached."""
        with ExitStack() as stack:
            for layer, gate in self._gates.items():
                handle = gate.register_forward_hook(lambda _gate, _args, out, layer=layer: self._see(layer, out))
                stack.callback(handle.remove)
            yield

    def _see(self, layer: int, out: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        logits, weights, ids = out
        self._seen[layer] = (ids, weights, logits if self._with_logits else None)

    def arrays(self, rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Ids and weights [B, S, M, K], and logits [B, S, M, E] if kept, on the CPU; M is 0 for a dense model."""

        def stack(index: int, dtype: Any) -> np.ndarray:
            if not self._gates:
                return np.zeros((rows, width, 0, self._spec.n_experts if index == 2 else self._spec.top_k), dtype)
            parts: Any = [self._seen[layer][index] for layer in self._gates]
            stacked = torch.stack(parts, dim=1).cpu().numpy().astype(dtype)
            return stacked.reshape(rows, width, *stacked.shape[1:])

        return stack(0, self._spec.id_dtype), stack(1, np.float32), stack(2, np.float32) if self._with_logits else None


@dataclass(frozen=True)
class _Layout:
    """Where the parts of one sequence lie, in tokens."""

    segment: np.ndarray
    step: np.ndarray
    steps: tuple[StepSpan, ...]
    completion: str


def _layout(sequence: _Sequence) -> _Layout:
    """Segments and steps of a sequence; the answer is from the line that begins with ``answer:`` on."""
    n, start = len(sequence.ids), sequence.n_prompt
    texts = sequence.texts[start:]
    completion = "".join(texts)
    stops = np.cumsum([len(text) for text in texts])
    offsets = [(int(stop) - len(text), int(stop)) for text, stop in zip(texts, stops, strict=True)]
    found = segment(sequence.record, completion)
    spans = token_spans(found, offsets, base=start)
    segments = np.full(n, _REASONING, np.uint8)
    segments[:start] = _PROMPT
    answer = 0 if completion.startswith("answer:") else completion.rfind("\nanswer:") + 1
    if completion[answer:].startswith("answer:"):
        segments[start:][np.array([offset[0] for offset in offsets]) >= answer] = _ANSWER
    segments[sequence.special] = _SPECIAL
    step = np.full(n, -1, np.int16)
    for index, (first, last) in enumerate(spans):
        step[first:last] = index
    steps = tuple(
        StepSpan(step=i, label=each.label, text=each.text, start=a, stop=b, correct=each.correct)
        for i, (each, (a, b)) in enumerate(zip(found, spans, strict=True))
    )
    return _Layout(segments, step, steps, completion)


def _trace(
    loaded: LoadedLing, sequence: _Sequence, layout: _Layout, ids: np.ndarray, weights: np.ndarray, loss: np.ndarray,
    extras: dict[str, np.ndarray], ungrouped: bool,
) -> RoutingTrace:  # fmt: skip
    record = sequence.record
    predicted = (extract_answer(layout.completion) or "") if sequence.generated else ""
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
        loss=loss.astype(np.float32),
        steps=layout.steps,
        benchmark=record.benchmark,
        family=record.family,
        split=record.split,
        prompt=record.prompt,
        completion=layout.completion,
        answer=record.answer,
        predicted=predicted,
        correct=(predicted.strip() == record.answer.strip()) if sequence.generated and record.answer else None,
        meta=record.meta,
        extras=extras,
        group_limited=not ungrouped,
    )


class _Editor:
    """Carries out interventions through the gates' own hook points; without any it attaches nothing."""

    def __init__(self, loaded: LoadedLing, interventions: Sequence[Intervention]) -> None:
        self._gates = loaded.gates()
        self._interventions = tuple(interventions)
        self._cover: dict[Intervention, torch.Tensor] = {}
        self._device = loaded.native.device

    @property
    def may_leave_groups(self) -> bool:
        """Whether a forced expert may lie outside the kept groups."""
        return any(each.kind == "force" for each in self._interventions)

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Edit every token while the block runs.

        Raises:
            InterventionError: One is limited to segments, steps or positions, which are not known while a text grows.
        """
        for each in self._interventions:
            if each.segments or each.labels or each.positions:
                raise InterventionError(
                    f"{each.kind} at layer {each.layer} is limited to some tokens; while generating it must act on all"
                )
        self._cover = {}
        with self._attached():
            yield

    @contextmanager
    def inside(self, layouts: Sequence[_Layout], width: int) -> Iterator[None]:
        """Edit the covered tokens of a right-padded batch while the block runs."""
        self._cover = {each: self._covered(each, layouts, width) for each in self._interventions}
        with self._attached():
            yield

    def _covered(self, intervention: Intervention, layouts: Sequence[_Layout], width: int) -> torch.Tensor:
        cover = np.zeros((len(layouts), width), bool)
        for row, layout in enumerate(layouts):
            names = np.array(["", *(span.label for span in layout.steps)], dtype=object)
            cover[row, : len(layout.step)] = intervention.covers(
                np.arange(len(layout.step)),
                segments=[SEGMENTS[code] for code in layout.segment],
                labels=list(names[layout.step + 1]),
            )
        return torch.from_numpy(cover.reshape(-1)).to(self._device)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, gate in self._gates.items():
                mine = [each for each in self._interventions if each.layer == layer]
                for module, edit in self._edits(gate, mine):
                    stack.callback(module.register_forward_hook(edit).remove)
            yield

    def _edits(self, gate: LingGate, mine: list[Intervention]) -> Iterator[tuple[torch.nn.Module, Any]]:
        kinds = {each.kind for each in mine}
        if kinds & {"exclude", "bias"}:
            yield gate.choice, lambda _m, _a, choice: self._edit_choice(choice, mine)
        if "force" in kinds:
            yield gate.expert_ids, lambda _m, _a, ids: self._force(ids, mine)
        if "silence" in kinds:
            yield gate, lambda _m, _a, out: (out[0], self._silence(out[1], out[2], mine), out[2])

    def _cells(self, each: Intervention, tokens: int, n_experts: int) -> torch.Tensor:
        """Which (token, expert) cells an intervention touches [T, E]."""
        experts = torch.zeros(n_experts, dtype=torch.bool, device=self._device)
        experts[list(each.experts)] = True
        cover = self._cover.get(each)
        return experts.expand(tokens, n_experts) if cover is None else cover[:, None] & experts

    def _edit_choice(self, choice: torch.Tensor, mine: list[Intervention]) -> torch.Tensor:
        edited = choice
        for kind in ("bias", "exclude"):
            for each in (each for each in mine if each.kind == kind):
                cells = self._cells(each, *choice.shape)
                edited = torch.where(cells, float("-inf") if kind == "exclude" else edited + each.value, edited)
        return edited

    def _force(self, ids: torch.Tensor, mine: list[Intervention]) -> torch.Tensor:
        """Forced experts not among the chosen take the last slots, in ascending id; the lowest-ranked others leave."""
        n_experts = next(iter(self._gates.values())).n_experts
        forced = torch.zeros(len(ids), n_experts, dtype=torch.bool, device=ids.device)
        for each in (each for each in mine if each.kind == "force"):
            forced |= self._cells(each, len(ids), n_experts)
        chosen = torch.zeros_like(forced).scatter_(1, ids, value=True)
        missing = forced & ~chosen
        k = ids.shape[1]
        # Stayers keep their order, first the forced ones' need of room is met from the back of the free slots.
        free = ~forced.gather(1, ids)
        room = missing.sum(1, keepdim=True)
        free_from_back = free.flip(1).cumsum(1).flip(1)
        leaving = free & (free_from_back <= room)
        stay_order = torch.where(leaving, k, torch.arange(k, device=ids.device).expand_as(ids)).argsort(dim=1, stable=True)
        stayed = ids.gather(1, stay_order)
        incoming = torch.where(missing, torch.arange(n_experts, device=ids.device), n_experts).sort(dim=1).values[:, :k]
        slot = torch.arange(k, device=ids.device).expand_as(ids)
        place = (slot - (k - room)).clamp(min=0)
        return torch.where(slot < k - room, stayed, incoming.gather(1, place))

    def _silence(self, weights: torch.Tensor, ids: torch.Tensor, mine: list[Intervention]) -> torch.Tensor:
        n_experts = next(iter(self._gates.values())).n_experts
        for each in (each for each in mine if each.kind == "silence"):
            weights = weights.masked_fill(self._cells(each, len(ids), n_experts).gather(1, ids), 0.0)
        return weights
