"""How well steps that are found by rules agree with steps that a benchmark marks.

    python analyses/segmentation.py BENCHMARK... [--limit N] [--json]

A benchmark is what `ling-probe capture` takes. Many write a step a line, and then line ends alone give the steps away: compare
with the row whose layout is removed. F1 is of the boundaries, Pk and WindowDiff are errors (0 is best); beside each stands what
as many boundaries give at random. Kappa is of the operations that both sides name.
"""

import argparse
import sys

import pandas as pd
from rich.console import Console
from rich.table import Table

from ling_probe.benchmarks import read_benchmark
from ling_probe.errors import LingProbeError
from ling_probe.steps.agreement import segmenter_agreement

SHOWN = ("layout", "segmenter", "records", "steps", "found", "precision", "recall", "f1", "ci_low", "ci_high", "f1_random",
         "near_f1", "pk", "pk_random", "window_diff", "window_diff_random", "both_named", "kappa", "named")  # fmt: skip
"""Columns of the printed table; the JSON rows have all."""


def show(name: str, table: pd.DataFrame) -> None:
    shown = Table(title=f"Where do rules and {name} put the ends of steps?")
    for column in SHOWN:
        shown.add_column(column, justify="left" if table[column].dtype == "str" else "right")
    for row in table[list(SHOWN)].itertuples(index=False):
        shown.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    Console(markup=False, width=None if sys.stdout.isatty() else 220).print(shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", nargs="+", help="a shipped benchmark, or a file of records with marked steps")
    parser.add_argument("--limit", type=int, help="at most so many records of each")
    parser.add_argument("--json", action="store_true", help="every row, one JSON object a line")
    asked = parser.parse_args()
    try:
        for name in asked.benchmark:
            benchmark = read_benchmark(name, limit=asked.limit)
            table = segmenter_agreement(benchmark.records).assign(benchmark=benchmark.name)
            if asked.json:
                sys.stdout.write(table.to_json(orient="records", lines=True))
            else:
                show(benchmark.name, table)
    except LingProbeError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
