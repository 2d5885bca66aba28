"""How loss, load and router bias of a checkpoint went through its training.

    python analyses/training.py CHECKPOINT [--rows N] [--figure FILE.html] [--json]

Reads the train.jsonl that `ling-probe train` leaves in the folder; the shipped model's is ling_probe/checkpoints/ling-tiny. A
row is the mean over the steps since the row before: losses in nats a token, over the whole text and over the solution alone;
for each routed layer, in order, the MaxVio of its load, its dead experts and the range of its bias.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from ling_probe.charts import EXPORT_CONFIG, training_curves


def show(log: pd.DataFrame, rows: int) -> None:
    every = max(1, len(log) // rows)
    shown = Table(title="How did loss, balance and router bias go through training?", caption=f"1 of {every} rows")
    for column in log.columns:
        shown.add_column(str(column), justify="right")
    for row in log.iloc[every - 1 :: every].itertuples(index=False):
        shown.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    Console(markup=False, width=None if sys.stdout.isatty() else 220).print(shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=20, help="about so many rows of the printed table (default 20)")
    parser.add_argument("--figure", type=Path, help="write the curves to this HTML file")
    parser.add_argument("--json", action="store_true", help="every row, one JSON object a line")
    asked = parser.parse_args()
    file = asked.checkpoint / "train.jsonl"
    if not file.is_file():
        sys.stderr.write(f"no train.jsonl in {asked.checkpoint}; name a folder that ling-probe train made\n")
        sys.exit(2)
    text = file.read_text(encoding="utf-8")
    log = pd.DataFrame([json.loads(line) for line in text.splitlines()])
    if asked.figure:
        training_curves(log).write_html(asked.figure, config=EXPORT_CONFIG)
    if asked.json:
        sys.stdout.write(text)
    else:
        show(log, asked.rows)
