"""Tables and figures of a run as one page that can be mailed, beside Markdown, CSV and JSON.

    report.html   everything on one page; works without a network
    report.md     the same words without the figures
    report.json   headline, findings and file names
    tables/       every table as CSV and JSON

The same run and seed give the same bytes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ling_probe import charts, stats
from ling_probe.analysis import ANALYSES, surest_first
from ling_probe.errors import UsageError
from ling_probe.run import Run

DEFAULT = tuple(ANALYSES)
"""Every analysis, in the order a reader meets them."""
TABLE_ROWS = 50_000
"""Longer tables are cut to their first rows to read; pairs of 256 experts in 19 layers are 620,160."""

LIMITS = (
    "The experts named first were picked by their effect on these same problems; on others it will tend to be smaller.",
    "A preference is not a cause. Whether the model needs an expert for a kind of step shows once it is excluded or silenced.",
    "Tokens that occur under one label alone cannot tell meaning from wording; they count as wording.",
    "Steps are found and labelled by rule. Another way to cut the text can give other labels and other effects.",
    "Steps that differ in their place in the solution or in their length may differ in routing for that reason.",
    "Intervals speak of other problems like these, not of other benchmarks or other models.",
    "Expert numbers mean nothing across layers: expert 3 of one layer and of the next are unrelated.",
    "Texts the model did not write itself (given solutions) are routed as read, which need not be as written.",
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question of the report and its answer."""

    name: str
    question: str
    method: str
    finding: str
    """One sentence computed from the table, or why there is none."""
    rows: int = 0
    """Rows of the table files."""
    total_rows: int = 0
    """Rows of the analysis; more than `rows` where the table was cut."""
    figures: tuple[go.Figure, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether the run can answer the question."""
        return self.total_rows > 0


def write_report(run: Run, folder: Path, *, analyses: Sequence[str] = DEFAULT) -> Path:
    """Write the report of a run into a folder, and return the path of its page.

    Files of an earlier report there are replaced. Questions the run cannot answer say why.

    Raises:
        UsageError: An analysis does not exist, the run holds no sequences, or the folder is a file.
    """
    if unknown := [name for name in analyses if name not in ANALYSES]:
        raise UsageError(f'no analysis "{unknown[0]}"; these there are: {", ".join(ANALYSES)}')
    if run.sequences.empty:
        raise UsageError(f"{run.folder} holds no sequences yet; there is nothing to report")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder for the report")
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    tables = dict(_answers(run, analyses))
    sections = [_section(run, name, answer) for name, answer in tables.items()]
    for name, answer in tables.items():
        _write_table(folder / "tables" / name, name, answer)
    _write_pages(run, folder, headline(run, tables), sections)
    return folder / "report.html"


def headline(run: Run, tables: Mapping[str, pd.DataFrame | str]) -> dict[str, Any]:
    """What a reader wants to know first, as plain values: what ran, how well it did, and the most specialised experts.

    `specialised` holds at most three distinct experts whose corrected p is below 0.05, the surest effect first: the interval's
    end nearest to 0 decides. `specialised_note` says what they are, or why there are none.

    Args:
        run: The run.
        tables: Tables by analysis name; `label_specialisation` is read. A text says why there is no table.
    """
    manifest = run.manifest
    experts, note = _most_specialised(tables.get("label_specialisation", "label_specialisation was not asked for"))
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


def _answers(run: Run, analyses: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame | str]]:
    """Each analysis with its table, or why this run cannot answer it."""
    for name in analyses:
        try:
            yield name, ANALYSES[name].function(run)
        except UsageError as error:
            yield name, str(error)


def _section(run: Run, name: str, answer: pd.DataFrame | str) -> Section:
    question, method = ANALYSES[name].question, ANALYSES[name].method
    if isinstance(answer, str):
        return Section(name=name, question=question, method=method, finding=f"Not applicable: {answer}.")
    finding, figures = _FINDINGS[name](answer), tuple(_FIGURES[name](run, answer))
    rows = min(len(answer), TABLE_ROWS)
    return Section(
        name=name, question=question, method=method, finding=finding, rows=rows, total_rows=len(answer), figures=figures
    )


def _most_specialised(table: pd.DataFrame | str) -> tuple[list[dict[str, Any]], str]:
    if isinstance(table, str):
        return [], f"Not applicable: {table}."
    found = surest_first(table[(table["q"] < 0.05) & (table["ci_low"] > 0)])
    if found.empty:
        return [], f"No expert's preference for a step label is significant (q below 0.05, {table['p'].count():,} tests)."
    columns = ["layer", "expert", "label", "log2_ratio", "ci_low", "ci_high", "raw_log2_ratio", "q"]
    best = found.drop_duplicates(["layer", "expert"]).head(3)
    tested = f"{len(found):,} of {table['p'].count():,} tested (layer, expert, label) cells"
    return _records(best[columns]), f"{tested} are preferences beyond chance (q below 0.05)."


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


def _specialisation_finding(table: pd.DataFrame) -> str:
    kind = "label" if "label" in table.columns else "family"
    place, others = ("steps", "other steps of the same family") if kind == "label" else ("problems", "other families")
    found = table[table["q"] < 0.05]
    tested = f"{len(found):,} of {table['p'].count():,} (layer, expert, {kind}) cells differ from chance (q below 0.05)"
    if found.empty:
        return f"{tested}: this run shows no preference for a {kind} beyond its tokens that survives the correction."
    row = surest_first(found).iloc[0]
    return (
        f"{tested}; the surest is layer {row['layer']}, expert {row['expert']}, chosen {_fold(row['log2_ratio'])} times as "
        f"often in {row[kind]} {place} as the same tokens choose it in {others} (95 % interval {_interval(row)})."
    )


def _load_finding(table: pd.DataFrame) -> str:
    most, least = table.iloc[int(np.argmax(table["load"]))], table.iloc[int(np.argmin(table["load"]))]
    return (
        f"Layer {most['layer']:.0f}, expert {most['expert']:.0f} does the most, {_fold(most['log2_ratio'])} times the even "
        f"share ({_percent(most['load'])} of its layer's choices, 95 % interval {_percent(most['ci_low'])} to "
        f"{_percent(most['ci_high'])}); "
        f"layer {least['layer']:.0f}, expert {least['expert']:.0f} the least, {_fold(least['log2_ratio'])} times."
    )


def _balance_finding(table: pd.DataFrame) -> str:
    most, least = table.iloc[int(np.argmax(table["gini"]))], table.iloc[int(np.argmin(table["gini"]))]
    return (
        f"Layer {most['layer']:.0f} is the least even (Gini {most['gini']:.3f}) and layer {least['layer']:.0f} the most "
        f"({least['gini']:.3f}); a router without preference would show {most['gini_floor']:.3f}. "
        f"Over all layers {table['dead'].sum()} experts are dead and {table['rare'].sum()} rare."
    )


def _coactivation_finding(table: pd.DataFrame) -> str:
    found = table[table["q"] < 0.05]
    more = int((found["lift"] > 0).sum())
    tested = (
        f"Of {table['p'].count():,} tested pairs {more:,} are chosen together more often than groups and loads "
        f"explain, and {len(found) - more:,} less often (q below 0.05)"
    )
    if found.empty:
        return f"{tested}."
    row = surest_first(found).iloc[0]
    return (
        f"{tested}; the surest are experts {row['expert']} and {row['other']} of layer {row['layer']}, "
        f"{_fold(row['lift'])} times as often as expected (95 % interval {_interval(row)})."
    )


def _cluster_finding(table: pd.DataFrame) -> str:
    row = table.iloc[0]
    trusted = row["mean_silhouette"] > row["silhouette_floor"] and row["stability"] >= 0.5
    verdict = "they may be read as kinds" if trusted else "so they should not be read as kinds of expert"
    return (
        f"{row['n_clusters']:.0f} clusters fit best: mean silhouette {row['mean_silhouette']:.2f} against "
        f"{row['silhouette_floor']:.2f} for shuffled classes, stability {row['stability']:.2f} (1 is the same clusters "
        f"whenever problems are drawn anew); {verdict}."
    )


def _fold(log2: float) -> str:
    """A log2 ratio as a factor."""
    return f"{2.0**log2:.2f}"


def _interval(row: pd.Series) -> str:
    return f"{_fold(row['ci_low'])} to {_fold(row['ci_high'])}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _markdown(text: str) -> str:
    """Text that Markdown shows letter by letter, on one line of a table."""
    safe = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|" else letter for letter in safe)


_FINDINGS: dict[str, Callable[[pd.DataFrame], str]] = {
    "label_specialisation": _specialisation_finding,
    "family_specialisation": _specialisation_finding,
    "expert_load": _load_finding,
    "load_balance": _balance_finding,
    "coactivation": _coactivation_finding,
    "expert_clusters": _cluster_finding,
}

_FIGURES: dict[str, Callable[[Run, pd.DataFrame], Sequence[go.Figure]]] = {
    "label_specialisation": lambda _, table: [charts.specialisation_bars(table), charts.specialisation_volcano(table)],
    "family_specialisation": lambda _, table: [charts.specialisation_bars(table), charts.specialisation_volcano(table)],
    "expert_load": lambda run, table: [charts.load_heatmap(table, group_size=run.spec.group_size)],
    "load_balance": lambda _, table: [charts.balance_lines(table)],
    "coactivation": lambda _, table: [charts.coactivation_heatmap(table, layer=int(surest_first(table)["layer"].iloc[0]))],
    "expert_clusters": lambda _, table: [charts.cluster_map(table)],
}


def _write_table(path: Path, name: str, answer: pd.DataFrame | str) -> None:
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
        "sections": sections,
        "limits": LIMITS,
        "manifest": json.dumps(run.manifest.to_dict(), indent=2, ensure_ascii=False),
    }
    pages = Environment(loader=PackageLoader("ling_probe"), autoescape=_is_html, trim_blocks=True, lstrip_blocks=True)
    pages.filters["fold"] = _fold
    pages.filters["markdown"] = _markdown
    pages.filters["figures"] = _figures_html
    pages.globals["plotly_js"] = Markup(get_plotlyjs())
    for name in ("report.html", "report.md"):
        (folder / name).write_text(pages.get_template(f"{name}.j2").render(values), encoding="utf-8")
    answers = [{key: value for key, value in vars(each).items() if key != "figures"} for each in sections]
    text = json.dumps({"headline": first, "sections": answers, "limits": LIMITS}, indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")


def _is_html(template: str | None) -> bool:
    return template is None or ".html" in template


def _figures_html(section: Section) -> list[Markup]:
    """Figures of a section without their titles: the page says the question already."""
    found = []
    for number, figure in enumerate(section.figures):
        plain = go.Figure(figure).update_layout(title_text="", margin_t=30)
        page = pio.to_html(
            plain, full_html=False, include_plotlyjs=False, div_id=f"{section.name}-{number}", config=charts.EXPORT_CONFIG
        )
        found.append(Markup(page))
    return found
