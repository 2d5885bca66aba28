"""Tables and figures of a run as one page that can be mailed, beside Markdown, CSV and JSON.

    report.html   everything on one page; works without a network
    report.md     the same words without the figures
    report.json   headline, findings and file names
    tables/       every table as CSV and JSON

The same run and seed give the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ling_probe import charts, stats
from ling_probe.analysis import (
    ANALYSES,
    SINGLE,
    Analysis,
    Finding,
    finding,
    findings_index,
    held_out,
    kept_answers,
    surest_first,
    surest_picked,
)
from ling_probe.analysis.question import fold
from ling_probe.errors import UsageError
from ling_probe.run import Run

TABLE_ROWS = 50_000
"""Longer tables are cut to their first rows to read; pairs of 256 experts in 19 layers are 620,160."""

LIMITS = (
    "The experts named first were picked on one half of the problems and measured on the other; other effects in the tables "
    "were picked and measured on the same problems, and will tend to be smaller on new ones.",
    "A preference is not a cause. Whether the model needs an expert for a kind of step shows once it is excluded or silenced.",
    "Tokens that occur under one label alone cannot tell meaning from wording; they count as wording.",
    "Steps are found and labelled by rule. Another way to cut the text can give other labels and other effects.",
    "Steps are compared in the same third of a solution; inside it place and length may still differ, and routing with them.",
    "Intervals speak of other problems like these, not of other benchmarks or other models.",
    "Expert numbers mean nothing across layers: expert 3 of one layer and of the next are unrelated.",
    "Texts the model did not write itself (given solutions) are routed as read, which need not be as written.",
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question of the report and its answer."""

    analysis: Analysis
    finding: Finding
    """Computed from the table, or why there is none."""
    rows: int = 0
    """Rows of the table files."""
    total_rows: int = 0
    """Rows of the analysis; more than `rows` where the table was cut."""
    figures: tuple[go.Figure, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether the run can answer the question."""
        return self.total_rows > 0


def write_report(
    run: Run,
    folder: Path,
    *,
    analyses: Sequence[str] | None = None,
    against: Sequence[Run] = (),
    workers: int = 1,
    fresh: bool = False,
) -> Path:
    """Write the report of a run into a folder, and return the path of its page.

    Files of an earlier report there are replaced. Questions the run cannot answer say why. Answers that the run's folder keeps
    are read, and the others kept there.

    Args:
        run: What to report.
        folder: Where to.
        analyses: By name; all that can be asked of so many runs if left out.
        against: Runs to compare it with.
        workers: Processes that share the analyses; the files are the same however many.
        fresh: Compute everything anew.

    Raises:
        UsageError: An analysis does not exist, the run holds no sequences, or the folder is a file.
    """
    if run.sequences.empty:
        raise UsageError(f"{run.folder} holds no sequences yet; there is nothing to report")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder for the report")
    every = tuple(ANALYSES) if against else SINGLE
    asked = every if analyses is None else analyses
    tables = dict(kept_answers(run, asked, against=against, workers=workers, fresh=fresh))
    sections = [_section(run, name, answer) for name, answer in tables.items()]
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for name, answer in tables.items():
        _write_table(folder / "tables" / name, name, answer)
    _write_pages(run, folder, headline(run, tables), sections)
    return folder / "report.html"


def headline(run: Run, tables: Mapping[str, pd.DataFrame | UsageError]) -> dict[str, Any]:
    """What a reader wants to know first, as plain values: what ran, how well it did, and the most specialised experts.

    `specialised` holds at most three distinct experts picked on one half of the problems (q below 0.05 there, the surest
    preference first: the interval's end nearest to 0 decides), with effect, interval and q on the other half. Where no half
    is enough to pick by, they are picked and measured on all problems. `specialised_note` says which, or why there are none.

    Args:
        run: The run.
        tables: Tables by analysis name; `label_specialisation` is read. A refusal says why there is no table.
    """
    manifest = run.manifest
    experts, note = _most_specialised(tables.get("label_specialisation", UsageError("label_specialisation was not asked for")))
    return {
        "model": str(manifest.model.get("name", run.spec.name)),
        "benchmark": " ".join(str(manifest.benchmark[key]) for key in ("name", "split") if manifest.benchmark.get(key)),
        "state": manifest.state,
        "sequences": len(run.sequences),
        "tokens": sum(part.tokens for part in manifest.parts),
        "steps": sum(part.steps for part in manifest.parts),
        "interventions": [each.to_dict() for each in manifest.interventions],
        "accuracy": _accuracy(run.sequences),
        "verification": dict(manifest.model.get("verification") or {}),
        "specialised": experts,
        "specialised_note": note,
    }


def _section(run: Run, name: str, answer: pd.DataFrame | UsageError) -> Section:
    analysis, found = ANALYSES[name], finding(name, answer)
    if isinstance(answer, UsageError):
        return Section(analysis=analysis, finding=found)
    figures = tuple(charts.FIGURES[name](answer, run.spec))
    return Section(analysis=analysis, finding=found, rows=min(len(answer), TABLE_ROWS), total_rows=len(answer), figures=figures)


def _most_specialised(table: pd.DataFrame | UsageError) -> tuple[list[dict[str, Any]], str]:
    if isinstance(table, UsageError):
        return [], f"Not applicable: {table}."
    liked = table[(table["q"] < 0.05) & (table["ci_low"] > 0)]
    if liked.empty:
        return [], f"No expert's preference for a step label is significant (q below 0.05, {table['p'].count():,} tests)."
    picked = surest_picked(table)
    picked = picked[(picked["picked_low"] > 0) & picked["held_out_q"].notna()]
    experts = (surest_first(liked) if picked.empty else held_out(picked)).drop_duplicates(["layer", "expert"]).head(3)
    columns = ["layer", "expert", "label", "log2_ratio", "ci_low", "ci_high", "raw_log2_ratio", "q", "replicated"]
    note = f"{len(liked):,} of {table['p'].count():,} tested (layer, expert, label) cells are preferences beyond chance"
    if picked.empty:
        how = "Half of the problems are too few to pick by: these are picked and measured on the same, and will tend to shrink."
    else:
        how = (
            f"{len(picked):,} were picked on a random half of the problems, and {int(picked['replicated'].sum()):,} of them "
            "hold on the other; the first are told with their effects there."
        )
    return _records(experts[columns]), f"{note} (q below 0.05). {how}"


def _accuracy(sequences: pd.DataFrame) -> list[dict[str, Any]]:
    """Share of correct answers with its Wilson interval by family, and over all where there are several."""
    judged = sequences[sequences["correct"].notna()]
    groups = [(str(family), rows) for family, rows in judged.groupby("family")]
    if len(groups) > 1:
        groups.append(("all", judged))
    return [_proportion(family, int(rows["correct"].sum()), len(rows)) for family, rows in groups]


def _proportion(family: str, correct: int, judged: int) -> dict[str, Any]:
    low, high = stats.wilson_interval(correct, judged)
    return {"family": family, "correct": correct, "judged": judged, "share": correct / judged, "ci_low": low, "ci_high": high}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values; what is not finite becomes null."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def _number(value: float | None) -> str:
    """Three digits; nothing for what is not there, and no more than a bound for what is next to nothing."""
    if value is None:
        return ""
    return "< 1e-12" if 0 < value < 1e-12 else f"{value:.3g}"


def _markdown(text: str) -> str:
    """Text that Markdown shows letter by letter, on one line of a table."""
    safe = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|" else letter for letter in safe)


def _write_table(path: Path, name: str, answer: pd.DataFrame | UsageError) -> None:
    """Both files of a table, in its own order; a longer one keeps the rows to read first."""
    for old in (path.with_suffix(".csv"), path.with_suffix(".json")):
        old.unlink(missing_ok=True)
    if isinstance(answer, pd.DataFrame):
        kept = answer if len(answer) <= TABLE_ROWS else ANALYSES[name].order(answer).head(TABLE_ROWS)
        kept.to_csv(path.with_suffix(".csv"), index=False)
        kept.to_json(path.with_suffix(".json"), orient="records", double_precision=15)


def _write_pages(run: Run, folder: Path, first: dict[str, Any], sections: Sequence[Section]) -> None:
    values = {
        "headline": first,
        "index": _records(findings_index({each.analysis.name: each.finding for each in sections})),
        "sections": sections,
        "limits": LIMITS,
        "manifest": json.dumps(run.manifest.to_dict(), indent=2, ensure_ascii=False),
    }
    pages = Environment(loader=PackageLoader("ling_probe"), autoescape=_is_html, trim_blocks=True, lstrip_blocks=True)
    pages.filters["fold"] = fold
    pages.filters["number"] = _number
    pages.filters["markdown"] = _markdown
    pages.filters["figures"] = _figures_html
    pages.globals["plotly_js"] = Markup(get_plotlyjs())
    for name in ("report.html", "report.md"):
        (folder / name).write_text(pages.get_template(f"{name}.j2").render(values), encoding="utf-8")
    told = [
        {name: getattr(each.analysis, name) for name in ("name", "question", "method")}
        | {"finding": each.finding.sentence, "rows": each.rows, "total_rows": each.total_rows}
        for each in sections
    ]
    written = {"headline": first, "index": values["index"], "sections": told, "limits": LIMITS}
    text = json.dumps(written, indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")


def _is_html(template: str | None) -> bool:
    return template is None or ".html" in template


def _figures_html(section: Section) -> list[Markup]:
    """Figures of a section without their titles: the page says the question already."""
    found = []
    for number, figure in enumerate(section.figures):
        plain = go.Figure(figure).update_layout(title_text="", margin_t=30)
        page = pio.to_html(
            plain,
            full_html=False,
            include_plotlyjs=False,
            div_id=f"{section.analysis.name}-{number}",
            config=charts.EXPORT_CONFIG,
        )
        found.append(Markup(page))
    return found
