"""Capture into a run folder: part after part, a summary, and going on after an interruption.

1. `cut` the records into parts; where they begin follows from the records and options alone.
2. Open the run, or make it, and keep every other writer away.
3. Capture each part that the run and its shard still lack, in batches of its own, and append it.
4. Sum up, and mark the run complete.

A record in flight when a process dies is captured again with the rest of its part; none is held twice.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ling_probe.activations import ActivationSpec
from ling_probe.benchmarks import Benchmark
from ling_probe.capture import Decoding, capture, check_keep
from ling_probe.chat import Chat
from ling_probe.errors import RunError, UsageError
from ling_probe.interventions import Intervention
from ling_probe.model.load import LoadedLing
from ling_probe.model.streaming import StreamedLing
from ling_probe.run import Run, Shard, cut, summarise
from ling_probe.steps import RULES_VERSION, check_steps
from ling_probe.trace import RoutingTrace
from ling_probe.writing import PartWriter


def record(
    loaded: LoadedLing,
    benchmark: Benchmark,
    out: Path,
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
    parts: int = 1,
    shard: Shard | None = None,
    resume: bool = False,
    redo_damaged: bool = False,
    progress: Callable[[int], None] = lambda _done: None,
) -> Run:
    """Capture a benchmark into a new run, or the rest of it into an interrupted one.

    Args:
        loaded: The model.
        benchmark: What to run.
        out: The run folder.
        interventions: As for `capture`.
        max_new_tokens: As for `capture`.
        temperature: As for `capture`.
        top_p: As for `capture`.
        stop: As for `capture`.
        seed: As for `capture`; in the manifest.
        keep: As for `capture`.
        activations: As for `capture`.
        batch_tokens: As for `capture`.
        chat: As for `capture`.
        steps: As for `capture`.
        parts: Cut the benchmark into so many parts at least.
        shard: Capture this share of the parts only, of which there will be one a shard at least.
        resume: Go on with a run in ``out`` that was started with the same model, benchmark and options.
        redo_damaged: As ``resume``, and capture parts with a missing or changed file again; the whole run is read.
        progress: Called with the number of sequences in the run or on their way there, after each part.

    Raises:
        RunError: ``out`` exists and ``resume`` is false, holds a run of something else, or is being written; the disk is full.
        RoutingMismatch: A streamed model does not route by the rule; nothing was written.
        UsageError: The model has no router, there are fewer records than parts, annotated steps are asked for and there are
            none, or a setting makes no sense.
    """
    check_keep(keep, activations)
    if activations:
        activations.check(loaded.spec)
    check_steps(steps, benchmark.records, generated=max_new_tokens > 0)
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=tuple(stop), seed=seed)
    if not loaded.spec.routed_layers:
        raise UsageError(f"{loaded.spec.name} is dense in every layer: it has no router, and there is no routing to record")
    least = max(parts, shard.of if shard else 1)
    pieces = cut(benchmark.records, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens, least=least)
    options = {
        "mode": "generate" if max_new_tokens > 0 else "teacher-forced",
        **decoding.to_dict(),
        "keep": sorted({"experts", *keep, *(["activations"] if activations else [])}),
        **({"activations": activations.to_dict()} if activations else {}),
        "batch_tokens": batch_tokens,
        "parts": len(pieces),
        "steps": steps,
        "step_rules": RULES_VERSION,
        **({"chat": chat.describe(loaded.tokenizer)} if chat else {}),
    }
    read = partial(
        capture, loaded, interventions=interventions, keep=keep, batch_tokens=batch_tokens, chat=chat, steps=steps,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop, seed=seed, activations=activations,
        spill=next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists()),
    )  # fmt: skip
    wanted = [number for number in range(len(pieces)) if shard is None or shard.holds(number)]
    ready: dict[int, list[RoutingTrace]] = {}
    if (resume or redo_damaged) and out.exists():
        run = Run.open(out, whole=not redo_damaged)
        _check_same(run, loaded, _source(benchmark), options, interventions, shard)
    else:
        if isinstance(loaded, StreamedLing) and not out.exists():
            # A streamed model proves its routing in its first stream; nothing is written before.
            ready[wanted[0]] = list(read(pieces[wanted[0]]))
        run = Run.create(
            out, spec=loaded.spec, model=loaded.describe(), benchmark=_source(benchmark), options=options,
            interventions=interventions, seed=seed, shard=shard,
        )  # fmt: skip
    with run.writing():
        if redo_damaged:
            run.drop_damaged()
        if run.is_complete:
            return run
        held = {int(part.name): part.sequences for part in run.manifest.parts}
        done = sum(held.values())
        with PartWriter(run) as writer:
            for number in (each for each in wanted if each not in held):
                writer.write(ready.pop(number, []) or list(read(pieces[number])), number=number)
                done += len(pieces[number])
                progress(done)
        run.finish(summarise(run))
    return run


def _source(benchmark: Benchmark) -> dict[str, Any]:
    """What identifies the records: the file's bytes, and what was read from them."""
    content = hashlib.sha256()
    for record in benchmark.records:
        content.update("\0".join((record.id, record.prompt, record.solution, record.answer, "")).encode())
    return benchmark.describe() | {"content_digest": content.hexdigest()}


def _check_same(
    run: Run, loaded: LoadedLing, source: dict[str, Any], options: dict[str, Any], interventions: Sequence[Intervention],
    shard: Shard | None,
) -> None:  # fmt: skip
    found = run.manifest
    same = {
        "model": found.model.get("digest") == loaded.digest,
        "benchmark": dict(found.benchmark) == source,
        "options": dict(found.options) == options,
        "interventions": found.interventions == tuple(interventions),
        "shard": found.shard == shard,
    }
    if different := [name for name, equal in same.items() if not equal]:
        raise RunError(f"{run.folder} was captured with another {' and '.join(different)}; give --out a new folder")
