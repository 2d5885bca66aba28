"""How results are printed: tables, JSON lines, and text that cannot steer a terminal."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from ling_probe.benchmarks import Benchmark
    from ling_probe.model.load import LoadedLing
    from ling_probe.run import Run

out = Console(highlight=False, markup=False)


def print_read(problems: "Benchmark") -> None:
    """Say what was read and what was skipped."""
    what = f"{len(problems.records):,} records of {problems.name} as {problems.format}, {problems.skipped:,} skipped"
    out.print(f"read {clean(what)}", soft_wrap=True)
    for problem in problems.problems:
        out.print(f"  skipped {clean(problem)}", soft_wrap=True)
    if problems.skipped > len(problems.problems):
        out.print(f"  and {problems.skipped - len(problems.problems):,} more")


def print_verification(loaded: "LoadedLing") -> None:
    """Say how the model's routing was verified."""
    out.print(f"routing of {loaded.spec.name} re-derived by the rule: {loaded.verification}", soft_wrap=True)


def facts_of(run: "Run") -> dict[str, Any]:
    """What a run holds, by name."""
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


def print_run(run: "Run") -> None:
    """Print what a run holds."""
    for name, value in facts_of(run).items():
        out.print(f"{name:<16}{clean(str(value))}", soft_wrap=True)


def print_headline(first: dict[str, Any]) -> None:
    """Print what a report says first."""
    what = f"{clean(first['model'])} on {clean(first['benchmark'])}"
    out.print(f"\n{what}: {first['sequences']:,} problems, {first['tokens']:,} tokens", soft_wrap=True)
    for row in first["accuracy"]:
        out.print(
            f"  {clean(row['family']):<12}{row['correct']:>4} of {row['judged']} correct"
            f"  ({row['share']:.1%}, 95 % interval {row['ci_low']:.1%} to {row['ci_high']:.1%})",
            soft_wrap=True,
        )
    out.print(
        "most specialised experts (choices in steps of a kind, over those of the same words in other steps at the same place)",
        soft_wrap=True,
    )
    for row in first["specialised"]:
        low, high = 2 ** row["ci_low"], 2 ** row["ci_high"]
        out.print(
            f"  layer {row['layer']} expert {row['expert']:<4}{clean(row['label']):<14}x{2 ** row['log2_ratio']:.2f}"
            f"  (95 % interval {low:.2f} to {high:.2f}), corrected p {row['q']:.2g}",
            soft_wrap=True,
        )
    out.print(f"  {clean(first['specialised_note'])}", soft_wrap=True)


def print_page(page: "Path", *, pdf: bool) -> None:
    """Say where a report's page is, and print it on paper where asked."""
    out.print(str(page), soft_wrap=True)
    if pdf:
        from ling_probe.report import write_pdf

        with out.status("printing"):
            paper = write_pdf(page)
        out.print(str(paper), soft_wrap=True)


def print_comparison(told: dict[str, Any]) -> None:
    """Print answers to the same problems and agreement by layer."""
    answers = [
        {
            "against": row["against"],
            "family": row["family"] or "unnamed",
            "problems": row["problems"],
            "right": f"{row['share']:.1%}",
            "right there": f"{row['other_share']:.1%}",
            "difference": f"{100 * row['difference']:+.1f} points ({100 * row['ci_low']:+.1f} to {100 * row['ci_high']:+.1f})",
            "q": row["q"],
        }
        for row in told["answers"]
    ]
    alike = [
        {
            "against": row["against"],
            "layer": row["layer"],
            "experts in common": f"{row['agreement']:.1%} ({row['ci_low']:.1%} to {row['ci_high']:.1%})",
            "loads alone": f"{row['chance']:.1%}",
            "same token elsewhere": "" if row["token_agreement"] is None else f"{row['token_agreement']:.1%}",
            "choices that differ": f"{row['decisions_differ']:.1%}",
        }
        for row in told["agreement"]
    ]
    for title, rows in (("Answers to the same problems", answers), ("The same experts for the same tokens", alike)):
        if rows:
            print_rows(title, rows, as_json=False)


def print_frame(title: str, table: "pd.DataFrame", *, as_json: bool, rows: int | None = None) -> None:
    """Print a table, or its rows as JSON lines."""
    if as_json:
        sys.stdout.write(table.to_json(orient="records", lines=True))
        return
    shown = table if rows is None else table.head(rows)
    caption = f"{len(shown)} of {len(table)} rows" if len(shown) < len(table) else None
    print_rows(title, shown.to_dict("records"), as_json=False, caption=caption)


def print_index(index: "pd.DataFrame", *, as_json: bool) -> None:
    """Print what was asked and found."""
    if as_json:
        print_frame("", index.rename(columns={"analysis": "name"}).assign(analysis="index"), as_json=True)
        return
    told = Table(title="What was asked and found", title_justify="left", show_lines=True, expand=True)
    for name in ("question", "finding", "effect", "interval", "q", "token alone", "verdict", "rung"):
        told.add_column(name, ratio={"question": 2, "finding": 5}.get(name), max_width=None if name == "finding" else 30)
    for row in index.to_dict("records"):
        numbers = [told_number(row[name]) for name in ("effect", "ci_low", "ci_high", "q", "token_effect")]
        effect, low, high, q, token = numbers
        told.add_row(
            row["question"], clean(row["finding"]), f"{effect}\n{row['unit']}" if effect else "",
            f"{low} to {high}" if low else "", q, token, row["verdict"], told_number(row["rung"]),
        )  # fmt: skip
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(told)


def told_number(value: Any) -> str:
    """Three digits; nothing for what is not there, and no more than a bound for what is next to nothing."""
    import pandas as pd

    if pd.isna(value):
        return ""
    return "< 1e-12" if 0 < value < 1e-12 else f"{value:.3g}"


def print_rows(title: str, rows: Sequence[dict[Any, Any]], *, as_json: bool, caption: str | None = None) -> None:
    """Print rows as a table or as JSON lines."""
    if as_json:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
        return
    table = Table(title=title, caption=caption, title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(str(column), justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else clean(str(value)) for value in row.values()))
    # A pipe has no width of its own: print every column whole rather than cut at 80.
    wide = out.measure(table, options=out.options.update(max_width=2000)).maximum
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else wide).print(table)


def clean(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
