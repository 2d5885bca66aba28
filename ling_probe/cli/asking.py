"""Commands that ask about a run."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ling_probe.cli.app import app
from ling_probe.cli.opening import check_explorable, check_printable, table_kinds
from ling_probe.cli.options import WORKERS, Against, DepthName, Fresh, Json, Pdf, RunFolder, Tables, Workers
from ling_probe.cli.showing import clean, out, print_comparison, print_frame, print_index, print_page, print_rows
from ling_probe.errors import UsageError

if TYPE_CHECKING:
    pass


@app.command()
def analyze(
    folder: Annotated[Path | None, typer.Argument(help="A run folder.", metavar="RUN", show_default=False)] = None,
    names: Annotated[list[str] | None, typer.Argument(help="Analyses by name, or all.", metavar="NAME...")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the analyses and the questions they answer.")] = False,
    against: Against = None,
    workers: Workers = WORKERS,
    fresh: Fresh = False,
    rows: Annotated[int, typer.Option(help="Rows of each printed table.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Answer questions about a run; several end in an index of what was found. Tables are kept in RUN/analysis."""
    from ling_probe.analysis import ANALYSES, SINGLE, finding, findings_index, kept_answers

    if show_list:
        print_rows("analyses", [{"name": name, "question": each.question} for name, each in ANALYSES.items()], as_json=as_json)
        return
    if folder is None or not names:
        raise UsageError("name a run and an analysis: ling-probe analyze RUN NAME (--list shows them, all runs every one)")
    from ling_probe.run import Run

    if unknown := [name for name in names if name != "all" and name not in ANALYSES]:
        raise UsageError(f'no analysis "{unknown[0]}"; these there are: {", ".join(ANALYSES)}, or all')
    others = [Run.open(each) for each in against or ()]
    every = tuple(ANALYSES) if others else SINGLE
    findings = {}
    asked = every if "all" in names else names
    for name, answer in kept_answers(Run.open(folder), asked, against=others, workers=workers, fresh=fresh):
        if isinstance(answer, UsageError) and "all" not in names:
            raise answer
        if not isinstance(answer, UsageError):
            table = ANALYSES[name].order(answer)
            print_frame(ANALYSES[name].question, table.assign(analysis=name) if as_json else table, as_json=as_json, rows=rows)
        findings[name] = finding(name, answer)
    if len(findings) > 1:
        print_index(findings_index(findings), as_json=as_json)


@app.command()
def trace(
    folder: RunFolder,
    sequence: Annotated[str, typer.Argument(help="A sequence's id, or its number from 0.", metavar="SEQUENCE")],
    as_json: Json = False,
) -> None:
    """Tell one problem's reasoning: each step, its most selective experts, and what they add to the answer."""
    from ling_probe.analysis import answer_once
    from ling_probe.run import Run
    from ling_probe.step_view import answer_attribution, attribution_by_layer, sequence_number, step_table

    run = Run.open(folder)
    number = sequence_number(run, sequence)
    with Console(stderr=True).status("finding what each step prefers"):
        specialisation = answer_once(run, "label_specialisation")
        if isinstance(specialisation, UsageError):
            raise specialisation
        steps = step_table(run, number, specialisation)
    problem = run.sequences.iloc[number]
    if not as_json:
        out.print(f"{clean(problem['sequence_id'])}  {clean(problem['prompt'].strip())}", soft_wrap=True)
    steps["experts"] = [rows if as_json else _told_experts(rows) for rows in steps["experts"]]
    print_frame("Steps", steps.assign(table="steps") if as_json else steps, as_json=as_json)
    try:
        added = answer_attribution(run, number)
        shown = added.assign(table="attribution") if as_json else attribution_by_layer(added)
        print_frame("Added directly to the logits of the tokens written, by layer", shown, as_json=as_json)
    except UsageError as error:
        Console(stderr=True).print(f"no attribution: {error}", soft_wrap=True)
    if not as_json:
        verdict = {True: "right", False: "wrong"}.get(problem["correct"], "not judged")
        told = f"answer  {problem['predicted']} ({verdict}; expected {problem['answer']})"
        out.print(clean(told), soft_wrap=True)


def _told_experts(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{row['layer']}.{row['expert']} {2 ** row['log2_ratio']:.1f}× ({row['times']})" for row in rows) or "none"


@app.command()
def report(
    folder: Annotated[Path | None, typer.Argument(help="A run folder.", metavar="RUN", show_default=False)] = None,
    into: Annotated[Path | None, typer.Option("--out", help="Folder of the report; the run's own if left out.")] = None,
    depth: Annotated[
        DepthName, typer.Option(help="summary: one page; full: every question; expert: that, expert by expert.")
    ] = (DepthName.full),
    only: Annotated[list[str] | None, typer.Option(help="Analyses by name; all of the depth if left out.")] = None,
    experts: Annotated[
        list[str] | None, typer.Option(help="An expert to tell of too, such as 4.20; repeatable.", metavar="LAYER.EXPERT")
    ] = None,
    against: Against = None,
    tables: Tables = None,
    pdf: Pdf = False,
    workers: Workers = WORKERS,
    fresh: Fresh = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of report.json, and do nothing else.")
    ] = False,
) -> None:
    """Write the report of a run: one offline page, Markdown, JSON and every table."""
    from ling_probe.report import REPORT_SCHEMA, Depth, write_report
    from ling_probe.run import Run

    if schema:
        sys.stdout.write(json.dumps(REPORT_SCHEMA, indent=2, ensure_ascii=False) + "\n")
        return
    if folder is None:
        raise UsageError("name a run to report: ling-probe report RUN (--schema prints what report.json holds)")
    check_printable(pdf)
    run, others = Run.open(folder), [Run.open(each) for each in against or ()]
    with out.status("analysing"):
        page = write_report(
            run, into or folder, analyses=tuple(only) if only else None, against=others, depth=Depth(depth.value),
            experts=experts or (), kinds=table_kinds(tables), workers=workers, fresh=fresh,
        )  # fmt: skip
    print_page(page, pdf=pdf)


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders; the first is compared with each other one.", metavar="RUN...")
    ],
    into: Annotated[Path, typer.Option("--out", help="Folder of the comparison.", show_default=False)],
    tables: Tables = None,
    pdf: Pdf = False,
    workers: Workers = WORKERS,
    as_json: Json = False,
) -> None:
    """Compare runs: answers to the same problems, choices for the same tokens, and loads."""
    from ling_probe.report import write_comparison
    from ling_probe.run import Run

    if len(folders) < 2:
        raise UsageError("name two runs or more: ling-probe compare RUN OTHER --out FOLDER")
    check_printable(pdf)
    runs = [Run.open(folder) for folder in folders]
    with Console(stderr=True).status("comparing"):
        page = write_comparison(runs, into, kinds=table_kinds(tables), workers=workers)
    told = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    if as_json:
        rows = [{"table": "index", **row} for row in told["index"]]
        print_rows(
            "", rows + [{"table": name, **row} for name, each in told["comparison"].items() for row in each], as_json=True
        )
        return
    print_comparison(told["comparison"])
    print_page(page, pdf=pdf)


@app.command()
def explore(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a folder of runs.", metavar="RUN")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port of the local page.", min=1, max=65535)] = 8501,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A checkpoint that the Lab may load beside the shipped ones, as for capture; repeatable."),
    ] = None,
) -> None:
    """Open the explorer on a run; it listens on this machine only, unless told otherwise.

    What a page needs and RUN/analysis does not keep is computed when it is first shown, and kept there; ling-probe analyze RUN
    all computes everything before.
    """
    import subprocess

    from ling_probe.shipping import app_path

    check_explorable(folder)
    command = [sys.executable, "-m", "streamlit", "run", str(app_path("explorer.py"))]
    command += ["--server.address", host, "--server.port", str(port), "--server.headless", str(not browser).lower()]
    command += ["--browser.gatherUsageStats", "false", "--", str(folder), *(model or ())]
    out.print(f"explorer  http://{host}:{port}", soft_wrap=True)
    try:
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
