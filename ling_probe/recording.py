"""Capture into a run folder: parts of bounded size, a summary, and going on after an interruption."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ling_probe.benchmarks import Benchmark
from ling_probe.capture import capture
from ling_probe.errors import RunError, UsageError
from ling_probe.interventions import Intervention
from ling_probe.model.load import LoadedLing
from ling_probe.model.streaming import StreamedLing
from ling_probe.run import Run
from ling_probe.trace import RoutingTrace

PART_TOKENS = 50_000
"""A part is written once it holds this many tokens; it is what an interruption can cost, and what memory holds."""


def record(
    loaded: LoadedLing,
    benchmark: Benchmark,
    out: Path,
    *,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 0,
    keep: Sequence[str] = ("experts", "loss"),
    batch_tokens: int = 8192,
    resume: bool = False,
    progress: Callable[[int], None] = lambda _done: None,
) -> Run:
    """Capture a benchmark into a new run, or the rest of it into an interrupted one.

    Args:
        loaded: The model.
        benchmark: What to run.
        out: The run folder.
        interventions: As for `capture`.
        max_new_tokens: As for `capture`.
        keep: As for `capture`.
        batch_tokens: As for `capture`.
        resume: Go on with a run in ``out`` that was started with the same model, benchmark and options.
        progress: Called with the number of sequences in the run, after each one.

    Raises:
        RunError: ``out`` exists and ``resume`` is false, or holds a run of something else.
        RoutingMismatch: A streamed model does not route by the rule; nothing was written.
        UsageError: The model has no router.
    """
    if not loaded.spec.routed_layers:
        raise UsageError(f"{loaded.spec.name} is dense in every layer: it has no router, and there is no routing to record")
    options = {
        "mode": "generate" if max_new_tokens > 0 else "teacher-forced",
        "max_new_tokens": max_new_tokens,
        "keep": sorted({"experts", *keep}),
        "batch_tokens": batch_tokens,
    }
    source = {"name": benchmark.name, "split": benchmark.split, "digest": benchmark.digest, "records": len(benchmark.records)}
    run = None
    if resume and out.exists():
        run = Run.open(out)
        _check_same(run, loaded, source, options, interventions)
        if run.is_complete:
            return run
    rest = [each for each in benchmark.records if run is None or each.id not in run.done]
    traces = capture(
        loaded, rest, interventions=interventions, max_new_tokens=max_new_tokens, keep=keep, batch_tokens=batch_tokens
    )
    if run is None:
        if isinstance(loaded, StreamedLing):
            traces = _begun(traces, out)
        run = Run.create(
            out, spec=loaded.spec, model=loaded.describe(), benchmark=source, options=options, interventions=interventions
        )
    done = len(benchmark.records) - len(rest)
    for part in _parts(traces):
        run.append(part)
        done += len(part)
        progress(done)
    run.finish(_summary(run))
    return run


def _begun(traces: Iterator[RoutingTrace], out: Path) -> Iterator[RoutingTrace]:
    """The same traces after the first stream, in which a streamed model proves its routing: nothing is written before."""
    if out.exists():
        raise RunError(f"{out} exists already and is left as it is; name a new folder, or resume")
    first = next(traces, None)
    return traces if first is None else chain((first,), traces)


def _parts(traces: Iterator[RoutingTrace]) -> Iterator[list[RoutingTrace]]:
    """Traces in groups of at least `PART_TOKENS` tokens, the last one whatever is left."""
    part: list[RoutingTrace] = []
    for trace in traces:
        part.append(trace)
        if sum(each.n_tokens for each in part) >= PART_TOKENS:
            yield part
            part = []
    if part:
        yield part


def _check_same(
    run: Run, loaded: LoadedLing, source: dict[str, Any], options: dict[str, Any], interventions: Sequence[Intervention]
) -> None:
    found = run.manifest
    same = {
        "model": found.model.get("digest") == loaded.digest,
        "benchmark": dict(found.benchmark) == source,
        "options": dict(found.options) == options,
        "interventions": found.interventions == tuple(interventions),
    }
    if different := [name for name, equal in same.items() if not equal]:
        raise RunError(f"{run.folder} was captured with another {' and '.join(different)}; give --out a new folder")


def _summary(run: Run) -> dict[str, Any]:
    """Sequences, judged and correct answers by family."""
    families: dict[str, Any] = {}
    for family, rows in run.sequences.groupby("family"):
        judged = rows["correct"].dropna()
        families[str(family)] = {"sequences": len(rows), "judged": len(judged), "correct": int(judged.sum())}
    return {"families": families}
