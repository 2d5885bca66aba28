"""Commands that change a model: its routing, its routers, all of it."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ling_probe.cli.app import app
from ling_probe.cli.opening import check_out, loaded_model, parsed_changes, read_problems, steered
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
    Steer,
    SteeringMeasure,
    Strength,
    Tunable,
)
from ling_probe.cli.showing import clean, out, print_frame, print_rows
from ling_probe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pandas as pd

    from ling_probe.benchmarks import Record
    from ling_probe.causal import Study
    from ling_probe.model.load import LoadedLing
    from ling_probe.run import Run
    from ling_probe.steering import Measure, SteeringVector


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
    table = intervened(loaded, list(problems.records), study, load, into or folder / "causal", batch_tokens)
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
def steer(
    model: Model,
    benchmark: BenchmarkName,
    folder: Annotated[Path, typer.Option("--run", help="The run that the vector is made of.", metavar="RUN")],
    toward: Annotated[
        str | None, typer.Option(help="A step label, a family, or right or wrong; left out with --against.")
    ] = None,
    away: Annotated[str | None, typer.Option(help="Another of the same kind; all the others if left out.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Steer towards all of --run and away from all of this run.", metavar="RUN")
    ] = None,
    split: Split = "test",
    limit: Limit = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(help="What the vector's largest value adds to a choice score; repeatable (±0.02, ±0.05, ±0.1)."),
    ] = None,
    measure: Annotated[
        SteeringMeasure, typer.Option(help="Difference of the shares that choose an expert, or pointwise mutual information.")
    ] = SteeringMeasure.risk_difference,
    experts: Annotated[int | None, typer.Option(help="Steer with the so many largest values alone.", min=1)] = None,
    draws: Annotated[int, typer.Option(help="Vectors of the same values given to other experts.", min=1)] = 49,
    generate: Generate = 100,
    generate_draws: GenerateDraws = 9,
    max_new_tokens: Annotated[int, typer.Option(help="Of a solution that the model writes.", min=1)] = 300,
    seed: Annotated[int, typer.Option(help="Of the draws and the bootstrap.")] = 0,
    batch_tokens: BatchTokens = 8192,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Make a vector of router biases from a run, and try it on other problems beside vectors of the same values elsewhere.

    The vector and what it does are kept in RUN/steering; capture --steer FILE applies it. A trial that was interrupted goes on
    where it stopped when the command is repeated.
    """
    from ling_probe.run import Run
    from ling_probe.steering import STRENGTHS, Trial, held_out, vector_folder
    from ling_probe.steering import steer as try_vector

    run = Run.open(folder)
    with Console(stderr=True).status("contrasting"):
        vector = _vector(run, toward, away, against, measure.value, seed)
    vector = vector if experts is None else vector.strongest(experts)
    home = vector_folder(folder, vector, experts)
    vector.save(home / "vector.json")
    prompts = [prompt for each in (run, *([Run.open(against)] if against else [])) for prompt in each.sequences["prompt"]]
    records = held_out(read_problems(benchmark, split=split, limit=limit).records, prompts)
    loaded = loaded_model(model, revision, device, dtype, quiet=as_json)
    trial = Trial(
        strengths=tuple(strength or STRENGTHS), draws=draws, written=generate, written_draws=generate_draws,
        max_new_tokens=max_new_tokens, seed=seed,
    )  # fmt: skip
    with _progress("steering") as told:
        table = try_vector(loaded, records, vector, trial, home, batch_tokens=batch_tokens, progress=told)
    if not as_json:
        out.print(f"vector    {home / 'vector.json'}", soft_wrap=True)
        out.print(f"the same in two halves of the problems to a correlation of {vector.reliability:.2f}")
    shown = ["strength", "measure", "effect", "control", "excess", "excess_low", "excess_high", "p", "q", "p_unchanged"]
    title = f"Steering towards {clean(vector.toward)}, away from {clean(vector.away)}"
    print_frame(title, table if as_json else table[shown], as_json=as_json, rows=len(table))


@app.command("try")
def try_(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What the model completes; a shell's $'...' can end it with a new line.")],
    exclude: Annotated[
        list[str] | None, typer.Option(help="An expert that cannot be chosen; repeatable.", metavar="L.E")
    ] = None,
    silence: Annotated[list[str] | None, typer.Option(help="An expert that adds nothing; repeatable.", metavar="L.E")] = None,
    force: Annotated[list[str] | None, typer.Option(help="An expert that is always chosen; repeatable.", metavar="L.E")] = None,
    bias: Annotated[
        list[str] | None, typer.Option(help="An expert whose choice score is raised; repeatable.", metavar="L.E=VALUE")
    ] = None,
    steer: Steer = None,
    strength: Strength = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.", min=1, max=4096)] = 128,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Complete one prompt with and without a change to routing, and compare text, routing and loss."""
    from ling_probe.laboratory import try_change

    changes = [*parsed_changes(exclude or (), silence or (), force or (), bias or ()), *steered(steer, strength)]
    if not changes:
        raise UsageError("name a change: --exclude, --silence, --force or --bias LAYER.EXPERT, or --steer FILE --strength 0.05")
    loaded = loaded_model(model, revision, device, dtype, quiet=as_json)
    with Console(stderr=True).status("writing"):
        found = try_change(loaded, prompt, changes, max_new_tokens=max_new_tokens, seconds=3600)
    told = {
        "before": found.before, "after": found.after, "same": found.before == found.after,
        "loss_before": found.loss_before, "loss_after": found.loss_after,
    }  # fmt: skip
    if as_json:
        print_rows("", [{"table": "text"} | told], as_json=True)
        print_frame("", found.layers.assign(table="layers"), as_json=True)
        return
    for name in ("before", "after"):
        out.print(f"\n{name}")
        for line in str(told[name]).splitlines():
            out.print(f"  {clean(line)}", soft_wrap=True)
    out.print("\nthe same text" if told["same"] else "\nanother text", soft_wrap=True)
    out.print(f"loss on the text before: {found.loss_before:.3g} nats a token, under the change {found.loss_after:.3g}")
    print_frame("Choices moved on the text before", found.layers, as_json=False)


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
    """Tune only the routers on a task, and judge the task and others before and after; kept in the folder's judged.json."""
    from itertools import chain, repeat

    from ling_probe.adapt import Adaptation, Judge, Task, task_problems
    from ling_probe.adapt import adapt as tune
    from ling_probe.claims import JUDGED

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
    (folder / JUDGED).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
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


def intervened(
    loaded: "LoadedLing", records: "list[Record]", study: "Study", load: dict[int, Any], folder: Path, batch_tokens: int
) -> "pd.DataFrame":
    """Carry a study out with a progress bar."""
    from ling_probe.causal import intervene as change

    with _progress("changing") as told:
        return change(loaded, records, study, load, folder, batch_tokens=batch_tokens, progress=told)


def _vector(
    run: "Run", toward: str | None, away: str | None, against: Path | None, measure: "Measure", seed: int
) -> "SteeringVector":
    from ling_probe.run import Run
    from ling_probe.steering import run_vector, steering_vector

    if (toward is None) == (against is None) or (against and away):
        raise UsageError("name what to steer to: --toward CLASS (and perhaps --away CLASS), or --against RUN")
    if against:
        return run_vector(run, Run.open(against), measure=measure, seed=seed)
    return steering_vector(run, str(toward), away=away, measure=measure, seed=seed)


@contextmanager
def _progress(name: str) -> "Iterator[Callable[[int, int], None]]":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
