"""The command that tests what is claimed of the model family on one run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ling_probe.cli.app import app
from ling_probe.cli.changing import intervened
from ling_probe.cli.opening import loaded_model, read_problems
from ling_probe.cli.options import WORKERS, BatchTokens, Device, Dtype, DtypeName, Fresh, Json, Limit, RunFolder, Workers
from ling_probe.cli.showing import clean, out, print_rows, told_number
from ling_probe.errors import LingProbeError, UsageError

if TYPE_CHECKING:
    import pandas as pd

    from ling_probe.claims import Claim
    from ling_probe.run import Run


@app.command()
def claims(
    folder: RunFolder,
    causal: Annotated[
        bool, typer.Option("--causal", help="First run the run's own model with its routing changed; kept in RUN/causal.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="With --causal: the model; that of the run if left out.")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="With --causal: problems with solutions; the run's own if that is a shipped one.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="With --causal: of the benchmark; the run's own if left out.")] = None,
    limit: Limit = None,
    draws: Annotated[int, typer.Option(help="With --causal: matched draws of experts for each kind of step.", min=1)] = 99,
    adapted: Annotated[
        Path | None, typer.Option(help="What ling-probe adapt made of the run's model.", metavar="FOLDER")
    ] = None,
    into: Annotated[
        Path | None, typer.Option("--out", help="Also write claims.html, claims.md and claims.json here.", metavar="FOLDER")
    ] = None,
    workers: Workers = WORKERS,
    fresh: Fresh = False,
    batch_tokens: BatchTokens = 8192,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    as_json: Json = False,
) -> None:
    """Test what is claimed of Ling 2.0's routing on one run: a verdict for each claim, with its evidence."""
    from ling_probe.analysis import kept_answers
    from ling_probe.claims import COST, SOURCES, write_claims
    from ling_probe.claims import claims as tested
    from ling_probe.run import Run

    run = Run.open(folder)
    if run.sequences.empty:
        raise UsageError(f"{folder} holds no sequences yet; there is nothing to test claims on")
    if adapted and not adapted.is_dir():
        raise UsageError(f"{adapted} is no folder; name the one that ling-probe adapt --out made")
    if not causal and (model or benchmark or split):
        raise UsageError("--model, --benchmark and --split say what --causal runs; add --causal")
    if causal:
        _run_studies(run, model, _benchmark(run, benchmark), split, limit, draws, batch_tokens, device, dtype, quiet=as_json)
    with Console(stderr=True).status("analysing"):
        tables = dict(kept_answers(run, SOURCES, workers=workers, fresh=fresh))
    found = tested(run, {**tables, COST: _cost(run)}, adapted=adapted)
    _print_claims(found, as_json=as_json)
    if into:
        page = write_claims(found, into, model=run.spec.name, text=_text_of(run))
        if not as_json:
            out.print(f"\n{page}", soft_wrap=True)


def _run_studies(
    run: "Run", model: str | None, benchmark: str, split: str | None, limit: int | None, draws: int, batch_tokens: int,
    device: str, dtype: DtypeName, *, quiet: bool,
) -> None:  # fmt: skip
    from ling_probe.causal import check_model, keep_rerouting, plan_study
    from ling_probe.run.folder import CAUSAL_EFFECTS

    split = split or run.manifest.benchmark.get("split") or "test"
    records = list(read_problems(benchmark, split=split, limit=limit).records)
    loaded = loaded_model(model or str(run.manifest.model.get("name", run.spec.name)), None, device, dtype, quiet=quiet)
    check_model(run, loaded)
    with Console(stderr=True).status("reading solutions under other routers") as status:
        told = lambda done, total: status.update(f"reading solutions under other routers: {done} of {total}")  # noqa: E731
        keep_rerouting(run, loaded, records, batch_tokens=batch_tokens, progress=told)
    try:
        with Console(stderr=True).status("picking experts"):
            study, load = plan_study(run, draws=draws)
    except UsageError as error:
        Console(stderr=True).print(f"no experts to change: {clean(str(error))}", soft_wrap=True)
        return
    intervened(loaded, records, study, load, run.folder / CAUSAL_EFFECTS.parent, batch_tokens)


def _benchmark(run: "Run", named: str | None) -> str:
    name = str(run.manifest.benchmark.get("name", ""))
    if named is None and name != "stepbench":
        raise UsageError(f"the run was captured from {name or 'unnamed text'}; name its file, or another, with --benchmark")
    return named or name


def _cost(run: "Run") -> "pd.DataFrame | UsageError":
    """Parameters and FLOPs of the run's model as it is and with twice its experts, where its configuration is at hand."""
    import pandas as pd

    from ling_probe.cost import cost, read_config

    name = str(run.manifest.model.get("name", run.spec.name))
    try:
        config = read_config(name)
        twice = type(config).from_dict(config.to_dict() | {"num_experts": 2 * config.num_experts})
    except LingProbeError as error:
        return UsageError(f"the configuration of {name} is not at hand ({error})")
    sums = {each.num_experts: cost(each).total for each in (config, twice)}
    return pd.DataFrame([{"experts": n, "parameters": total.parameters, "flops": total.flops} for n, total in sums.items()])


def _print_claims(found: "list[Claim]", *, as_json: bool) -> None:
    rows = [claim.to_dict() for claim in found]
    if as_json:
        print_rows("claims", rows, as_json=True)
        return
    print_rows("What is claimed, and what this run says", [_row(row) for row in rows], as_json=False)
    for row in rows:
        out.print(f"\n{row['number']}. {row['statement']} {row['verdict'].capitalize()}.", style="bold", soft_wrap=True)
        out.print(clean(row["reason"]), soft_wrap=True)
        for part in row["parts"]:
            shown = "" if part["decides"] else " (shown, decides nothing)"
            out.print(f"  {part['verdict']:<14} {part['statement']}{shown} [{part['source']}]", soft_wrap=True)
        out.print(f"  would change it: {row['would_change']}", soft_wrap=True)
        out.print(f"  test it further: {row['command']}", soft_wrap=True)


def _row(row: dict[str, object]) -> dict[str, object]:
    effect, low, high = (told_number(row[name]) for name in ("effect", "ci_low", "ci_high"))
    return {
        "claim": f"{row['number']}. {row['statement']}",
        "verdict": row["verdict"],
        "effect": f"{effect} {row['unit']}" if effect else "",
        "95 % interval": f"{low} to {high}" if low and high else "",
        "q": told_number(row["q"]),
        "n": f"{row['n']:,} {row['n_of']}" if row["n"] else "",
        "rung": told_number(row["rung"]),
    }


def _text_of(run: "Run") -> str:
    facts = run.manifest.benchmark
    return " ".join(str(facts[key]) for key in ("name", "split") if facts.get(key)) or "unnamed text"
