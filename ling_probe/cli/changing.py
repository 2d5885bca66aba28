"""Commands that change a model: its routing, its routers, all of it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ling_probe.cli.app import app
from ling_probe.cli.opening import check_out, loaded_model, read_problems
from ling_probe.cli.options import (
    BatchTokens,
    BenchmarkName,
    Change,
    Device,
    Dtype,
    DtypeName,
    Generate,
    GenerateDraws,
    Json,
    Limit,
    Model,
    Revision,
    Split,
    Tunable,
)
from ling_probe.cli.showing import clean, out, print_frame, print_rows
from ling_probe.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

    from ling_probe.benchmarks import Record
    from ling_probe.causal import Study
    from ling_probe.model.load import LoadedLing


@app.command()
def intervene(
    model: Model,
    benchmark: BenchmarkName,
    folder: Annotated[Path, typer.Option("--run", help="The run in whose steps experts are picked.", metavar="RUN")],
    split: Split = "test",
    limit: Limit = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A kind of step; repeatable. All that some expert surely prefers if left out.")
    ] = None,
    kind: Annotated[
        list[Change] | None,
        typer.Option(help="Repeatable: exclude, silence, force, bias or route_as; exclude and route_as if left out."),
    ] = None,
    dose: Annotated[list[int] | None, typer.Option(help="Change so many experts; repeatable (default 4).", min=1)] = None,
    value: Annotated[list[float] | None, typer.Option(help="Of bias: what is added to the choice score; repeatable.")] = None,
    draws: Annotated[int, typer.Option(help="Matched draws of experts for each change.", min=1)] = 99,
    generate: Generate = 0,
    generate_draws: GenerateDraws = 9,
    max_new_tokens: Annotated[int, typer.Option(help="Of a solution that the model writes.", min=1)] = 300,
    seed: Annotated[int, typer.Option(help="Of the draws and the bootstrap.")] = 0,
    into: Annotated[Path | None, typer.Option("--out", help="Folder of the study; RUN/causal if left out.")] = None,
    batch_tokens: BatchTokens = 8192,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Test whether steps need the experts they prefer: change routing, and compare with the same change to like experts.

    A study that was interrupted goes on where it stopped when the command is repeated.
    """
    from dataclasses import replace

    from ling_probe.causal import plan_study
    from ling_probe.run import Run

    run = Run.open(folder)
    kinds = [each.value for each in kind or (Change.exclude, Change.route_as)]
    with Console(stderr=True).status("picking experts"):
        study, load = plan_study(
            run, labels=label, kinds=kinds, numbers=dose or (4,), values=value or (), draws=draws, seed=seed
        )
    study = replace(study, written=generate, written_draws=generate_draws, max_new_tokens=max_new_tokens)
    problems = read_problems(benchmark, split=split, limit=limit)
    loaded = loaded_model(model, revision, device, dtype, quiet=as_json)
    table = _intervened(loaded, list(problems.records), study, load, into or folder / "causal", batch_tokens)
    if problems.name == run.manifest.benchmark.get("name") and split == run.manifest.benchmark.get("split") and not as_json:
        out.print("note: experts were picked on these same problems; another --split gives effects on others", soft_wrap=True)
    if missing := sorted(set(study.labels) - set(table["label"])):
        Console(stderr=True).print(f"no problem has steps of these labels: {clean(', '.join(missing))}", soft_wrap=True)
    shown = ["label", "kind", "dose", "measure", "effect", "control", "excess", "excess_low", "excess_high", "p", "q"]
    print_frame(
        "What changes to routing cost, in nats a token; solved and steps_right are shares",
        table if as_json else table[shown],
        as_json=as_json,
    )


@app.command()
def adapt(
    model: Model,
    benchmark: Annotated[
        str,
        typer.Argument(help="A file of problems with solutions, or stepbench: new problems of a split's kind."),
    ] = "stepbench",
    folder: Annotated[Path, typer.Option("--out", help="The checkpoint folder to make.")] = Path("out/adapted"),
    split: Split = "longer",
    family: Annotated[str, typer.Option(help="Of stepbench.")] = "arithmetic",
    tuned: Annotated[
        Tunable, typer.Option("--tune", help="The routers; or, as references, their bias, as large a share of experts, or all.")
    ] = Tunable.router,
    steps: Annotated[int, typer.Option(help="Batches to learn from.", min=1)] = 200,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch.", min=1)] = 3072,
    learning_rate: Annotated[float, typer.Option(help="At its highest.", min=0)] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the draw of experts.")] = 0,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="Also judge on this: a file, stepbench:SPLIT or stepbench:SPLIT:FAMILY; repeatable."),
    ] = None,
    limit: Limit = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Tune only the routers on a task, and judge the task and others before and after."""
    from itertools import chain, repeat

    from ling_probe.adapt import Adaptation, Judge, Task, task_problems
    from ling_probe.adapt import adapt as tune

    check_out(folder, resume=False)
    own = f"stepbench:{split}:{family}" if benchmark == "stepbench" else benchmark
    tasks = [Task.named(name, limit) for name in dict.fromkeys([own, *(judge or ["stepbench:test"])])]
    problems = task_problems(family, split) if benchmark == "stepbench" else chain.from_iterable(repeat(tasks[0].records))
    if benchmark != "stepbench":
        Console(stderr=True).print(
            f"note: {clean(own)} is also what is learned; judge on other problems with --judge", soft_wrap=True
        )
    loaded = loaded_model(model, None, device, DtypeName.float32, quiet=as_json)
    asked = Adaptation(tuned=tuned.value, steps=steps, batch_tokens=batch_tokens, learning_rate=learning_rate, seed=seed)
    judging = Judge(loaded, tasks)
    with Console(stderr=True).status("judging before"):
        rows = judging.rows("before")
    with Console(stderr=True).status("adapting") as status:
        for line in tune(loaded, problems, asked, folder):
            status.update(f"adapting: step {line['step']} of {steps}, loss {line['loss']:.4f}")
    with Console(stderr=True).status("judging after"):
        rows += judging.rows("after")
    print_rows(f"{loaded.spec.name} with its {tuned.value} tuned on {own}", rows, as_json=as_json)
    if not as_json:
        out.print(f"saved to {folder}", soft_wrap=True)


@app.command()
def train(
    folder: Annotated[Path, typer.Option("--out", help="The checkpoint folder to make.")],
    preset: Annotated[str, typer.Option(help="A recipe by name.")] = "ling-tiny",
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps of the recipe.", min=1)] = None,
    snapshot: Annotated[list[float] | None, typer.Option(help="Fractions of the training at which to save a copy.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the work on a CPU, one thread each.", min=1)] = 1,
    start: Annotated[Path | None, typer.Option(help="Go on from the weights of a checkpoint that train made.")] = None,
    device: Device = "cpu",
) -> None:
    """Train a small Ling 2.0 from scratch on stepbench, balanced through the router bias."""
    import transformers

    from ling_probe.train import PRESETS
    from ling_probe.train import train as run_training

    transformers.utils.logging.disable_progress_bar()

    if preset not in PRESETS:
        raise UsageError(f'no recipe "{preset}"; there is {", ".join(PRESETS)}')
    marks = tuple(snapshot or ())
    for line in run_training(
        PRESETS[preset], folder, device=device, workers=workers, start=start, snapshots=marks, stop_after=steps
    ):
        worst = max(line["max_vio"], default=0.0)
        out.print(
            f"step {line['step']:>6}  loss {line['loss']:.4f}  solution {line['solution_loss']:.4f}  "
            f"MaxVio {worst:.2f}  dead {sum(line['dead'])}  tokens {line['tokens']:,}  {line['seconds']:.0f} s"
        )
    out.print(f"saved to {folder}", soft_wrap=True)


def _intervened(
    loaded: "LoadedLing", records: "list[Record]", study: "Study", load: dict[int, Any], folder: Path, batch_tokens: int
) -> "pd.DataFrame":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ling_probe.causal import intervene

    columns = (TextColumn("changing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("changing", total=None)
        told = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        return intervene(loaded, records, study, load, folder, batch_tokens=batch_tokens, progress=told)
