"""Commands that make runs and look into them."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ling_probe.cli.app import app
from ling_probe.cli.opening import (
    asked_activations,
    chat_of,
    check_kept,
    check_out,
    interruptible,
    loaded_model,
    parsed_shard,
    read_problems,
    record_run,
    steered,
)
from ling_probe.cli.options import (
    WORKERS,
    BatchTokens,
    BenchmarkName,
    Device,
    Dtype,
    DtypeName,
    Json,
    Limit,
    Model,
    OnError,
    Revision,
    RunFolder,
    Split,
    Steer,
    StepsName,
    Strength,
)
from ling_probe.cli.showing import (
    clean,
    facts_of,
    out,
    print_headline,
    print_read,
    print_run,
    print_verification,
)
from ling_probe.errors import UsageError

if TYPE_CHECKING:
    pass


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where the run and its report go.")] = Path("runs/demo"),
    limit: Limit = None,
) -> None:
    """Run the shipped model on the shipped benchmark, analyse it, and write the report."""
    with interruptible(folder):
        loaded = loaded_model("ling-tiny", None, "auto", DtypeName.auto)
        keep = ("experts", "loss", "logits", "contribution", "lens", "residual")
        run = record_run(loaded, read_problems("stepbench", limit=limit), folder, max_new_tokens=200, keep=keep, resume=True)
    from ling_probe.report import write_report

    with out.status("analysing"):
        page = write_report(run, folder, workers=WORKERS)
    print_headline(json.loads((folder / "report.json").read_text(encoding="utf-8"))["headline"])
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
    steer: Steer = None,
    strength: Strength = None,
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
    share = parsed_shard(shard)
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
    vectors = asked_activations(activations, activation_positions)
    options = {
        "keep": ("experts", "loss", *(keep or ())), "activations": vectors, "batch_tokens": batch_tokens, "parts": parts,
        "redo_damaged": redo_damaged, "chat": chat_of(system) if chat else None, "steps": steps.value,
        "interventions": steered(steer, strength), **decoding,
    }  # fmt: skip
    if not ray:
        check_out(into, resume=resume or redo_damaged)
    check_kept(keep or (), vectors, **decoding)
    source = {"split": split, "limit": limit, "format": format_name, "on_error": on_error.value, **fields}
    problems = read_problems(benchmark, **source)
    print_read(problems)
    check_steps(steps.value, problems.records, generated=generate > 0)
    with interruptible(into):
        if ray:
            from ling_probe.cluster import capture_with_ray

            run = capture_with_ray(
                folder, actors=ray, model={"name_or_path": model, "revision": revision, "device": device, "dtype": dtype.value},
                benchmark={"name_or_path": benchmark, **source}, options=options, resume=resume or redo_damaged,
            )  # fmt: skip
        else:
            loaded = loaded_model(model, revision, device, dtype, stream=stream_layers)
            run = record_run(loaded, problems, into, shard=share, resume=resume, **options)
            if stream_layers and loaded.verification.choices:
                print_verification(loaded)
    print_run(run)


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
    print_run(join(folder, shards or find_shards(source or folder)))


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
        sys.stdout.write(json.dumps(facts_of(run) | ({"verified": True, "foreign": foreign} if verify else {})) + "\n")
        return
    print_run(run)
    if verify:
        out.print("every file is as it was written")
    for name in foreign:
        out.print(f"not of this run: {clean(name)}", soft_wrap=True)
