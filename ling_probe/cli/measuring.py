"""Commands that measure a model."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ling_probe.cli.app import app
from ling_probe.cli.opening import loaded_model, read_problems
from ling_probe.cli.options import BatchTokens, CacheDtypeName, Device, Dtype, DtypeName, Json, Limit, Model, Split
from ling_probe.cli.showing import out, print_frame, print_rows

if TYPE_CHECKING:
    from ling_probe.cost import Cost
    from ling_probe.model.load import LoadedLing


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

    problems = read_problems(benchmark, split=split, limit=limit)
    loaded = loaded_model(model, None, device, dtype, quiet=as_json)
    with Console(stderr=True).status("solving"):
        found = run_evaluation(loaded, problems.records, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
    title = f"{loaded.spec.name} on {problems.name} {problems.split}"
    for table, name in ((found.accuracy, "exact answers"), (found.balance, "balance")):
        print_frame(f"{title}: {name}", table.assign(table=name) if as_json else table, as_json=as_json)
    if rerouting:
        _print_rerouting(loaded, problems.records, title, batch_tokens=batch_tokens, as_json=as_json)


_REROUTED = ("condition", "family", "problems", "loss", "loss_increase", "increase_low", "increase_high", "token_accuracy",
             "solved", "share", "ci_low", "ci_high")  # fmt: skip


def _print_rerouting(loaded: "LoadedLing", records: Sequence[Any], title: str, *, batch_tokens: int, as_json: bool) -> None:
    if not any(record.solution for record in records):
        sys.stderr.write("no problem has a solution to read, so other routers are not tried\n")
        return
    from ling_probe.rerouting import rerouted_losses

    name = "does routing matter"
    with Console(stderr=True).status("reading the solutions under other routers"):
        table = rerouted_losses(loaded, records, batch_tokens=batch_tokens)
    shown = table.assign(table=name) if as_json else table[list(_REROUTED)]
    print_frame(f"{title}: {name}", shown, as_json=as_json)


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
        print_rows("cost", [*rows, {"table": "facts"} | facts], as_json=True)
        return
    _print_cost(f"{model}: parameters, and FLOPs per token at {context:,} tokens of context", found, dtype.value)


def _print_cost(title: str, found: "Cost", dtype: str) -> None:
    shown = (*found.parts, found.non_embedding, found.total)
    rows = [{name: f"{each:>17,}" if isinstance(each, int) else each for name, each in asdict(part).items()} for part in shown]
    print_rows(title, rows, as_json=False)
    for name, value in {
        f"key-value cache, {dtype}": f"{found.cache_bytes_per_token:,} bytes a token, {found.cache_bytes:,} for the context",
        "attention scores": f"{found.prefill_score_flops:,} FLOPs a token, averaged over a prefill of the context",
        "weights, bfloat16": f"{found.weight_bytes:,} bytes",
        "routing": f"{found.routing_choices:,} experts a token, over all layers",
        "next-token layers": f"{found.next_token_layers}, uncounted; one has {found.next_token_layer_parameters:,} parameters",
    }.items():
        out.print(f"{name:<28}{value}", soft_wrap=True)
