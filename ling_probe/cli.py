"""The command line: thin verbs over the package. Nothing heavy is imported before a verb needs it."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ling_probe.errors import LingProbeError, UsageError

if TYPE_CHECKING:
    import pandas as pd

    from ling_probe.activations import ActivationSpec
    from ling_probe.benchmarks import Benchmark, Record
    from ling_probe.causal import Study
    from ling_probe.chat import Chat
    from ling_probe.cost import Cost
    from ling_probe.model.load import LoadedLing
    from ling_probe.run import Run, Shard

app = typer.Typer(
    name="ling-probe",
    help="See, test and change which experts a Ling 2.0 model routes to while it reasons.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False, markup=False)


class DtypeName(StrEnum):
    """Weight types a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Change(StrEnum):
    """Ways to change routing in a causal study."""

    exclude = "exclude"
    silence = "silence"
    force = "force"
    bias = "bias"
    route_as = "route_as"


class Tunable(StrEnum):
    """What an adaptation may move."""

    router = "router"
    bias = "bias"
    experts = "experts"
    all = "all"


class OnError(StrEnum):
    """What a record that cannot be read does."""

    stop = "stop"
    skip = "skip"


class StepsName(StrEnum):
    """How the reasoning steps of a text are found."""

    auto = "auto"
    annotated = "annotated"
    rules = "rules"
    sentences = "sentences"
    lines = "lines"


Model = Annotated[
    str, typer.Argument(help="A checkpoint folder, a hub repository, or a shipped one (ling-tiny); NAME@step-N is a snapshot.")
]
BenchmarkName = Annotated[
    str,
    typer.Argument(
        help="A shipped benchmark (stepbench), a file (.jsonl, .json, .txt, an Inspect .eval), "
        "hf:OWNER/DATASET[:CONFIG[:SPLIT]] or gym:TASK[:size=N][:seed=N]."
    ),
]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]
Against = Annotated[list[Path] | None, typer.Option(help="A run to compare with; repeatable.", metavar="RUN")]
Split = Annotated[str, typer.Option(help="Which split of a benchmark.")]
Limit = Annotated[int | None, typer.Option(help="At most so many problems.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print rows as JSON lines instead of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[DtypeName, typer.Option(help="auto is the checkpoint's own on a GPU, float32 on the CPU.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")]
BatchTokens = Annotated[int, typer.Option(help="Padded tokens of one forward pass.", min=1)]


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where the run and its report go.")] = Path("runs/demo"),
    limit: Limit = None,
) -> None:
    """Run the shipped model on the shipped benchmark, analyse it, and write the report."""
    with _interruptible(folder):
        loaded = _load("ling-tiny", None, "auto", DtypeName.auto)
        keep = ("experts", "loss", "logits", "contribution", "lens", "residual")
        run = _record(loaded, _read("stepbench", limit=limit), folder, max_new_tokens=200, keep=keep, resume=True)
    from ling_probe.report import write_report

    with out.status("analysing"):
        page = write_report(run, folder)
    _print_headline(json.loads((folder / "report.json").read_text(encoding="utf-8"))["headline"])
    out.print(f"\nreport    {page}\nexplorer  ling-probe explore {folder}")


@app.command()
def capture(
    model: Model,
    benchmark: BenchmarkName,
    folder: Annotated[Path, typer.Option("--out", help="The run folder to make.")],
    split: Split = "test",
    limit: Limit = None,
    generate: Annotated[
        int, typer.Option(help="Complete each prompt with at most so many tokens; 0 reads the given solutions.", min=0)
    ] = 0,
    temperature: Annotated[float, typer.Option(help="Of the draw of each generated token; 0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that reach this probability.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a completion; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="What to keep beside experts and loss (3MK + 4 bytes a token; M routed of L layers, K chosen of E experts); "
            "repeatable: logits (2ME), contribution (norm of what each chosen and the shared expert add, 2MK + 4M), residual "
            "(norm after every layer, 4L), lens (what each of them adds to the logit of the next token, 2MK + 2M)."
        ),
    ] = None,
    activations: Annotated[
        list[str] | None,
        typer.Option(
            help="Whole vectors to keep, 2D + 8 bytes a token and site (4D + 8 in float32; D wide); repeatable: residual:3,5 "
            "(the stream after layers), router:0-4 (what routers read), expert:4.17 (what expert 17 of layer 4 adds where it "
            "is chosen).",
            metavar="SITE",
        ),
    ] = None,
    activation_positions: Annotated[
        str, typer.Option(help="Which tokens' vectors: all, prompt, reasoning, answer, last (of a sequence) or step-ends.")
    ] = "all",
    prompt_field: Annotated[str, typer.Option(help="Field of a .jsonl record that holds the problem.")] = "prompt",
    solution_field: Annotated[str, typer.Option(help="Field that holds the worked solution.")] = "solution",
    answer_field: Annotated[str, typer.Option(help="Field that holds the answer.")] = "answer",
    format_name: Annotated[
        str | None,
        typer.Option("--format", help="What the records are (gsm8k, math, arc ...); recognised by their fields if left out."),
    ] = None,
    on_error: Annotated[OnError, typer.Option(help="What a record that cannot be read does.")] = OnError.stop,
    steps: Annotated[
        StepsName,
        typer.Option(
            help="How reasoning steps are found: annotated by the benchmark; by rules, as the text itself marks them; as "
            "sentences; as lines; auto is annotated where there is something, else rules."
        ),
    ] = StepsName.auto,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt through the checkpoint's own chat template.")] = False,
    system: Annotated[str, typer.Option(help="With --chat: the system message.")] = "",
    batch_tokens: BatchTokens = 8192,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    redo_damaged: Annotated[
        bool, typer.Option("--redo-damaged", help="As --resume, and capture parts with a missing or changed file again.")
    ] = False,
    parts: Annotated[int, typer.Option(help="Cut the benchmark into so many parts at least.", min=1)] = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Capture share i/n alone, into a folder of its own in --out; ling-probe merge joins them.", metavar="I/N"
        ),
    ] = None,
    ray: Annotated[int | None, typer.Option(help="Spread over so many Ray actors, a shard each, and merge.", min=1)] = None,
    stream_layers: Annotated[
        bool, typer.Option("--stream-layers", help="Hold one layer at a time, for a checkpoint larger than memory; on the CPU.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    revision: Revision = None,
) -> None:
    """Run a benchmark through a model and record what its routers choose."""
    from ling_probe.steps import check_steps

    fields = {"prompt_field": prompt_field, "solution_field": solution_field, "answer_field": answer_field}
    share = _shard(shard)
    into = folder / share.folder if share else folder
    if ray and share:
        raise UsageError("--ray makes the shards itself; leave --shard out")
    if system and not chat:
        raise UsageError("a system message needs --chat; without it the prompt is read as it is")
    if stream_layers and (generate or ray):
        raise UsageError(
            "--stream-layers reads given solutions only, on one machine; leave --generate and --ray out, or run the whole model"
        )
    decoding = {
        "max_new_tokens": generate, "temperature": temperature, "top_p": top_p, "stop": tuple(stop or ()), "seed": seed,
    }  # fmt: skip
    vectors = _activations(activations, activation_positions)
    options = {
        "keep": ("experts", "loss", *(keep or ())), "activations": vectors, "batch_tokens": batch_tokens, "parts": parts,
        "redo_damaged": redo_damaged, "chat": _chat(system) if chat else None, "steps": steps.value, **decoding,
    }  # fmt: skip
    if not ray:
        _check_out(into, resume=resume or redo_damaged)
    _check_kept(keep or (), vectors, **decoding)
    source = {"split": split, "limit": limit, "format": format_name, "on_error": on_error.value, **fields}
    problems = _read(benchmark, **source)
    _print_read(problems)
    check_steps(steps.value, problems.records, generated=generate > 0)
    with _interruptible(into):
        if ray:
            from ling_probe.cluster import capture_with_ray

            run = capture_with_ray(
                folder, actors=ray, model={"name_or_path": model, "revision": revision, "device": device, "dtype": dtype.value},
                benchmark={"name_or_path": benchmark, **source}, options=options, resume=resume or redo_damaged,
            )  # fmt: skip
        else:
            loaded = _load(model, revision, device, dtype, stream=stream_layers)
            run = _record(loaded, problems, into, shard=share, resume=resume, **options)
            if stream_layers and loaded.verification.choices:
                _print_verification(loaded)
    _print_run(run)


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="The run folder to make.", metavar="OUT")],
    shards: Annotated[list[Path] | None, typer.Argument(help="The shards' run folders.", metavar="SHARD...")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="A folder that holds the shards, as capture --out did.")] = None,
) -> None:
    """Join the shards of one run, after checking that all are there and whole; the shards stay."""
    from ling_probe.run import find_shards
    from ling_probe.run import merge as join

    if bool(shards) == (source is not None):
        raise UsageError("name the shards, or the folder that holds them: ling-probe merge OUT --from FOLDER")
    _print_run(join(folder, shards or find_shards(source or folder)))


@app.command()
def inspect(
    folder: RunFolder,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its recorded digest.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a run holds."""
    from ling_probe.run import Run

    run = Run.open(folder)
    foreign = run.verify() if verify else []
    if as_json:
        sys.stdout.write(json.dumps(_facts(run) | ({"verified": True, "foreign": foreign} if verify else {})) + "\n")
        return
    _print_run(run)
    if verify:
        out.print("every file is as it was written")
    for name in foreign:
        out.print(f"not of this run: {_clean(name)}", soft_wrap=True)


@app.command()
def analyze(
    folder: Annotated[Path | None, typer.Argument(help="A run folder.", metavar="RUN", show_default=False)] = None,
    names: Annotated[list[str] | None, typer.Argument(help="Analyses by name, or all.", metavar="NAME...")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the analyses and the questions they answer.")] = False,
    against: Against = None,
    rows: Annotated[int, typer.Option(help="Rows of each printed table.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Answer questions about a run; several end in an index of what was found."""
    from ling_probe.analysis import ANALYSES, SINGLE, answers, finding, findings_index

    if show_list:
        _print_rows("analyses", [{"name": name, "question": each.question} for name, each in ANALYSES.items()], as_json=as_json)
        return
    if folder is None or not names:
        raise UsageError("name a run and an analysis: ling-probe analyze RUN NAME (--list shows them, all runs every one)")
    from ling_probe.run import Run

    if unknown := [name for name in names if name != "all" and name not in ANALYSES]:
        raise UsageError(f'no analysis "{unknown[0]}"; these there are: {", ".join(ANALYSES)}, or all')
    others = [Run.open(each) for each in against or ()]
    every = tuple(ANALYSES) if others else SINGLE
    findings = {}
    for name, answer in answers(Run.open(folder), every if "all" in names else names, against=others):
        if isinstance(answer, UsageError) and "all" not in names:
            raise answer
        if not isinstance(answer, UsageError):
            table = ANALYSES[name].order(answer)
            _print_frame(ANALYSES[name].question, table.assign(analysis=name) if as_json else table, as_json=as_json, rows=rows)
        findings[name] = finding(name, answer)
    if len(findings) > 1:
        _print_index(findings_index(findings), as_json=as_json)


@app.command()
def trace(
    folder: RunFolder,
    sequence: Annotated[str, typer.Argument(help="A sequence's id, or its number from 0.", metavar="SEQUENCE")],
    as_json: Json = False,
) -> None:
    """Tell one problem's reasoning: each step, its most selective experts, and what they add to the answer."""
    from ling_probe.analysis import label_specialisation
    from ling_probe.run import Run
    from ling_probe.step_view import answer_attribution, attribution_by_layer, sequence_number, step_table

    run = Run.open(folder)
    number = sequence_number(run, sequence)
    with Console(stderr=True).status("finding what each step prefers"):
        steps = step_table(run, number, label_specialisation(run))
    problem = run.sequences.iloc[number]
    if not as_json:
        out.print(f"{_clean(problem['sequence_id'])}  {_clean(problem['prompt'].strip())}", soft_wrap=True)
    steps["experts"] = [rows if as_json else _told_experts(rows) for rows in steps["experts"]]
    _print_frame("Steps", steps.assign(table="steps") if as_json else steps, as_json=as_json)
    try:
        added = answer_attribution(run, number)
        shown = added.assign(table="attribution") if as_json else attribution_by_layer(added)
        _print_frame("Added directly to the logits of the tokens written, by layer", shown, as_json=as_json)
    except UsageError as error:
        Console(stderr=True).print(f"no attribution: {error}", soft_wrap=True)
    if not as_json:
        verdict = {True: "right", False: "wrong"}.get(problem["correct"], "not judged")
        told = f"answer  {problem['predicted']} ({verdict}; expected {problem['answer']})"
        out.print(_clean(told), soft_wrap=True)


def _told_experts(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{row['layer']}.{row['expert']} {2 ** row['log2_ratio']:.1f}× ({row['times']})" for row in rows) or "none"


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
    from ling_probe.causal import plan_study
    from ling_probe.run import Run

    run = Run.open(folder)
    kinds = [each.value for each in kind or (Change.exclude, Change.route_as)]
    with Console(stderr=True).status("picking experts"):
        study, load = plan_study(
            run, labels=label, kinds=kinds, numbers=dose or (4,), values=value or (), draws=draws, seed=seed
        )
    problems = _read(benchmark, split=split, limit=limit)
    loaded = _load(model, revision, device, dtype, quiet=as_json)
    table = _intervened(loaded, list(problems.records), study, load, into or folder / "causal", batch_tokens)
    if problems.name == run.manifest.benchmark.get("name") and split == run.manifest.benchmark.get("split") and not as_json:
        out.print("note: experts were picked on these same problems; another --split gives effects on others", soft_wrap=True)
    if missing := sorted(set(study.labels) - set(table["label"])):
        Console(stderr=True).print(f"no problem has steps of these labels: {_clean(', '.join(missing))}", soft_wrap=True)
    shown = ["label", "kind", "dose", "measure", "effect", "control", "excess", "excess_low", "excess_high", "p", "q"]
    _print_frame("What changes to routing cost, in nats a token", table if as_json else table[shown], as_json=as_json)


@app.command()
def report(
    folder: RunFolder,
    into: Annotated[Path | None, typer.Option("--out", help="Folder of the report; the run's own if left out.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Analyses by name; all if left out.")] = None,
    against: Against = None,
) -> None:
    """Write the report of a run: one offline page, Markdown, and every table as CSV and JSON."""
    from ling_probe.report import write_report
    from ling_probe.run import Run

    run, others = Run.open(folder), [Run.open(each) for each in against or ()]
    with out.status("analysing"):
        page = write_report(run, into or folder, analyses=tuple(only) if only else None, against=others)
    out.print(str(page), soft_wrap=True)


@app.command()
def explore(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a folder of runs.", metavar="RUN")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port of the local page.", min=1, max=65535)] = 8501,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Open the explorer on a run; it listens on this machine only, unless told otherwise."""
    import subprocess

    from ling_probe.shipping import app_path

    _check_explorable(folder)
    command = [sys.executable, "-m", "streamlit", "run", str(app_path("explorer.py"))]
    command += ["--server.address", host, "--server.port", str(port), "--server.headless", str(not browser).lower()]
    command += ["--browser.gatherUsageStats", "false", "--", str(folder)]
    out.print(f"explorer  http://{host}:{port}", soft_wrap=True)
    try:
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command()
def evaluate(
    model: Model,
    benchmark: Annotated[str, typer.Argument(help="A shipped benchmark or a .jsonl file.")] = "stepbench",
    split: Split = "test",
    limit: Limit = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.", min=1)] = 200,
    batch_tokens: BatchTokens = 8192,
    rerouting: Annotated[bool, typer.Option(help="Read the given solutions under other routers too.")] = True,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    as_json: Json = False,
) -> None:
    """Solve a benchmark by greedy generation: exact answers by family, the balance of the experts, and if routing matters."""
    from ling_probe.evaluate import evaluate as run_evaluation

    problems = _read(benchmark, split=split, limit=limit)
    loaded = _load(model, None, device, dtype, quiet=as_json)
    with Console(stderr=True).status("solving"):
        found = run_evaluation(loaded, problems.records, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
    title = f"{loaded.spec.name} on {problems.name} {problems.split}"
    for table, name in ((found.accuracy, "exact answers"), (found.balance, "balance")):
        _print_frame(f"{title}: {name}", table.assign(table=name) if as_json else table, as_json=as_json)
    if rerouting:
        _print_rerouting(loaded, problems.records, title, batch_tokens=batch_tokens, as_json=as_json)


_REROUTED = ("condition", "family", "problems", "loss", "loss_increase", "increase_low", "increase_high", "token_accuracy",
             "solved", "share", "ci_low", "ci_high")  # fmt: skip
"""Columns of the printed table; the JSON rows have all."""


def _print_rerouting(loaded: "LoadedLing", records: Sequence[Any], title: str, *, batch_tokens: int, as_json: bool) -> None:
    if not any(record.solution for record in records):
        sys.stderr.write("no problem has a solution to read, so other routers are not tried\n")
        return
    from ling_probe.rerouting import rerouted_losses

    name = "does routing matter"
    with Console(stderr=True).status("reading the solutions under other routers"):
        table = rerouted_losses(loaded, records, batch_tokens=batch_tokens)
    shown = table.assign(table=name) if as_json else table[list(_REROUTED)]
    _print_frame(f"{title}: {name}", shown, as_json=as_json)


class CacheDtypeName(StrEnum):
    """Number types that keys and values can be cached in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float8 = "float8"


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

    _check_out(folder, resume=False)
    own = f"stepbench:{split}:{family}" if benchmark == "stepbench" else benchmark
    tasks = [Task.named(name, limit) for name in dict.fromkeys([own, *(judge or ["stepbench:test"])])]
    problems = task_problems(family, split) if benchmark == "stepbench" else chain.from_iterable(repeat(tasks[0].records))
    if benchmark != "stepbench":
        Console(stderr=True).print(
            f"note: {_clean(own)} is also what is learned; judge on other problems with --judge", soft_wrap=True
        )
    loaded = _load(model, None, device, DtypeName.float32, quiet=as_json)
    asked = Adaptation(tuned=tuned.value, steps=steps, batch_tokens=batch_tokens, learning_rate=learning_rate, seed=seed)
    judging = Judge(loaded, tasks)
    with Console(stderr=True).status("judging before"):
        rows = judging.rows("before")
    with Console(stderr=True).status("adapting") as status:
        for line in tune(loaded, problems, asked, folder):
            status.update(f"adapting: step {line['step']} of {steps}, loss {line['loss']:.4f}")
    with Console(stderr=True).status("judging after"):
        rows += judging.rows("after")
    _print_rows(f"{loaded.spec.name} with its {tuned.value} tuned on {own}", rows, as_json=as_json)
    if not as_json:
        out.print(f"saved to {folder}", soft_wrap=True)


@app.command()
def cost(
    model: Annotated[
        str,
        typer.Argument(
            help="A published size (ling-mini-2.0, ling-flash-2.0, ling-1t), a config.json, a checkpoint folder, or a shipped "
            "checkpoint (ling-tiny).",
            metavar="CONFIG_OR_MODEL",
        ),
    ],
    context: Annotated[int, typer.Option(help="Tokens that a new token attends to, itself included.", min=1)] = 4096,
    dtype: Annotated[CacheDtypeName, typer.Option(help="Number type of the key-value cache.")] = CacheDtypeName.bfloat16,
    as_json: Json = False,
) -> None:
    """Count parameters, FLOPs per token and cache bytes from a configuration alone; no weights are read."""
    from ling_probe.cost import NUMBER_BYTES, read_config
    from ling_probe.cost import cost as count

    found = count(read_config(model), context=context, number_bytes=NUMBER_BYTES[dtype.value])
    sums = (found.non_embedding, found.total)
    if as_json:
        rows = [{"table": "parts"} | asdict(part) for part in found.parts] + [{"table": "sums"} | asdict(part) for part in sums]
        facts = {name: value for name, value in asdict(found).items() if name != "parts"}
        facts = {"model": model, "cache_dtype": dtype.value, "cache_bytes": found.cache_bytes} | facts
        _print_rows("cost", [*rows, {"table": "facts"} | facts], as_json=True)
        return
    _print_cost(f"{model}: parameters, and FLOPs per token at {context:,} tokens of context", found, dtype.value)


def _print_cost(title: str, found: "Cost", dtype: str) -> None:
    shown = (*found.parts, found.non_embedding, found.total)
    rows = [{name: f"{each:>17,}" if isinstance(each, int) else each for name, each in asdict(part).items()} for part in shown]
    _print_rows(title, rows, as_json=False)
    for name, value in {
        f"key-value cache, {dtype}": f"{found.cache_bytes_per_token:,} bytes a token, {found.cache_bytes:,} for the context",
        "attention scores": f"{found.prefill_score_flops:,} FLOPs a token, averaged over a prefill of the context",
        "weights, bfloat16": f"{found.weight_bytes:,} bytes",
        "routing": f"{found.routing_choices:,} experts a token, over all layers",
        "next-token layers": f"{found.next_token_layers}, uncounted; one has {found.next_token_layer_parameters:,} parameters",
    }.items():
        out.print(f"{name:<28}{value}", soft_wrap=True)


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


def _check_out(folder: Path, *, resume: bool) -> None:
    """Refuse an occupied folder before minutes are spent on loading."""
    if folder.exists() and not resume:
        from ling_probe.errors import RunError

        raise RunError(f"{folder} exists already and is left as it is; give --out a new folder, or --resume an interrupted run")


def _activations(sites: Sequence[str] | None, positions: str) -> "ActivationSpec | None":
    from ling_probe.activations import ActivationSpec

    if not sites and positions != "all":
        raise UsageError(f"positions {positions} of which activations? name them with --activations, such as residual:3")
    return ActivationSpec(names=tuple(sites), positions=positions) if sites else None


def _check_kept(keep: Sequence[str], activations: "ActivationSpec | None", **decoding: Any) -> None:
    """Refuse settings that make no sense before minutes are spent on loading."""
    from ling_probe.capture import Decoding, check_keep

    check_keep(keep, activations)
    Decoding(**decoding)


@contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """Say on Ctrl-C what is safe and how to go on, and exit with 130, as shells have it for SIGINT."""
    try:
        yield
    except KeyboardInterrupt:
        held = "holds nothing yet"
        if (folder / "run.json").is_file():
            from ling_probe.run import Run

            held = f"holds {sum(part.sequences for part in Run.open(folder).manifest.parts)} sequences, all whole"
        sys.stderr.write(f"ling-probe: interrupted; {_clean(str(folder))} {held}; repeat the command with --resume to go on\n")
        raise typer.Exit(130) from None


def _shard(text: str | None) -> "Shard | None":
    if text is None:
        return None
    from ling_probe.run import Shard

    return Shard.parse(text)


def _check_explorable(folder: Path) -> None:
    if (folder / "run.json").is_file() or not folder.is_dir():
        from ling_probe.run import Run

        Run.open(folder)


def _read(name: str, **options: Any) -> "Benchmark":
    from ling_probe.benchmarks import read_benchmark

    return read_benchmark(name, **options)


def _print_read(problems: "Benchmark") -> None:
    what = f"{len(problems.records):,} records of {problems.name} as {problems.format}, {problems.skipped:,} skipped"
    out.print(f"read {_clean(what)}", soft_wrap=True)
    for problem in problems.problems:
        out.print(f"  skipped {_clean(problem)}", soft_wrap=True)
    if problems.skipped > len(problems.problems):
        out.print(f"  and {problems.skipped - len(problems.problems):,} more")


def _chat(system: str) -> "Chat":
    from ling_probe.chat import Chat

    return Chat(system)


def _load(
    name: str, revision: str | None, device: str, dtype: DtypeName, *, quiet: bool = False, stream: bool = False
) -> "LoadedLing":
    with Console(stderr=True).status("loading"):
        import transformers

        from ling_probe.model.load import load_native
        from ling_probe.model.streaming import load_streamed

        transformers.utils.logging.disable_progress_bar()
        load = load_streamed if stream else load_native
        loaded = load(name, revision=revision, device=device, dtype=dtype.value)
    # A streamed model is verified by its first stream.
    if not (quiet or stream):
        _print_verification(loaded)
    return loaded


def _print_verification(loaded: "LoadedLing") -> None:
    out.print(f"routing of {loaded.spec.name} re-derived by the rule: {loaded.verification}", soft_wrap=True)


def _record(loaded: "LoadedLing", problems: "Benchmark", folder: Path, **options: Any) -> "Run":
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


def _facts(run: "Run") -> dict[str, Any]:
    manifest = run.manifest
    tokens = sum(part.tokens for part in manifest.parts)
    size = sum(path.stat().st_size for path in (run.folder / "parts").rglob("tokens.parquet"))
    kept = run.kept_activations
    vectors = sum(path.stat().st_size for path in (run.folder / "parts").rglob("activations.safetensors"))
    check = manifest.model.get("verification") or {}
    return {
        "run": str(run.folder),
        "state": manifest.state,
        **({"shard": f"{manifest.shard.index}/{manifest.shard.of}"} if manifest.shard else {}),
        "model": run.spec.name,
        "routed_layers": list(run.spec.routed_layers),
        "experts": run.spec.n_experts,
        "top_k": run.spec.top_k,
        "benchmark": manifest.benchmark.get("name"),
        "split": manifest.benchmark.get("split"),
        "mode": manifest.options.get("mode"),
        "sequences": sum(part.sequences for part in manifest.parts),
        "steps": sum(part.steps for part in manifest.parts),
        "tokens": tokens,
        "bytes_per_token": round(size / tokens, 1) if tokens else None,
        **({"activations": str(kept), "vector_bytes": vectors} if kept else {}),
        "parts": len(manifest.parts),
        "interventions": len(manifest.interventions),
        "verification": f"{check.get('differ')} of {check.get('choices')} differ" if check else None,
        "created": manifest.created,
    }


def _print_run(run: "Run") -> None:
    for name, value in _facts(run).items():
        out.print(f"{name:<16}{_clean(str(value))}", soft_wrap=True)


def _print_headline(first: dict[str, Any]) -> None:
    what = f"{_clean(first['model'])} on {_clean(first['benchmark'])}"
    out.print(f"\n{what}: {first['sequences']:,} problems, {first['tokens']:,} tokens", soft_wrap=True)
    for row in first["accuracy"]:
        out.print(
            f"  {_clean(row['family']):<12}{row['correct']:>4} of {row['judged']} correct"
            f"  ({row['share']:.1%}, 95 % interval {row['ci_low']:.1%} to {row['ci_high']:.1%})",
            soft_wrap=True,
        )
    out.print(
        "most specialised experts (choices in steps of a kind, over those of the same words in other steps of the family)",
        soft_wrap=True,
    )
    for row in first["specialised"]:
        low, high = 2 ** row["ci_low"], 2 ** row["ci_high"]
        out.print(
            f"  layer {row['layer']} expert {row['expert']:<4}{_clean(row['label']):<14}x{2 ** row['log2_ratio']:.2f}"
            f"  (95 % interval {low:.2f} to {high:.2f}), corrected p {row['q']:.2g}",
            soft_wrap=True,
        )
    out.print(f"  {_clean(first['specialised_note'])}", soft_wrap=True)


def _print_frame(title: str, table: "pd.DataFrame", *, as_json: bool, rows: int | None = None) -> None:
    if as_json:
        sys.stdout.write(table.to_json(orient="records", lines=True))
        return
    shown = table if rows is None else table.head(rows)
    caption = f"{len(shown)} of {len(table)} rows" if len(shown) < len(table) else None
    _print_rows(title, shown.to_dict("records"), as_json=False, caption=caption)


def _print_index(index: "pd.DataFrame", *, as_json: bool) -> None:
    if as_json:
        _print_frame("", index.rename(columns={"analysis": "name"}).assign(analysis="index"), as_json=True)
        return
    told = Table(title="What was asked and found", title_justify="left", show_lines=True)
    for name in ("question", "finding", "effect", "interval", "q", "token alone", "verdict", "rung"):
        told.add_column(name, ratio={"question": 2, "finding": 5}.get(name))
    for row in index.to_dict("records"):
        numbers = [_figures(row[name]) for name in ("effect", "ci_low", "ci_high", "q", "token_effect")]
        effect, low, high, q, token = numbers
        told.add_row(
            row["question"], _clean(row["finding"]), f"{effect} {row['unit']}" if effect else "",
            f"{low} to {high}" if low else "", q, token, row["verdict"], _figures(row["rung"]),
        )  # fmt: skip
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(told)


def _figures(value: Any) -> str:
    """Three digits; nothing for what is not there."""
    import pandas as pd

    return "" if pd.isna(value) else f"{value:.3g}"


def _print_rows(title: str, rows: Sequence[dict[Any, Any]], *, as_json: bool, caption: str | None = None) -> None:
    if as_json:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
        return
    table = Table(title=title, caption=caption, title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(str(column), justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else _clean(str(value)) for value in row.values()))
    # A pipe has no width of its own: print every column whole rather than cut at 80.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table)


def _clean(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def main() -> None:
    """Run the command line; our own errors and the system's refusals are one line and exit status 2."""
    try:
        app()
    except LingProbeError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")


def _fail(message: str) -> None:
    sys.stderr.write(f"ling-probe: {_clean(' '.join(message.split()))}\n")
    raise SystemExit(2)
