"""From a run, or several, to the files of a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ling_probe.analysis import ANALYSES, findings_index, kept_answers
from ling_probe.analysis.comparable import require_comparable
from ling_probe.claims import claims
from ling_probe.errors import UsageError
from ling_probe.report.comparison import told_comparison
from ling_probe.report.example import told_example
from ling_probe.report.experts import chosen_experts, named_experts, told_experts
from ling_probe.report.headline import headline
from ling_probe.report.pages import BETWEEN, LIMITS, write_pages
from ling_probe.report.sections import COMPARING, Depth, Section, asked, sections_of
from ling_probe.report.tables import DEFAULT_KINDS, TableKind, write_table
from ling_probe.run import Run
from ling_probe.shown import records

SCHEMA = 1
"""Version of report.json."""
Tables = Mapping[str, pd.DataFrame | UsageError]


def write_report(
    run: Run,
    folder: Path,
    *,
    analyses: Sequence[str] | None = None,
    against: Sequence[Run] = (),
    depth: Depth = Depth.full,
    experts: Sequence[str] = (),
    kinds: Sequence[TableKind] = DEFAULT_KINDS,
    workers: int = 1,
    fresh: bool = False,
) -> Path:
    """Write the report of a run into a folder, and return the path of its page.

    Files of an earlier report there are replaced. Questions the run cannot answer say why. Answers that the run's folder keeps
    are read, and the others kept there.

    Args:
        run: What to report.
        folder: Where to.
        analyses: By name; all that the depth needs of so many runs if left out.
        against: Runs to compare it with.
        depth: How much to tell.
        experts: Such as 4.20, to be told of beside those a report of depth expert picks itself.
        kinds: Files of each table.
        workers: Processes that share the analyses; the files are the same however many.
        fresh: Compute everything anew.

    Raises:
        UsageError: An analysis or expert does not exist, the run holds no sequences, or the folder is a file.
    """
    _check(folder, [run])
    if experts and depth is not Depth.expert:
        raise UsageError(f"experts are told of in a report of depth expert, and this one is of depth {depth}")
    named = named_experts(experts, run.spec)
    names = asked(depth, comparing=bool(against)) if analyses is None else analyses
    tables = dict(kept_answers(run, names, against=against, workers=workers, fresh=fresh))
    sections = sections_of(run.spec, tables, depth)
    first = headline(run, tables)
    # Named analyses are answered alone: what claims rest on was not asked.
    front = [each.to_dict() for each in claims(run, tables)] if analyses is None else []
    told = _told(sections) | {"kind": "run", "depth": depth.value, "headline": first, "claims": front}
    if depth is not Depth.summary:
        label = next((row["label"] for row in first["specialised"]), None)
        told["example"] = told_example(run, tables.get("label_specialisation"), label)
    if depth is Depth.expert:
        told["experts"] = told_experts(run, tables, chosen_experts(run.spec, tables, named))
    return _write([run], folder, told, sections, tables, kinds)


def write_comparison(
    runs: Sequence[Run], folder: Path, *, kinds: Sequence[TableKind] = DEFAULT_KINDS, workers: int = 1
) -> Path:
    """Write how runs differ into a folder, and return the path of the page.

    Args:
        runs: The one asked about, then those it is compared with.
        folder: Where to.
        kinds: Files of each table.
        workers: Processes that share the analyses.

    Raises:
        UsageError: The runs cannot be compared, or the folder is a file.
    """
    _check(folder, runs)
    require_comparable(runs)
    tables = dict(kept_answers(runs[0], COMPARING, against=runs[1:], workers=workers))
    if all(isinstance(answer, UsageError) for answer in tables.values()):
        raise next(answer for answer in tables.values() if isinstance(answer, UsageError))
    sections = sections_of(runs[0].spec, tables, Depth.full)
    told = _told(sections) | {"kind": "comparison", "depth": "full", "comparison": told_comparison(runs, tables)}
    told["limits"] = list(BETWEEN)
    return _write(runs, folder, told, sections, tables, kinds)


def _check(folder: Path, runs: Sequence[Run]) -> None:
    for run in runs:
        if run.sequences.empty:
            raise UsageError(f"{run.folder} holds no sequences yet; there is nothing to report")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder for the report")


def _told(sections: Sequence[Section]) -> dict[str, Any]:
    """What every report says, as report.json holds it."""
    return {
        "schema": SCHEMA,
        "headline": None,
        "claims": [],
        "comparison": None,
        "index": records(findings_index({each.analysis.name: each.finding for each in sections})),
        "sections": [
            {name: getattr(each.analysis, name) for name in ("name", "question", "claim", "method")}
            | {"finding": each.finding.sentence, "rows": each.rows, "total_rows": each.total_rows}
            for each in sections
        ],
        "example": None,
        "experts": [],
        "limits": list(LIMITS),
    }


def _write(
    runs: Sequence[Run],
    folder: Path,
    told: dict[str, Any],
    sections: Sequence[Section],
    tables: Tables,
    kinds: Sequence[TableKind],
) -> Path:
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for old in set(ANALYSES) - set(tables):
        write_table(folder / "tables", old, UsageError("not asked for"), kinds)
    for name, answer in tables.items():
        write_table(folder / "tables", name, answer, kinds)
    (folder / "report.pdf").unlink(missing_ok=True)
    write_pages(folder, told | {"tables": [kind.value for kind in TableKind if kind in kinds]}, sections, runs)
    return folder / "report.html"
