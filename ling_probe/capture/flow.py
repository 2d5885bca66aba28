"""Records to traces, window by window."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ling_probe.activations import EXAMPLES, ActivationSpec
from ling_probe.benchmarks import Record
from ling_probe.capture.edits import Editor
from ling_probe.capture.generation import Decoding, complete
from ling_probe.capture.passes import record_sequences
from ling_probe.capture.sequences import read_sequence
from ling_probe.chat import Chat
from ling_probe.errors import UsageError
from ling_probe.interventions import Intervention, check_all
from ling_probe.model.load import LoadedLing
from ling_probe.model.streaming import StreamedLing
from ling_probe.steps import check_steps
from ling_probe.trace import RoutingTrace

KEEP = ("experts", "loss", "logits", "contribution", "residual", "lens")
"""What `capture` can record. Bytes per token before compression (M routed layers of L, K chosen of E, D wide):

    experts       3MK       ids and weights of the chosen; 4MK if E > 256; always kept
    loss          4         next-token loss, by logits of a slice of tokens at a time
    logits        2ME       the router's logits
    contribution  2MK + 4M  norm of weight times output of each chosen expert, and of the shared expert
    residual      4L        norm of the residual stream after every layer
    lens          2MK + 2M  direct logit attribution of each chosen expert, and of the shared one, to the token that followed
    activations   2D + 8    whole vectors: so much for each site and each of its tokens, 4D + 8 if the model is float32; which
                            ones, an `ActivationSpec` says

What they cost in time is measured by tests/perf; contribution and lens hold one more [T K D] array of one layer at a time, and
no expert runs twice. `writes` has the formulas.
"""
WINDOW = 512
"""Records held at a time."""


def capture(
    model: Any,
    records: Iterable[Record],
    *,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    keep: Sequence[str] = ("experts", "loss"),
    activations: ActivationSpec | None = None,
    batch_tokens: int = 8192,
    chat: Chat | None = None,
    steps: str = "auto",
    spill: Path | None = None,
) -> Iterator[RoutingTrace]:
    """Run records through a model and yield one trace each, in order.

    Args:
        model: What `load_model` or `load_native` returns.
        records: Problems; without generation their own solutions are read, teacher-forced.
        interventions: Changes to routing, in force for every forward pass, decoding steps included.
        max_new_tokens: If positive, complete each prompt, at most so far, instead of reading the solution.
        temperature: 0 completes greedily; above, tokens are drawn.
        top_p: Draw among the likeliest tokens whose probabilities first reach this sum.
        stop: Texts that end a completion; the token that completes one is its last.
        seed: Of the draws; a sequence's draws depend on it and the record's id alone.
        keep: Names from `KEEP`; experts are always kept.
        activations: Which vectors to keep, if any.
        batch_tokens: Padded tokens of one forward pass; a longer sequence is a batch of its own.
        chat: Put each prompt as a conversation, through the tokenizer's own chat template.
        steps: How reasoning steps are found: a name in `ling_probe.steps.CHOICES`.
        spill: Folder of a disk that holds the activations of a window until they are read; the system's temporary one by
            default.

    Raises:
        UsageError: An unknown name in ``keep`` or ``steps``, activations that the model does not have, a setting out of its
            range, a prompt without tokens, no chat template where one is asked for, or what a streamed model cannot do.
        InterventionError: An intervention that this model, or generation, cannot carry out.
    """
    loaded: LoadedLing = getattr(model, "loaded", model)
    check_keep(keep, activations)
    if activations:
        activations.check(loaded.spec)
    check_steps(steps)
    if isinstance(loaded, StreamedLing):
        _check_streamed(keep, max_new_tokens)
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=tuple(stop), seed=seed)
    check_all(interventions, loaded.spec)
    editor = Editor(loaded, interventions)
    remaining = iter(records)
    while window := list(islice(remaining, WINDOW)):
        if max_new_tokens > 0:
            sequences = complete(loaded, window, editor, decoding, batch_tokens, chat)
        else:
            sequences = [read_sequence(loaded, record, chat) for record in window]
        sequences = [replace(sequence, steps=steps) for sequence in sequences]
        yield from record_sequences(loaded, sequences, editor, tuple(keep), batch_tokens, activations, spill)


def _check_streamed(keep: Sequence[str], max_new_tokens: int) -> None:
    if max_new_tokens > 0:
        raise UsageError("a model that is streamed layer by layer reads given solutions only; leave generation out")
    if "lens" in keep:
        raise UsageError("lens needs the model's head beside every layer, and a streamed model has one at a time; leave it out")


def check_keep(keep: Sequence[str], activations: ActivationSpec | None = None) -> None:
    """Refuse a name that is not in `KEEP`, and activations of which nothing says which.

    Raises:
        UsageError: There is one.
    """
    if "activations" in keep and activations is None:
        raise UsageError(f"which activations to keep is said by --activations: {EXAMPLES}")
    if unknown := [name for name in keep if name not in (*KEEP, "activations")]:
        raise UsageError(f'cannot keep "{unknown[0]}"; these can be kept: {", ".join(KEEP)}')
