"""What the scripts in `analyses/` share: a run on the command line (a comparison takes more), one table on standard output."""

import argparse
import sys
from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table

from ling_probe.analysis.registry import ANALYSES
from ling_probe.errors import LingProbeError
from ling_probe.run import Run


def script_main(name: str, argv: Sequence[str] | None = None) -> int:
    """Answer one question about the run named on the command line, and those it is compared with; return the exit status.

    0 when answered, 2 with one line on standard error when the run cannot answer it. With --json every row is printed, one
    JSON object a line; otherwise a table of the first rows.
    """
    analysis = ANALYSES[name]
    parser = argparse.ArgumentParser(description=f"{analysis.question} {analysis.method}")
    parser.add_argument("run", metavar="RUN", help="run folder")
    if analysis.compares:
        parser.add_argument("--against", metavar="RUN", action="append", default=[], help="a run to compare with; repeatable")
    parser.add_argument("--json", action="store_true", help="print every row as one JSON object a line")
    parser.add_argument("--rows", type=int, default=20, help="rows of the printed table (default 20)")
    asked = parser.parse_args(argv)
    try:
        run = Run.open(asked.run)
        asked_of = [run, *map(Run.open, asked.against)] if analysis.compares else run
        table = analysis.order(analysis.function(asked_of))
    except LingProbeError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if asked.json:
        sys.stdout.write(table.to_json(orient="records", lines=True))
    else:
        _print_table(analysis.question, table, asked.rows)
    return 0


def _print_table(question: str, table: pd.DataFrame, rows: int) -> None:
    shown = Table(title=question, caption=f"{min(rows, len(table))} of {len(table)} rows")
    for column in table.columns:
        shown.add_column(str(column), justify="left" if table[column].dtype == "str" else "right")
    for row in table.head(rows).itertuples(index=False):
        shown.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    # A pipe has no width of its own: print every column whole rather than cut at 80.
    Console(markup=False, width=None if sys.stdout.isatty() else 200).print(shown)
