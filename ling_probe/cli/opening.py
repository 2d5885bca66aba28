"""From names on the command line to models, benchmarks and runs; refusals before minutes are spent."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from ling_probe.cli.options import DtypeName, TableName
from ling_probe.cli.showing import clean, print_verification
from ling_probe.errors import UsageError

if TYPE_CHECKING:
    from ling_probe.activations import ActivationSpec
    from ling_probe.benchmarks import Benchmark
    from ling_probe.chat import Chat
    from ling_probe.interventions import Intervention
    from ling_probe.model.load import LoadedLing
    from ling_probe.report import TableKind
    from ling_probe.run import Run, Shard


def check_out(folder: Path, *, resume: bool) -> None:
    """Refuse an occupied folder before minutes are spent on loading."""
    if folder.exists() and not resume:
        from ling_probe.errors import RunError

        raise RunError(f"{folder} exists already and is left as it is; give --out a new folder, or --resume an interrupted run")


def asked_activations(sites: Sequence[str] | None, positions: str) -> "ActivationSpec | None":
    """Which vectors to keep, or none."""
    from ling_probe.activations import ActivationSpec

    if not sites and positions != "all":
        raise UsageError(f"positions {positions} of which activations? name them with --activations, such as residual:3")
    return ActivationSpec(names=tuple(sites), positions=positions) if sites else None


def check_kept(keep: Sequence[str], activations: "ActivationSpec | None", **decoding: Any) -> None:
    """Refuse settings that make no sense before minutes are spent on loading."""
    from ling_probe.capture import Decoding, check_keep

    check_keep(keep, activations)
    Decoding(**decoding)


@contextmanager
def interruptible(folder: Path) -> Iterator[None]:
    """Say on Ctrl-C what is safe and how to go on, and exit with 130, as shells have it for SIGINT."""
    try:
        yield
    except KeyboardInterrupt:
        held = "holds nothing yet"
        if (folder / "run.json").is_file():
            from ling_probe.run import Run

            held = f"holds {sum(part.sequences for part in Run.open(folder).manifest.parts)} sequences, all whole"
        sys.stderr.write(f"ling-probe: interrupted; {clean(str(folder))} {held}; repeat the command with --resume to go on\n")
        raise typer.Exit(130) from None


def parsed_shard(text: str | None) -> "Shard | None":
    """The share of a run that i/n names."""
    if text is None:
        return None
    from ling_probe.run import Shard

    return Shard.parse(text)


def check_explorable(folder: Path) -> None:
    """Refuse a folder that is no run, unless runs may lie in it."""
    if (folder / "run.json").is_file() or not folder.is_dir():
        from ling_probe.run import Run

        Run.open(folder)


def check_printable(pdf: bool) -> None:
    """Refuse a PDF before minutes are spent, where nothing can print it."""
    if pdf:
        from ling_probe.report.pdf import find_browser

        find_browser()


def table_kinds(names: Sequence[TableName] | None) -> "tuple[TableKind, ...]":
    """Kinds of table files by name; those a report writes by default where none is named."""
    from ling_probe.report.tables import DEFAULT_KINDS, TableKind

    return tuple(TableKind(name.value) for name in names) if names else DEFAULT_KINDS


def read_problems(name: str, **options: Any) -> "Benchmark":
    """A benchmark by name or file."""
    from ling_probe.benchmarks import read_benchmark

    return read_benchmark(name, **options)


def chat_of(system: str) -> "Chat":
    """How prompts are put as conversations."""
    from ling_probe.chat import Chat

    return Chat(system)


def steered(vector: Path | None, strength: float | None) -> "tuple[Intervention, ...]":
    """The interventions of a steering vector's file, if one is asked for."""
    if (vector is None) != (strength is None):
        raise UsageError("a steering vector and a strength go together: --steer FILE --strength 0.05")
    if vector is None or strength is None:
        return ()
    from ling_probe.steering import SteeringVector

    return SteeringVector.read(vector).interventions(strength)


def parsed_changes(
    exclude: Sequence[str], silence: Sequence[str], force: Sequence[str], bias: Sequence[str]
) -> "list[Intervention]":
    """Changes to routing named by LAYER.EXPERT, for bias with =VALUE; one intervention a layer, kind and value."""
    from ling_probe.interventions import Intervention

    cells: dict[tuple[str, int, float], list[int]] = {}
    for kind, words in (("exclude", exclude), ("silence", silence), ("force", force), ("bias", bias)):
        for word in words:
            where, equals, value = word.partition("=")
            layer, dot, expert = where.partition(".")
            try:
                if not dot or bool(equals) != (kind == "bias"):
                    raise ValueError
                cells.setdefault((kind, int(layer), float(value or 0)), []).append(int(expert))
            except ValueError:
                form = "LAYER.EXPERT=VALUE, as in 3.5=0.1" if kind == "bias" else "LAYER.EXPERT, as in 3.5"
                raise UsageError(f'--{kind} "{word}" names no expert; write {form}') from None
    return [
        Intervention.from_dict({"kind": kind, "layer": layer, "experts": tuple(experts), "value": value})
        for (kind, layer, value), experts in cells.items()
    ]


def loaded_model(
    name: str, revision: str | None, device: str, dtype: DtypeName, *, quiet: bool = False, stream: bool = False
) -> "LoadedLing":
    """A model, with how its routing was verified printed unless quiet."""
    with Console(stderr=True).status("loading"):
        import transformers

        from ling_probe.model.load import load_native
        from ling_probe.model.streaming import load_streamed

        transformers.utils.logging.disable_progress_bar()
        load = load_streamed if stream else load_native
        loaded = load(name, revision=revision, device=device, dtype=dtype.value)
    # A streamed model is verified by its first stream.
    if not (quiet or stream):
        print_verification(loaded)
    return loaded


def record_run(loaded: "LoadedLing", problems: "Benchmark", folder: Path, **options: Any) -> "Run":
    """Capture with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ling_probe.recording import record

    columns = (TextColumn("capturing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("capturing", total=len(problems.records))
        try:
            return record(loaded, problems, folder, progress=lambda done: bar.update(task, completed=done), **options)
        except BaseException:
            bar.live.transient = True  # what went wrong is one line, without a bar before it
            raise
